"""Seconds of a step of demo-math over Ray, with the machine to itself and beside one busy process on the same cores;
this build beside another revision."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dphrl.processors import whole_cpus
from tests.benchmarks._sides import ROOT, Side, checked_out, side

CHILD = Path(__file__).with_name("_neighbours_child.py")
NUM_WARM_UP = 6
BUSY = "while True: pass"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks neighbours", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", help="the revision to compare with (default: none)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side takes its turn (default: 5)")
    parser.add_argument("--steps", type=int, default=6, help="quiet steps of a turn (default: 6)")
    parser.add_argument("--busy-steps", type=int, default=3, help="steps of a turn beside a busy process (default: 3)")
    parser.add_argument("--busy", type=int, default=1, help="how many busy processes (default: 1)")
    parser.add_argument(
        "--spin", type=int, action="append", default=[], help="this build with another GOMP_SPINCOUNT too (repeatable)"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="no round begins later than this after the warm-up (default: 300)"
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over all steps; ratios of two sides are medians over rounds of the ratios of a round's medians. The first
    step of a turn is left out: in it the processes wake up, and the busy one is new. Exits with status 2 where the
    revision is not known."""
    with contextlib.ExitStack() as stack:
        sides = {"new": stack.enter_context(training(ROOT))}
        if arguments.old:
            sides["old"] = stack.enter_context(training(stack.enter_context(checked_out(arguments.old))))
        for count in arguments.spin:
            sides[f"spin_{count}"] = stack.enter_context(training(ROOT, GOMP_SPINCOUNT=str(count)))
        for one in sides.values():
            one.answer()
            steps(one, NUM_WARM_UP)
        return summary(measure(sides, arguments), arguments.busy)


def measure(sides: dict[str, Side], arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    """`SIDE_quiet` and `SIDE_beside` -> for each round the seconds of its steps."""
    seen: dict[str, list[list[float]]] = {f"{name}_{how}": [] for name in sides for how in ("quiet", "beside")}
    began = time.monotonic()
    for number in range(arguments.rounds):
        if number and time.monotonic() - began > arguments.seconds:
            break
        # Whoever comes second finds a warmer machine, so the order changes.
        for name in sorted(sides, reverse=bool(number % 2)):
            seen[f"{name}_quiet"].append(steps(sides[name], arguments.steps + 1)[1:])
        for name in sorted(sides, reverse=bool(number % 2)):
            with busy_processes(arguments.busy):
                seen[f"{name}_beside"].append(steps(sides[name], arguments.busy_steps + 1)[1:])
    return seen


def summary(seen: dict[str, list[list[float]]], num_busy: int) -> dict[str, Any]:
    def ratio(name: str, other: str) -> float:
        pairs = zip(seen[name], seen[other], strict=True)
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)

    result: dict[str, Any] = {
        "benchmark": "neighbours",
        "num_cpus": whole_cpus(),
        "num_busy": num_busy,
        "num_rounds": len(seen["new_quiet"]),
    }
    for name, rounds in seen.items():
        taken = sorted(seconds for one in rounds for seconds in one)
        result |= {f"{name}_s": statistics.median(taken), f"{name}_min_s": taken[0], f"{name}_max_s": taken[-1]}
    for name in dict.fromkeys(key.rpartition("_")[0] for key in seen):
        result[f"{name}_beside_vs_quiet"] = ratio(f"{name}_beside", f"{name}_quiet")
        if name != "new":
            result[f"quiet_vs_{name}"] = ratio("new_quiet", f"{name}_quiet")
            result[f"beside_vs_{name}"] = ratio("new_beside", f"{name}_beside")
    return result


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(one: Side, count: int) -> list[float]:
    """Seconds of the next `count` steps."""
    return [one.ask({})["seconds"] for _ in range(count)]


def training(checkout: Path, **variables: str) -> AbstractContextManager[Side]:
    """A training run that takes a step when it is asked to. Its first answer is that of its first step."""
    # The model changes little in these steps, and with it the length of completions.
    settings = ["learner.num_steps=100000", "learner.lr=1e-9", "checkpoint.every_steps=0", "evaluation.num_samples=0"]
    settings += ["cluster.object_store_gib=0.5", "tracking.tensorboard=false", "data.train.limit=256"]
    return side(CHILD, [str(checkout), "train", "demo-math", *settings], [checkout], variables)
