"""The math grader: speed beside math-verify on one core, and what hostile answers cost the others.

Realistic pairs, none twice, so that the cache of verdicts does not help: 70 % plain numbers, the rest the gold answers
of MATH-500 beside themselves respelled or beside each other.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dphrl.rewards.math_answer import MathAnswerGrader

NUM_ROUNDS, NUM_PAIRS, NUM_BENIGN, BATCH_SIZE = 3, 200, 8_000, 64
HOSTILE_SHARE, TIMEOUT_S = 0.05, 2.0

Pair = tuple[str, str]


def run() -> dict[str, Any]:
    """Exits with status 2 where the data folder is missing."""
    pairs = realistic_pairs(random.Random(0))
    lines = (_data_root() / "labels" / "hostile_math.jsonl").read_bytes().splitlines()
    hostile = [_expanded(json.loads(line)) for line in lines]
    return {"benchmark": "math_grading", **_beside_math_verify(pairs), **_with_hostile(pairs, hostile)}


def _data_root() -> Path:
    root = Path(os.environ.get("DPHRL_DATA", "../shared/data"))
    if not root.is_dir():
        print(f"this benchmark needs the data folder, and {root} is none; set DPHRL_DATA", file=sys.stderr)
        raise SystemExit(2)
    return root


def realistic_pairs(generator: random.Random) -> Iterator[Pair]:
    """(answer, gold) without end and without repetition. Exits with status 2 where the data folder is missing."""
    lines = (_data_root() / "math" / "math500.jsonl").read_text().splitlines()
    return _pairs([json.loads(line)["answer"] for line in lines], generator)


def _pairs(golds: list[str], generator: random.Random) -> Iterator[Pair]:
    respellings: list[Callable[[str], str]] = [
        lambda gold: gold,
        lambda gold: gold.replace("\\frac", "\\dfrac") + ".",
        lambda gold: gold.replace("(", "\\left( ").replace(")", " \\right)"),
        lambda gold: f"{{{gold}}} + 0" if "," not in gold else f" {gold} ",
        lambda gold: generator.choice(golds),
    ]
    for index in itertools.count():
        if generator.random() < 0.7:
            number = 3 * index + generator.random().__round__(2) if generator.random() < 0.3 else 3 * index
            yield (f"{number}" if generator.random() < 0.6 else f"{number + 1:,}", f"{number}")
        else:
            gold = generator.choice(golds)
            # A name nobody else has makes the pair new and asks for the same work.
            yield (f"x_{{{index}}} = {generator.choice(respellings)(gold)}", f"x_{{{index}}} = {gold}")


def _expanded(row: dict[str, Any]) -> Pair:
    text = row["prediction"]
    if repeat := row.get("repeat"):
        text = text.replace(repeat["placeholder"], repeat["unit"] * repeat["n"])
    return text if "\\boxed" in text else rf"\boxed{{{text}}}", row["gold"]


def _boxed(pairs: Any, num_pairs: int) -> list[Pair]:
    return [(rf"So the answer is \boxed{{{answer}}}.", gold) for answer, gold in itertools.islice(pairs, num_pairs)]


# ------------------------------------------------------------ beside math-verify


def _beside_math_verify(pairs: Any) -> dict[str, float]:
    cores = os.sched_getaffinity(0)
    # Children started from here stay on this core too.
    os.sched_setaffinity(0, {min(cores)})
    grader = MathAnswerGrader("boxed", TIMEOUT_S)
    sides = {"dphrl": lambda items: _grade_all(grader, items), "math_verify": _verify_all}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    try:
        for warm_up in sides.values():
            warm_up(_boxed(pairs, 10))
        for _ in range(NUM_ROUNDS):
            items = _boxed(pairs, NUM_PAIRS)
            for side, grade in sides.items():
                started = time.perf_counter()
                grade(items)
                rates[side].append(NUM_PAIRS / (time.perf_counter() - started))
    finally:
        grader.close()
        os.sched_setaffinity(0, cores)
    median = {side: statistics.median(seen) for side, seen in rates.items()}
    return {
        "throughput_ratio": median["dphrl"] / median["math_verify"],
        **{f"{side}_answers_per_s": rate for side, rate in median.items()},
    }


def _verify_all(items: list[Pair]) -> None:
    from math_verify import parse, verify

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text, gold in items:
            verify(parse(f"${gold}$"), parse(text))


def _grade_all(grader: MathAnswerGrader, items: list[Pair]) -> None:
    for start in range(0, len(items), BATCH_SIZE):
        grader.grade(items[start : start + BATCH_SIZE])


# ------------------------------------------------------------ hostile neighbours


def _with_hostile(pairs: Any, hostile: list[Pair]) -> dict[str, float]:
    """Two workers; the rate of benign answers with hostile ones among them over the rate without."""
    graders = [MathAnswerGrader("boxed", TIMEOUT_S) for _ in range(2)]
    rates: dict[bool, list[float]] = {False: [], True: []}
    _two_workers(graders, [_boxed(pairs, 100) for _ in graders])
    for round_index in range(NUM_ROUNDS):
        for is_mixed in (False, True):
            batches = []
            for worker in range(len(graders)):
                items = _boxed(pairs, NUM_BENIGN)
                if is_mixed:
                    items = _mixed(items, hostile, random.Random(2 * round_index + worker))
                batches.append(items)
            rates[is_mixed].append(len(graders) * NUM_BENIGN / _two_workers(graders, batches))
    for grader in graders:
        grader.close()
    return {
        "hostile_ratio": statistics.median(rates[True]) / statistics.median(rates[False]),
        "benign_per_s_alone": statistics.median(rates[False]),
        "benign_per_s_with_hostile": statistics.median(rates[True]),
    }


def _mixed(items: list[Pair], hostile: list[Pair], generator: random.Random) -> list[Pair]:
    num_hostile = round(len(items) * HOSTILE_SHARE / (1 - HOSTILE_SHARE))
    # New every time, as a model's would be: a verdict from the cache is no work.
    bad = [(f"{index} {text}", gold) for index, (text, gold) in zip(range(num_hostile), itertools.cycle(hostile))]
    mixed = items + [(text[:-1] + " " * (index % 50) + text[-1], gold) for index, (text, gold) in enumerate(bad)]
    generator.shuffle(mixed)
    return mixed


def _two_workers(graders: list[MathAnswerGrader], batches: list[list[Pair]]) -> float:
    """Seconds until the slower of the two has graded its items."""
    threads = [
        threading.Thread(target=_grade_all, args=(grader, items))
        for grader, items in zip(graders, batches, strict=True)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started
