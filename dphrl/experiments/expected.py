"""Published figures in a suite: what a paper reports for the arms, beside what the suite's own runs found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from dphrl.config.section import Section
from dphrl.experiments.results import DOMAINS, Results

_RATE = re.compile(r"(?:pass@[1-9]\d{0,5}|majority@[1-9]\d{0,5}|retention|greedy)")
_WORDS = "pass@K, majority@K, retention, greedy"

Table = tuple[list[str], list[list[object]]]


class Expected(Section):
    """Figures that were published for a suite's arms, and where."""

    source: Annotated[str, Field(min_length=1)]
    """Where the figures stand: the paper and its table, and in what they differ from what the suite measures."""
    figures: Annotated[dict[str, dict[str, float]], Field(min_length=1)]
    """The figures, as arm: {DOMAIN.RATE: value}; `base` is an arm. Values are shares, from 0 to 1."""

    @field_validator("figures")
    @classmethod
    def _are_rates(cls, figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for arm, metrics in figures.items():
            for metric, value in metrics.items():
                domain, _, rate = metric.partition(".")
                if domain not in DOMAINS or not _RATE.fullmatch(rate):
                    raise ValueError(
                        f"{arm}.{metric}: no such metric; name it DOMAIN.RATE, with {' or '.join(DOMAINS)} and one of "
                        f"{_WORDS}"
                    )
                if not 0 <= value <= 1:
                    raise ValueError(f"{arm}.{metric}: {value:g} is no share; give a number from 0 to 1")
        return figures


def compare_expected(results: Results) -> list[dict[str, Any]]:
    """For each published figure: arm, domain, rate, `published`, `here` (a cell, or None without it), `difference`.

    The difference is the mean over the suite's seeds minus the published figure. Empty without published figures.
    """
    found = []
    for arm, metrics in (results.get("expected") or {}).get("figures", {}).items():
        for metric, value in metrics.items():
            domain, _, rate = metric.partition(".")
            cell: Mapping[str, float] | None = results["arms"].get(arm, {}).get(domain, {}).get(rate)
            row = {"arm": arm, "domain": domain, "rate": rate, "published": value, "here": cell}
            found.append({**row, "difference": None if cell is None else cell["mean"] - value})
    return found


def expected_table(results: Results) -> Table:
    """A row for each published figure, with the figure here and their difference; no rows without published figures."""
    rows: list[list[object]] = []
    for entry in compare_expected(results):
        cell = entry["here"]
        half = (cell["high"] - cell["low"]) / 2 if cell else 0.0
        here = "-" if cell is None else f"{cell['mean']:.3f}" + (f" ±{half:.3f}" if half else "")
        difference = "-" if cell is None else f"{entry['difference']:+.3f}"
        where = "in" if entry["domain"] == DOMAINS[0] else "out"
        rows.append([entry["arm"], where, entry["rate"], f"{entry['published']:.3f}", here, difference])
    return ["arm", "domain", "rate", "published", "here", "difference"], rows
