"""Forward and backward of rows of unequal lengths on a CPU, packed through sdpa with a mask of all pairs, against the
same rows padded without a mask.

The model has layers of SmolLM2-135M's shape with random weights; both sides run in one process, in turn. `waste` is the
share of positions that are padding.
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
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks cpu_packing", description=__doc__)
    parser.add_argument("--rows", type=int, default=6, help="rows of a micro-batch (default: 6)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default: 4 of SmolLM2's 30)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each side, after one to warm up (default: 3)")
    return parser.parse_args(arguments)


def _pass(policy: Any, batch: Any) -> tuple[float, float]:
    """(seconds, seconds of all threads on a processor) of one forward and backward."""
    policy.zero_grad()
    started, used = time.perf_counter(), time.process_time()
    policy(batch)[0].mean().backward()
    return time.perf_counter() - started, time.process_time() - used


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dphrl.learner.batching import collate
    from dphrl.types import RowKind, TrainRow
    from tests.benchmarks.attention_mask import _policy

    torch.set_num_threads(2)
    policy = _policy(arguments.layers, 1024, torch.float32)
    result: dict[str, Any] = {"benchmark": "cpu_packing", "num_cpus": os.cpu_count(), "layers": arguments.layers}
    for name, (shortest, longest) in SPREADS.items():
        rng = random.Random(0)
        lengths = sorted(rng.randint(shortest, longest) for _ in range(arguments.rows))
        rows = [
            TrainRow(RowKind.POLICY, tuple(rng.randrange(5, 49152) for _ in range(n)), n - 16, (0.0,) * 16, 1.0)
            for n in lengths
        ]
        batches = {packed: collate(rows, packed=packed) for packed in (True, False)}
        seen: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for i in range(arguments.rounds + 1):
            for packed, batch in batches.items():
                spent = _pass(policy, batch)
                if i:  # the first pass of each side faults its memory in
                    seen[packed].append(spent)
        result[f"{name}/waste"] = 1 - sum(lengths) / (max(lengths) * len(lengths))
        for i, kind in enumerate(("time", "cpu_time")):
            ratios = [a[i] / b[i] for a, b in zip(seen[True], seen[False], strict=True)]
            result[f"{name}/packed_vs_padded_{kind}"] = statistics.median(ratios)
    return result
