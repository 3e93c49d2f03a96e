"""The report's tables by strategy, the prompts that were lost, and the points of each seed: by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report_folders import render, write_run

Counts = dict[str, list[int | None]]


def count_strategies(run: Path, name: str, prompts: Sequence[Counts], fitting: Sequence[Sequence[str]] = ()) -> None:
    """Put counts by strategy into an evaluation of `write_run`."""
    path = run / "eval" / f"{name}.json"
    (summary,) = json.loads(path.read_text())
    for place, (row, counts) in enumerate(zip(summary["per_prompt"], prompts, strict=True)):
        row["strategies"] = counts
        if fitting:
            row["fitting"] = fitting[place]
    path.write_text(json.dumps([summary]))


# The base of `write_run` has 6, 2, 1 and 0 right of 8; the trained model here 8, 8, 0 and 0.
BASE: list[Counts] = [
    {"3": [6, 6, 6], "7": [2, 2, 0]},
    {"3": [4, 4, 2], "7": [4, 0, 0]},
    {"3": [4, 0, 0], "7": [4, 4, 1]},
    {"3": [2, 0, 0], "7": [4, 0, 0], "other": [2, 0, 0]},
]
TRAINED: list[Counts] = [{"3": [8, 8, 8]}, {"3": [8, 8, 8]}, {"3": [8, 0, 0]}, {"3": [8, 0, 0]}]
FITTING = [["3", "7"], ["3"], ["7"], ["11"]]


def make_run(folder: Path, **changes: Any) -> Path:
    run = write_run(folder, correct=(8, 8, 0, 0), **changes)
    count_strategies(run, "base", BASE, FITTING)
    count_strategies(run, "step_4", TRAINED, FITTING)
    return run


def test_the_mass_before_and_after_by_hand(tmp_path: Path) -> None:
    rows = render(tmp_path, make_run(tmp_path / "only")).table("arm strategy share before")
    assert rows[0] == [
        "arm", "strategy", "share before", "share", "selection before", "selection", "precision before", "precision",
        "right before", "right",
    ]  # fmt: skip
    # Of 32 samples 16 name 3, and 10 of them where it fits: 8 right. 14 name 7, and 6 where it fits: one right.
    assert rows[1] == ["only", "3", "50.0", "100.0", "62.5", "50.0", "80.0", "100.0", "25.0", "50.0"]
    assert rows[2] == ["only", "7", "43.8", "0.0", "42.9", "-", "16.7", "-", "3.1", "0.0"]
    assert rows[3] == ["only", "other", "6.2", "0.0", "0.0", "-", "-", "-", "0.0", "0.0"]
    # All: 16 of 32 fit, 9 of these are right; then 16 fit, and 16 are right.
    assert rows[4] == ["only", "all", "100.0", "100.0", "50.0", "50.0", "56.2", "100.0", "28.1", "50.0"]


def test_the_mass_over_seeds_has_an_interval(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    make_run(suite / "grpo-s0", seed=0, arm=("passk", "grpo"))
    second = make_run(suite / "grpo-s1", seed=1, arm=("passk", "grpo"))
    half: list[Counts] = [{"3": [4, 4, 4], "7": [4, 4, 4]}, *TRAINED[1:]]
    count_strategies(second, "step_4", half, FITTING)
    rows = render(tmp_path, suite).table("arm strategy share before")
    # Shares of 3: 100 and 87.5; t of two seeds is 12.706, half of their distance 6.25; no share is above 100.
    assert rows[1][3].split() == ["93.8", "14.3", "to", "100.0"]
    assert rows[1][2] == "50.0"
    assert rows[2][1:3] == ["7", "43.8"]
    assert rows[2][3].split() == ["6.2", "0.0", "to", "85.7"]


def test_runs_that_counted_no_strategies_say_so(tmp_path: Path) -> None:
    page = render(tmp_path, write_run(tmp_path / "old"))
    assert "No evaluation counted strategies" in page.text
    # Only the base's evaluation is of an older version.
    half = write_run(tmp_path / "half", correct=(8, 8, 0, 0))
    count_strategies(half, "step_4", TRAINED)
    rows = render(tmp_path, half).table("arm strategy share before")
    assert rows[1][:5] == ["half", "3", "-", "100.0", "-"]


def test_lost_prompts_are_named_with_what_fits_them(tmp_path: Path) -> None:
    page = render(tmp_path, make_run(tmp_path / "only"))
    assert "Lost by only on factor, held out: 1" in page.text
    assert "p2 (fits: 7)" in page.text
    assert "p0 (fits" not in page.text
    assert "Lost by" not in render(tmp_path, write_run(tmp_path / "keeps", correct=(1, 1, 1, 0))).text


@pytest.mark.parametrize(
    "counts",
    [
        {"3": [8, 8]},
        {"3": [8, 8, 9]},
        {"3": [8, 6, 7]},
        {"3": [8, 8, 7]},
        {"3": [7, 7, 7]},
        {"3": [8.0, 8, 8]},
        {"3": [8, "8", 8]},
        {"3": "888"},
        [],
        None,
    ],
)
def test_damaged_counts_are_named_and_left_out(tmp_path: Path, counts: Any) -> None:
    run = make_run(tmp_path / "run")
    count_strategies(run, "step_4", [counts, *TRAINED[1:]])
    page = render(tmp_path, run)
    assert "eval/step_4.json: entry 1: per_prompt has a row whose strategies" in page.text
    unknown = make_run(tmp_path / "unknown")
    count_strategies(unknown, "step_4", [{"join": [8, None, 8]}, *TRAINED[1:]])
    assert "entry 1" not in render(tmp_path, unknown).text


def test_points_of_every_seed_are_drawn_and_etas_joined(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    for seed, correct in ((0, (8, 8, 0, 0)), (1, (8, 8, 8, 0))):
        write_run(suite / f"weak-s{seed}", seed=seed, arm=("passk", "weak"), correct=correct)
    strong = {"divergence": "forward_kl", "eta": 0.9}
    write_run(suite / "strong-s0", arm=("passk", "strong"), correct=(4, 4, 4, 4), algorithm=strong)
    page = render(tmp_path, suite)
    chart = page.chart("A point for each seed: Pass@1 and Pass@8")
    seeds = {g.get("data-name"): g.get("data-seeds") for g in chart.iter("g") if g.get("data-seeds")}
    # Pass@1 and Pass@8 of 8 samples: the share of right samples, and of prompts with any.
    assert seeds["weak"] == "50.00,50.00 75.00,75.00"
    assert seeds["strong"] == "50.00,100.00"
    assert seeds["base"] == "28.12,75.00 28.12,75.00"
    assert [g.get("data-arms") for g in chart.iter("g") if g.get("data-arms")] == ["weak strong"]
    # Of seed 0 alone both etas are there: .5 * 1; the base has .28125 * .75 on both seeds.
    assert "base 0.211; strong, weak 0.500" in page.text


def test_a_page_without_a_second_k_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one")
    for name in ("base", "step_4"):
        path = run / "eval" / f"{name}.json"
        (summary,) = json.loads(path.read_text())
        del summary["pass@8"]
        path.write_text(json.dumps([summary]))
    assert render(tmp_path, run).text.count("evaluation.k gives no second k") == 2
