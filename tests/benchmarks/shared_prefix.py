"""One learner step of SmolLM2 on groups of completions that share their prompt: another revision and this one, at long
prompts (512 tokens, 8 completions of 64) and at short ones (115 tokens, 4 of 48)."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from dphrl.models import ensure_smollm2
from tests.benchmarks._learner_sides import learner, measure, ratios, small_model, summary, wait_for
from tests.benchmarks._sides import ROOT, checked_out

# Prompt tokens, completion tokens, completions, and groups of a step: so many that the optimizer's step weighs little.
SHAPES = {"long": (512, 64, 8, 1), "short": (115, 48, 4, 8)}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks shared_prefix", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", required=True, help="the revision to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (default: 3)")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model (default: SmolLM2's 30)")
    parser.add_argument("--groups", type=int, help="groups of a step (default: 1 long, 8 short)")
    parser.add_argument("--only", choices=SHAPES, help="one of the two shapes (default: both)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "benchmark": "shared_prefix",
        "num_cpus": os.cpu_count(),
        "layers": arguments.layers or 30,
    }
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(small_model(str(ensure_smollm2()), arguments.layers))
        old = stack.enter_context(checked_out(arguments.old))
        sides = {
            "new": stack.enter_context(learner(ROOT, model, {})),
            "old": stack.enter_context(learner(old, model, {})),
        }
        wait_for(sides)
        for shape, (num_prompt, num_completion, count, num_groups) in SHAPES.items():
            if arguments.only in (None, shape):
                scores = [i % 2 for i in range(count)]
                order = {"groups": [[num_prompt, num_completion, scores]] * (arguments.groups or num_groups)}
                seen = measure(sides, dict.fromkeys(sides, order), arguments.rounds)
                result |= summary(seen, f"{shape}/") | ratios(seen, "new", "old", f"{shape}/")
    return result
