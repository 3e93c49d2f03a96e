"""How much the packages of the CUDA image weigh: writes docker/sizes-cuda.txt from docker/constraints-cuda.txt.

`make lock` runs it. It asks the package index through uv, and downloads no package. Sizes are those of the files that
are downloaded (1 MB = 10^6 bytes), which is about what the image's compressed layer has of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS, TABLE = ROOT / "docker/constraints-cuda.txt", ROOT / "docker/sizes-cuda.txt"
# The extras that docker/setup.sh installs into an image.
EXTRAS = ("cuda", "gguf", "lora")
# The Python and the machine of the image.
PYTHON, MACHINE = "3.12", "x86_64"
HEAD = """\
# MB of each package that docker/constraints-cuda.txt names, as it is downloaded; - for a tool of developers, which the
# image does without. docker/sizes.py writes this file (make lock).
"""


def pins() -> list[str]:
    return [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]


def resolve(requirements: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The packages that the requirements bring, by name, each as uv's lock file has it."""
    project = f"""
[project]
name = "sizes"
version = "0"
requires-python = ">=3.11"
dependencies = {json.dumps(list(requirements))}
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == '{MACHINE}' and python_version == '{PYTHON}'"]
constraint-dependencies = {json.dumps(pins())}
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(project)
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([str(uv), "lock", "--quiet", "--python", sys.executable], cwd=folder, check=True)
        lock = tomllib.loads(Path(folder, "uv.lock").read_text())
    return {package["name"]: package for package in lock["package"] if package["name"] != "sizes"}


def megabytes(package: dict[str, Any]) -> float:
    """The size of the wheel that the image would take, or of the source package where there is none that fits."""
    fitting = [file for file in package.get("wheels", []) if "url" in file and fits(file["url"])]
    chosen = max(fitting, key=lambda file: file["size"]) if fitting else package["sdist"]
    return chosen["size"] / 1e6


def fits(url: str) -> bool:
    """Whether a wheel is for the image's Python and machine."""
    python, abi, platforms = url.rsplit("/", 1)[-1].removesuffix(".whl").split("-")[-3:]
    if not any(each == "any" or ("manylinux" in each and each.endswith(MACHINE)) for each in platforms.split(".")):
        return False
    tag = f"cp{PYTHON.replace('.', '')}"
    older = [int(minor) for minor in re.findall(r"cp3(\d+)", python)]
    return tag in abi or "py3" in python or ("abi3" in abi and min(older) <= int(PYTHON.split(".")[1]))


def main() -> None:
    """Write the table and print its sum."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra]), "uv"]
    image = resolve(wanted)
    sizes = {pin: megabytes(image[name]) if (name := pin.split("==")[0]) in image else None for pin in pins()}
    lines = [f"{pin} {'-' if size is None else f'{size:.3g}'}\n" for pin, size in sizes.items()]
    TABLE.write_text(HEAD + "".join(lines))
    print(f"{TABLE}: {sum(filter(None, sizes.values())) / 1000:.1f} GB")


if __name__ == "__main__":
    main()
