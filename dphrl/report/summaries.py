"""Whether an evaluation's summary, read from a file, can be used by the report."""

from __future__ import annotations

import math
from typing import Any


def find_summary_fault(summary: Any) -> str | None:
    """What is wrong with one data set's summary, in words; None when the report can use it.

    It checks the names, per_prompt with its counts, and the pass@k rates. It does not check that the rates agree with
    the counts.
    """
    if not isinstance(summary, dict) or not {"dataset", "per_prompt"} <= summary.keys():
        return "not an evaluation"
    if not isinstance(summary["dataset"], str) or not isinstance(summary.get("split", ""), str):
        return "dataset or split is not text"
    rows = summary["per_prompt"]
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        return "per_prompt has a row without a prompt_id and 0 <= num_correct <= num_samples, or greedy is not 0 or 1"
    if not all(_has_usable_strategies(row) for row in rows):
        return "per_prompt has a row whose strategies are not counts of its samples, or whose fitting is not names"
    for key, value in summary.items():
        if not key.startswith("pass@"):
            continue
        k = key.removeprefix("pass@")
        if not (k.isascii() and k.isdigit() and len(k) < 10):
            return f"{key[:40]!r} is not pass@k"
        # null stands for a rate that could not be estimated.
        if value is not None and not _is_number(value):
            return f"{key} is not a number"
    return None


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("prompt_id"), str):
        return False
    if row.get("greedy") not in (None, 0, 1):
        return False
    correct, graded = row.get("num_correct"), row.get("num_samples")
    return type(correct) is int and type(graded) is int and 0 <= correct <= graded < 2**31


def _has_usable_strategies(row: dict[str, Any]) -> bool:
    names, counts = row.get("fitting", []), row.get("strategies")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    if counts is None:
        return "strategies" not in row
    if not isinstance(counts, dict) or not all(isinstance(c, list) and len(c) == 3 for c in counts.values()):
        return False
    for samples, fitting, right in counts.values():
        fits = right if fitting is None else fitting
        if not all(type(number) is int for number in (samples, fits, right)) or not 0 <= right <= fits <= samples:
            return False
    sums = [sum(count[place] for count in counts.values()) for place in (0, 2)]
    return sums == [row["num_samples"], row["num_correct"]]


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and math.log10(abs(value) + 1) < 300)
