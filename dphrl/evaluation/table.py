"""One table on the console that shows base and trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dphrl.evaluation.stage import Summary
from dphrl.tracking.console import Console, format_table

# Columns of a usual terminal, which does not wrap a table of this width.
TABLE_WIDTH = 100


def report_evaluations(console: Console, models: Mapping[str, Sequence[Summary]]) -> None:
    """Print one table with a row per data set and model, so that base and trained stand one above the other.

    It also has half of each 95 % interval, and the majority vote of the largest k, if they fit TABLE_WIDTH columns.
    """
    if not any(models.values()):
        return
    for intervals, majority in ((True, True), (False, True), (False, False)):
        columns, rows = _evaluation_table(models, intervals=intervals, majority=majority)
        if max(map(len, format_table(columns, rows).splitlines())) <= TABLE_WIDTH:
            break
    console.table("evaluation" + (", ± half of the 95 % interval" if intervals else ""), columns, rows)


def _evaluation_table(
    models: Mapping[str, Sequence[Summary]], *, intervals: bool, majority: bool
) -> tuple[list[str], list[list[object]]]:
    summaries = [(model, summary) for model, of_model in models.items() for summary in of_model]
    first = summaries[0][1]
    keys = [*(key for key in first if key.startswith("pass@")), "greedy"]
    if majority:
        votes = [key for key in first if key.startswith("majority@")]
        keys += sorted(votes, key=lambda key: int(key.removeprefix("majority@")))[-1:]
    keys += ["retention", "distinct_correct"]
    # A column in which no model has a value, such as retention without a base, is left out.
    keys = [key for key in keys if any(summary.get(key) is not None for _, summary in summaries)]

    def cell(summary: Summary, key: str) -> object:
        value, interval = summary.get(key), summary.get("intervals", {}).get(key)
        if not intervals or value is None or interval is None:
            return value
        return f"{value:.3f} ±{(interval[1] - interval[0]) / 2:.3f}"

    rows: list[list[object]] = []
    for name in dict.fromkeys(summary["dataset"] for _, summary in summaries):
        for model, summary in summaries:
            if summary["dataset"] == name:
                rows.append([name, summary["split"], model, *(cell(summary, key) for key in keys)])
    names = [key.replace("majority@", "maj@").replace("distinct_correct", "distinct") for key in keys]
    return ["data set", "split", "model", *names], rows
