"""Sums for a small chat model: problems that it can partly solve, without a file to download.

`train` and `held_out` ask for sums and differences of a number below 40 and a digit, over disjoint pairs of numbers;
`out_of_domain` asks for products and tells short stories about sums, which RL never rewards. Larger numbers, or sums of
three, are too hard for a model of 135 M parameters: if none of its answers is right, there is nothing to rehearse.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from dphrl.tiny.task import TinyProblem, take_distinct

SPLITS: tuple[str, ...] = ("train", "held_out", "out_of_domain")
MAX_PROBLEMS: dict[str, int] = {"train": 400, "held_out": 80, "out_of_domain": 400}
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
    """Whether problems over these are kept for evaluation. A fixed hash decides, so that no seed can leak one."""
    digest = hashlib.blake2b(f"dphrl-arithmetic:{sorted(numbers)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _stream(split: str, seed: int) -> Iterator[TinyProblem]:
    rng = random.Random(f"arithmetic:{split}:{seed}")
    while True:
        a, b = rng.randrange(2, 40), rng.randrange(2, 10)
        if split == "out_of_domain":
            question, answer = _foreign(rng)
        elif is_held_out(a, b) != (split == "held_out"):
            continue
        elif a >= b and rng.random() < 0.5:
            question, answer = f"What is {a} - {b}?", a - b
        else:
            question, answer = f"What is {a} + {b}?", a + b
        yield TinyProblem(question, str(answer), question)


def _foreign(rng: random.Random) -> tuple[str, int]:
    if rng.random() < 0.3:
        a, b = rng.randrange(2, 13), rng.randrange(2, 10)
        return f"What is {a} times {b}?", a * b
    story = rng.choice(_STORIES)
    a, b = rng.randrange(10, 40), rng.randrange(2, 10)
    return story.format(a=a, b=b), a - b if "sold" in story else a + b
