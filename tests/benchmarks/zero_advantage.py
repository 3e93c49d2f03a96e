"""One learner step of SmolLM2 in which half of the groups have equal scores: another revision and this one, with the
prompts of this one's rows apart, so that nothing else differs."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from dphrl.models import ensure_smollm2
from tests.benchmarks._learner_sides import learner, measure, ratios, small_model, summary, wait_for
from tests.benchmarks._sides import ROOT, checked_out


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks zero_advantage", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", required=True, help="the revision to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (default: 3)")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model (default: SmolLM2's 30)")
    parser.add_argument("--groups", type=int, default=2, help="groups, half of them flat (default: 2)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Groups of four completions of 48 tokens to prompts of 115."""
    order = {"groups": [[115, 48, [1, 1, 1, 1] if i % 2 else [1, 0, 1, 0]] for i in range(arguments.groups)]}
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(small_model(str(ensure_smollm2()), arguments.layers))
        old = stack.enter_context(checked_out(arguments.old))
        sides = {
            "new": stack.enter_context(learner(ROOT, model, {"learner": {"lr": 1e-7, "share_prefix": "never"}})),
            "old": stack.enter_context(learner(old, model, {})),
        }
        seen = measure(wait_for(sides), dict.fromkeys(sides, order), arguments.rounds)
    head = {"benchmark": "zero_advantage", "num_cpus": os.cpu_count(), "layers": arguments.layers or 30}
    return head | summary(seen) | ratios(seen, "new", "old")
