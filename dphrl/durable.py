"""Files that are whole or absent, on disk before they have their name, and checked when they are read.

What is written goes to a place aside, is handed to the disk (fsync), and gets its name by one rename. A kill or a loss
of power at any moment leaves the old or the new, never a part. A sealed folder also holds the size and the SHA-256 of
each of its files, so that a bit that flips later is seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SEAL = "checksums.json"
# Some files are large, and a disk serves several at once.
NUM_HASHING_THREADS = 4


# The disk has no room left or is broken: what the machine's keeper mends, as opposed to a path that is a mistake.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# Places aside: `.NAME.PROCESS.partial` and `.old` of this module, and two kinds that are the owner's alone.
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>[0-9]+)\.(?:partial|old)|\.(?:step_[0-9]+|export)\.partial")
# The longest names of files below a run's folder have fewer characters.
_ROOM_FOR_NAMES = 100


def write_obstacle(folder: Path) -> str:
    """Why no files can be made in `folder`, which need not exist yet, in the system's words; "" when nothing prevents
    it. Leaves nothing behind."""
    made: list[Path] = []
    try:
        for place in reversed([folder, *folder.parents]):
            if not os.path.isdir(place):
                if os.path.lexists(place):
                    return f"{place} is no folder"
                place.mkdir()
                made.append(place)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="." + "x" * _ROOM_FOR_NAMES) as file:
            file.write(bytes(2**12))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for place in reversed(made):
            with suppress(OSError):
                place.rmdir()
    return ""


def place_aside(path: Path) -> Path:
    """Where what is to become `path`, or is to go, is kept: this process's own place. An actor may live seconds longer
    than its killed driver and still write."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a place aside to write to; what is there at the end becomes `path`. After an error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = place_aside(path)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not tell where
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in UTF-8. A lone surrogate becomes \\udXXX, which JSON reads back as the same surrogate."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def whole_sealed_file(path: Path) -> Iterator[Path]:
    """`whole_file`, whose SHA-256 is kept beside it in `.NAME.sha256`, as `sha256sum --check` reads it."""
    with whole_file(path) as aside:
        yield aside
        # Before the file itself: a kill between the two leaves a file that counts as damaged, never one unchecked.
        write_whole(_seal_of(path), f"{file_digest(aside)}  {path.name}\n")


def file_damage(path: Path) -> str | None:
    """What is wrong with a file that `whole_sealed_file` wrote; None for one without a seal, of an older version."""
    try:
        told = _seal_of(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{_seal_of(path).name} cannot be read ({error.strerror})"
    try:
        is_whole = told == f"{file_digest(path)}  {path.name}\n".encode()
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if is_whole else f"{path.name} has another content than was written"


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def write_output(path: Path, content: str | bytes) -> None:
    """Write what the user asked for with -o. Only a regular file is replaced; a device or a pipe is written to."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(data)
        return
    with whole_file(path.resolve()) as aside:  # resolved: a link stays one
        aside.write_bytes(data)


def put_in_place(staging: Path, target: Path) -> None:
    """Make the folder `staging` the folder `target`; what was there moves aside in one rename before it is deleted."""
    sync_tree(staging)
    retired = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, retired)
    os.replace(staging, target)
    sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of a run left aside below `folder`, which this process owns; what is of another
    process that lives stays, and so does what only looks alike.

    Where a kill came between the two renames of `put_in_place`, the folder of before gets its name back.
    """
    for path in [*folder.rglob(".*.partial"), *folder.rglob(".*.old")]:
        if not (ours := _ASIDE.fullmatch(path.name)) or not os.path.lexists(path):  # gone with the folder around it
            continue
        name, process = ours["name"], ours["process"]
        # One with this process's number has ended: in a container, the first process has the same number each time.
        if process and int(process) != os.getpid() and Path(f"/proc/{process}").exists():
            continue
        if path.suffix == ".old" and not path.with_name(name).exists():
            os.replace(path, path.with_name(name))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when the disk has the file's content, or the folder's list of names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def seal(folder: Path, facts: Mapping[str, Any] = {}, *, known: Mapping[str, str] = {}) -> None:
    """Write size and SHA-256 of every file below `folder` to its `checksums.json`.

    facts: kept beside them. known: SHA-256 of files by their path in the folder, which are not read for it again.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    names = [path.relative_to(folder).as_posix() for path in found]
    with ThreadPoolExecutor(NUM_HASHING_THREADS) as pool:
        digests = pool.map(lambda name: known.get(name) or file_digest(folder / name), names)
        files = {
            name: {"bytes": path.stat().st_size, "sha256": digest}
            for name, path, digest in zip(names, found, digests, strict=True)
        }
    content = {"files": files, **facts}
    write_whole(folder / SEAL, json.dumps({**content, "sha256": _digest_of(content)}, indent=2) + "\n")


def read_seal(folder: Path) -> dict[str, Any]:
    """What `seal` wrote. Raises FileNotFoundError where there is no seal, and ValueError for a damaged one."""
    content = json.loads((folder / SEAL).read_bytes())
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest_of(content):
        raise ValueError(f"{SEAL} is not as it was written")
    return content


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, by its first bad file; None when every file is as it was sealed."""
    try:
        files = read_seal(folder)["files"]
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (ValueError, KeyError):
        return f"{SEAL} is not as it was written"
    except OSError as error:
        return f"{SEAL} cannot be read ({error.strerror})"
    for name, told in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (num_bytes := (folder / name).stat().st_size) != told["bytes"]:
            return f"{name} has {num_bytes} bytes, {told['bytes']} were written"
    with ThreadPoolExecutor(NUM_HASHING_THREADS) as pool:
        digests = {name: pool.submit(file_digest, folder / name) for name in files}
    for name, digest in digests.items():
        try:
            if digest.result() != files[name]["sha256"]:
                return f"{name} has another content than was written"
        except OSError as error:  # as a failing disk answers
            return f"{name} cannot be read ({error.strerror})"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
