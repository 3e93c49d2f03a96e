"""The math grader at two revisions: answers a second on the realistic mix, in turn, with new answers every round."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.math_grading import realistic_pairs

ROOT = Path(__file__).resolve().parents[2]
# Grades what a line of standard input holds, and answers with the seconds it took.
_CHILD = """
import json, sys, time

def main():
    import dphrl
    from dphrl.rewards.math_answer import MathAnswerGrader
    assert dphrl.__file__.startswith(sys.argv[1]), dphrl.__file__
    grader = MathAnswerGrader("boxed")
    for line in sys.stdin:
        items = [tuple(pair) for pair in json.loads(line)]
        started = time.perf_counter()
        correct = 0
        for start in range(0, len(items), 64):
            correct += sum(r.score == 1.0 for r in grader.grade(items[start : start + 64]))
        print(json.dumps([time.perf_counter() - started, correct]), flush=True)
    grader.close()

if __name__ == "__main__":
    main()
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks grader_change", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", required=True, help="the revision to compare with")
    parser.add_argument("--rounds", type=int, default=15, help="how often each side is measured (default: 15)")
    parser.add_argument("--pairs", type=int, default=2000, help="answers in a round (default: 2000)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The new side is the checkout that this file is in, as it is; the ratio is the median over rounds of new / old.

    Exits with status 2 where the data folder is missing.
    """
    with tempfile.TemporaryDirectory(prefix="dphrl-grader-") as folder:
        old = Path(folder, "old")
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(old)], check=True)
        revision = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", f"{arguments.old}^{{commit}}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        subprocess.run(["git", "-C", str(old), "checkout", "--quiet", "--detach", revision], check=True)
        program = Path(folder, "child.py")
        program.write_text(_CHILD)
        sides = {"old": _start(program, old), "new": _start(program, ROOT)}
        try:
            return _measure(sides, arguments.rounds, arguments.pairs)
        finally:
            for child in sides.values():
                child.kill()


def _start(program: Path, checkout: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(program), str(checkout)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )


def _measure(sides: dict[str, subprocess.Popen[str]], num_rounds: int, num_pairs: int) -> dict[str, Any]:
    pairs = realistic_pairs(random.Random(0))

    def grade(side: str, items: list[tuple[str, str]]) -> tuple[float, int]:
        child = sides[side]
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(items) + "\n")
        child.stdin.flush()
        seconds, correct = json.loads(child.stdout.readline())
        return seconds, correct

    def taken() -> list[tuple[str, str]]:
        chosen = itertools.islice(pairs, num_pairs)
        return [(rf"So the answer is \boxed{{{answer}}}.", gold) for answer, gold in chosen]

    rates: dict[str, list[float]] = {side: [] for side in sides}
    correct = dict.fromkeys(sides, 0)
    for number in range(-1, num_rounds):
        items = taken()
        # Whoever comes second finds warmer caches, so the order changes.
        for side in sorted(sides, reverse=bool(number % 2)):
            seconds, right = grade(side, items)
            if number >= 0:  # the first round starts the children that compare
                rates[side].append(num_pairs / seconds)
                correct[side] += right
    ratios = [new / old for old, new in zip(rates["old"], rates["new"], strict=True)]
    return {
        "benchmark": "grader_change",
        "throughput_ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        **{f"{side}_answers_per_s": statistics.median(seen) for side, seen in rates.items()},
        **{f"{side}_correct": count for side, count in correct.items()},
    }
