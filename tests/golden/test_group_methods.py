"""Advantages of other papers against numbers worked out by hand in the comments."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dphrl.algo.advantages import GroupFields, group_advantages


def check(
    expected: list[float | None], scores: list[float | None], name: str, fields: Any = None, **params: Any
) -> None:
    got = group_advantages(scores, name, fields, **params)
    # 1e-4: the normalised ones have 1e-6 beside a standard deviation of 0.1 or more.
    assert [None if a is None else pytest.approx(a, abs=1e-4) for a in expected] == got


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 0, 0, 0], [3, -1, -1, -1]),  # mean 1/4: (3/4) / (1/4), (-1/4) / (1/4)
        ([1, 1, 0, 0], [1, 1, -1, -1]),  # mean 1/2
        ([1, 1, 1, 0], [1 / 3, 1 / 3, 1 / 3, -1]),  # mean 3/4: (1/4) / (3/4)
        ([1, 1, 1], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),  # no success: mean 0
        ([1, None, 0], [1, None, -1]),  # the failed item leaves mean 1/2
        ([1, None, None], [0, None, None]),
        # mean (1 - 0.5 - 0.2 - 0.1) / 4 = 1/20, below 1/4, so 1/4 divides: 0.95 x 4, -0.55 x 4, ...
        ([1, -0.5, -0.2, -0.1], [3.8, -2.2, -1.0, -0.6]),
        ([0, -0.5], [0, 0]),  # all wrong, one of them too long: mean -1/4
    ],
)
def test_maxrl(scores: list[float | None], expected: list[float | None]) -> None:
    check(expected, scores, "maxrl")


@pytest.mark.parametrize(
    ("k", "scores", "expected"),
    [
        # n = 4, k = 2: each of the 3 others is the best of 1 with 1/3. A right one beats 3, 2, 1 or 0 wrong ones by 1.
        (2, [1, 0, 0, 0], [2 * 3 / 3, 0, 0, 0]),
        (2, [1, 1, 0, 0], [2 * 2 / 3, 2 * 2 / 3, 0, 0]),
        (2, [1, 1, 1, 0], [2 * 1 / 3, 2 * 1 / 3, 2 * 1 / 3, 0]),
        (2, [1, 1, 1, 1], [0, 0, 0, 0]),
        (2, [0, 0, 0, 0], [0, 0, 0, 0]),
        # k = 3: both others of a set of 3 have to be wrong: of C(3, 2) = 3 pairs 3, 1 or 0 are.
        (3, [0, 1, 0, 0], [0, 3 * 3 / 3, 0, 0]),
        (3, [0, 1, 1, 0], [0, 3 * 1 / 3, 3 * 1 / 3, 0]),
        (3, [1, 1, 1, 0], [0, 0, 0, 0]),
        # Of the 3 sets {1, 1/2}, {1, 0}, {1/2, 0} the best adds 1/2 and 1, the second 1/2; times n = 3.
        (2, [1, 0.5, 0], [3 * 1.5 / 3, 3 * 0.5 / 3, 0]),
        # The failed item leaves n = 3 and one set of 3: the right one adds 1 to it, times 3. With n = 2 there is none.
        (3, [1, None, 0, 0], [3, None, 0, 0]),
        (3, [1, None, None, 0], [0, None, None, 0]),
        # k = 1 is leave-one-out: 1 - 1/3, 0 - 2/3.
        (1, [1, 1, 0, 0], [2 / 3, 2 / 3, -2 / 3, -2 / 3]),
        (1, [1, None], [0, None]),
    ],
)
def test_pkpo(k: int, scores: list[float | None], expected: list[float | None]) -> None:
    check(expected, scores, "pkpo", k=k)


@pytest.mark.parametrize(
    ("params", "scores", "expected"),
    [
        ({}, [1, 0, None, 1], [0.1, -1, None, 0.1]),
        ({"positive_weight": 0}, [1, 0], [0, -1]),  # NSR
        ({"positive_weight": 1, "negative_weight": 0}, [1, 0], [1, 0]),  # PSR
        ({}, [1, 1], [0.1, 0.1]),  # nothing is compared
        ({}, [0, 0], [-1, -1]),
        ({}, [None, 0], [None, -1]),
        ({"positive_weight": 0.5}, [0.75], [0.125]),  # 0.5 x 3/4 - 1/4
        ({}, [-0.5], [-1.55]),  # wrong and too long: -0.05 - 1.5
    ],
)
def test_w_reinforce(params: Any, scores: list[float | None], expected: list[float | None]) -> None:
    check(expected, scores, "w_reinforce", **params)


def logprobs(*values: float) -> GroupFields:
    return {"logprobs": lambda: values}


def test_unlikeliness() -> None:
    # Log-probs -1, -3, -2, -4 have ranks 0, 2, 1, 3, so 0.4 x (4, 2, 3, 1) / 4 = 0.4, 0.2, 0.3, 0.1 is taken off what
    # is paid: 0.6, 0.8, 0 (wrong), 0.9. Mean 0.575, squared deviations .000625 + .050625 + .330625 + .105625 = .4875,
    # / 3 = .1625.
    expected = [d / math.sqrt(0.1625) for d in (0.025, 0.225, -0.575, 0.325)]
    check([*expected], [1, 1, 0, 1], "unlikeliness", logprobs(-1, -3, -2, -4), beta=0.4)


def test_equally_likely_completions_are_paid_the_same() -> None:
    # The likeliest two, 1e-6 apart as engines compute them, share rank 1/2: 1 - (3 - 1/2) / 3 = 1/6 each. The wrong one
    # has 0: mean 1/9, deviations 1/18, 1/18, -1/9, squares 6/324, / 2 = 1/108.
    expected = [d * math.sqrt(108) for d in (1 / 18, 1 / 18, -1 / 9)]
    check([*expected], [1, 1, 0], "unlikeliness", logprobs(-2.0, -2.000001, -5.0), beta=1.0)


def test_an_ungraded_completion_has_no_rank() -> None:
    # Ranks 1 and 0 of two: 1/4 x (2 - 1) / 2 = 1/8 is taken off, 7/8 and 0 are paid, whatever they are: +-sqrt(1/2).
    half = math.sqrt(0.5)
    check([half, None, -half], [1, None, 0], "unlikeliness", logprobs(-3.0, -2.0, -1.0))
    check([0, 0], [1, 1], "unlikeliness", logprobs(-3.0, -2.0))
    check([0, 0], [0, 0], "unlikeliness", logprobs(-3.0, -2.0))
    check([0, None], [1, None], "unlikeliness", logprobs(-3.0, -2.0))


def test_what_is_not_paid_is_not_discounted() -> None:
    # Ranks 0, 1, 2. A third is taken off the right one, nothing off the wrong ones, which were too long: -1/2, -1, 2/3.
    # Mean -5/18, deviations -4/18, -13/18, 17/18, squares (16 + 169 + 289) / 324 = 474/324, / 2 = 237/324.
    expected = [d / math.sqrt(237) for d in (-4, -13, 17)]
    check([*expected], [-0.5, -1, 1], "unlikeliness", logprobs(-1.0, -2.0, -3.0), beta=1.0)


def clusters(*keys: str) -> GroupFields:
    return {"clusters": lambda: keys}


def test_uniqueness() -> None:
    # mean 3/4, squared deviations 3 x 1/16 + 9/16 = 3/4, / 3 = 1/4, std 1/2: 1/2, 1/2, 1/2, -3/2, two in one cluster.
    check([0.25, 0.25, 0.5, -1.5], [1, 1, 1, 0], "uniqueness", clusters("7", "7", "11", "x"))
    root = math.sqrt(0.5) / 2
    check([root, root, 0.5, -1.5], [1, 1, 1, 0], "uniqueness", clusters("7", "7", "11", "x"), alpha=0.5)
    # Wrong ones in one cluster share too: 3/2, -1/2, -1/2, -1/2.
    check([1.5, -0.25, -0.25, -0.5], [1, 0, 0, 0], "uniqueness", clusters("7", "x", "x", "y"))
    # The completion whose grader failed is of no cluster: mean 2/3, deviations 1/3, 1/3, -2/3, std sqrt(1/3).
    third = 1 / math.sqrt(3)
    check([third, None, third, -2 * third], [1, None, 1, 0], "uniqueness", clusters("7", "7", "11", "7 wrong"))
    check([0, 0], [1, 1], "uniqueness", clusters("7", "7"))
    check([0, 0], [0, 0], "uniqueness", clusters("x", "y"))
    check([0, None], [1, None], "uniqueness", clusters("x", "y"))
