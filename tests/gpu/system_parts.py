"""Parts that run the whole system on GPUs: short trainings of the embedded task, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.parts import Figures

NUM_STEPS = 3
SHORT = [
    f"learner.num_steps={NUM_STEPS}",
    "data.train.limit=64",
    "data.evaluation.0.limit=16",
    "evaluation.num_samples=4",
    "evaluation.k=[1,4]",
    "rollout.max_concurrent_sequences=64",
    "rollout.enforce_eager=true",
    "tracking.tensorboard=false",
]


def trained(folder: str, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of a run of demo-math with these settings. Raises AssertionError, with the run's last line, when it
    fails."""
    command = [sys.executable, "-m", "dphrl", "train", "demo-math", f"run_dir={folder}", "run_name=run"]
    done = subprocess.run([*command, *SHORT, *overrides], capture_output=True, text=True, check=False)
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    assert done.returncode == 0, f"exit {done.returncode}: {last}"
    steps = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    return steps


def figures(steps: list[dict[str, Any]]) -> Figures:
    """What every training shows: the largest gaps between engines and learner, and the median seconds."""

    def median(name: str) -> float:
        return float(sorted(step[name] for step in steps)[len(steps) // 2])

    return {
        "gap_mean": max(step["sync/logprob_gap_mean"] for step in steps),
        "gap_max": max(step["sync/logprob_gap_max"] for step in steps),
        "sync_s": median("time/sync_s"),
        "step_s": median("time/step_s"),
    }


def run(*overrides: str) -> Figures:
    with tempfile.TemporaryDirectory(prefix="dphrl-gpu-") as folder:
        return figures(trained(folder, *overrides))


def colocated(small: bool) -> Figures:
    """Engine and learner take turns on one GPU; weights go through the object store."""
    return run("cluster.colocate=true", "rollout.gpu_memory_utilization=0.3", "sync.backend=object_store")


def colocated_ipc(small: bool) -> Figures:
    """Engine and learner take turns on one GPU; weights stay on it."""
    return run("cluster.colocate=true", "rollout.gpu_memory_utilization=0.3", "sync.backend=ipc")


def colocated_float32(small: bool) -> Figures:
    """The same in float32, where the bound on the gap is narrow."""
    return run("cluster.colocate=true", "rollout.gpu_memory_utilization=0.3", "model.dtype=float32")


def nccl(small: bool) -> Figures:
    """Engine and learner each on a GPU; weights go from one to the other."""
    return run("sync.backend=nccl")


def nccl_wide(small: bool) -> Figures:
    """Two learner ranks under ZeRO-3, one engine of width 2."""
    return run("sync.backend=nccl", "rollout.tensor_parallel=2", "learner.num_ranks=2", "learner.zero_stage=3")


def lora(small: bool) -> Figures:
    """Adapters alone are trained; engines get the sum."""
    return run("cluster.colocate=true", "rollout.gpu_memory_utilization=0.3", "model.lora.rank=8")


def offload(small: bool) -> Figures:
    """AdamW's state lives in host memory."""
    return run("cluster.colocate=true", "rollout.gpu_memory_utilization=0.3", "learner.offload=optimizer")


def seeds(small: bool) -> Figures:
    """Two runs from one seed with `deterministic: true`: the same completions and losses."""
    same = ("reward/mean", "policy/loss", "rollout/num_tokens", "learner/grad_norm")
    settings = ("deterministic=true", "cluster.colocate=true", "rollout.gpu_memory_utilization=0.3")
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        runs = [[{name: step[name] for name in same} for step in trained(each, *settings)] for each in (first, second)]
    assert runs[0] == runs[1], f"the runs differ: {runs[0][0]} and {runs[1][0]}"
    return {"equal_steps": float(len(runs[0]))}
