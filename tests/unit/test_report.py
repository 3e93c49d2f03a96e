"""`dphrl report`: its numbers against the run folders, hostile text, runs that were killed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dphrl.config import Config
from dphrl.config_loading import InputError, config_to_yaml
from dphrl.evaluation import bootstrap_interval, pass_at_k, summarize
from dphrl.report import write_report
from dphrl.report_axes import k_axis, linear_axis, log_axis, show_number, thin_out
from dphrl.report_charts import spread
from dphrl.report_runs import find_runs, group_arms, group_bases
from dphrl.report_samples import MAX_TOTAL_BYTES, choose_steps, shorten
from dphrl.report_statistics import largest, pass_at_k_curve, shown_ks, smooth
from dphrl.report_steps import phases
from dphrl.report_text import clean, embed_json
from dphrl.types import RewardStatus

NUM_SAMPLES = 8
HOSTILE = 'a</script><script>alert(1)</script><img src=x onerror="alert(2)"> & \x00 \ud800 \u202e \x1b[31m'


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    arm: tuple[str, str] | None = None,
    divergence: str = "forward_kl",
    num_steps: int = 4,
    correct: Sequence[int] = (8, 4, 0, 2),
    completion: str = "3 : 0 1 \\boxed{3}",
    **changes: Any,
) -> Path:
    """A finished run of 4 evaluation prompts, of which the base solves three; `correct`: the trained model's counts."""
    folder.mkdir(parents=True)
    config = Config.model_validate(
        {
            "run_name": folder.name,
            "seed": seed,
            "data": {
                "train": {"name": "factor", "kind": "tiny", "limit": 24},
                "evaluation": [{"name": "factor", "kind": "tiny", "split": "held_out"}],
            },
            "reward": {"name": "factorization"},
            "algorithm": {"divergence": divergence, "eta": 0.5},
            "reference": {"num_samples": 4, "threshold": 3},
            "learner": {"num_steps": num_steps, "lr": 1e-3},
            "evaluation": {"num_samples": NUM_SAMPLES, "k": [1, 8]},
        }
        | changes
    )
    (folder / "config.yaml").write_text(config_to_yaml(config))
    if arm:
        (folder / "arm.json").write_text(json.dumps({"suite": arm[0], "arm": arm[1], "seed": seed}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(1, num_steps + 1)))
    (folder / "run.log").write_text("2026-01-02T03:04:05.678Z INFO dphrl.console: step\n")
    base = write_evaluation(folder / "eval" / "base.json", [6, 2, 1, 0])
    write_evaluation(folder / "eval" / f"step_{num_steps}.json", correct, base)
    samples = folder / "samples"
    samples.mkdir()
    sample = {"prompt_id": "p0", "prompt": "FACTOR 9", "completion": completion, "score": 1.0, "status": "correct"}
    sample |= {"detail": "3*3", "policy_version": 0, "sample_index": 0, "finish_reason": "stop"}
    (samples / "step_000001.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def record(step: int) -> dict[str, float | None]:
    statuses = {f"reward/status/{status}": 0.0 for status in RewardStatus}
    return {
        "step": step,
        "reward/mean": step / 16,
        "policy/entropy": 1.0 / step,
        "divergence/loss": 0.01 * step,
        "sync/logprob_gap_max": 10.0**-step,
        "rollout/staleness_max": 0.0,
        "rollout/num_tokens": 1000.0,
        **statuses,
        "reward/status/correct": 4.0,
        "reward/status/timeout": 1.0,
        "time/step_s": 2.0,
        "time/rollout_s": 1.0,
        "time/reward_s": 0.25,
        "time/learn_s": 0.5,
        "time/sync_s": 0.125,
    }


def write_evaluation(path: Path, correct: Sequence[int], base: Sequence[tuple[str, int, int]] | None = None) -> Any:
    path.parent.mkdir(exist_ok=True)
    counts = [(f"p{i}", NUM_SAMPLES, c) for i, c in enumerate(correct)]
    summary = summarize("factor", "held_out", counts, [1, 8], 0.5, base) | {"distinct_correct": 1.25}
    path.write_text(json.dumps([summary]))
    return counts


def write_reference(folder: Path, correct: Sequence[int], graded: Sequence[int]) -> None:
    (folder / "reference").mkdir()
    part = ["near_perfect" if c >= 3 else "exploration" for c in correct]
    columns = {"prompt_id": [f"p{i}" for i in range(len(part))], "num_correct": correct, "num_graded": graded}
    pq.write_table(pa.table(columns | {"part": part}), folder / "reference" / "counts.parquet")
    split = {"num_near_perfect": part.count("near_perfect"), "num_exploration": part.count("exploration")}
    split |= {"num_dropped": 0, "num_stored_samples": 11}
    manifest = {"fingerprint": {"prompts": "abc"}, "seed": 0, "split": split}
    (folder / "reference" / "manifest.json").write_text(json.dumps(manifest))


class Page(HTMLParser):
    """The report's elements, tables (rows of cell texts) and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in_cell = False
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag in ("script", "style")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.tables[-1][-1].append("")
        elif self._in_cell and tag in ("small", "br"):
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data
        if not self._in_script:
            self.text += data

    def table(self, first_columns: str) -> list[list[str]]:
        return next(rows for rows in self.tables if " ".join(rows[0]).startswith(first_columns))

    def charts(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg viewBox.*?</svg>", self.source, re.S)]

    def chart(self, title: str) -> ElementTree.Element:
        return next(svg for svg in self.charts() if (svg.findtext("title") or "").startswith(title))

    def data(self) -> Any:
        block = re.search(r'<script type="application/json" id="samples-data">(.*?)</script>', self.source, re.S)
        assert block is not None
        return json.loads(block[1])


def render(tmp_path: Path, *run_dirs: Path) -> Page:
    output = tmp_path / "out" / "report.html"
    write_report(run_dirs, output)
    return Page(output.read_bytes().decode("utf-8"))


def points(svg: ElementTree.Element, name: str) -> list[list[float]]:
    groups = [group for group in svg.iter("g") if group.get("data-name") == name]
    assert len(groups) == 1
    return [[float(v) for v in text.split(",")] for text in groups[0].get("data-points", "").split()]


# -------------------------------------------------------------------------------------------- numbers


def test_summary_has_base_first_and_the_best_in_bold(tmp_path: Path) -> None:
    write_run(tmp_path / "low", correct=(1, 1, 1, 0))
    write_run(tmp_path / "high", correct=(8, 8, 0, 0))
    page = render(tmp_path, tmp_path / "low", tmp_path / "high")
    rows = page.table("arm step Pass@1")
    assert [row[0] for row in rows[1:]] == ["base", "low", "high"]
    assert [row[1] for row in rows[1:]] == ["0", "4", "4"]
    assert [row[2].split()[0] for row in rows[1:]] == ["28.1", "9.4", "50.0"]
    assert [row[3].split()[0] for row in rows[1:]] == ["75.0", "75.0", "50.0"]
    # Of the three prompts that the base solves, low keeps all and high two.
    assert [row[5].split()[0] for row in rows[1:]] == ["-", "100.0", "66.7"]
    bold = re.findall(r"<strong>([\d.]+)</strong>", page.source)
    assert bold.count("50.0") >= 1 and "9.4" not in bold and bold.count("75.0") == 2


def test_curve_of_one_seed_is_the_estimator_with_its_bootstrap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only", correct=(8, 4, 0, 2))
    curve = points(render(tmp_path, run).chart("Pass@k"), "only")
    assert [point[0] for point in curve] == list(range(1, NUM_SAMPLES + 1))
    for k, mean, low, high in curve:
        values = pass_at_k([NUM_SAMPLES] * 4, [8, 4, 0, 2], int(k))
        assert mean == pytest.approx(100 * np.mean(values), rel=1e-3)
        assert (low, high) == pytest.approx([100 * v for v in bootstrap_interval(values) or ()], rel=1e-3)


def test_seeds_of_a_suite_are_one_arm_with_an_interval(tmp_path: Path) -> None:
    suite = tmp_path / "passk"
    for seed, correct in enumerate([(8, 8, 0, 0), (8, 4, 0, 0), (8, 0, 0, 0)]):
        write_run(suite / f"grpo-s{seed}", seed=seed, arm=("passk", "grpo"), divergence="none", correct=correct)
    write_run(suite / "dph-f-s0", arm=("passk", "dph-f"))
    page = render(tmp_path, suite)
    rows = page.table("arm step Pass@1")
    # Plain RL before what preserves diversity, whatever the alphabet says.
    assert [row[0] for row in rows[1:]] == ["base 3 seeds", "grpo 3 seeds", "dph-f"]
    # Student's t for three seeds: 37.5 +- 4.303 * 12.5 / sqrt(3).
    assert rows[2][2].split() == ["37.5", "6.4", "to", "68.6"]
    k, mean, low, high = points(page.chart("Pass@k"), "grpo")[0]
    assert (k, mean) == (1, 37.5)
    assert (low, high) == pytest.approx((37.5 - 31.05, 37.5 + 31.05), abs=0.05)
    assert "3 finished" in page.table("arm seed state")[1][2]


def test_series_and_plane_hold_what_was_logged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only")
    page = render(tmp_path, run)
    assert points(page.chart("Reward"), "only") == [[1, 0.0625], [2, 0.125], [3, 0.1875], [4, 0.25]]
    assert points(page.chart("Log-prob gap"), "only") == [[1, 0.1], [2, 0.01], [3, 0.001], [4, 0.0001]]
    assert points(page.chart("Throughput"), "only") == [[step, 500] for step in range(1, 5)]
    assert points(page.chart("Pass@1 against Pass@8"), "only") == [[28.12, 75], [43.75, 75]]
    assert "Staleness: 0 at every step of every run." in page.text


def test_time_and_statuses_are_stacked_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only")
    page = render(tmp_path, run)
    time = page.chart("only: where the time")
    heights = {g.get("data-name"): g.get("data-heights", "") for g in time.iter("g") if g.get("data-heights")}
    assert {name: float(text.split(",")[0]) for name, text in heights.items()} == {
        "rollout": 1.0, "reward": 0.25, "learn": 0.5, "sync": 0.125, "other": 0.125,
    }  # fmt: skip
    statuses = page.chart("only: completions of a step")
    assert [g.get("data-name") for g in statuses.iter("g") if g.get("data-heights")] == ["correct", "timeout"]
    assert "Never: wrong, unparsable, refused, resource limit, infrastructure error." in page.text


def test_retention_counts_lost_and_newly_solved(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only", correct=(8, 4, 0, 2))
    rows = render(tmp_path, run).table("arm retention")
    assert rows[1][1].split()[0] == "66.7"
    assert rows[1][2:] == ["3", "2", "1", "1"]


def test_reference_split_is_counted_and_its_absence_said(tmp_path: Path) -> None:
    dph = write_run(tmp_path / "dph")
    write_reference(dph, correct=[4, 3, 0, 0, 1, 2], graded=[4, 4, 4, 0, 4, 4])
    grpo = write_run(tmp_path / "grpo", divergence="none")
    unfinished = write_run(tmp_path / "unfinished")
    page = render(tmp_path, dph, grpo, unfinished)
    rows = page.table("used by")
    assert rows[1] == ["dph", "≥ 3 of 4", "6", "2", "4", "1", "0", "1", "11"]
    bars = [g.get("data-count") for g in page.chart("Reference split of dph").iter("g") if g.get("data-count")]
    assert bars == ["1", "1", "1", "1", "1"]
    assert "No reference stage (no divergence, or one on rollouts alone): grpo." in page.text
    assert "Reference stage not finished, or its files are gone: unfinished." in page.text


def test_only_differing_settings_are_listed(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", seed=1)
    second = write_run(tmp_path / "b", seed=2, learner={"num_steps": 4, "lr": 1e-2})
    rows = render(tmp_path, first, second).table("setting a b")
    assert rows[1:] == [["learner.lr", "0.001", "0.01"]]


# -------------------------------------------------------------------------------------------- hostile text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only", completion=HOSTILE)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("run_name: only", "run_name: '<img src=x onerror=alert(3)>'"))
    page = render(tmp_path, run)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "\x00" not in page.source and "\x1b" not in page.source
    completion = page.data()["rows"][0][4]
    assert completion == HOSTILE.replace("\x00", "␀").replace("\ud800", "�").replace("\x1b", "␛")
    assert page.data()["arms"] == ["<img src=x onerror=alert(3)>"]


def test_page_loads_nothing(tmp_path: Path) -> None:
    page = render(tmp_path, write_run(tmp_path / "only"))
    assert not [attrs for _, attrs in page.tags if "src" in attrs or (attrs.get("href") or "#")[0] != "#"]
    assert "://" not in re.sub(r"<script type=.*?</script>", "", page.source, flags=re.S)
    policy = next(attrs for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")


def test_charts_are_named_and_tables_have_headers(tmp_path: Path) -> None:
    page = render(tmp_path, write_run(tmp_path / "only"))
    for svg in page.charts():
        assert svg.get("role") == "img" and svg.findtext("title") and svg.findtext("desc")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_can_be_embedded(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode("utf-8")
    embedded = embed_json({"text": cleaned})
    assert "<" not in embedded and "\x00" not in embedded
    assert json.loads(embedded)["text"] == cleaned


# -------------------------------------------------------------------------------------------- incomplete runs


def test_killed_run_is_reported_as_such(tmp_path: Path) -> None:
    run = write_run(tmp_path / "killed", num_steps=9)
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record(i)) + "\n" for i in (1, 2, 3)) + '{"step": 4, "reward/me')
    (run / "eval" / "step_9.json").unlink()
    page = render(tmp_path, run)
    assert "killed: stopped after step 3 of 9" in page.text
    assert "metrics.jsonl: 1 of 4 lines are cut off or broken" in page.text
    assert "Not evaluated after training began: killed." in page.text
    assert [row[0] for row in page.table("arm step Pass@1")[1:]] == ["base"]
    assert "no run has both a base and a later evaluation" in page.text


def test_run_that_only_has_settings_makes_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare")
    for path in [run / "metrics.jsonl", run / "run.log", *run.glob("eval/*"), *run.glob("samples/*")]:
        path.unlink()
    page = render(tmp_path, run)
    for said in ("no step taken yet", "No run was evaluated", "No step was recorded", "No completions were stored"):
        assert said in page.text
    assert not page.charts()


@pytest.mark.parametrize("broken", ["eval/step_4.json", "eval/base.json", "samples/step_000001.jsonl", "arm.json"])
def test_broken_file_is_named_and_left_out(tmp_path: Path, broken: str) -> None:
    run = write_run(tmp_path / "run", arm=("suite", "arm"))
    (run / broken).write_text('[{"dataset": ')
    page = render(tmp_path, run)
    assert ("1 broken lines left out" if "samples" in broken else broken.split("/")[-1]) in page.text
    assert page.chart("Reward") is not None


def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "gap")
    records = [record(i) for i in range(1, 5)]
    records[1]["reward/mean"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [x for x, _ in points(render(tmp_path, run).chart("Reward"), "gap")] == [1, 3, 4]


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"empty: no config\.yaml in it or directly below; name a run's folder"
    ) as error:
        write_report([tmp_path / "empty", tmp_path / "nowhere"], tmp_path / "report.html")
    assert error.value.lines[1].endswith("nowhere: no such folder; name a run's folder (RUN_DIR/NAME) or a suite's")
    assert not (tmp_path / "report.html").exists()
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match="is a folder; name the HTML file"):
        write_report([run], tmp_path)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        write_report([run], tmp_path / "report.html")


# -------------------------------------------------------------------------------------------- parts


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
    assert band is not None and list(band.ys) == [max(v) for v in near.values()]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=3000))
def test_thinned_curve_keeps_ends_extremes_and_gaps(ys: list[float | None]) -> None:
    kept = thin_out(list(enumerate(ys)), limit=100)
    assert len(kept) <= max(100, 3 * 49 + 2) and kept == sorted(set(kept))
    assert {0, len(ys) - 1} <= set(kept)
    present = [y for y in ys if y is not None]
    shown = [ys[i] for i in kept if ys[i] is not None]
    assert not present or {min(present), max(present)} <= set(shown)
    assert (None in ys) == (None in [ys[i] for i in kept])


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_linear_axis_holds_its_values_and_a_few_ticks(low: float, width: float) -> None:
    axis = linear_axis("y", [low, low + width])
    assert axis.low <= low and low + width <= axis.high
    assert 1 <= len(axis.ticks) <= 12 and all(axis.low <= tick <= axis.high + 1e-6 * width for tick, _ in axis.ticks)


def test_axes_of_k_and_of_powers() -> None:
    assert [tick for tick, _ in k_axis("k", 24).ticks] == [1, 2, 4, 8, 16, 24]
    assert [tick for tick, _ in k_axis("k", 1).ticks] == [1]
    gap = log_axis("gap", [0.0, 3e-7, 2e-5])
    assert (gap.low, gap.high) == pytest.approx((1e-7, 1e-4))
    assert gap.place(0.0) == 0.0 and gap.place(1e-4) == pytest.approx(1.0)
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
    assert all(b - a >= 13.0 - 1e-6 for a, b in zip(placed, placed[1:], strict=False))
    assert all(-1e-6 <= level <= 300.0 for level in placed)


def test_other_time_is_never_negative(tmp_path: Path) -> None:
    run = write_run(tmp_path / "overlap")
    records = [record(1) | {"time/step_s": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert phases(find_runs([run])[0])["other"] == {1: 0.0}


def test_samples_fit_their_budget(tmp_path: Path) -> None:
    assert choose_steps({1: 10, 2: 10, 3: 10, 4: 10, 5: 10}, 30) == [1, 3, 5]
    assert choose_steps({1: 10, 2: 10, 3: 10}, 1000) == [1, 2, 3]
    assert choose_steps({}, 10) == []
    assert shorten("x" * 5000 + "end").endswith("end") and "1,003 characters left out" in shorten("x" * 5000 + "end")
    run = write_run(tmp_path / "long")
    line = json.dumps({"prompt_id": "p", "prompt": "q", "completion": "w" * 3900, "score": 0, "status": "wrong"})
    for step in range(1, 41):
        (run / "samples" / f"step_{step:06d}.jsonl").write_text(f"{line}\n" * 10)
    page = render(tmp_path, run)
    assert len(page.source) < MAX_TOTAL_BYTES + 300_000
    steps = sorted({row[2] for row in page.data()["rows"]})
    assert 5 <= len(steps) < 40 and steps[0] == 1 and steps[-1] == 40
    assert f"of {len(steps)} of the 40 steps that stored any" in page.text


def test_long_evaluations_are_drawn_at_chosen_k() -> None:
    assert shown_ks(4) == [1, 2, 3, 4]
    ks = shown_ks(1024)
    assert ks[:32] == list(range(1, 33)) and ks[-1] == 1024 and len(ks) < 60
    assert all(math.isclose(b / a, 1.16, rel_tol=0.1) for a, b in zip(ks[32:], ks[33:], strict=False))
