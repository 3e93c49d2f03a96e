"""A disk that fills up at each kind of write: one line, exit status 1, and nothing of before is lost."""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.learner.checkpoint import list_checkpoints, newest_whole
from dphrl.saving import CheckpointSaver
from dphrl.tracking.tracker import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.inline, pytest.mark.timeout(120)]

# (what is being written, the function that writes it, its call at which the disk is full, whole checkpoints then)
WRITES = [
    ("a graded chunk", "dphrl.reference.stage:GradedResponses.write", 1, []),
    ("the reference buffer", "dphrl.reference.buffer:ReferenceBuffer.save", 1, []),
    ("metrics", "dphrl.tracking.tracker:Tracker.log_step", 2, ["step_1"]),
    ("samples", "dphrl.tracking.tracker:Tracker.log_samples", 2, ["step_1"]),
    ("a checkpoint", "dphrl.inline:InlineLearner.write_state", 2, ["step_1"]),
    ("an exported model", "dphrl.inline:InlineLearner.write_export", 2, ["step_1", "step_2"]),
    ("an evaluation", "dphrl.run:write_summaries", 1, ["step_1", "step_2"]),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def full_at(monkeypatch: pytest.MonkeyPatch, where: str, number: int, folder: Path) -> None:
    """Have the disk full from a function's call of that number on."""
    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def write(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == number:
            fill(folder)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, write)


def train(config_file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["train", str(config_file), "--inline", *options])


@pytest.mark.parametrize(("what", "where", "number", "whole"), WRITES, ids=[what for what, *_ in WRITES])
def test_a_disk_that_fills_up(
    make_config: Any,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    where: str,
    number: int,
    whole: list[str],
) -> None:
    config = make_config(
        run_dir=str(disk),
        algorithm={"num_minibatches": 1},
        data={"train": {"limit": 8}},
        reference={"prompts_per_chunk": 4},
        evaluation={"num_samples": 2, "k": [1]},
        checkpoint={"every_steps": 1},
        tracking={"tensorboard": False},
    )
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with monkeypatch.context() as patch:
        full_at(patch, where, number, disk)
        if what in ("metrics", "samples"):
            # The disk is not to be full before the first step's checkpoint is whole.
            save = CheckpointSaver.save

            async def save_whole(saver: CheckpointSaver, step: int) -> None:
                await save(saver, step)
                await saver.whole()

            patch.setattr(CheckpointSaver, "save", save_whole)
        failed = train(tmp_path / "mine.yaml")
    told = [line for line in failed.stderr.splitlines() if line.startswith("dphrl:") and "traceback" not in line]
    assert (failed.exit_code, len(told)) == (1, 1), failed.stderr
    assert re.search(rf"[Nn]o space left|{disk}.* GiB free", told[0]), told
    checkpoints = disk / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == whole
    said: list[str] = []
    newest = newest_whole(checkpoints, said.append)
    assert (newest.name if newest else None, said) == (whole[-1] if whole else None, [])

    os.unlink(disk / "ballast")
    done = train(tmp_path / "mine.yaml", "--resume")
    assert done.exit_code == 0, done.output
    assert [record["step"] for record in read_metrics(disk / "run")] == [1, 2]
    assert (checkpoints / "step_2" / "hf" / "model.safetensors").is_file()
