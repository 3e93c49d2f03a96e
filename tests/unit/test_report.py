"""`dphrl report`: its numbers against the run folders, hostile text, runs that were killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dphrl.config.loading import InputError
from dphrl.evaluation.estimators import bootstrap_interval, pass_at_k
from dphrl.report import write_report
from tests.unit.report_folders import NUM_SAMPLES, points, record, render, write_reference, write_run

HOSTILE = 'a</script><script>alert(1)</script><img src=x onerror="alert(2)"> & \x00 \ud800 \u202e \x1b[31m'


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
    assert bold.count("50.0") >= 1
    assert "9.4" not in bold
    assert bold.count("75.0") == 2


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
    assert points(page.chart("Largest log-prob gap"), "only") == [[1, 0.1], [2, 0.01], [3, 0.001], [4, 0.0001]]
    assert points(page.chart("Throughput"), "only") == [[step, 500 * step] for step in range(1, 5)]
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


def test_changes_from_the_base_are_paired(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only", correct=(7, 3, 2, 1))
    row = render(tmp_path, run).table("arm Pass@1 Pass@8 kept")[1]
    # Every prompt has one more right sample of eight than the base's 6, 2, 1, 0.
    assert row[1].split() == ["+12.5", "+12.5", "to", "+12.5"]
    assert row[2].split()[0] == "+25.0"
    halves = [pass_at_k([8] * 4, counts, 4) for counts in ([6, 2, 1, 0], [7, 3, 2, 1])]
    itself = 2 * np.sum(halves[0]) - np.sum(pass_at_k([8] * 4, [6, 2, 1, 0], 8))
    shares = [100 * share / np.sum(halves[0]) for share in (np.sum(halves[0] * halves[1]), itself)]
    assert [float(cell) for cell in row[-2:]] == pytest.approx(shares, abs=0.06)
    # Over seeds: Student's t for changes of 12.5 and 0 is 6.25 +- 12.706 * 6.25.
    suite = tmp_path / "suite"
    for seed, correct in enumerate([(7, 3, 2, 1), (6, 2, 1, 0)]):
        write_run(suite / f"grpo-s{seed}", seed=seed, arm=("passk", "grpo"), correct=correct)
    row = render(tmp_path, suite).table("arm Pass@1 Pass@8 kept")[1]
    assert row[1].split() == ["+6.2", "-73.2", "to", "+85.7"]


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
    cut = write_run(tmp_path / "cut")
    write_reference(cut, correct=[4, 4, 4, 0], graded=[4, 4, 4, 0], complete=[4, 0, 0, 0])
    chart = render(tmp_path, cut).chart("Reference split of cut")
    assert "2 with 0, 0 with 1, 0 with 2, 0 with 3, 1 with 4" in "".join(chart.itertext())
    assert "No reference stage (no divergence, or one on rollouts alone): grpo." in page.text
    # Replay needs the split without a divergence.
    replay = write_run(tmp_path / "replay", divergence="none", reference={"replay_share": 0.25})
    told = render(tmp_path, dph, replay).text
    assert "No reference stage" not in told
    assert "Reference stage not finished, or its files are gone: replay." in told
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
    assert "\x00" not in page.source
    assert "\x1b" not in page.source
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
        assert svg.get("role") == "img"
        assert svg.findtext("title")
        assert svg.findtext("desc")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


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
    assert ("1 broken lines were left out" if "samples" in broken else broken.split("/")[-1]) in page.text
    assert page.chart("Reward") is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"per_prompt": [{}]}, "per_prompt has a row"),
        ({"per_prompt": [{"prompt_id": "a", "num_samples": 2, "num_correct": 3}]}, "per_prompt has a row"),
        ({"per_prompt": [{"prompt_id": "a", "num_samples": 2, "num_correct": 1, "greedy": "yes"}]}, "greedy is not"),
        ({"pass@x": 0.5}, "is not pass@k"),
        ({"pass@1": "half"}, "pass@1 is not a number"),
    ],
)
def test_damaged_summary_is_named_and_left_out(tmp_path: Path, change: dict[str, object], said: str) -> None:
    run = write_run(tmp_path / "run")
    path = run / "eval" / "step_4.json"
    path.write_text(json.dumps([{**entry, **change} for entry in json.loads(path.read_text())]))
    (run / "eval" / "step_-3.json").write_text("[]")
    page = render(tmp_path, run)
    assert "eval/step_4.json: entry 1: " in page.text
    assert said in page.text
    assert "eval/step_-3.json: not a step's number; left out" in page.text
    assert [row[0] for row in page.table("arm step Pass@1")[1:]] == ["base"]


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
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        write_report([run], tmp_path)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        write_report([run], tmp_path / "report.html")
