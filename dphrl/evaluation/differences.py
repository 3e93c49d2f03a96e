"""What changed between two evaluations of the same prompts, prompt by prompt.

The question after training is the difference. Both models answered the same prompts, so the difference of their rates
is known better than the rates are: whether a prompt is easy or hard cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dphrl.evaluation.estimators import bootstrap_interval, pass_at_k

# The `per_prompt` rows of a summary: prompt_id, num_samples (graded), num_correct, and greedy where it was graded.
PromptRow = Mapping[str, Any]
Difference = dict[str, float]


def half_size(*evaluations: Sequence[PromptRow]) -> int:
    """m: half of the graded samples that nine of ten prompts have; 0 where they have fewer than two.

    Not of the prompt with the fewest: one prompt that the grader failed on would decide for all.
    """
    graded = sorted(row["num_samples"] for rows in evaluations for row in rows)
    return int(graded[len(graded) // 10] // 2) if graded else 0


def self_retention(rows: Sequence[PromptRow]) -> float | None:
    """Of the prompts that m of a model's samples solve, the share that m others of its samples solve too.

    It is what retention would be if nothing were lost. It is below 1 because a model that seldom solves a prompt
    misses it by chance. m is `half_size`; prompts with fewer than 2m graded samples are left out. The value is the
    exact mean over all ways to draw the two parts; None when m is 0 or no prompt is solved.
    """
    m = half_size(rows)
    if not m:
        return None
    solved, both = _halves([row for row in rows if row["num_samples"] >= 2 * m], m)
    return float(both.sum() / solved.sum()) if solved.sum() else None


def compare(base: Sequence[PromptRow], model: Sequence[PromptRow], ks: Sequence[int]) -> dict[str, Difference | None]:
    """The model minus the base, with `low` and `high` of the 95 % interval (bootstrap over prompts, paired).

    The keys are pass@k for each k, greedy, and retention. A prompt that lacks k graded samples or a graded greedy
    completion in one of the two is left out there. A value is None when no prompt is left.

    Retention is compared at m samples, half of what there is (`num_samples`; see `half_size`): of the prompts that m
    samples of the base solve, `model` is the share that m samples of the model solve, and `base` the share that m
    other samples of the base solve. Their difference is 0 when the model lost no more than the base loses to itself
    by chance.

    base, model: the same prompts, in any order. Raises KeyError for a prompt that the base lacks.
    """
    by_id = {row["prompt_id"]: row for row in base}
    pairs = [(by_id[row["prompt_id"]], row) for row in model]
    found: dict[str, Difference | None] = {}
    for k in ks:
        enough = [(b, m) for b, m in pairs if min(b["num_samples"], m["num_samples"]) >= k]
        found[f"pass@{k}"] = _difference([_passed(m, k) - _passed(b, k) for b, m in enough])
    graded = [
        (b["greedy"], m["greedy"]) for b, m in pairs if b.get("greedy") is not None and m.get("greedy") is not None
    ]
    found["greedy"] = _difference([float(m) - float(b) for b, m in graded])
    found["retention"] = _retention([b for b, _ in pairs], [m for _, m in pairs])
    return found


def _retention(base: Sequence[PromptRow], model: Sequence[PromptRow]) -> Difference | None:
    half = half_size(base, model)
    if not half:
        return None
    pairs = [(b, m) for b, m in zip(base, model, strict=True) if min(b["num_samples"], m["num_samples"]) >= 2 * half]
    solved, both = _halves([b for b, _ in pairs], half)
    if not solved.sum():
        return None
    kept = solved * np.array([_passed(m, half) for _, m in pairs])
    # Each prompt counts as often as m samples of the base solve it.
    change = np.divide(kept - both, solved, out=np.zeros_like(solved), where=solved > 0)
    difference = _difference(change, weights=solved)
    assert difference is not None
    shares = {"base": float(both.sum() / solved.sum()), "model": float(kept.sum() / solved.sum())}
    return {"num_samples": half, **shares, **difference}


def _halves(rows: Sequence[PromptRow], m: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each prompt: the chance that m of its samples solve it, and that m others solve it too.

    Two disjoint parts of m both fail as often as one part of 2m does, and the rest is inclusion and exclusion.
    """
    solved = np.array([_passed(row, m) for row in rows])
    either = np.array([_passed(row, 2 * m) for row in rows])
    return solved, 2 * solved - either


def _passed(row: PromptRow, k: int) -> float:
    return pass_at_k(row["num_samples"], row["num_correct"], k)


def _difference(values: Sequence[float] | NDArray[np.float64], weights: Any = None) -> Difference | None:
    if not len(values):
        return None
    interval = bootstrap_interval(values, weights=weights)
    assert interval is not None
    return {"value": float(np.average(values, weights=weights)), "low": interval[0], "high": interval[1]}
