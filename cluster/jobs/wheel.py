"""A wheel as Ray can give it to a job: without the packages that it requires, and named by its content.

Ray's nodes install a job's wheel with pip into an empty folder. pip would fetch everything that the wheel requires
into that folder, torch and vLLM too, and it would hide what the nodes have. And Ray knows a wheel by its file's name
alone: of two builds of one version, the second would never be sent.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from dphrl.config.loading import InputError

PROGRAM_FILE = "dphrl/own_code.py"
REQUIRES = b"Requires-Dist:"


def check_wheel(wheel: Path) -> None:
    """Raises InputError for what is not a wheel of dphrl."""
    make = "make one with `pip wheel --no-deps -w dist .`"
    if not (wheel.is_file() and wheel.suffix == ".whl" and len(wheel.stem.split("-")) in (5, 6)):
        raise InputError(f"--wheel {wheel}: no such wheel; {make}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"--wheel {wheel}: cannot be read ({error}); {make}") from None
    if PROGRAM_FILE not in names:
        raise InputError(f"--wheel {wheel}: holds no dphrl ({PROGRAM_FILE} is not in it); {make}")


def stand_alone(wheel: Path, folder: Path) -> Path:
    """Write the wheel to `folder` as Ray needs it: it requires nothing, and its build tag is its content's digest."""
    name, version, *_, python, abi, platform = wheel.stem.split("-")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]
    # A build tag begins with a digit.
    made = folder / f"{name}-{version}-0{digest}-{python}-{abi}-{platform}.whl"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/METADATA"):
                content = _without_requirements(content)
            elif entry.filename.endswith(".dist-info/RECORD"):
                content = _without_digests(content)
            target.writestr(entry, content)
    return made


def _without_requirements(metadata: bytes) -> bytes:
    """The fields' lines but those of requirements; the text that follows the first empty line stays."""
    fields, empty, text = metadata.partition(b"\n\n")
    return b"\n".join(line for line in fields.split(b"\n") if not line.startswith(REQUIRES)) + empty + text


def _without_digests(record: bytes) -> bytes:
    """METADATA is another now, and a file's digest and size may be left out."""
    lines = record.split(b"\n")
    return b"\n".join(line.split(b",")[0] + b",," if b".dist-info/METADATA," in line else line for line in lines)
