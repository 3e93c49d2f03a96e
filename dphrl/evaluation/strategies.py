"""Where the probability mass of a policy lies: the share of each strategy, whether it fits, and how well it is done.

Pass@1 is the sum over strategies of share x selection x precision. *Share*: the part of the completions that take the
strategy. *Selection*: the part of these whose prompt the strategy fits. *Precision*: the part of those that are right.
A policy that learns to choose raises selection, one that learns to calculate raises precision, and one that collapses
moves share onto one strategy. `dphrl.rewards.strategies` says which strategies there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dphrl.rewards.strategies import strategies_that_fit, strategy_of
from dphrl.types import RolloutGroup

# Of one prompt and strategy: (graded samples, those that the strategy fits or None where no one knows, right ones).
StrategyCount = Sequence[int | None]
# One prompt's counts by strategy, without those that no sample takes.
PromptCounts = Mapping[str, StrategyCount]
# All strategies together, as a row of a table.
ALL = "all"


@dataclass(frozen=True)
class Part:
    """One strategy's part in Pass@1; selection and precision are None where they are unknown or there is no sample."""

    share: float
    selection: float | None
    precision: float | None
    right: float


def count_strategies(groups: Sequence[RolloutGroup], reward: str) -> list[dict[str, Any]] | None:
    """For each prompt what its row of a summary gets: `strategies` (counts) and, where it is known, `fitting` (names).

    A right completion fits its prompt by definition, even if its strategy usually does not, so that the counts add up
    to Pass@1. Samples that the grader failed on are left out. None for a reward whose task has no strategies.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        known = strategies_that_fit(reward, group.prompt.answer)
        counts: dict[str, list[int | None]] = {}
        for completion, result in zip(group.completions, group.results, strict=True):
            name = strategy_of(reward, completion.text, result, known)
            if name is None:
                return None
            if result.score is None:
                continue
            is_right = bool(result.score)
            samples, fitting, right = counts.get(name, [0, None if known is None else 0, 0])
            assert samples is not None
            assert right is not None
            if known is not None and fitting is not None:
                fitting += int(is_right or known.get(name, False))
            counts[name] = [samples + 1, fitting, right + int(is_right)]
        row: dict[str, Any] = {"strategies": dict(sorted(counts.items()))}
        if known is not None:
            row["fitting"] = [name for name, fits in known.items() if fits]
        rows.append(row)
    return rows


def split_pass_at_1(prompts: Sequence[PromptCounts]) -> dict[str, Part]:
    """Pass@1 taken apart by strategy, with all of them together as `ALL`; empty without a graded sample.

    Every prompt counts the same, as in Pass@1: with n graded samples, each of them counts 1/n. Then
    `sum(part.right) == Pass@1`, and share x selection x precision == right wherever all three are known.
    """
    graded = [counts for counts in prompts if any(count[0] for count in counts.values())]
    sums: dict[str, list[float]] = {}
    unknown: set[str] = set()
    for counts in graded:
        num_samples = sum(count[0] or 0 for count in counts.values())
        for name, (samples, fitting, right) in counts.items():
            for key in (name, ALL):
                total = sums.setdefault(key, [0.0, 0.0, 0.0])
                for place, number in enumerate((samples, fitting, right)):
                    total[place] += (number or 0) / num_samples / len(graded)
                if fitting is None:
                    unknown.add(key)
    parts = {}
    for name in sorted(sums, key=lambda key: (key == ALL, _order(key))):
        taken, fitting_share, right_share = sums[name]
        is_known = name not in unknown
        selection = fitting_share / taken if is_known and taken else None
        precision = right_share / fitting_share if is_known and fitting_share else None
        parts[name] = Part(taken, selection, precision, right_share)
    return parts


def _order(name: str) -> tuple[bool, int, str]:
    """Numbers by their value, then words."""
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
