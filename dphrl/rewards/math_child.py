"""What the math grader runs in its child process."""

from __future__ import annotations

from collections.abc import Callable

from dphrl.rewards.math_compare import compare
from dphrl.types import JsonDict


def make(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    """The handler of {"answer", "gold"}: {"status", "detail"}."""
    # Tables that the first comparison would build in every worker anew.
    compare(r"\frac{\sqrt{2}}{2}+\sin x", r"\sin x+2^{-1/2}")
    return _handle


def _handle(item: JsonDict) -> JsonDict:
    result = compare(item["answer"], item["gold"])
    return {"status": result.status.value, "detail": result.detail}
