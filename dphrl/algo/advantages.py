"""Group-relative advantages: a completion is judged against its siblings of the same prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Added to the standard deviation, as GRPO implementations do; matters only for spreads that are numerical noise.
STD_EPSILON = 1e-6


def group_advantages(scores: Sequence[float | None], mode: str) -> list[float | None]:
    """Advantage of each completion of one group; None (an infrastructure error) stays None and counts nowhere.

    group_normalized: (s - mean) / (std + eps), sample standard deviation (GRPO). mean_only: s - mean (Dr.GRPO,
    arXiv 2503.20783). leave_one_out: s - mean of the others (RLOO, arXiv 2402.14740). A group with fewer than
    two graded completions, or without variance, gets zeros.
    """
    graded = [score for score in scores if score is not None]
    if len(graded) < 2:
        return [None if score is None else 0.0 for score in scores]
    advantage = _MODES[mode](graded)
    return [None if score is None else advantage(score) for score in scores]


def _group_normalized(graded: list[float]) -> Callable[[float], float]:
    mean = sum(graded) / len(graded)
    std = math.sqrt(sum((score - mean) ** 2 for score in graded) / (len(graded) - 1))
    return lambda score: (score - mean) / (std + STD_EPSILON)


def _mean_only(graded: list[float]) -> Callable[[float], float]:
    mean = sum(graded) / len(graded)
    return lambda score: score - mean


def _leave_one_out(graded: list[float]) -> Callable[[float], float]:
    total, others = sum(graded), len(graded) - 1
    return lambda score: score - (total - score) / others


_MODES = {"group_normalized": _group_normalized, "mean_only": _mean_only, "leave_one_out": _leave_one_out}


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to max_tokens - buffer_tokens, then down a line to -1 at max_tokens (DAPO, arXiv 2503.14476, eq. 13)."""
    if not buffer_tokens:
        return 0.0
    return -min(1.0, max(0, num_tokens - (max_tokens - buffer_tokens)) / buffer_tokens)
