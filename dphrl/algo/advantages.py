"""Group-relative advantages: a completion is compared with the other completions of its prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dphrl.algo.registry import METHODS, Registry, one_line

# Takes the graded scores of one group, at least two, as a tuple, and returns their advantages in the same order.
# It is made anew for each group, so it cannot keep anything from one to the next.
AdvantageFn = Callable[[Sequence[float]], Sequence[float]]

# GRPO implementations add this to the standard deviation. It matters only when the spread is numerical noise.
STD_EPSILON = 1e-6

_ADVANTAGES: Registry[AdvantageFn] = METHODS["advantage"]

# Decorator: register_advantage("mine") makes `factory(**params) -> AdvantageFn` available to configurations.
register_advantage = _ADVANTAGES.register


def get_advantage(name: str, **params: Any) -> AdvantageFn:
    """The registered advantage `name` with its parameters.

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return _ADVANTAGES.build(name, params)


def group_advantages(scores: Sequence[float | None], name: str, /, **params: Any) -> list[float | None]:
    """Advantage of each completion of one group by the registered method `name`.

    A score of None (an infrastructure error) stays None and is not passed to the method. A group with fewer than two
    graded completions gets zeros, because there is nothing to compare. Raises ValueError as `get_advantage` does, and
    when the method fails or does not return one finite number for each score.
    """
    graded = [score for score in scores if score is not None]
    if len(graded) < 2:
        return [None if score is None else 0.0 for score in scores]
    advantages = get_advantage(name, **params)
    # A tuple of its own: a method that sorts what it is given must not change whose score is whose.
    values = _finite_numbers(name, advantages, tuple(graded))
    given = iter(values)
    return [None if score is None else next(given) for score in scores]


def _finite_numbers(name: str, advantages: AdvantageFn, scores: tuple[float, ...]) -> list[float]:
    try:
        made: Any = advantages(scores)
    except Exception as error:
        raise ValueError(f"advantage {name!r} failed at the scores {list(scores)} ({one_line(error)})") from error
    try:
        values = [math.nan if isinstance(value, str) else float(value) for value in made]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != len(scores) or not all(map(math.isfinite, values)):
        raise ValueError(
            f"advantage {name!r} made {made!r} of the scores {list(scores)}; return one finite number for each"
        )
    return values


@register_advantage("group_normalized")
def _group_normalized() -> AdvantageFn:
    """(score - mean) / standard deviation of the group (GRPO, arXiv 2402.03300)."""

    def advantages(scores: Sequence[float]) -> list[float]:
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
        return [(score - mean) / (std + STD_EPSILON) for score in scores]

    return advantages


@register_advantage("mean_only")
def _mean_only() -> AdvantageFn:
    """score - mean of the group: hard and easy prompts keep their scale (Dr.GRPO, arXiv 2503.20783)."""

    def advantages(scores: Sequence[float]) -> list[float]:
        mean = sum(scores) / len(scores)
        return [score - mean for score in scores]

    return advantages


@register_advantage("leave_one_out")
def _leave_one_out() -> AdvantageFn:
    """score - mean of the other completions: an unbiased baseline (RLOO, arXiv 2402.14740)."""

    def advantages(scores: Sequence[float]) -> list[float]:
        total, others = sum(scores), len(scores) - 1
        return [score - (total - score) / others for score in scores]

    return advantages


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to max_tokens - buffer_tokens, then falling linearly to -1 at max_tokens (DAPO, arXiv 2503.14476, eq. 13).

    Without a buffer (0 tokens) there is no penalty.
    """
    if not buffer_tokens:
        return 0.0
    return -min(1.0, max(0, num_tokens - (max_tokens - buffer_tokens)) / buffer_tokens)
