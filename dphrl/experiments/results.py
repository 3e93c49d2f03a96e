"""What the finished runs of a suite show together: rates with intervals over seeds, and whether a claim holds.

Everything here is computed from rows. There is one for each run and data set, with the correct samples of every prompt.
The committed results files carry their rows, so that each figure in them can be recomputed.
"""

from __future__ import annotations

import json
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dphrl.evaluation.estimators import bootstrap_interval, pass_at_k, retention
from dphrl.experiments.packing import pack_strategies
from dphrl.outputs import save_output

BASE_ARM = "base"
# Kinds of algorithms, by what they do for diversity. The paper's claims are about the third, beside the first two.
PLAIN, PENALISED, REHEARSING, OTHER = "plain", "penalised", "rehearsing", "other"
# Two-sided 95 % quantiles: the normal one, and Student's t by degrees of freedom.
_NORMAL = 1.95996
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
DOMAINS = ("in_domain", "out_of_domain")
# Figures that cannot be computed from the counts, so rows carry them.
_CARRIED = ("greedy", "distinct_correct", "entropy_mean", "completion_tokens_mean")
# What a suite says of itself and its results repeat: see `about` in dphrl.experiments.suite.
ABOUT = ("methods", "expected")

Row = Mapping[str, Any]
Results = dict[str, Any]
Cell = dict[str, float]


def rows_of(arm: str, seed: int, evaluation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set of one evaluation, as a run's eval/*.json holds it; the first is the training domain."""
    rows = []
    for place, summary in enumerate(evaluation):
        carried = [*(key for key in summary if key.startswith("majority@")), *_CARRIED]
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "domain": DOMAINS[place > 0],
                "dataset": summary["dataset"],
                "num_samples": summary["num_samples"],
                "num_graded": [prompt["num_samples"] for prompt in summary["per_prompt"]],
                "num_correct": [prompt["num_correct"] for prompt in summary["per_prompt"]],
                **{key: summary[key] for key in carried if summary.get(key) is not None},
                **pack_strategies(summary["per_prompt"], is_base=arm == BASE_ARM),
            }
        )
    return rows


def add_up(suite: str, rows: Sequence[Row], ks: Sequence[int], kinds: Mapping[str, str]) -> Results:
    """The results: for each arm and domain, the mean and interval of each rate over seeds, and the rows behind them.

    rows: those of every run, and those of the base, which is an arm of its own. kinds: what each trained arm does for
    diversity. Out of domain, several data sets count as their mean. The interval is Student's 95 % over seeds; for one
    seed on one data set it is the bootstrap over prompts. `predict_low` and `predict_high` are the interval in which
    one more seed is expected. That seed would have other prompts, so the interval is never narrower than the sampling
    error over prompts, even when the measured seeds are very close to each other.
    """
    arms = {arm: _summarize_arm(arm, rows, ks) for arm in dict.fromkeys([BASE_ARM, *(row["arm"] for row in rows)])}
    return {
        "suite": suite,
        "seeds": sorted({row["seed"] for row in rows}),
        "k": list(ks),
        "kinds": {arm: kind for arm, kind in kinds.items() if arm in arms},
        "arms": arms,
        "rows": [dict(row) for row in rows],
    }


def merge(results: Results, others: Results) -> Results:
    """The runs of both files together. A run that both have is taken from `results`. Both must be of the same suite."""
    assert results["suite"] == others["suite"]
    ours = {(row["arm"], row["seed"]) for row in results["rows"]}
    rows = [*results["rows"], *(row for row in others["rows"] if (row["arm"], row["seed"]) not in ours)]
    kinds = {**others["kinds"], **results["kinds"]}
    order = [BASE_ARM, *kinds]
    rows.sort(key=lambda row: (order.index(row["arm"]), row["seed"]))
    merged = add_up(results["suite"], rows, [k for k in results["k"] if k in others["k"]], kinds)
    return merged | {key: {**others, **results}[key] for key in ABOUT if key in {**others, **results}}


def recompute(results: Results) -> Results:
    """The same results from their rows alone."""
    recomputed = add_up(results["suite"], results["rows"], results["k"], results["kinds"])
    return recomputed | {key: results[key] for key in ABOUT if key in results}


def read_results(path: Path) -> Results:
    """Read a results file. Raises ValueError when the file is missing or holds no results."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as results of a suite: {error}") from None
    if not isinstance(found, dict) or {"suite", "seeds", "k", "kinds", "arms", "rows"} - found.keys():
        raise ValueError(f"{path}: holds no results of a suite; name the results.json of one")
    return found


def write_results(path: Path, results: Results) -> None:
    """Write JSON with a line for each arm and row, so that the file is small and a diff is readable.

    Raises InputError when it cannot be written.
    """

    def lines(entries: Iterable[str]) -> str:
        return ",\n  ".join(entries)

    keys = ["suite", "seeds", "k", "kinds", *(key for key in ABOUT if key in results)]
    head = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in keys]
    arms = lines(f"{json.dumps(arm)}: {json.dumps(_rounded(value))}" for arm, value in results["arms"].items())
    rows = lines(json.dumps(_rounded(row)) for row in results["rows"])
    parts = [*head, f'"arms": {{\n  {arms}\n }}', f'"rows": [\n  {rows}\n ]']
    save_output(path, "{" + ",\n ".join(parts) + "\n}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 5) if isinstance(value, float) else value


# -------------------------------------------------------------------------------------------- rates


def _summarize_arm(arm: str, rows: Sequence[Row], ks: Sequence[int]) -> dict[str, dict[str, Cell]]:
    found: dict[str, dict[str, Cell]] = {}
    for domain in DOMAINS:
        mine = [row for row in rows if row["arm"] == arm and row["domain"] == domain]
        keys = [*(f"pass@{k}" for k in ks), "retention", *dict.fromkeys(k for row in mine for k in row if "@" in k)]
        for key in [*keys, *_CARRIED]:
            by_seed = values_by_seed(rows, arm, domain, key)
            if by_seed:
                alone = _interval_over_prompts(rows, mine[0], key) if len(mine) == 1 else None
                error = _error_over_prompts(rows, mine, key)
                found.setdefault(domain, {})[key] = interval_over_seeds(list(by_seed.values()), alone, error)
    return found


def values_by_seed(rows: Sequence[Row], arm: str, domain: str, key: str) -> dict[int, float]:
    """One rate of an arm by seed, as the mean over the domain's data sets; empty unless every seed has the rate."""
    values: dict[int, list[float | None]] = {}
    for row in rows:
        if row["arm"] == arm and row["domain"] == domain:
            values.setdefault(row["seed"], []).append(_rate(rows, row, key))
    means = {
        seed: statistics.fmean([v for v in of_seed if v is not None] or [math.nan]) for seed, of_seed in values.items()
    }
    return {} if any(math.isnan(mean) for mean in means.values()) else means


def _rate(rows: Sequence[Row], row: Row, key: str) -> float | None:
    if key.startswith("pass@"):
        values = _passes(row, int(key.removeprefix("pass@")))
        return float(values.mean()) if len(values) else None
    if key == "retention":
        base = base_of(rows, row)
        return None if base is None else retention(base["num_correct"], row["num_correct"])
    return row.get(key)


def _interval_over_prompts(rows: Sequence[Row], row: Row, key: str) -> tuple[float, float] | None:
    values = values_of_prompts(rows, row, key)
    return None if values is None else bootstrap_interval(values)


def _error_over_prompts(rows: Sequence[Row], mine: Sequence[Row], key: str) -> float:
    """Standard error of one seed's rate that comes from its choice of prompts, as the root mean square over seeds."""
    variances: dict[int, list[float]] = {}
    for row in mine:
        values = values_of_prompts(rows, row, key)
        if values is not None and len(values) > 1:
            variances.setdefault(row["seed"], []).append(float(values.var(ddof=1)) / len(values))
    of_seeds = [sum(of_sets) / len(of_sets) ** 2 for of_sets in variances.values()]
    return math.sqrt(statistics.fmean(of_seeds)) if of_seeds else 0.0


def values_of_prompts(rows: Sequence[Row], row: Row, key: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """The values, one per prompt, whose mean is the row's rate; None for a rate that is no such mean."""
    if key.startswith("pass@"):
        return _passes(row, int(key.removeprefix("pass@")))
    if key == "retention" and (base := base_of(rows, row)) is not None:
        return np.asarray(np.array(row["num_correct"])[np.array(base["num_correct"]) > 0] > 0, dtype=np.float64)
    return None


def _passes(row: Row, k: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Pass@k of every prompt that has at least k graded samples."""
    graded, correct = np.array(row["num_graded"], dtype=int), np.array(row["num_correct"], dtype=int)
    return np.asarray(pass_at_k(graded[graded >= k], correct[graded >= k], k), dtype=np.float64)


def base_of(rows: Sequence[Row], row: Row) -> Row | None:
    """The base's row on the same prompts; None if there is none or `row` is the base's own."""
    if row["arm"] == BASE_ARM:
        return None
    same = ("seed", "domain", "dataset")
    return next((r for r in rows if r["arm"] == BASE_ARM and all(r[key] == row[key] for key in same)), None)


def interval_over_seeds(
    values: Sequence[float], of_one: Sequence[float] | None = None, least_error: float = 0.0
) -> Cell:
    """The mean, Student's 95 % interval and the 95 % prediction interval of the values.

    A single value has no prediction interval, and its interval is `of_one`, or else has no width. least_error: the
    smallest standard error that the prediction interval may assume.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        low, high = of_one or (mean, mean)
        return {"mean": mean, "low": low, "high": high}
    n, spread = len(values), statistics.stdev(values)
    # Beyond the table, the first term of the expansion about the normal quantile is at most 0.014 too small.
    t = _STUDENT_T[n - 2] if n - 2 < len(_STUDENT_T) else _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * (n - 1))
    half, predicted = t * spread / math.sqrt(n), max(t * spread, _NORMAL * least_error) * math.sqrt(1 + 1 / n)
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "predict_low": mean - predicted,
        "predict_high": mean + predicted,
    }


# -------------------------------------------------------------------------------------------- claims


def compared(results: Results, arm: str, domain: str, combine: Callable[..., float], *keys: tuple[str, str]) -> Cell:
    """Mean and interval over seeds of `combine(value, ...)`, with the rate of each (arm, key) for a seed.

    An empty arm name in `keys` means `arm`. Rates are combined seed by seed: arms of one seed share prompts, base and
    reference samples, so their difference varies less over seeds than the rates do. Empty without a finite value.
    """
    columns = [values_by_seed(results["rows"], name or arm, domain, key) for name, key in keys]
    shared = [seed for seed in results["seeds"] if all(seed in column for column in columns)]
    values = [combine(*(column[seed] for column in columns)) for seed in shared]
    finite = [value for value in values if math.isfinite(value)]
    return interval_over_seeds(finite) if finite else {}


def claims(results: Results) -> list[dict[str, Any]]:
    """The paper's claims about every trained arm, with the figures that decide them, per domain.

    Each has `arm`, `claim`, `domain`, `value` (mean, low and high over seeds) and `bound`. `holds` says whether the
    mean is as claimed, `is_sure` whether the whole interval is. The list is empty without an arm named grpo.
    Methods of other papers, and controls, must do what rehearsing arms must; no claim is made about who is above whom.
    """
    kinds = results["kinds"]
    if "grpo" not in kinds:
        return []
    k = 16 if 16 in results["k"] else max(results["k"])
    top, found = f"pass@{k}", []

    def claim(
        arm: str,
        domain: str,
        words: str,
        bound: float,
        combine: Callable[..., float],
        *keys: tuple[str, str],
        is_met: Callable[[float, float], bool] = operator.ge,
    ) -> None:
        value = compared(results, arm, domain, combine, *keys)
        if value:
            # One seed has no interval over seeds, so its claims are never sure.
            is_sure = "predict_low" in value and value["low"] > bound
            verdict = {"holds": is_met(value["mean"], bound), "is_sure": is_sure}
            found.append({"arm": arm, "claim": words, "domain": domain, "value": value, "bound": bound, **verdict})

    def differs(arm: str, domain: str, words: str, more: tuple[str, str], less: tuple[str, str]) -> None:
        # A difference of 0 is neither above nor below.
        claim(arm, domain, words, 0.0, operator.sub, more, less, is_met=operator.gt)

    def share(a: float, b: float, c: float) -> float:
        # There is no share without a positive way from b to c: where GRPO is above the base, it lost nothing.
        return (a - b) / (c - b) if c > b else math.nan

    own, base, grpo = "", BASE_ARM, "grpo"
    for arm, kind in kinds.items():
        for domain in (d for d in DOMAINS if d in results["arms"][arm]):
            if kind in (PLAIN, PENALISED):
                differs(arm, domain, f"below the base at Pass@{k} by", (base, top), (own, top))
                if domain == DOMAINS[0]:
                    differs(arm, domain, "above the base at Pass@1 by", (own, "pass@1"), (base, "pass@1"))
                continue
            rivals = [name for name in kinds if kinds[name] in (PLAIN, PENALISED)] if kind == REHEARSING else [grpo]
            for other in rivals:
                differs(arm, domain, f"above {other} at Pass@{k} by", (own, top), (other, top))
            for other in rivals:
                differs(arm, domain, f"keeps more than {other} by", (own, "retention"), (other, "retention"))
            words = f"share of the way from GRPO to the base at Pass@{k}"
            claim(arm, domain, words, 0.6, share, (own, top), (grpo, top), (base, top))
            if domain == DOMAINS[0]:
                words = "share of GRPO's gain at Pass@1"
                claim(arm, domain, words, 0.85, share, (own, "pass@1"), (base, "pass@1"), (grpo, "pass@1"))
            words = f"not below the base at Pass@{k}: difference"
            claim(arm, domain, words, 0.0, operator.sub, (own, top), (base, top))
            words = "not below GRPO at Pass@1: difference"
            claim(arm, domain, words, 0.0, operator.sub, (own, "pass@1"), (grpo, "pass@1"))
    return found


def predicted(results: Results, committed: Results) -> list[dict[str, Any]]:
    """Pass@k and retention of one more seed; `inside` says whether each lies in its committed prediction interval."""
    found = []
    for arm, domains in results["arms"].items():
        for domain, cells in domains.items():
            expected = committed["arms"].get(arm, {}).get(domain, {})
            for key, cell in cells.items():
                bounds = expected.get(key, {})
                if (key.startswith("pass@") or key == "retention") and "predict_low" in bounds:
                    low, high = max(0.0, bounds["predict_low"]), min(1.0, bounds["predict_high"])
                    # The committed bounds are rounded to five digits.
                    inside = low - 1e-5 <= cell["mean"] <= high + 1e-5
                    row = {"arm": arm, "domain": domain, "rate": key, "value": cell["mean"]}
                    found.append({**row, "low": low, "high": high, "inside": inside})
    return found
