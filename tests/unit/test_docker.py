"""The images, as far as they can be tested without a container engine."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


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
        if line.startswith("COPY")
        for name in line.split()[1:-1]
        if not name.startswith("--")
    ]
    backend = path.name.removesuffix(".Dockerfile")
    assert {"dphrl", "actors", "cluster", "docker/setup.sh", f"docker/constraints-{backend}.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in sent), name


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_it_runs_as_somebody_and_is_set_up_by_the_script(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER 10001$", text, flags=re.MULTILINE)
    assert "docker/setup.sh" in text
    assert "HEALTHCHECK" in text
    # The slow layer comes before the code, which changes more often.
    assert text.index("docker/setup.sh\n") < text.index("COPY --chown=10001 dphrl dphrl")


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
