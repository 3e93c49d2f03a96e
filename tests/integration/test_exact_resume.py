"""A killed run that goes on, against one that was never killed: prompts, completions, losses and weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dphrl.tracking.tracker import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

NUM_STEPS, KILLED_AT = 8, 4
# Times, what follows from them, and what is told of a run that goes on.
OF_THE_CLOCK = ("time/", "events/", "busy_fraction", "tokens_per_s", "queue/", "latency", "learner/mfu", "per_s")

Start = Callable[..., Path]


@pytest.fixture
def config_file(make_config: Any, tmp_path: Path) -> Path:
    """Eight steps on the embedded task, with a checkpoint after the fourth and every completion on record."""
    config = make_config(
        run_dir=str(tmp_path),
        deterministic=True,
        algorithm={"num_minibatches": 1},
        rollout={"num_prompts": 4, "num_samples": 4},
        learner={"num_steps": NUM_STEPS},
        checkpoint={"every_steps": KILLED_AT, "every_minutes": 0, "keep": 3},
        evaluation={"num_samples": 0},
        tracking={"tensorboard": False, "prometheus": False, "samples_per_step": 16},
        cluster={"num_cpus": 2},
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def command(config_file: Path, name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "dphrl", "train", str(config_file), f"run_name={name}", *arguments]


def train(config_file: Path, name: str, *arguments: str) -> Path:
    done = subprocess.run(command(config_file, name, *arguments), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return config_file.parent / name


def train_and_kill(config_file: Path, name: str, *arguments: str) -> Path:
    """SIGKILL of the driver, and of nothing else, as soon as steps follow the first checkpoint."""
    folder = config_file.parent / name
    process = subprocess.Popen(
        command(config_file, name, *arguments), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 150
    while not ((folder / "checkpoints" / f"step_{KILLED_AT}").is_dir() and len(read_metrics(folder)) > KILLED_AT):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return folder


def completions(folder: Path) -> list[Any]:
    """Prompt, sample and text of all that was sampled, in the order of the steps."""
    rows = [
        json.loads(line) for path in sorted((folder / "samples").iterdir()) for line in path.read_text().splitlines()
    ]
    return [(row["prompt_id"], row["sample_index"], row["completion"], row["policy_version"]) for row in rows]


def numbers(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if not any(word in name for word in OF_THE_CLOCK)}
        for record in read_metrics(folder)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{NUM_STEPS}" / "hf" / "model.safetensors")


def check_same(ours: Path, theirs: Path) -> None:
    assert completions(ours) == completions(theirs)
    assert numbers(ours) == numbers(theirs)
    assert all(torch.equal(weights(ours)[name], weight) for name, weight in weights(theirs).items())


def check_close(ours: Path, theirs: Path) -> None:
    """The prompts of every step; losses up to rounding, until another token is drawn somewhere."""
    assert [row[:2] for row in completions(ours)] == [row[:2] for row in completions(theirs)]
    for mine, other in list(zip(numbers(ours), numbers(theirs), strict=True))[: KILLED_AT + 1]:
        for name in ("policy/loss", "divergence/loss"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4), (name, mine["step"])


@pytest.mark.inline
def test_inline_to_the_bit(config_file: Path) -> None:
    whole = train(config_file, "whole", "--inline")
    train_and_kill(config_file, "part", "--inline")
    check_same(train(config_file, "part", "--inline", "--resume"), whole)


@pytest.mark.long
def test_on_ray_to_the_bit_and_elsewhere_up_to_rounding(config_file: Path) -> None:
    whole = train(config_file, "whole")
    killed = train_and_kill(config_file, "part")
    for name in ("two-ranks", "inline"):
        subprocess.run(["cp", "-r", str(killed), str(config_file.parent / name)], check=True)
    check_same(train(config_file, "part", "--resume"), whole)
    two = "learner.num_ranks=2", "learner.zero_stage=3", "learner.cpus_per_rank=0.4"
    check_close(train(config_file, "two-ranks", "--resume", *two), whole)
    check_close(train(config_file, "inline", "--resume", "--inline"), whole)
