"""Sampled tokens a second through the engine's actor, the hand-over and the grading, beside `vllm.LLM.generate` alone.

Both sides sample the same completions: the same prompts, seeds and limits, the same arguments of vLLM and the same
number of threads, in turn, each time of other prompts. The plain side neither decodes text nor grades.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks._sides import ROOT, Side, side
from tests.benchmarks.e2e_vs_trl import data_folder

POOL_CHILD, PLAIN_CHILD = (Path(__file__).with_name(f"_{name}_child.py") for name in ("collect", "plain"))
# Of the plain side's tokens a second. A step of the tiny model takes a millisecond or two, so that it shows everything.
BARS = {"smollm2": 0.95, "tiny": 0.8}
NUM_WARM_UP = 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks rollout_overhead", description=__doc__)
    parser.add_argument("--model", choices=[*BARS], action="append", help="which model; may be given twice (both)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured (default: 5)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios are medians over rounds of two rates of the same round. Exits with status 2 without the data folder."""
    result: dict[str, Any] = {"benchmark": "rollout_overhead", "num_cpus": os.cpu_count(), "dtype": arguments.dtype}
    for model in arguments.model or BARS:
        # Warm-ups and rounds each have prompts of their own, because prefixes stay in the cache.
        settings, per_round = make_settings(model, arguments.dtype, arguments.rounds + NUM_WARM_UP)
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(side(POOL_CHILD, [str(ROOT), json.dumps(settings)], [ROOT]))
            plain = stack.enter_context(side(PLAIN_CHILD, [json.dumps(settings)], [ROOT], engine_variables(settings)))
            for started in (pool, plain):
                started.answer()
            result |= summary(model, measure({"pool": pool, "plain": plain}, arguments.rounds, per_round))
    return result


def make_settings(model: str, dtype: str, num_rounds: int) -> tuple[dict[str, Any], int]:
    """The configuration, and the number of prompts of a round."""
    if model == "tiny":
        per_round, path = 64, "tiny-factor"
        data = {"name": "factor", "kind": "tiny", "limit": per_round * num_rounds}
        rollout, max_prompt_tokens = {"num_samples": 8, "max_tokens": 24, "max_concurrent_sequences": 256}, 16
    else:
        per_round, path = 16, "smollm2-135m-instruct"
        file = str(data_folder() / "math/gsm8k_train.jsonl")
        data = {"name": "gsm8k", "path": file, "layout": "gsm8k", "limit": per_round * num_rounds}
        rollout, max_prompt_tokens = {"num_samples": 4, "max_tokens": 64, "max_concurrent_sequences": 64}, 256
    settings = {
        "run_name": f"overhead-{model}",
        "model": {"path": path, "dtype": dtype},
        "data": {"train": data, "max_prompt_tokens": max_prompt_tokens},
        "algorithm": {"divergence": "none"},
        "rollout": {"num_prompts": per_round, "threads_per_engine": 2, **rollout},
        "cluster": {"object_store_gib": 2},
    }
    return settings, per_round


def engine_variables(settings: dict[str, Any]) -> dict[str, str]:
    from actors.vllm_settings import process_variables
    from dphrl.config.schema import Config

    return process_variables(Config.model_validate(settings))


def measure(sides: dict[str, Side], num_rounds: int, per_round: int) -> dict[str, list[dict[str, float]]]:
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(-NUM_WARM_UP, num_rounds):
        order = {"first": (number + NUM_WARM_UP) * per_round, "count": per_round, "seed": number + NUM_WARM_UP}
        # Whoever comes second finds warmer caches, so the order changes.
        for name in sorted(sides, reverse=bool(number % 2)):
            answer = sides[name].ask(order)
            print(f"-- round {number + 1}, {name}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
            if number >= 0:
                seen[name].append(answer)
    return seen


def summary(model: str, seen: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    rates = {name: [a["num_tokens"] / a["seconds"] for a in answers] for name, answers in seen.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["pool"], rates["plain"], strict=True))
    return {
        **{f"{model}_{name}_tokens_per_s": statistics.median(each) for name, each in rates.items()},
        **{f"{model}_{name}_tokens": sum(a["num_tokens"] for a in answers) for name, answers in seen.items()},
        f"{model}_pool_vs_plain": ratio,
        f"{model}_bar": BARS[model],
        f"{model}_within_bar": ratio >= BARS[model],
    }
