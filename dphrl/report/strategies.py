"""The report's tables of where the probability mass lies, before and after training, and of the prompts lost."""

from __future__ import annotations

from collections.abc import Sequence

from dphrl.evaluation.strategies import ALL, Part, split_pass_at_1
from dphrl.experiments.results import interval_over_seeds
from dphrl.report.figures import name_of, note
from dphrl.report.runs import Arm, DatasetKey, Summary
from dphrl.report.statistics import same_prompts
from dphrl.report.tables import Cell, arm_cell, table
from dphrl.report.text import escape

PARTS = ("share", "selection", "precision", "right")
# More prompts than this of one run would bury the page; its eval/*.json have them all.
MAX_LOST = 60

ABOUT_STRATEGIES = (
    "Pass@1 is the sum over strategies of share x selection x precision, in % before and after training. Share: of the "
    "completions, those that take the strategy. Selection: of these, those whose prompt it fits. Precision: of those, "
    "the right ones. Right: what the strategy contributes to Pass@1. Several seeds: means, with the 95 % interval of "
    "the later one over seeds (Student's t)."
)


def strategies_table(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """A row for each arm and strategy with `PARTS` before and after training; "" when no run counted strategies."""
    rows = []
    for arm in arms:
        pairs = [pair for run in arm.runs if (pair := same_prompts(run, dataset)) is not None]
        before, after = ([split for pair in pairs if (split := _split(pair[place]))] for place in (0, 1))
        names = list(dict.fromkeys(name for split in (*before, *after) for name in split if name != ALL))
        for name in [*names, ALL] if names else []:
            cells = [_cell(splits, name, key, i > 0) for key in PARTS for i, splits in enumerate((before, after))]
            rows.append([arm_cell(arm), escape(name), *cells])
    if not rows:
        return ""
    columns = ["arm", "strategy", *(f"{key}{when}" for key in PARTS for when in (" before", ""))]
    return table(f"{name_of(dataset)}: where the mass lies, %", columns, rows, css="numbers")


def _split(summary: Summary) -> dict[str, Part]:
    rows = summary["per_prompt"]
    counted = bool(rows) and all("strategies" in row for row in rows)
    return split_pass_at_1([row["strategies"] for row in rows]) if counted else {}


def _cell(splits: Sequence[dict[str, Part]], name: str, key: str, has_interval: bool) -> Cell:
    parts = [split.get(name, Part(0.0, None, None, 0.0)) for split in splits]
    values = [100 * value for part in parts if (value := getattr(part, key)) is not None]
    if not values:
        return "-"
    cell = interval_over_seeds(values)
    if len(values) == 1 or not has_interval:
        return f"{cell['mean']:.1f}"
    return f"{cell['mean']:.1f} <small>{max(0.0, cell['low']):.1f} to {min(100.0, cell['high']):.1f}</small>"


def lost_prompts(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """The ids of the prompts that the base solves and the trained model does not, for each run; "" without any."""
    parts = []
    for arm in arms:
        for run in arm.runs:
            pair = same_prompts(run, dataset)
            if pair is None:
                continue
            after = {row["prompt_id"]: row["num_correct"] for row in pair[1]["per_prompt"]}
            lost = [row for row in pair[0]["per_prompt"] if row["num_correct"] and not after[row["prompt_id"]]]
            if lost:
                which = f"{arm.name}, seed {run.seed}" if arm.num_seeds > 1 else arm.name
                named = [
                    row["prompt_id"] + (f" (fits: {', '.join(row['fitting'])})" if row.get("fitting") else "")
                    for row in lost[:MAX_LOST]
                ]
                left = f" and {len(lost) - MAX_LOST} more" if len(lost) > MAX_LOST else ""
                parts.append(
                    f"<details><summary>Lost by {escape(which)} on {escape(name_of(dataset))}: {len(lost)}</summary>"
                    f"{note('; '.join(named) + left)}</details>"
                )
    return "".join(parts)
