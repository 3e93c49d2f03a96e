"""Which prompts a suite's arms lose, and where their probability mass goes, from the counts in the suite's rows.

Rows of runs that did not count strategies hold the correct samples alone; what follows from these is told, and the rest
is said to be missing.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dphrl.evaluation.strategies import ALL, Part, split_pass_at_1
from dphrl.experiments.packing import unpack_strategies
from dphrl.experiments.results import BASE_ARM, Cell, Results, Row, base_of, interval_over_seeds

Table = tuple[list[str], list[list[object]]]
# The prompts that every strategy fits, beside those that one alone fits.
EVERY = "every"
PARTS = ("share", "selection", "precision", "right")
# A listing of more prompts than this would bury the table; --json has them all.
MAX_LISTED = 5


def split_over_seeds(results: Results, arm: str, dataset: str) -> dict[str, dict[str, Cell]]:
    """For each strategy, and all of them, `PARTS` of Pass@1 as mean and interval over the seeds.

    A part that is undefined on a seed (the precision of a strategy that no sample took) is of the other seeds. A
    strategy that a seed never takes has a share of 0 there. Empty without counts by strategy.
    """
    counts = [unpack_strategies(row) for row in _rows(results, arm, dataset)]
    splits = [split_pass_at_1(of_row) for of_row in counts if of_row is not None]
    names = list(dict.fromkeys(name for split in splits for name in split))
    names.sort(key=lambda name: next(list(split).index(name) for split in splits if name in split))
    found: dict[str, dict[str, Cell]] = {}
    for name in names:
        parts = [asdict(split.get(name, Part(0.0, None, None, 0.0))) for split in splits]
        for key in PARTS:
            values = [part[key] for part in parts if part[key] is not None]
            if values:
                found.setdefault(name, {})[key] = interval_over_seeds(values)
    return found


def blind_selection(results: Results, arm: str, dataset: str) -> dict[str, float]:
    """What selection would be if the same strategies were taken without a look at the prompt: means over the seeds.

    Of one strategy it is the part of the prompts that it fits; of all (`ALL`), the mean of these by share. A selection
    above it comes from seeing what fits. Empty without counts by strategy, or where no one knows what fits.
    """
    found: dict[str, list[float]] = {}
    for row in _rows(results, arm, dataset):
        base = row if arm == BASE_ARM else base_of(results["rows"], row)
        counts = unpack_strategies(row)
        if base is None or "fitting" not in base or counts is None:
            continue
        # As in the split, of the prompts that have a graded sample.
        fitting = [set(names.split()) for names, prompt in zip(base["fitting"], counts, strict=True) if prompt]
        split = split_pass_at_1(counts)
        fits = {name: sum(name in names for names in fitting) / len(fitting) for name in split if name != ALL}
        fits[ALL] = sum(split[name].share * of_prompts for name, of_prompts in fits.items())
        for name, value in fits.items():
            found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def changed_prompts(results: Results, arm: str, dataset: str) -> list[dict[str, Any]]:
    """For each seed with a base: how many prompts the base solves at least once, and which are `lost` and `gained`.

    Lost: the base solves it in its samples, the arm in none of its own. A prompt is named by its id, or else by its
    place in the data set, from 0. `lost_where` counts the lost prompts by the strategies that fit them, if known.
    """
    found = []
    for row in _rows(results, arm, dataset):
        base = base_of(results["rows"], row)
        if base is None:
            continue
        before, after = ([count > 0 for count in side["num_correct"]] for side in (base, row))
        names = base.get("prompt_ids") or [f"#{place}" for place in range(len(before))]
        lost = [i for i, (was, still) in enumerate(zip(before, after, strict=True)) if was and not still]
        gained = [i for i, (was, now) in enumerate(zip(before, after, strict=True)) if now and not was]
        entry = {"seed": row["seed"], "solved_by_base": sum(before), "lost": [names[i] for i in lost]}
        entry["gained"] = [names[i] for i in gained]
        if "fitting" in base:
            entry["lost_where"] = dict(Counter(base["fitting"][i] for i in lost).most_common())
        found.append(entry)
    return found


def alone(results: Results, arm: str, dataset: str) -> dict[str, Cell]:
    """Pass@1 on the prompts that one strategy alone fits, by strategy, and on those that all fit (`EVERY`).

    Where one alone fits, a completion is right if it takes this strategy and carries it out well, so the figure is the
    strategy's share x precision on these prompts. Where every one fits there is nothing to choose, and the figure is
    the precision of the whole mix. Both need the correct samples and what fits (`fitting`), and no other counts. Each
    is the mean and interval over the seeds that have such prompts.
    """
    values: dict[str, list[float]] = {}
    for row in _rows(results, arm, dataset):
        base = row if arm == BASE_ARM else base_of(results["rows"], row)
        if base is None or "fitting" not in base:
            continue
        num_strategies = len({name for fitting in base["fitting"] for name in fitting.split()})
        rates: dict[str, list[float]] = {}
        for fitting, graded, correct in zip(base["fitting"], row["num_graded"], row["num_correct"], strict=True):
            names = fitting.split()
            key = EVERY if len(names) == num_strategies > 1 else fitting if len(names) == 1 else None
            if graded and key is not None:
                rates.setdefault(key, []).append(correct / graded)
        for key, of_prompts in rates.items():
            values.setdefault(key, []).append(statistics.fmean(of_prompts))
    return {name: interval_over_seeds(values[name]) for name in sorted(values, key=_by_number)}


def _by_number(name: str) -> tuple[bool, float, str]:
    return (name == EVERY, float(name) if name.isdecimal() else math.inf, name)


def mass_as_json(results: Results) -> dict[str, Any]:
    """Everything above by data set and arm, each part only where it is known."""
    found: dict[str, Any] = {}
    for dataset in datasets_of(results):
        for arm in results["arms"]:
            parts = {
                "strategies": split_over_seeds(results, arm, dataset),
                "blind_selection": blind_selection(results, arm, dataset),
                "alone": alone(results, arm, dataset),
                "prompts": changed_prompts(results, arm, dataset),
            }
            found.setdefault(dataset, {})[arm] = {key: value for key, value in parts.items() if value}
    return found


# -------------------------------------------------------------------------------------------- tables


def prompts_table(results: Results) -> Table:
    """A row for each arm and data set: prompts that the base solves, lost and gained ones, and where those were lost.

    Figures are means over seeds. Where prompts were lost is told by the strategies that fit them, as numbers of prompts
    over all seeds; or else some of them are named.
    """
    rows: list[list[object]] = []
    for dataset in datasets_of(results):
        for arm in results["kinds"]:
            seeds = changed_prompts(results, arm, dataset)
            if seeds:
                lost = interval_over_seeds([float(len(seed["lost"])) for seed in seeds])
                solved = statistics.fmean(seed["solved_by_base"] for seed in seeds)
                gained = statistics.fmean(len(seed["gained"]) for seed in seeds)
                numbers = [f"{solved:.1f}", _number(lost), f"{gained:.1f}"]
                rows.append([arm, dataset, *numbers, _distinct(results, arm, dataset), _where_lost(seeds)])
    header = ["arm", "data set", "solved by the base", "lost", "gained", "distinct right", "lost where these fit"]
    return header, rows


def _distinct(results: Results, arm: str, dataset: str) -> str:
    """Different right solutions a prompt; in a factorization these are the strategies that came out right."""
    values = [row.get("distinct_correct") for row in _rows(results, arm, dataset)]
    return "-" if None in values else f"{statistics.fmean(value for value in values if value is not None):.2f}"


def _where_lost(seeds: Sequence[Mapping[str, Any]]) -> str:
    if all("lost_where" in seed for seed in seeds):
        total: Counter[str] = Counter()
        for seed in seeds:
            total.update(seed["lost_where"])
        named = [f"{name.replace(' ', '+')}: {count}" for name, count in total.most_common()]
    else:
        named = [f"{name} (seed {seed['seed']})" for seed in seeds for name in seed["lost"]]
    left = f" and {len(named) - MAX_LISTED} more" if len(named) > MAX_LISTED else ""
    return ", ".join(named[:MAX_LISTED]) + left or "-"


def alone_table(results: Results) -> Table:
    """Pass@1 where one strategy alone fits, and where all do: a row for each arm and data set."""
    found = {(d, arm): alone(results, arm, d) for d in datasets_of(results) for arm in results["arms"]}
    names = sorted({name for cells in found.values() for name in cells}, key=_by_number)
    rows: list[list[object]] = [
        [arm, dataset, *(_rate(cells.get(name)) for name in names)] for (dataset, arm), cells in found.items() if cells
    ]
    return ["arm", "data set", *names], rows


def split_table(results: Results) -> Table:
    """Pass@1 taken apart: a row for each data set, arm and strategy; empty when no run counted strategies."""
    rows: list[list[object]] = []
    for dataset in datasets_of(results):
        for arm in results["arms"]:
            blind = blind_selection(results, arm, dataset)
            for name, cells in split_over_seeds(results, arm, dataset).items():
                share, selection, *others = (_rate(cells.get(key)) for key in PARTS)
                unseen = f"{blind[name]:.3f}" if name in blind else "-"
                rows.append([arm, dataset, name, share, selection, unseen, *others])
    return ["arm", "data set", "strategy", *PARTS[:2], "blind", *PARTS[2:]], rows


def say_missing(results: Results) -> str | None:
    """One sentence when the split cannot be had from these results, or of some of their runs only; None when it can."""
    rows = results["rows"]
    without = [row for row in rows if "strategies" not in row]
    if not without:
        return None
    if len(without) == len(rows):
        has_any = any("fitting" in row for row in rows)
        remedy = "only new runs can tell" if has_any else "nor does anything say that their task has any"
        return (
            "no run of these results counted strategies, so Pass@1 cannot be taken apart into share, selection and "
            f"precision; {remedy}"
        )
    arms = ", ".join(dict.fromkeys(f"{row['arm']} (seed {row['seed']})" for row in without))
    return f"strategies were not counted in runs of {arms}; the split is of the others"


def datasets_of(results: Results) -> list[str]:
    """The data sets, those in domain first."""
    return list(dict.fromkeys(row["dataset"] for row in results["rows"]))


def _rows(results: Results, arm: str, dataset: str) -> list[Row]:
    return [row for row in results["rows"] if row["arm"] == arm and row["dataset"] == dataset]


def _rate(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    half = (cell["high"] - cell["low"]) / 2
    return f"{cell['mean']:.3f} ±{half:.3f}" if half else f"{cell['mean']:.3f}"


def _number(cell: Cell) -> str:
    half = (cell["high"] - cell["low"]) / 2
    return f"{cell['mean']:.1f} ±{half:.1f}" if half else f"{cell['mean']:.1f}"
