"""What the math grader runs in its child process."""

from __future__ import annotations

from collections.abc import Callable

from dphrl.rewards.math_compare import compare
from dphrl.types import JsonDict


def make(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    """Make the handler of items {"answer", "gold"}; it returns {"status", "detail"}. `settings` has no effect."""
    # This comparison builds tables that otherwise every worker would build again in its first comparison.
    compare(r"\frac{\sqrt{2}}{2}+\sin x", r"\sin x+2^{-1/2}")
    return _handle


def _handle(item: JsonDict) -> JsonDict:
    result = compare(item["answer"], item["gold"])
    return {"status": result.status.value, "detail": result.detail}
