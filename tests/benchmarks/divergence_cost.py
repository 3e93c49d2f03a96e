"""One learner step of SmolLM2 by three algorithms at the same number of trained tokens: GRPO, DPH-JS, in which half of
the rows are stored samples of the initial policy, and reverse KL on rollouts with a resident reference model.

Prompts are not shared, because rollouts have more completions of one prompt than the buffer, and no group is flat, so
that all compute as many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from dphrl.models import ensure_smollm2
from tests.benchmarks._learner_sides import learner, measure, ratios, small_model, summary, wait_for
from tests.benchmarks._sides import ROOT

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"divergence": "none"},
    "dph_js": {"divergence": "js", "eta": 0.2},
    "rkl": {"divergence": "reverse_kl", "eta": 0.05, "estimator": "rollout", "kl_estimator": "k3"},
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks divergence_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (default: 3)")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model (default: SmolLM2's 30)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Eight rows of 115 + 48 tokens."""
    group = [115, 48, [1, 0, 1, 0]]
    orders = {
        "grpo": {"groups": [group, group]},
        "dph_js": {"groups": [group], "rehearsal": [[115, 48, 1]] * 4},
        "rkl": {"groups": [group, group]},
    }
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(small_model(str(ensure_smollm2()), arguments.layers))
        sides = {
            name: stack.enter_context(
                learner(ROOT, model, {"algorithm": algorithm, "learner": {"lr": 1e-7, "share_prefix": "never"}})
            )
            for name, algorithm in ALGORITHMS.items()
        }
        seen = measure(wait_for(sides), orders, arguments.rounds)
    head = {"benchmark": "divergence_cost", "num_cpus": os.cpu_count(), "layers": arguments.layers or 30}
    return head | summary(seen) | ratios(seen, "dph_js", "grpo") | ratios(seen, "dph_js", "rkl")
