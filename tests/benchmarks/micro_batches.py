"""Forward and backward of rows of unequal lengths on a CPU, as the learner cuts them into padded micro-batches, beside
the same rows padded in one micro-batch, and packed into one sequence through sdpa with a mask of all pairs.

The model has layers of SmolLM2-135M's shape with random weights; all sides run in one process, in turn. `waste` is the
share of positions that are padding when there is one micro-batch. `micro_batch_cost` is what one more micro-batch
takes, in positions, beside what the learner reckons with; for the embedded tiny model too.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from typing import Any

import torch

SPREADS = {"like": (140, 180), "unequal": (40, 300), "very_unequal": (20, 600)}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks micro_batches", description=__doc__)
    parser.add_argument("--rows", type=int, default=12, help="rows (default: 12)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4 of SmolLM2's 30)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each side, after one to warm up (default: 3)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """cut_vs_one, packed_vs_one: the time of one side over that of one padded micro-batch, medians over rounds."""
    from dphrl.config.model import ModelConfig
    from dphrl.learner.batching import collate_bundles
    from dphrl.learner.bundles import Sharing, cut_micro_batches
    from dphrl.learner.loading import load_policy
    from dphrl.learner.prefixes import micro_batch_cost, pair_cost
    from dphrl.tiny import ensure_tiny_model
    from tests.benchmarks.attention_mask import _policy

    torch.set_num_threads(2)
    policy = _policy(arguments.layers, 8192, torch.float32)
    sharing = Sharing("never", pair_cost(policy.lm), micro_batch_cost(policy.lm, torch.device("cpu"), 1))
    result: dict[str, Any] = {"benchmark": "micro_batches", "num_cpus": os.cpu_count(), "layers": arguments.layers}
    tiny = load_policy(str(ensure_tiny_model()), ModelConfig(dtype="float32"), temperature=1.0)
    for label, of_model, length in (("smollm2", policy, 160), ("tiny", tiny, 24)):
        result[f"{label}/micro_batch_cost"] = _cost(of_model, length, arguments)
        result[f"{label}/micro_batch_cost_reckoned"] = micro_batch_cost(of_model.lm, torch.device("cpu"), 1)
    for name, (shortest, longest) in SPREADS.items():
        rng = random.Random(0)
        lengths = sorted(rng.randint(shortest, longest) for _ in range(arguments.rows))
        bundles = [_row(rng, length, 49152) for length in lengths]
        cut = cut_micro_batches(bundles, 10**6, packed=False, sharing=sharing)
        sides = {
            "one": [collate_bundles(bundles, packed=False)],
            "cut": [collate_bundles(group, packed=False) for group in cut],
            "packed": [collate_bundles(bundles, packed=True)],
        }
        seen: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(arguments.rounds + 1):
            for side, batches in sides.items():
                seconds = _pass(policy, batches)
                if number:  # the first pass of each side faults its memory in
                    seen[side].append(seconds)
        result[f"{name}/waste"] = 1 - sum(lengths) / (max(lengths) * len(lengths))
        result[f"{name}/num_micro_batches"] = len(cut)
        for side in ("cut", "packed"):
            ratios = [a / b for a, b in zip(seen[side], seen["one"], strict=True)]
            result[f"{name}/{side}_vs_one"] = statistics.median(ratios)
    return result


def _row(rng: random.Random, length: int, vocabulary: int) -> Any:
    from dphrl.learner.bundles import Bundle
    from dphrl.types import RowKind, TrainRow

    num_completion = min(16, length // 2)
    tokens = tuple(rng.randrange(vocabulary // 2, vocabulary) for _ in range(length))
    return Bundle((TrainRow(RowKind.POLICY, tokens, length - num_completion, (0.0,) * num_completion, 1.0),))


def _cost(policy: Any, length: int, arguments: argparse.Namespace) -> float:
    """Positions that take as long as one more micro-batch: of rows of one length, all together and each alone."""
    from dphrl.learner.batching import collate_bundles

    rng = random.Random(0)
    rows = [_row(rng, length, policy.lm.config.vocab_size) for _ in range(arguments.rows)]
    together, alone = [collate_bundles(rows, packed=False)], [collate_bundles([row], packed=False) for row in rows]
    costs = []
    for number in range(arguments.rounds + 1):
        one_s, many_s = _pass(policy, together), _pass(policy, alone)
        if number:
            costs.append((many_s - one_s) / (len(rows) - 1) / one_s * length * len(rows))
    return statistics.median(costs)


def _pass(policy: Any, batches: list[Any]) -> float:
    policy.zero_grad()
    started = time.perf_counter()
    for batch in batches:
        policy(batch)[0].mean().backward()
    return time.perf_counter() - started
