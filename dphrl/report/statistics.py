"""The report's numbers: Pass@k curves, rates and step series of an arm, each with its interval of uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dphrl.evaluation.differences import Difference, compare
from dphrl.evaluation.estimators import pass_at_k
from dphrl.experiments.results import interval_over_seeds
from dphrl.report.runs import Arm, DatasetKey, Run, Summary

Floats = NDArray[np.float64]
# A curve over k is drawn at every k up to the first number; beyond it, at the second number of ks, evenly spaced on the
# log axis.
MAX_DENSE_K = 32
NUM_SPARSE_K = 24
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Band:
    """Values with the interval around each; low and high are None where there is none."""

    xs: Sequence[float]
    ys: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Rate:
    """One number of the summary table; the interval is over seeds, or over prompts for one seed."""

    mean: float
    low: float | None
    high: float | None


def trained_summaries(arm: Arm, dataset: DatasetKey) -> list[Summary]:
    """The newest evaluation on `dataset` of each run of the arm that has one; for a base, the evaluation at step 0."""
    steps = [(run, 0 if arm.is_base else run.last_evaluated_step) for run in arm.runs]
    found = [run.evaluations[step].get(dataset) for run, step in steps if step is not None]
    return [summary for summary in found if summary is not None]


def datasets_of(arms: Sequence[Arm]) -> list[DatasetKey]:
    """Every data set that any run was evaluated on, in the order of the first run that has it."""
    keys = [key for arm in arms for run in arm.runs for summaries in run.evaluations.values() for key in summaries]
    return list(dict.fromkeys(keys))


def pass_keys(summaries: Sequence[Summary]) -> list[str]:
    """The pass@k keys in the order of k."""
    keys = {key for summary in summaries for key in summary if key.startswith("pass@")}
    return sorted(keys, key=lambda key: int(key.removeprefix("pass@")))


def rate(summaries: Sequence[Summary], key: str) -> Rate | None:
    """Mean over seeds of one number of the evaluations; None unless every evaluation has it."""
    values = [summary.get(key) for summary in summaries]
    if not values or any(value is None for value in values):
        return None
    found = [float(value) for value in values if value is not None]
    if len(found) > 1:
        interval = interval_over_seeds(found)
        # An interval by Student's t has no bounds, but a share lies between 0 and 1.
        most = math.inf if key == "distinct_correct" else 1.0
        return Rate(interval["mean"], max(0.0, interval["low"]), min(most, interval["high"]))
    low, high = (summaries[0].get("intervals") or {}).get(key) or (None, None)
    return Rate(found[0], low, high)


def counts(summary: Summary) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(graded samples, correct ones) of every prompt."""
    rows = summary["per_prompt"]
    graded = np.array([row["num_samples"] for row in rows], dtype=np.int64)
    return graded, np.array([row["num_correct"] for row in rows], dtype=np.int64)


def shown_ks(num_samples: int) -> list[int]:
    """Every k up to num_samples, thinned out where there are more than a chart can show."""
    dense = list(range(1, min(num_samples, MAX_DENSE_K) + 1))
    if num_samples <= MAX_DENSE_K:
        return dense
    sparse = np.geomspace(MAX_DENSE_K, num_samples, NUM_SPARSE_K).round().astype(int)
    return sorted({*dense, *(int(k) for k in sparse)})


def pass_at_k_curve(summaries: Sequence[Summary]) -> Band | None:
    """Pass@k over k: for several seeds the mean and its interval over them, for one the bootstrap over prompts (95 %).

    None when no prompt was graded. A prompt with fewer than k graded samples is left out at that k.
    """
    per_seed = [counts(summary) for summary in summaries]
    if not per_seed or any(not len(graded) or not graded.max() for graded, _ in per_seed):
        return None
    ks = shown_ks(min(int(graded.max()) for graded, _ in per_seed))
    if len(per_seed) == 1:
        return _bootstrapped_curve(*per_seed[0], ks)
    ys, low, high = [], [], []
    for k in ks:
        values = [
            float(np.mean(pass_at_k(graded[graded >= k], correct[graded >= k], k))) for graded, correct in per_seed
        ]
        interval = interval_over_seeds(values)
        ys.append(interval["mean"])
        low.append(max(0.0, interval["low"]))
        high.append(min(1.0, interval["high"]))
    return Band(ks, ys, low, high)


def _bootstrapped_curve(graded: NDArray[np.int64], correct: NDArray[np.int64], ks: Sequence[int]) -> Band:
    counted = np.stack([graded >= k for k in ks], axis=1).astype(np.float64)
    passed = np.zeros_like(counted)
    for column, k in enumerate(ks):
        enough = graded >= k
        passed[enough, column] = pass_at_k(graded[enough], correct[enough], k)
    # One set of resamples for all k, so that the band is as smooth as the curve; in chunks, to bound memory.
    generator, num_prompts = np.random.default_rng(0), len(graded)
    means = []
    for _ in range(0, NUM_RESAMPLES, 100):
        drawn = generator.integers(num_prompts, size=(100, num_prompts))
        times = np.stack([np.bincount(row, minlength=num_prompts) for row in drawn]).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((times @ passed) / (times @ counted))
    low, high = np.nanquantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return Band(ks, (passed.sum(axis=0) / counted.sum(axis=0)).tolist(), low.tolist(), high.tolist())


def plane_points(arm: Arm, dataset: DatasetKey, keys: tuple[str, str]) -> list[tuple[int, float, float]]:
    """(step, x, y) of every evaluation that all of the arm's runs have, as the mean over seeds; step 0 is the base."""
    common = set.intersection(*(set(run.evaluations) for run in arm.runs))
    points = []
    for step in sorted(common):
        summaries = [run.evaluations[step].get(dataset) for run in arm.runs]
        present = [summary for summary in summaries if summary is not None]
        x, y = (rate(present, key) for key in keys)
        if len(present) == len(summaries) and x and y:
            points.append((step, x.mean, y.mean))
    return points


def series(run: Run, name: str) -> dict[int, float]:
    """One metric by step; without the steps whose value is missing or was not finite."""
    values = {int(record["step"]): record.get(name) for record in run.metrics}
    return {s: float(v) for s, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def tokens_per_second(run: Run) -> dict[int, float]:
    """Completion tokens over the whole step's duration."""
    tokens, seconds = series(run, "rollout/num_tokens"), series(run, "time/step_s")
    return {step: tokens[step] / seconds[step] for step in tokens if seconds.get(step)}


def over_seeds(per_seed: Sequence[Mapping[int, float]], window: int = 1) -> Band | None:
    """The mean at each step and its interval over seeds, each seed smoothed first; None without values.

    Steps that not every run has taken are left out, because the mean would jump there. Only several seeds give an
    interval.
    """
    smoothed = [smooth(values, window) if window > 1 else dict(values) for values in per_seed if values]
    if not smoothed:
        return None
    steps = sorted(set.intersection(*(set(values) for values in smoothed)))
    if len(smoothed) == 1:
        return Band(steps, [smoothed[0][step] for step in steps])
    intervals = [interval_over_seeds([values[step] for values in smoothed]) for step in steps]
    means, low, high = ([interval[key] for interval in intervals] for key in ("mean", "low", "high"))
    return Band(steps, means, low, high)


def largest(per_seed: Sequence[Mapping[int, float]], window: int = 1) -> Band | None:
    """The largest value over seeds and the `window` steps around each step, for metrics that are maxima themselves."""
    merged: dict[int, float] = {}
    for values in per_seed:
        for step, value in values.items():
            merged[step] = max(value, merged.get(step, value))
    if not merged:
        return None
    steps = sorted(merged)
    ys = np.array([merged[step] for step in steps])
    return Band(steps, [float(ys[first:end].max()) for first, end in _windows(steps, window)])


def smooth(values: Mapping[int, float], window: int) -> dict[int, float]:
    """Mean over the `window` steps around each step, over fewer at the ends; window 1 gives the values themselves."""
    sums = np.concatenate([[0.0], np.cumsum(list(values.values()))])
    ends = _windows(list(values), window)
    return {
        step: float(sums[end] - sums[first]) / (end - first) for step, (first, end) in zip(values, ends, strict=True)
    }


def _windows(steps: Sequence[int], window: int) -> list[tuple[int, int]]:
    """For each of the ascending steps, the indices where the stretch around it begins and ends. An even window counts
    as one more."""
    first = np.searchsorted(steps, np.asarray(steps) - window // 2, side="left")
    end = np.searchsorted(steps, np.asarray(steps) + window // 2, side="right")
    return list(zip(first.tolist(), end.tolist(), strict=True))


@dataclass(frozen=True)
class Kept:
    """Counts of prompts, one evaluation compared with the base of the same run. Solved: at least one correct sample."""

    num_prompts: int
    solved_by_base: int
    still_solved: int
    newly_solved: int


def kept_and_gained(run: Run, dataset: DatasetKey) -> Kept | None:
    """What the trained model keeps and gains on `dataset`; None unless base and trained model were both evaluated on
    the same prompts."""
    both = same_prompts(run, dataset)
    if both is None:
        return None
    before, after = ({row["prompt_id"]: row["num_correct"] > 0 for row in side["per_prompt"]} for side in both)
    still = sum(before[i] and after[i] for i in before)
    return Kept(len(before), sum(before.values()), still, sum(after.values()) - still)


def paired_changes(runs: Sequence[Run], dataset: DatasetKey) -> dict[str, Rate]:
    """Newest evaluation minus base by rate, prompt by prompt; of several runs their mean, with its interval over seeds.

    Beside the rates: `kept`, of what half of the base's samples solve the share that as many of the trained model's
    solve, and `itself`, the share that the base's other half solves. Empty without a run that has both evaluations.
    """
    columns: dict[str, list[Difference]] = {}
    for run in runs:
        both = same_prompts(run, dataset)
        if both is None:
            continue
        ks = [int(key.removeprefix("pass@")) for key in pass_keys(both)]
        changes = compare(both[0]["per_prompt"], both[1]["per_prompt"], ks)
        retention = changes.pop("retention")
        for key, change in changes.items():
            columns.setdefault(key, []).extend([change] if change else [])
        for key, name in (("kept", "model"), ("itself", "base")):
            columns.setdefault(key, []).extend([{"value": retention[name]}] if retention else [])
    return {key: _mean_of_changes(found) for key, found in columns.items() if found}


def _mean_of_changes(found: Sequence[Difference]) -> Rate:
    if len(found) == 1:
        return Rate(found[0]["value"], found[0].get("low"), found[0].get("high"))
    interval = interval_over_seeds([change["value"] for change in found])
    return Rate(interval["mean"], interval["low"], interval["high"])


def same_prompts(run: Run, dataset: DatasetKey) -> tuple[Summary, Summary] | None:
    """The run's base evaluation and its newest later one; None unless both are of the same prompts."""
    base = run.evaluations.get(0, {}).get(dataset)
    trained = run.evaluations.get(run.last_evaluated_step or -1, {}).get(dataset)
    if base is None or trained is None:
        return None
    asked = [{row["prompt_id"] for row in side["per_prompt"]} for side in (base, trained)]
    return (base, trained) if asked[0] == asked[1] else None
