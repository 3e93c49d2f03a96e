"""Sums for a small chat model: problems it can partly do, without a file to fetch.

`train` and `held_out` ask for sums and differences of two numbers and sums of three, over disjoint sets of numbers;
`out_of_domain` asks for products and tells short stories about sums, which RL never rewards.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from dphrl.tiny.task import TinyProblem, take_distinct

SPLITS: tuple[str, ...] = ("train", "held_out", "out_of_domain")
MAX_PROBLEMS: dict[str, int] = {"train": 5_000, "held_out": 1_000, "out_of_domain": 1_000}
HELD_OUT_ONE_IN = 5
_STORIES = (
    "Ada has {a} stamps and buys {b} more. How many stamps does she have now?",
    "A bus carries {a} people and {b} more get on. How many people are on it?",
    "A shop had {a} lamps and sold {b} of them. How many lamps are left?",
)


def make_problems(split: str, num_problems: int, seed: int) -> list[TinyProblem]:
    """Draw `num_problems` distinct problems of `split`; the first k do not depend on `num_problems`.

    Raises ValueError for an unknown split or a size out of range.
    """
    return take_distinct(_stream(split, seed), split, num_problems, MAX_PROBLEMS)


def is_held_out(*numbers: int) -> bool:
    """Whether problems over these numbers are kept for evaluation: by a fixed hash, so that no seed can leak one."""
    digest = hashlib.blake2b(f"dphrl-arithmetic:{sorted(numbers)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _stream(split: str, seed: int) -> Iterator[TinyProblem]:
    rng = random.Random(f"arithmetic:{split}:{seed}")
    while True:
        numbers = [rng.randrange(10, 100) for _ in range(rng.choice((2, 2, 3)))]
        if split == "out_of_domain":
            question, answer = _foreign(rng)
        elif is_held_out(*numbers) != (split == "held_out"):
            continue
        elif len(numbers) == 2 and rng.random() < 0.5:
            question, answer = f"What is {max(numbers)} - {min(numbers)}?", max(numbers) - min(numbers)
        else:
            question, answer = f"What is {' + '.join(map(str, numbers))}?", sum(numbers)
        yield TinyProblem(question, str(answer), question)


def _foreign(rng: random.Random) -> tuple[str, int]:
    if rng.random() < 0.5:
        a, b = rng.randrange(2, 30), rng.randrange(2, 13)
        return f"What is {a} times {b}?", a * b
    story = rng.choice(_STORIES)
    a = rng.randrange(20, 100)
    b = rng.randrange(2, a)
    return story.format(a=a, b=b), a - b if "sold" in story else a + b
