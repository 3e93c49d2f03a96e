"""One table on the console that shows base and trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dphrl.evaluation.results import Summary
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
    for model, summaries in models.items():
        compared = [summary for summary in summaries if summary.get("difference")]
        if compared:
            console.table(*_difference_table(model, compared))


def _difference_table(model: str, summaries: Sequence[Summary]) -> tuple[str, list[str], list[list[object]]]:
    """Title, columns and rows: what `model` gained or lost against the base, and what each of them keeps."""
    keys = list(dict.fromkeys(key for summary in summaries for key in summary["difference"] if key != "retention"))
    title = f"{model} minus base, prompt by prompt, ± half of the 95 % interval"
    columns = ["data set", "split", *keys]
    if any(summary["difference"]["retention"] for summary in summaries):
        title += (
            "\nkept: of the prompts that half of the base's samples solve, the share that as many of the other model's "
            "do;\nby the base: the share that its other half does; where both are equal, nothing was lost"
        )
        columns += ["half", "kept", "by the base"]
    rows: list[list[object]] = []
    for summary in summaries:
        difference, retention = summary["difference"], summary["difference"]["retention"] or {}
        shares = [retention.get(name) for name in ("num_samples", "model", "base")]
        changes = [_signed(difference.get(key)) for key in keys]
        rows.append([summary["dataset"], summary["split"], *changes, *shares][: len(columns)])
    return title, columns, rows


def _signed(difference: Mapping[str, float] | None) -> str | None:
    if difference is None:
        return None
    return f"{difference['value']:+.3f} ±{(difference['high'] - difference['low']) / 2:.3f}"


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
