"""What an evaluation reports: unbiased Pass@k, retention against the base, diversity of correct answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dphrl.types import RewardStatus, RolloutGroup

# (prompt_id, n graded samples, c correct ones)
Count = tuple[str, int, int]


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64] | float: ...
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64] | float:
    """Chance that k of the n samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374. Integers give a float; arrays are broadcast and give an array.
    Raises ValueError unless all are integers with 1 <= k <= n and 0 <= c <= n.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    for name, values in (("num_samples", n), ("num_correct", c), ("k", np.asarray(k))):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be of integers, not {values.dtype}")
    if k < 1 or (n < k).any():
        raise ValueError(f"k={k} needs 1 <= k <= num_samples (smallest num_samples: {n.min() if n.size else 0})")
    if ((c < 0) | (c > n)).any():
        raise ValueError("num_correct must lie between 0 and num_samples")
    # As a product of k factors below 1: binomials of hundreds of samples overflow a float.
    missed = np.ones(n.shape, dtype=np.float64)
    for i in range(k):
        missed *= np.maximum(n - c - i, 0) / (n - i)
    passed = 1.0 - missed
    return float(passed) if passed.ndim == 0 else passed


def retention(base_correct: Sequence[int], model_correct: Sequence[int]) -> float | None:
    """Of the prompts the base solves (>= 1 correct), the share still solved; None if it solves none.

    The two count correct samples of the same prompts in the same order; ValueError when their lengths differ.
    """
    if len(base_correct) != len(model_correct):
        raise ValueError(f"{len(base_correct)} prompts of the base against {len(model_correct)} of the model")
    kept = [model > 0 for base, model in zip(base_correct, model_correct, strict=True) if base > 0]
    return sum(kept) / len(kept) if kept else None


def count_groups(groups: Iterable[RolloutGroup]) -> list[Count]:
    """(prompt_id, n, c) of each group; what the grader failed on is in neither n nor c."""
    return [(g.prompt.prompt_id, sum(result.score is not None for result in g.results), g.num_correct) for g in groups]


def distinct_correct(groups: Sequence[RolloutGroup]) -> float | None:
    """Mean number per prompt of different correct solutions, by the reward's canonical form of each, or else by text
    with white space aside; None without prompts."""
    numbers = []
    for group in groups:
        graded = zip(group.completions, group.results, strict=True)
        solutions = {
            result.solution or " ".join(c.text.split()) for c, result in graded if result.status is RewardStatus.CORRECT
        }
        numbers.append(len(solutions))
    return sum(numbers) / len(numbers) if numbers else None


def summarize(
    dataset: str,
    split: str,
    counts: Sequence[Count],
    ks: Sequence[int],
    greedy: float | None,
    base_counts: Sequence[Count] | None = None,
    distinct_correct: float | None = None,
) -> dict[str, Any]:
    """One entry of the `eval` output.

    greedy: share of prompts solved by the greedy completion. base_counts: the base's on the same prompts, in
    any order. A prompt with fewer than k graded samples is left out of pass@k, which is None when that
    leaves no prompt. Raises ValueError for repeated prompts, or base_counts of other prompts.
    """
    correct = {prompt_id: c for prompt_id, _, c in counts}
    if len(correct) != len(counts):
        raise ValueError(f"{dataset}: {len(counts) - len(correct)} prompts are counted twice")
    num_samples = max((n for _, n, _ in counts), default=0)
    result: dict[str, Any] = {
        "dataset": dataset,
        "split": split,
        "num_prompts": len(counts),
        "num_samples": num_samples,
        # Samples the grader failed on: they are in no rate below.
        "num_ungraded": sum(num_samples - n for _, n, _ in counts),
        "greedy": greedy,
    }
    for k in ks:
        enough = [(n, c) for _, n, c in counts if n >= k]
        result[f"pass@{k}"] = float(np.mean([pass_at_k(n, c, k) for n, c in enough])) if enough else None
    result["retention"] = _retention(dataset, base_counts, correct) if base_counts is not None else None
    result["distinct_correct"] = distinct_correct
    result["per_prompt"] = [{"prompt_id": i, "num_samples": n, "num_correct": c} for i, n, c in counts]
    return result


def _retention(dataset: str, base_counts: Sequence[Count], correct: dict[str, int]) -> float | None:
    base = {prompt_id: c for prompt_id, _, c in base_counts}
    if base.keys() != correct.keys():
        raise ValueError(
            f"{dataset}: the base was evaluated on other prompts ({len(base.keys() - correct.keys())} only "
            f"there, {len(correct.keys() - base.keys())} missing); evaluate both with the same config"
        )
    return retention(list(base.values()), [correct[prompt_id] for prompt_id in base])
