"""A run stopped by every signal in turn, in its stages, goes on each time and ends as a run that nobody stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dphrl.learner.checkpoint import list_checkpoints
from dphrl.tracking.tracker import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.inline]

NUM_STEPS, DEADLINE_S = 16, 120.0
# A shell may have started the tests with Ctrl-C ignored.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cluster.cli import main; main()"
)
# Parts of the names of metrics that a clock decides.
TIMED = ("events/", "time/", "reward/latency", "per_s", "busy_fraction", "utilization", "model_flops")


class Command:
    """`dphrl train --inline` in a process of its own; one thread, so that sums have one order."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self.output = config.with_suffix(f".{time.monotonic_ns()}.out")
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "train", str(config), "--inline", *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def until(self, said: Callable[[], Any]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not said():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < end
            time.sleep(0.01)

    def end(self, number: int | None = None) -> tuple[int, str]:
        """The exit status and the output; after a signal, if one is given."""
        if number is not None:
            self.process.send_signal(number)
        self.process.wait(DEADLINE_S)
        return self.process.returncode, self.output.read_text()


def test_a_run_goes_on_after_every_signal(make_config: Any, tmp_path: Path) -> None:
    config = make_config(
        run_dir=str(tmp_path),
        learner={"num_steps": NUM_STEPS},
        reference={"prompts_per_chunk": 2, "num_samples": 8},
        rollout={"max_concurrent_sequences": 8},
        checkpoint={"every_steps": 0, "keep": NUM_STEPS},
        tracking={"tensorboard": False},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    folder, commands = tmp_path / "stopped", []

    def start(*arguments: str, name: str = "stopped") -> Command:
        commands.append(Command(path, f"run_name={name}", *arguments))
        return commands[-1]

    def steps_saved() -> list[int]:
        return [int(saved.name.removeprefix("step_")) for saved in list_checkpoints(folder / "checkpoints")]

    def until_step(run: Command, step: int) -> None:
        run.until(lambda: len(read_metrics(folder)) >= step)

    try:
        whole = start(name="whole")

        # In the reference stage: its chunks are kept.
        run = start()
        run.until(lambda: list((folder / "reference.graded").glob("chunk_*")))
        status, out = run.end(signal.SIGINT)
        assert status == 130, out
        assert "stopped by SIGINT; the same command goes on with what is done" in out
        assert not (folder / "reference").exists(), "the stage was not finished"

        # SIGUSR1: a checkpoint, and on. Nobody else may write meanwhile. Ctrl-C: the step ends and is saved.
        run = start()
        until_step(run, 1)
        run.process.send_signal(signal.SIGSTOP)
        status, refusal = start("--overwrite").end()
        assert status == 2
        assert f"{folder} is being written by process {run.process.pid} on " in refusal
        run.process.send_signal(signal.SIGUSR1)
        run.process.send_signal(signal.SIGCONT)
        run.until(steps_saved)
        (asked,) = steps_saved()
        until_step(run, asked + 1)
        status, out = run.end(signal.SIGINT)
        assert status == 130, out
        assert any(f"reference stage: {how}" in out for how in ("continuing", "every prompt is sampled already"))
        saved = steps_saved()[-1]
        assert saved > asked
        assert read_metrics(folder)[-1]["step"] == saved
        assert f"stopped by SIGINT; the same command with --resume goes on after step {saved}" in out

        # SIGTERM.
        run = start("--resume")
        until_step(run, saved + 2)
        status, out = run.end(signal.SIGTERM)
        assert status == 143, out
        assert saved + 2 <= steps_saved()[-1] == read_metrics(folder)[-1]["step"] < NUM_STEPS
        assert not (folder / ".owner").exists()

        status, out = start("--resume").end()
        assert status == 0, out
        status, out = whole.end()
        assert status == 0, out
    finally:
        for command in commands:
            command.process.kill()
            command.process.wait()
    ours, theirs = (
        [
            {key: value for key, value in record.items() if not any(part in key for part in TIMED)}
            for record in read_metrics(tmp_path / name)
        ]
        for name in ("stopped", "whole")
    )
    assert ours == theirs
    for result in ("eval/base.json", f"eval/step_{NUM_STEPS}.json"):
        assert (folder / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()
    assert not [path for path in folder.rglob(".*") if not path.name.endswith((".sha256", ".base-identity"))]
