"""What long answers cost a step: two engines that share one queue, beside each engine's whole share handed at once, and
beside another revision; and the reference stage beside that of the other revision.

The step: two real engines of one thread each, groups of completions whose lengths are log-normal, so that a few are six
times as long as the mean. The lengths come from a model made for it (see _lengths.py): every side samples the same
completions. `share` is the same system in which each engine is a pool of its own, which gets half of the prompts at
once. Of `old`, a pool of one engine hands over everything at once whatever its length, so with --old `share` is taken
there too.

The stage: `fill_reference` with two such engines, and answers of that kind, but shorter. With --answers short, those of
the embedded tiny model, which are all of about one length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks._lengths import make_talker
from tests.benchmarks._sides import ROOT, Side, checked_out, side

CHILD = Path(__file__).with_name("_collect_child.py")
NUM_ENGINES, NUM_PROMPTS, NUM_SAMPLES, CONCURRENCY, STAGE_CONCURRENCY = 2, 16, 8, 32, 64
MEAN_TOKENS, MAX_TOKENS, SIGMA = 64, 384, 1.0
STAGE_MEAN_TOKENS, STAGE_MAX_TOKENS = 16, 96
BARS = {"step_vs_share": 1.05, "step_vs_old": 0.75, "stage_vs_old": 0.7}
Answers = dict[str, list[dict[str, Any]]]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks tail", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", help="the revision to compare with (default: none)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each side; 0 leaves them out (default: 9)")
    parser.add_argument("--stages", type=int, default=2, help="reference stages of each; 0 for none (default: 2)")
    parser.add_argument("--prompts", type=int, default=512, help="prompts of the reference stage (default: 512)")
    parser.add_argument("--answers", choices=["long", "short"], default="long", help="of the stage (default: long)")
    parser.add_argument("--chunk", type=int, default=64, help="reference.prompts_per_chunk of both sides (default: 64)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every ratio is the median over rounds of two times of the same round. Exits with status 2 for an unknown
    revision."""
    facts = {"num_cpus": os.cpu_count(), "num_engines": NUM_ENGINES, "old": arguments.old}
    result: dict[str, Any] = {"benchmark": "tail", **facts}
    with contextlib.ExitStack() as stack:
        checkouts = {"new": ROOT}
        if arguments.old:
            checkouts["old"] = stack.enter_context(checked_out(arguments.old))
        if arguments.rounds:
            model = stack.enter_context(talker(MEAN_TOKENS, MAX_TOKENS))
            result |= step_summary(compare(checkouts, step_settings(model), step_plans, arguments.rounds))
        if arguments.stages:
            settings = stage_settings("tiny-factor", 24, arguments)
            if arguments.answers == "long":
                model = stack.enter_context(talker(STAGE_MEAN_TOKENS, STAGE_MAX_TOKENS))
                settings = stage_settings(model, STAGE_MAX_TOKENS, arguments)
            stages = stage_summary(compare(checkouts, settings, stage_plans, arguments.stages))
            result |= {"stage_answers": arguments.answers, **stages}
    bars = {name: bar for name, bar in BARS.items() if name in result}
    result |= {f"{name}_bar": bar for name, bar in bars.items()}
    return {**result, "within_bars": all(result[name] <= bar for name, bar in bars.items())}


def step_settings(model: str) -> dict[str, Any]:
    rollout = {"num_prompts": NUM_PROMPTS, "num_samples": NUM_SAMPLES, "max_tokens": MAX_TOKENS}
    # The cache holds every sequence, so that concurrency alone is what is short.
    return engines("tail-step", model, 256, {**rollout, "max_concurrent_sequences": CONCURRENCY})


def stage_settings(model: str, max_tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rollout = {"max_tokens": max_tokens, "max_concurrent_sequences": STAGE_CONCURRENCY}
    settings = engines("tail-stage", model, arguments.prompts, rollout)
    reference = {"num_samples": 8, "prompts_per_chunk": arguments.chunk}
    return settings | {"reference": reference, "algorithm": {"divergence": "js"}}


@contextlib.contextmanager
def talker(mean: int, cap: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dphrl-tail-") as folder:
        yield str(make_talker(Path(folder), mean=mean, sigma=SIGMA, cap=cap))


def engines(name: str, model: str, num_prompts: int, rollout: dict[str, int]) -> dict[str, Any]:
    """Two engines of one thread each. The shares of CPUs are what Ray packs by, not what it gives."""
    return {
        "run_name": name,
        "model": {"path": model, "dtype": "float32"},
        "data": {"train": {"name": "factor", "kind": "tiny", "limit": num_prompts}, "max_prompt_tokens": 16},
        "algorithm": {"divergence": "none"},
        "rollout": {"num_engines": NUM_ENGINES, "threads_per_engine": 1, **rollout},
        "learner": {"threads_per_rank": 1, "micro_batch_tokens": 4096},
        "cluster": {"num_cpus": 4, "object_store_gib": 1},
    }


def step_plans(side_name: str) -> dict[str, dict[str, Any]]:
    """What to ask a side in each round, by the name of the figure."""
    whole = "share" if side_name == "new" else "old_share"
    step = "step" if side_name == "new" else "old_step"
    return {step: {"count": NUM_PROMPTS}, whole: {"count": NUM_PROMPTS, "split": True}}


def stage_plans(side_name: str) -> dict[str, dict[str, Any]]:
    return {"stage" if side_name == "new" else "old_stage": {"stage": "reference"}}


def compare(checkouts: dict[str, Path], settings: dict[str, Any], plans: Any, num_rounds: int) -> Answers:
    with contextlib.ExitStack() as stack:
        sides = {
            name: stack.enter_context(side(CHILD, [str(checkout), json.dumps(settings)], [checkout]))
            for name, checkout in checkouts.items()
        }
        for started in sides.values():
            started.answer()
        asked = {key: (sides[name], order) for name in sides for key, order in plans(name).items()}
        return measure(asked, num_rounds)


def measure(asked: dict[str, tuple[Side, dict[str, Any]]], num_rounds: int) -> Answers:
    """One round before is left out."""
    seen: Answers = {name: [] for name in asked}
    for number in range(-1, num_rounds):
        place = {"first": (number + 1) * NUM_PROMPTS % 256, "seed": number + 1}
        # Whoever comes second finds warmer caches, so the order changes.
        for name in sorted(asked, reverse=bool(number % 2)):
            where, order = asked[name]
            answer = where.ask(order | place)
            print(f"-- round {number + 1}, {name}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
            if number >= 0:
                seen[name].append(answer)
    return seen


def seconds_and_ratios(seen: Answers, pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """pairs: by the name of a ratio, its two figures. Those of which one was not measured are left out."""
    result: dict[str, Any] = {f"{name}_s": statistics.median(a["seconds"] for a in seen[name]) for name in seen}
    for name, (one, other) in pairs.items():
        if {one, other} <= seen.keys():
            each = zip(seen[one], seen[other], strict=True)
            result[name] = statistics.median(a["seconds"] / b["seconds"] for a, b in each)
    return result


def step_summary(seen: Answers) -> dict[str, Any]:
    share = "old_share" if "old_share" in seen else "share"
    pairs = {
        "step_vs_share": ("step", share),
        "step_vs_own_share": ("step", "share"),
        "step_vs_old": ("step", "old_step"),
        "old_vs_share": ("old_step", share),
    }
    rounds = zip(*seen.values(), strict=True)
    same = [len({answer["digest"] for answer in answers}) == 1 for answers in rounds]
    return {
        "step_tokens": statistics.median(a["num_tokens"] for a in seen["step"]),
        **seconds_and_ratios(seen, pairs),
        # Rounding may decide between two tokens now and then; lengths then differ a little.
        "rounds_with_same_tokens": sum(same) / len(same),
    }


def stage_summary(seen: Answers) -> dict[str, Any]:
    graded = {f"{name}_graded": answers[0]["graded"] for name, answers in seen.items()}
    return {**graded, **seconds_and_ratios(seen, {"stage_vs_old": ("stage", "old_stage")})}
