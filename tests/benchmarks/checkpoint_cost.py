"""A learner step of SmolLM2 while a checkpoint is written, with the copy for it, against one without. Nothing is
sampled meanwhile, so that in a run the share is smaller still."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from typing import Any

from dphrl.models import ensure_smollm2
from tests.benchmarks._learner_sides import CHILD, SURROUNDINGS, small_model
from tests.benchmarks._sides import ROOT, side


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks checkpoint_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model (default: SmolLM2's 30)")
    parser.add_argument("--groups", type=int, default=8, help="groups of 4 x 48 tokens in a step (default: 8)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(small_model(str(ensure_smollm2()), arguments.layers))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dphrl-checkpoint-cost-"))
        child = CHILD.with_name("_checkpoint_child.py")
        one = stack.enter_context(side(child, [model, folder, str(arguments.groups)], [ROOT], SURROUNDINGS))
        one.answer()
        one.ask({"saves": True})  # the first copy asks the system for its memory
        seen: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for number in range(arguments.rounds):
            for saves in (True, False) if number % 2 else (False, True):
                seen[saves].append(one.ask({"saves": saves}))
    pairs = zip(seen[True], seen[False], strict=True)
    return {
        "benchmark": "checkpoint_cost",
        "num_cpus": os.cpu_count(),
        "layers": arguments.layers or 30,
        "without_s": statistics.median(answer["seconds"] for answer in seen[False]),
        "with_s": statistics.median(answer["seconds"] for answer in seen[True]),
        "copy_s": statistics.median(answer["copy_s"] for answer in seen[True]),
        "written_after_s": statistics.median(answer["left_s"] for answer in seen[True]),
        "time_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
    }
