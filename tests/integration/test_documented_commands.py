"""The commands of the documentation, run as they are written.

Each block runs top to bottom in an empty folder that holds the files of its page, with its own flags and settings. So
that all of them together take little time, commands that train, sample or evaluate are made small by settings behind
their own, and run in this process (`--inline`). `make demo` runs once as it is, with Ray and vLLM, but for two steps.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from tests.documentation import ROOT, Block, blocks_of, command_blocks, files_of

pytestmark = pytest.mark.integration

# Behind the documented settings, which are read and checked before.
SMALL = [
    "data.train.limit=24",
    "data.evaluation.0.limit=4",
    "data.evaluation.1.limit=4",
    "rollout.num_prompts=4",
    "rollout.num_samples=4",
    "reference.num_samples=4",
    "reference.threshold=1",
    "reference.stored_per_prompt=1",
    "reference.rows_per_step=4",
    "learner.num_steps=2",
    "learner.warmup_steps=0",
    "checkpoint.every_steps=1",
    "evaluation.num_samples=4",
    "evaluation.k=[1,4]",
]
# Commands that would start engines, and whether they take settings of a run.
STARTING = ("train", "sample", "eval", "experiment", "tune")
RUNNABLE = [block for block in command_blocks() if not block.needs]


def expanded(words: Sequence[str]) -> list[str]:
    """Patterns of file names as a shell replaces them."""
    found: list[str] = []
    for word in words:
        matches = sorted(str(path) for path in Path().glob(word)) if "*" in word and "=" not in word else []
        found += matches or [word]
    return found


def redirected(words: list[str]) -> tuple[list[str], Path | None]:
    """The words before `> FILE`, and FILE."""
    if ">" not in words:
        return words, None
    at = words.index(">")
    assert len(words) == at + 2, "one file, at the end"
    return words[:at], Path(words[-1])


def run_dphrl(arguments: Sequence[str], place: str) -> str:
    """Runs `dphrl ...` in this process; returns what it prints."""
    words = expanded(arguments)
    if words[0] in STARTING and "--show" not in words:
        inline = [] if "--inline" in words else ["--inline"]
        words = [*words, *SMALL, *inline]
    result = CliRunner().invoke(app, words)
    # What doctor finds missing on this machine is not the documentation's fault.
    allowed = (0, 1) if words[0] == "doctor" else (0,)
    assert result.exit_code in allowed, f"{place}: dphrl {' '.join(arguments)}\n{result.output}\n{result.stderr}"
    assert result.stdout or result.stderr, f"{place}: dphrl {' '.join(arguments)} says nothing"
    return result.stdout


def run_process(words: Sequence[str], place: str) -> str:
    """Runs `[NAME=VALUE ...] dphrl|python ...` in a process of its own; returns what it prints."""
    environment = dict(os.environ)
    words = list(words)
    while re.match(r"\w+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        # The package under test stays in reach.
        environment[name] = f"{value}{os.pathsep}{ROOT}" if name == "PYTHONPATH" else value
    programs = {"dphrl": [sys.executable, "-c", "from cluster.cli import main; main()"], "python": [sys.executable]}
    environment.setdefault("PYTHONPATH", str(ROOT))
    result = subprocess.run(
        [*programs[words[0]], *words[1:]], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, f"{place}: {' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of a model this small, threads that wait for each other take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.place)
def test_documented_commands_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files_of(block.page).items():
        (tmp_path / name).write_text(text)
    for words, target in map(redirected, block.commands):
        in_process = words[0] == "dphrl"
        printed = run_dphrl(words[1:], block.place) if in_process else run_process(words, block.place)
        if target is not None:
            assert printed, block.place
            target.write_text(printed)


def test_small_settings_are_read_last() -> None:
    # Otherwise a documented `learner.num_steps=40` would run forty steps here.
    words = ["train", "demo-math", "learner.num_steps=40", *SMALL]
    assert words.index("learner.num_steps=40") < words.index("learner.num_steps=2")


def make(target: str, arguments: Sequence[str], *options: str) -> str:
    """`make OPTIONS TARGET ARGS=...` in the environment of this test; the set-up itself is left out."""
    result = subprocess.run(
        # -o: the set-up counts as done, since the tests run in an environment that is there.
        ["make", *options, "-o", "setup", target, f"VENV={sys.prefix}", f"ARGS={shlex.join(arguments)}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def test_make_runs_what_the_readme_says(tmp_path: Path) -> None:
    shown = {tuple(words) for block in blocks_of(ROOT / "README.md") if block.needs for words in block.commands}
    assert {("make", "demo"), ("make", "test")} <= shown
    printed = make("demo", [*SMALL, f"run_dir={tmp_path}"])
    assert "engine and learner log-probs agree" in printed
    assert (tmp_path / "demo-math" / "checkpoints" / "step_2" / "hf" / "config.json").is_file()
    # What runs this test runs all of `make test`.
    sharing, one_by_one = make("test", ["-k", "test_row_weights"], "--dry-run").strip().splitlines()
    assert " tests/unit tests/golden tests/test_architecture.py tests/integration -m " in sharing
    assert " tests/integration tests/gpu -m " in one_by_one
    assert all(" -k test_row_weights " in command for command in (sharing, one_by_one))
