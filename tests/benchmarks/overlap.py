"""What overlap brings: steps with rollout.max_staleness=1 beside strictly on-policy ones, with long answers.

One engine and one learner rank, of one thread each, so that on two cores neither takes the other's. Completions have
log-normal lengths (see _lengths.py), so that on-policy the engine waits for the longest one and then for the learner.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks._lengths import make_talker

ROOT = Path(__file__).resolve().parents[2]
MEAN_TOKENS, MAX_TOKENS, SIGMA = 32, 192, 1.0
NUM_WARM_UP = 3
MAX_STEP_VS_LONGER_PART, MIN_THROUGHPUT_VS_ON_POLICY = 1.15, 1.3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks overlap", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn (default: 2)")
    parser.add_argument("--steps", type=int, default=15, help="steps of a run (default: 15)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step, of 8 completions (default: 16)")
    parser.add_argument("--staleness", type=int, default=1, help="steps ahead (default: 1)")
    parser.add_argument("--on-update", default="recompute", help="rollout.on_update (default: recompute)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """step_vs_longer_part: a step with overlap over the longer of rollout and learning (update and sync), which the
    on-policy runs measure apart. Medians over the steps of all runs, but for the first NUM_WARM_UP of each."""
    seen: dict[int, list[dict[str, float]]] = {0: [], arguments.staleness: []}
    with tempfile.TemporaryDirectory(prefix="dphrl-overlap-") as folder:
        model = make_talker(Path(folder, "model"), mean=MEAN_TOKENS, sigma=SIGMA, cap=MAX_TOKENS)
        for number in range(arguments.rounds):
            for staleness in sorted(seen, reverse=bool(number % 2)):
                name = f"{number}-{staleness}"
                seen[staleness] += train(Path(folder), name, settings(model, staleness, arguments))

    def median(staleness: int, *names: str) -> float:
        return statistics.median(sum(step[name] for name in names) for step in seen[staleness])

    def tokens_per_s(staleness: int) -> float:
        steps = seen[staleness]
        return sum(step["rollout/num_tokens"] for step in steps) / sum(step["time/step_s"] for step in steps)

    ahead = arguments.staleness
    rollout_s = median(0, "time/rollout_s", "time/reward_s")
    learn_s = median(0, "time/learn_s", "time/sync_s")
    result = {
        "benchmark": "overlap",
        "num_cpus": os.cpu_count(),
        "max_staleness": ahead,
        "on_update": arguments.on_update,
        "rollout_s": rollout_s,
        "learn_s": learn_s,
        "sync_s": median(0, "time/sync_s"),
        "on_policy_step_s": median(0, "time/step_s"),
        "step_s": median(ahead, "time/step_s"),
        "step_sync_s": median(ahead, "time/sync_s"),
        "staleness_mean": median(ahead, "rollout/staleness_mean"),
        "mixed_fraction": median(ahead, "rollout/mixed_fraction"),
        "on_policy_busy_fraction": median(0, "rollout/busy_fraction"),
        "busy_fraction": median(ahead, "rollout/busy_fraction"),
        "step_vs_longer_part": median(ahead, "time/step_s") / max(rollout_s, learn_s),
        "throughput_vs_on_policy": tokens_per_s(ahead) / tokens_per_s(0),
    }
    return result | {
        "step_vs_longer_part_bar": MAX_STEP_VS_LONGER_PART,
        "throughput_vs_on_policy_bar": MIN_THROUGHPUT_VS_ON_POLICY,
    }


def settings(model: Path, staleness: int, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"name": "factor", "kind": "tiny", "limit": 512}, "evaluation": [], "max_prompt_tokens": 16},
        "reward": {"name": "tests.benchmarks._text_reward:reward"},
        "algorithm": {"divergence": "none"},
        "rollout": {
            "num_prompts": arguments.prompts,
            "num_samples": 8,
            "max_tokens": MAX_TOKENS,
            "max_concurrent_sequences": 64,
            "threads_per_engine": 1,
            "max_staleness": staleness,
            "on_update": arguments.on_update,
        },
        # So small that the lengths stay what they are.
        "learner": {"num_steps": arguments.steps, "lr": 1e-7, "threads_per_rank": 1, "micro_batch_tokens": 8192},
        "evaluation": {"num_samples": 0},
        "cluster": {"object_store_gib": 1},
    }


def train(folder: Path, name: str, config: dict[str, Any]) -> list[dict[str, float]]:
    """The steps of a run but for the first ones. Exits when the run fails."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"run_name": name, "run_dir": str(folder / "runs"), **config}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dphrl", "train", str(path)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"run {name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    steps = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    print(f"-- {name}: {[round(step['time/step_s'], 2) for step in steps]}", file=sys.stderr, flush=True)
    # In the last steps nothing is ahead of the learner.
    return steps[NUM_WARM_UP : len(steps) - config["rollout"]["max_staleness"]]
