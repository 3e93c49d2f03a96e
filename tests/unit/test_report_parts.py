"""Parts of the report: which runs belong together, curves, smoothing, axes, the choice of samples."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dphrl.evaluation.estimators import summarize
from dphrl.report.axes import k_axis, linear_axis, log_axis, show_number, thin_out
from dphrl.report.charts import spread
from dphrl.report.runs import find_runs, group_arms, group_bases
from dphrl.report.samples import MAX_TOTAL_BYTES, choose_steps, shorten
from dphrl.report.statistics import largest, pass_at_k_curve, shown_ks, smooth
from dphrl.report.steps import phases
from dphrl.report.svg import Style
from dphrl.report.text import clean, embed_json
from tests.unit.report_folders import record, render, write_run


def test_bases_are_one_arm_unless_models_or_prompts_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "a")
    write_run(tmp_path / "x" / "b")
    arms = group_arms(find_runs([tmp_path / "x", tmp_path / "x" / "a"]))
    assert [arm.name for arm in arms] == ["a", "b"]
    assert [base.name for base in group_bases(arms)] == ["base"]
    write_run(tmp_path / "y" / "a", model={"path": "org/other"})
    arms = group_arms(find_runs([tmp_path / "x", tmp_path / "y"]))
    assert [arm.name for arm in arms] == ["x/a", "b", "y/a"]
    assert [base.name for base in group_bases(arms)] == ["base tiny-factor (of x/a, b)", "base other (of y/a)"]


def test_curves_of_prompts_with_ungraded_samples_leave_them_out() -> None:
    rows = [("a", 4, 4), ("b", 2, 0), ("c", 0, 0)]
    summary = summarize("d", "s", rows, [1, 4], None)
    curve = pass_at_k_curve([summary])
    assert curve is not None
    assert (curve.ys[0], curve.ys[3]) == (summary["pass@1"], summary["pass@4"])
    assert pass_at_k_curve([summarize("d", "s", [("c", 0, 0)], [], None)]) is None
    assert pass_at_k_curve([]) is None


@given(st.dictionaries(st.integers(1, 300), st.floats(-5, 5), min_size=1), st.integers(1, 20))
def test_smoothing_is_the_mean_around_each_step(values: Mapping[int, float], window: int) -> None:
    ordered = dict(sorted(values.items()))
    near = {s: [v for t, v in values.items() if abs(t - s) <= window // 2] for s in ordered}
    assert smooth(ordered, window) == pytest.approx({s: sum(v) / len(v) for s, v in near.items()}, abs=1e-9)
    band = largest([ordered], window)
    assert band is not None
    assert list(band.ys) == [max(v) for v in near.values()]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=3000))
def test_thinned_curve_keeps_ends_extremes_and_gaps(ys: list[float | None]) -> None:
    kept = thin_out(list(enumerate(ys)), limit=100)
    assert len(kept) <= max(100, 3 * 49 + 2)
    assert kept == sorted(set(kept))
    assert {0, len(ys) - 1} <= set(kept)
    present = [y for y in ys if y is not None]
    shown = [ys[i] for i in kept if ys[i] is not None]
    assert not present or {min(present), max(present)} <= set(shown)
    assert (None in ys) == (None in [ys[i] for i in kept])


# Metrics reach 1e-12; what is smaller than a normal float is no concern of a chart's.
_VALUES = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-100)


@given(_VALUES, _VALUES.map(abs))
def test_linear_axis_holds_its_values_and_a_few_ticks(low: float, width: float) -> None:
    axis = linear_axis("y", [low, low + width])
    assert axis.low <= low
    assert low + width <= axis.high
    assert 1 <= len(axis.ticks) <= 12
    assert all(axis.low - 1e-6 * abs(axis.low) <= tick <= axis.high + 1e-6 * abs(axis.high) for tick, _ in axis.ticks)


def test_axes_of_k_and_of_powers() -> None:
    assert [tick for tick, _ in k_axis("k", 24).ticks] == [1, 2, 4, 8, 16, 24]
    assert [tick for tick, _ in k_axis("k", 1).ticks] == [1]
    gap = log_axis("gap", [0.0, 3e-7, 2e-5])
    assert (gap.low, gap.high) == pytest.approx((1e-7, 1e-4))
    assert gap.place(0.0) == 0.0
    assert gap.place(1e-4) == pytest.approx(1.0)
    assert not log_axis("gap", [0.0]).is_log
    assert [show_number(v) for v in (0, 0.54321, 1234.56, 123456, 1.23e-7)] == [
        "0",
        "0.5432",
        "1235",
        "123,456",
        "1.2e-7",
    ]


@given(st.lists(st.floats(0, 300), max_size=15).map(sorted))
def test_labels_lie_apart(levels: list[float]) -> None:
    placed = spread(levels, 13.0, 0.0, 300.0)
    assert all(b - a >= 13.0 - 1e-6 for a, b in itertools.pairwise(placed))
    assert all(-1e-6 <= level <= 300.0 for level in placed)


def test_arms_look_different_even_beyond_the_colours() -> None:
    looks = {(Style("a", i).css, Style("a", i).marker(0, 0)) for i in range(24)}
    assert len(looks) == 24


def test_other_time_is_never_negative(tmp_path: Path) -> None:
    run = write_run(tmp_path / "overlap")
    records = [record(1) | {"time/step_s": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert phases(find_runs([run])[0])["other"] == {1: 0.0}


def test_samples_fit_their_budget(tmp_path: Path) -> None:
    assert choose_steps({1: 10, 2: 10, 3: 10, 4: 10, 5: 10}, 30) == [1, 3, 5]
    assert choose_steps({1: 10, 2: 10, 3: 10}, 1000) == [1, 2, 3]
    assert choose_steps({}, 10) == []
    assert shorten("x" * 5000 + "end").endswith("end")
    assert "1,003 characters left out" in shorten("x" * 5000 + "end")
    run = write_run(tmp_path / "long")
    line = json.dumps({"prompt_id": "p", "prompt": "q", "completion": "w" * 3900, "score": 0, "status": "wrong"})
    for step in range(1, 41):
        (run / "samples" / f"step_{step:06d}.jsonl").write_text(f"{line}\n" * 10)
    page = render(tmp_path, run)
    assert len(page.source) < MAX_TOTAL_BYTES + 300_000
    steps = sorted({row[2] for row in page.data()["rows"]})
    assert 5 <= len(steps) < 40
    assert steps[0] == 1
    assert steps[-1] == 40
    assert f"of {len(steps)} of the 40 steps that stored any" in page.text


def test_long_evaluations_are_drawn_at_chosen_k() -> None:
    assert shown_ks(4) == [1, 2, 3, 4]
    ks = shown_ks(1024)
    assert ks[:32] == list(range(1, 33))
    assert ks[-1] == 1024
    assert len(ks) < 60
    assert all(math.isclose(b / a, 1.16, rel_tol=0.1) for a, b in itertools.pairwise(ks[32:]))


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_can_be_embedded(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode("utf-8")
    embedded = embed_json({"text": cleaned})
    assert "<" not in embedded
    assert "\x00" not in embedded
    assert json.loads(embedded)["text"] == cleaned
