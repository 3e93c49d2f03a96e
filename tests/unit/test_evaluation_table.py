"""The table that ends an evaluation: what it shows, and what it leaves out to fit a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest

from dphrl.evaluation.estimators import summarize
from dphrl.evaluation.table import report_evaluations
from dphrl.tracking.console import Console


def summary(name: str, ks: Sequence[int], base: Any = None) -> dict[str, Any]:
    counts = [(f"{name}{i}", 16, i) for i in range(17)]
    described = {"distinct_correct": 1.25, "majority@2": 0.5, f"majority@{max(ks)}": 0.75}
    return summarize(name, "held_out", counts, ks, 0.5, counts if base else None) | described


def table(ks: Sequence[int], *, with_base: bool = True) -> list[str]:
    said = io.StringIO()
    models = {"base": [summary("factor", ks)]} if with_base else {}
    models["trained"] = [summary("factor", ks, base=with_base)]
    report_evaluations(Console(said, interactive=False), models)
    return said.getvalue().splitlines()


def test_the_table_has_intervals_and_the_largest_majority_vote_where_they_fit() -> None:
    title, header, _, base, trained = table((1, 16))
    assert title == "evaluation, ± half of the 95 % interval"
    columns = ["data set", "split", "model", "pass@1", "pass@16", "greedy", "maj@16", "retention", "distinct"]
    assert re.split(" {2,}", header) == columns
    low, high = summary("factor", (1, 16))["intervals"]["pass@1"]
    assert 0.05 < low < 0.45
    assert re.split(" {2,}", base)[2:4] == ["base", f"0.500 ±{(high - low) / 2:.3f}"]
    assert re.split(" {2,}", trained)[5:] == ["0.500", "0.750", "1.000 ±0.000", "1.250"]


@pytest.mark.parametrize(
    ("ks", "intervals", "majority"),
    [((1, 16), True, True), ((1, 8, 16), False, True), ((1, 2, 4, 8, 16), False, False)],
)
def test_the_table_drops_what_does_not_fit(ks: Sequence[int], intervals: bool, majority: bool) -> None:
    title, *lines = table(ks)
    assert max(map(len, lines)) <= 100
    assert ("±" in title, "±" in lines[-1], "maj@16" in lines[0]) == (intervals, intervals, majority)


def test_a_table_that_cannot_fit_is_shown_all_the_same() -> None:
    assert "pass@8" in table((1, 2, 3, 4, 5, 6, 8, 16))[1]


def test_a_column_without_anything_is_left_out() -> None:
    assert "retention" in table((1, 16))[1]
    assert "retention" not in table((1, 16), with_base=False)[1]
