r"""FACTOR and DIVIDE: a verifiable task with several right answers per prompt, small enough for a laptop.

`FACTOR 0 4 1 5 8 ?` asks for a non-trivial factorisation of 4158 with a factor of 3, 7 or 11. A completion
names a divisor p, divides by hand (the five running remainders, digit by digit) and boxes the two factors:

    7 : 0 4 6 2 0 \boxed{ 7 * 0 0 5 9 4 }

Each divisor is a *strategy*. Each works on about half of the numbers, and to know which ones work takes
as much arithmetic as the division itself. Plain RL therefore learns "always use the divisor that works most
often": Pass@1 rises and Pass@k falls to Pass@1. `DIVIDE 7 0 4 1 5 8 ?` is the same division with the divisor
named. RL never rewards it, so it shows what training on FACTOR does to the strategies that the policy stopped
using.

The demonstrations choose among the working divisors evenly and make a slip in one division of five, so that a
model trained on them is diverse and imprecise: there is something to gain (precision) and something to lose
(diversity).

Pass@1 is the share of prompts on which the chosen divisor fits, times the precision of its division. So what it costs
to keep every strategy is a matter of how the strategies compare, and the task comes in three variants:

- `FACTOR`: 3 fits fewer prompts than 7 and 11, so that one strategy is worth more than a mix of all.
- `FACTOR_EVEN`: each of 3, 7 and 11 fits the same share of prompts.
- `CUE`: 7, 8 and 9. Whether 8 fits can be read from the last three digits and whether 9 does from the sum of the
  digits, without a division. A policy that kept several strategies can learn which one to use.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

DIVISORS: tuple[int, ...] = (3, 7, 11)
NUM_DIGITS = 5
SPLITS: tuple[str, ...] = ("train", "held_out", "out_of_domain")

# One integer in five is never seen before evaluation, neither in the warm start nor in RL.
HELD_OUT_ONE_IN = 5
SLIP_RATE = 0.2
# The share of the demonstrations that are DIVIDE questions.
OUT_OF_DOMAIN_SHARE = 0.25

# Every word of a question or a completion; one token each (0 to 11: digits, remainders and divisors).
VOCABULARY: tuple[str, ...] = ("FACTOR", "DIVIDE", "?", ":", "\\boxed{", "*", "}", *map(str, range(12)))

# Problems are distinct, and multiples of all three divisors are few (in FACTOR about 180 to train on): they are 9 % of
# the first 500 problems and 5 % of 3,000. Far beyond that a set would hardly contain any, so larger ones are
# refused.
MAX_PROBLEMS: dict[str, int] = {"train": 10_000, "held_out": 2_500, "out_of_domain": 2_500}

_LIMIT = 10**NUM_DIGITS
_BOX_OPENING = re.compile(r"\\boxed\s*\{")
# Lengths are bounded so that int() cannot be handed a number of thousands of digits.
_BOX_CONTENT = re.compile(r"([0-9]{1,5})\*([0-9]{1,5})")
_ANSWER = re.compile(r"(?:factor(?:\[([0-9]{1,2}(?:,[0-9]{1,2})*)\])?|divide:([0-9]{1,2})):([0-9]{5})")


@dataclass(frozen=True)
class TinyProblem:
    """One prompt of the task.

    question: the user message, e.g. ``FACTOR 0 4 1 5 8 ?`` or ``DIVIDE 7 0 4 1 5 8 ?``.
    answer: what `grade` needs, e.g. ``factor:04158``, ``factor[7,8,9]:04158`` (the divisors that count, where they are
    not 3, 7 and 11) or ``divide:7:04158``; it lists no solution.
    problem_id: unique within a split, the same in every process, e.g. ``factor-04158``.
    """

    question: str
    answer: str
    problem_id: str


def take_distinct(
    stream: Iterator[TinyProblem], split: str, num_problems: int, most: Mapping[str, int]
) -> list[TinyProblem]:
    """The first `num_problems` of an endless stream, each problem_id once. most: what each split of the task can give.

    Raises ValueError, before anything is drawn, for an unknown split or a size out of range.
    """
    if split not in most:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(most)}")
    if not 0 <= num_problems <= most[split]:
        raise ValueError(f"num_problems is {num_problems}: split {split!r} gives 0 to {most[split]}")
    problems: dict[str, TinyProblem] = {}
    while len(problems) < num_problems:
        problem = next(stream)
        problems.setdefault(problem.problem_id, problem)
    return list(problems.values())


@dataclass(frozen=True)
class FactorTask:
    """A variant of the task.

    inclusion: how often each divisor is built into a number (numbers with none are drawn again). The divisors are the
    strategies; they have no common factors.
    free_cofactor: whether the rest of a number may contain the divisors as well, which adds to what `inclusion` says.
    """

    inclusion: Mapping[int, float]
    free_cofactor: bool

    @property
    def divisors(self) -> tuple[int, ...]:
        return tuple(self.inclusion)

    def make_problems(self, split: str, num_problems: int, seed: int) -> list[TinyProblem]:
        """Draw `num_problems` distinct problems of `split`; the first k do not depend on `num_problems`.

        ``train`` and ``held_out`` are FACTOR problems over disjoint sets of integers, ``out_of_domain`` are
        DIVIDE problems over held-out integers with an exact quotient. Raises ValueError for an unknown split or a
        size out of range.
        """
        return take_distinct(self._stream(split, seed), split, num_problems, MAX_PROBLEMS)

    def make_demonstrations(
        self,
        num_demonstrations: int,
        seed: int,
        *,
        slip_rate: float = SLIP_RATE,
        out_of_domain_share: float = OUT_OF_DOMAIN_SHARE,
    ) -> list[tuple[str, str]]:
        """Draw (question, completion) pairs over training integers, with repetition.

        A share `out_of_domain_share` are DIVIDE questions. In a share `slip_rate` of all pairs one remainder is wrong
        and the rest of the division follows from it, which always makes the boxed product wrong; the others grade
        ``correct``.
        """
        rng = random.Random(f"demonstrations:{seed}")
        demonstrations = []
        for _ in range(num_demonstrations):
            number = self._draw_number(rng, held_out=False)
            divisor = rng.choice(self.fitting(number))
            named = rng.random() < out_of_domain_share
            question = _divide_question(divisor, number) if named else _factor_question(number)
            demonstrations.append((question, _work_out(number, divisor, rng, slip=rng.random() < slip_rate)))
        return demonstrations

    def fitting(self, number: int) -> list[int]:
        """The divisors that divide `number`."""
        return [p for p in self.divisors if number % p == 0]

    def fingerprint_parts(self) -> list[object]:
        """What decides the demonstrations and their tokens, apart from the arguments of `make_demonstrations`."""
        parts = [self.divisors, NUM_DIGITS, sorted(self.inclusion.items()), HELD_OUT_ONE_IN, VOCABULARY]
        return [*parts, "free cofactor"] if self.free_cofactor else parts

    def _stream(self, split: str, seed: int) -> Iterator[TinyProblem]:
        rng = random.Random(f"{split}:{seed}")
        kind = "factor" if self.divisors == DIVISORS else f"factor[{','.join(map(str, self.divisors))}]"
        while True:
            number = self._draw_number(rng, held_out=split != "train")
            digits = f"{number:0{NUM_DIGITS}d}"
            if split == "out_of_domain":
                p = rng.choice(self.fitting(number))
                yield TinyProblem(_divide_question(p, number), f"divide:{p}:{digits}", f"divide-{p}-{digits}")
            else:
                yield TinyProblem(_factor_question(number), f"{kind}:{digits}", f"factor-{digits}")

    def _draw_number(self, rng: random.Random, *, held_out: bool) -> int:
        """A number below 10^5 with at least one of the divisors, from the asked side of the split."""
        while True:
            chosen = [p for p in self.divisors if rng.random() < self.inclusion[p]]
            product = math.prod(chosen)
            cofactor = rng.randrange(2, _LIMIT // product)
            # A cofactor without these divisors keeps `inclusion` exact: no strategy gains by accident.
            allowed = self.free_cofactor or all(cofactor % p for p in self.divisors)
            if chosen and allowed and is_held_out(product * cofactor) == held_out:
                return product * cofactor


# The shares are close to each other, so that the strategies are worth about the same: if one failed on most prompts, it
# would be no loss when RL drops it. Of 2,000 problems to train on, 3 fits 45 %, 7 and 11 fit 51 to 53 %.
FACTOR = FactorTask({3: 0.35, 7: 0.45, 11: 0.45}, free_cofactor=False)
# A free cofactor brings in 3 more often than 7, and 7 more often than 11. Of 2,000 problems each fits 56 to 58 %.
FACTOR_EVEN = FactorTask({3: 0.28, 7: 0.42, 11: 0.44}, free_cofactor=True)
# Their tables of remainders are about as large, so that the model divides by each about as well.
CUE = FactorTask({7: 0.45, 8: 0.47, 9: 0.47}, free_cofactor=True)

FACTOR_TASKS = {"factor": FACTOR, "factor-even": FACTOR_EVEN, "cue": CUE}


def grade(completion_text: str, answer: str) -> tuple[str, str]:
    r"""Grade one completion: (status, detail), where status is ``correct``, ``wrong`` or ``unparsable``.

    Only the last ``\boxed{`` counts, so an answer may be revised but a list of guesses earns nothing; a last
    box that is cut off or malformed is ``unparsable``. White space inside the box and leading zeros are
    ignored, the remainders are not graded. Never raises on any `completion_text`; raises ValueError if
    `answer` is not of this task.
    """
    allowed, asked_divisor, number = _parse_answer(answer)
    content = _last_box(completion_text)
    if content is None:
        return "unparsable", r"no complete \boxed{...} at the end"
    match = _BOX_CONTENT.fullmatch("".join(content.split()))
    if match is None:
        return (
            "unparsable",
            f"the box holds {content.strip()[:40]!a}, not p*q with at most {NUM_DIGITS} digits each",
        )
    divisor, quotient = int(match[1]), int(match[2])
    if asked_divisor is not None and divisor != asked_divisor:
        return "wrong", f"divided by {divisor}, asked to divide by {asked_divisor}"
    if divisor not in allowed:
        return "wrong", f"{divisor} is not one of {', '.join(map(str, allowed))}"
    if divisor * quotient != number:
        return "wrong", f"{divisor}*{quotient} is {divisor * quotient}, not {number}"
    return "correct", f"{divisor}*{quotient} is {number}"


def strategies_of(answer: str) -> dict[str, bool]:
    """Every strategy of the problem with this `answer` by name, and whether it can be right there.

    A strategy is the divisor that a completion names. DIVIDE asks for one, so it has no other. Raises ValueError if
    `answer` is not of this task.
    """
    allowed, _, number = _parse_answer(answer)
    return {str(p): number % p == 0 for p in allowed}


def is_held_out(number: int) -> bool:
    """Whether `number` is kept for evaluation. A fixed hash decides, so that no seed can leak it into training."""
    digest = hashlib.blake2b(f"dphrl-tiny:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _spaced(number: int) -> str:
    return " ".join(f"{number:0{NUM_DIGITS}d}")


def _factor_question(number: int) -> str:
    return f"FACTOR {_spaced(number)} ?"


def _divide_question(divisor: int, number: int) -> str:
    return f"DIVIDE {divisor} {_spaced(number)} ?"


def _work_out(number: int, divisor: int, rng: random.Random, *, slip: bool) -> str:
    """The written division of `number` by `divisor`; with `slip`, one that goes wrong at a random digit."""
    remainders, quotient = _long_division(number, divisor)
    if slip:
        exact = quotient
        # With divisor 11, a small slip near the end can leave the quotient intact: draw again until it is wrong.
        while quotient == exact:
            position = rng.randrange(NUM_DIGITS - 1)
            wrong = rng.choice([r for r in range(divisor) if r != remainders[position]])
            slipped, quotient = _long_division(number, divisor, slip_at=position, slip_to=wrong)
        remainders = slipped
    steps = " ".join(map(str, remainders))
    return f"{divisor} : {steps} \\boxed{{ {divisor} * {' '.join(map(str, quotient))} }}"


def _long_division(
    number: int, divisor: int, *, slip_at: int | None = None, slip_to: int = 0
) -> tuple[list[int], list[int]]:
    """Running remainders and quotient digits, first digit first; remainder `slip_at` becomes `slip_to`."""
    remainders: list[int] = []
    quotient: list[int] = []
    carried = 0
    for position, digit in enumerate(f"{number:0{NUM_DIGITS}d}"):
        digit_of_quotient, carried = divmod(10 * carried + int(digit), divisor)
        if position == slip_at:
            carried = slip_to
        quotient.append(digit_of_quotient)
        remainders.append(carried)
    return remainders, quotient


def _last_box(text: str) -> str | None:
    openings = list(_BOX_OPENING.finditer(text))
    if not openings:
        return None
    start = openings[-1].end()
    end = text.find("}", start)
    return None if end < 0 else text[start:end]


def _parse_answer(answer: str) -> tuple[tuple[int, ...], int | None, int]:
    """The divisors that count, the one that is asked for if any, and the number."""
    match = _ANSWER.fullmatch(answer)
    if match is None:
        raise ValueError(f"answer {answer!r} is not of this task: expected e.g. 'factor:04158' or 'divide:7:04158'")
    allowed, asked, number = match.groups()
    if asked is not None:
        return (int(asked),), int(asked), int(number)
    return (DIVISORS if allowed is None else tuple(map(int, allowed.split(",")))), None, int(number)
