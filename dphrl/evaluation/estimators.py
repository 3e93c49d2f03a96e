"""What an evaluation reports: unbiased Pass@k, retention against the base, diversity of correct answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dphrl.types import RolloutGroup

# (prompt_id, n graded samples, c correct ones)
Count = tuple[str, int, int]


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64] | float: ...
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> NDArray[np.float64] | float:
    """The chance that k of n samples, drawn without replacement, include a correct one: 1 - C(n-c, k) / C(n, k).

    This is the unbiased estimator of arXiv 2107.03374. Integers give a float; arrays are broadcast and give an array.
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
    # This is computed as a product of k factors of at most 1: binomials of hundreds of samples overflow a float.
    missed = np.ones(n.shape, dtype=np.float64)
    for i in range(k):
        missed *= np.maximum(n - c - i, 0) / (n - i)
    passed = 1.0 - missed
    return float(passed) if passed.ndim == 0 else passed


def pass_curve(counts: Sequence[Count]) -> list[float]:
    """The mean Pass@k for k = 1, 2, ... up to the largest number of graded samples that a prompt has.

    A prompt with fewer than k graded samples is left out at that k.
    """
    n, c = (np.array([count[i] for count in counts], dtype=np.int64) for i in (1, 2))
    missed = np.ones(len(counts), dtype=np.float64)
    curve: list[float] = []
    for k in range(1, int(n.max(initial=0)) + 1):
        kept = n >= k
        n, c, missed = n[kept], c[kept], missed[kept]
        # This is the next factor of `pass_at_k`'s product, so the whole curve costs as much as its last point.
        missed = missed * (np.maximum(n - c - (k - 1), 0) / (n - (k - 1)))
        # The sum is the same as in `_mean`, so that a point of the curve equals its pass@k to the last digit.
        curve.append(sum((1.0 - missed).tolist()) / len(missed))
    return curve


def retention(base_correct: Sequence[int], model_correct: Sequence[int]) -> float | None:
    """Of the prompts that the base solves (>= 1 correct), the share that the model solves; None without such prompts.

    Both arguments are numbers of correct samples of the same prompts in the same order. Raises ValueError when their
    lengths differ.
    """
    if len(base_correct) != len(model_correct):
        raise ValueError(f"{len(base_correct)} prompts of the base against {len(model_correct)} of the model")
    kept = [model > 0 for base, model in zip(base_correct, model_correct, strict=True) if base > 0]
    return sum(kept) / len(kept) if kept else None


def count_groups(groups: Iterable[RolloutGroup]) -> list[Count]:
    """(prompt_id, n, c) of each group; samples that the grader failed on are in neither n nor c."""
    return [(g.prompt.prompt_id, sum(result.score is not None for result in g.results), g.num_correct) for g in groups]


def describe_samples(groups: Sequence[RolloutGroup], ks: Sequence[int]) -> dict[str, Any]:
    """What the completions show besides right and wrong; a value is None when there is nothing to average.

    statuses: number of completions by status. distinct_correct: mean number of different correct solutions of a
    prompt, compared in the reward's canonical form, or else as text without differences in white space. majority@k:
    the chance that the most frequent of k answers is right. entropy_mean: entropy of the sampled distribution in nats
    per token, estimated as the mean -log-prob of the sampled tokens.
    """
    correct = [{s for s, r in zip(group.solutions, group.results, strict=True) if r.score} for group in groups]
    votes = [
        [(answer, r.score) for answer, r in zip(group.answers, group.results, strict=True) if r.score is not None]
        for group in groups
    ]
    completions = [completion for group in groups for completion in group.completions]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    surprise = -sum(sum(completion.logprobs) for completion in completions)
    majorities = {f"majority@{k}": _mean([majority_at_k(v, k) for v in votes if len(v) >= k]) for k in ks if k > 1}
    statuses = Counter(str(result.status) for group in groups for result in group.results)
    return {
        "statuses": dict(sorted(statuses.items())),
        "distinct_correct": _mean([len(solutions) for solutions in correct]),
        **majorities,
        "completion_tokens_mean": num_tokens / len(completions) if completions else None,
        "entropy_mean": surprise / num_tokens if num_tokens else None,
    }


def majority_at_k(answers: Sequence[tuple[str, float]], k: int, *, num_draws: int = 200) -> float:
    """The chance that the most frequent answer among k of the (answer, score) samples has score 1.

    Tied answers have equal chances. The result is exact for k = n; else it is the mean over `num_draws` draws without
    replacement, which are the same at every call.
    """
    assert 1 <= k <= len(answers)
    rng = random.Random(k)
    draws = [answers] if k == len(answers) else [rng.sample(answers, k) for _ in range(num_draws)]
    total = 0.0
    for draw in draws:
        votes = Counter(answer for answer, _ in draw)
        most = max(votes.values())
        scores = dict(draw)
        winners = [scores[answer] for answer, count in votes.items() if count == most]
        total += sum(winners) / len(winners)
    return total / len(draws)


def bootstrap_interval(
    values: ArrayLike, *, weights: ArrayLike | None = None, level: float = 0.95, num_resamples: int = 2000
) -> tuple[float, float] | None:
    """Percentile interval of the (weighted) mean over resampled prompts; None when all weights are 0.

    values, weights: one per prompt. Every call makes the same draws.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if not w.sum():
        return None
    drawn = np.random.default_rng(0).integers(len(x), size=(num_resamples, len(x)))
    totals = w[drawn].sum(axis=1)
    # A resample in which every prompt has weight 0 has no mean, so it is left out.
    means = (x * w)[drawn].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def summarize(
    dataset: str,
    split: str,
    counts: Sequence[Count],
    ks: Sequence[int],
    greedy: float | None,
    base_counts: Sequence[Count] | None = None,
) -> dict[str, Any]:
    """One entry of the `eval` output; `describe_samples` adds what counts cannot tell.

    greedy: the share of prompts that the greedy completion solves. base_counts: the base's counts on the same prompts,
    in any order. The entry's `intervals` are 95 % bootstraps over prompts, (low, high) or None for each rate. A prompt
    with fewer than k graded samples is left out of pass@k, which is None when no prompt is left. Raises ValueError for
    repeated prompts, or for base_counts of other prompts.
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
        # Samples that the grader failed on; no rate below includes them.
        "num_ungraded": sum(num_samples - n for _, n, _ in counts),
        "greedy": greedy,
    }
    intervals: dict[str, tuple[float, float] | None] = {}
    for k in ks:
        passed = [pass_at_k(n, c, k) for _, n, c in counts if n >= k]
        result[f"pass@{k}"] = _mean(passed)
        intervals[f"pass@{k}"] = bootstrap_interval(passed)
    result["pass_curve"] = pass_curve(counts)
    result["retention"] = None
    if base_counts is not None:
        base = _base_of_the_same_prompts(dataset, base_counts, correct)
        result["retention"] = retention(base, list(correct.values()))
        kept, solved = [c > 0 for c in correct.values()], [c > 0 for c in base]
        intervals["retention"] = bootstrap_interval(kept, weights=solved)
    result["intervals"] = intervals
    result["per_prompt"] = [{"prompt_id": i, "num_samples": n, "num_correct": c} for i, n, c in counts]
    return result


def _base_of_the_same_prompts(dataset: str, base_counts: Sequence[Count], correct: Mapping[str, int]) -> list[int]:
    """The base's correct samples in the order of `correct`."""
    base = {prompt_id: c for prompt_id, _, c in base_counts}
    if base.keys() != correct.keys():
        raise ValueError(
            f"{dataset}: the base was evaluated on other prompts ({len(base.keys() - correct.keys())} only "
            f"there, {len(correct.keys() - base.keys())} missing); evaluate both with the same config"
        )
    return [base[prompt_id] for prompt_id in correct]
