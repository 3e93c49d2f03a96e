"""The alert rules fire when they should and only then, and name what a run exports."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.dashboards import alerts, grafana
from cluster.dashboards.panels import ROWS
from dphrl.config.errors import ConfigSchema
from dphrl.health import CHECKS
from dphrl.tracking.metrics import METRICS
from dphrl.types import RewardStatus
from tests.unit.promql import (
    check_series,
    exposition,
    faults,
    labels_in,
    names_in,
    needs_promtool,
    promtool,
    series_of,
)

ROOT = Path(__file__).resolve().parents[2]
RULES = [rule for group in alerts.rules()["groups"] for rule in group["rules"]]
RULE_NAMES = [rule["alert"] for rule in RULES]
PANELS = [panel for panel in grafana.dashboard()["panels"] if panel["type"] != "row"]

every_rule = pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)


@pytest.fixture(scope="module")
def events() -> set[str]:
    """The names of all events that a run can have."""
    written = set(CHECKS)
    for package in ("dphrl", "actors", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            written |= set(re.findall(r'"event": "(\w+)"', path.read_text(encoding="utf-8")))
    return written


# ------------------------------------------------------------ the file


def test_the_committed_file_is_the_generated_one() -> None:
    assert alerts.ALERTS.read_text(encoding="utf-8") == alerts.render(), "run: python -m cluster.dashboards.alerts"


def test_the_documentation_lists_every_rule() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().partition("### Alerts")[2].partition("\n### ")[0]
    assert re.findall(r"`(Dphrl\w+)`", section) == RULE_NAMES


def test_a_wheel_has_the_files() -> None:
    patterns = re.search(r"^cluster = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert patterns is not None
    for file in (alerts.ALERTS, grafana.DASHBOARD):
        assert f'"dashboards/*{file.suffix}"' in patterns[1]


@every_rule
def test_a_rule_says_which_run_and_what_to_do(rule: dict[str, Any]) -> None:
    notes = rule["annotations"]
    assert "{{ $labels.run }}" in notes["summary"]
    assert "{{ $labels.run }}" in notes["description"]
    assert notes["description"].partition(" What to do: ")[2].endswith(".")
    assert rule["labels"]["severity"] in ("info", "warning", "critical")


@every_rule
def test_a_rule_names_what_is_exported(rule: dict[str, Any]) -> None:
    assert names_in(rule["expr"])
    assert faults(rule["expr"]) == []


@every_rule
def test_a_rule_asks_for_values_that_there_are(rule: dict[str, Any], events: set[str]) -> None:
    values = {"event": events, "status": {str(status) for status in RewardStatus}, "policy": {"base", "current"}}
    for label, chosen in re.findall(r'(\w+)=~?"([^"]*)"', rule["expr"]):
        assert set(chosen.split("|")) - values[label] == set()


def test_every_check_on_a_run_s_curves_has_a_rule(events: set[str]) -> None:
    told = {*alerts.FINDINGS, *alerts.LOSSES, *alerts.DAMAGES, "rising_gap"}
    # Skipped steps have a rule by their count; the others are no bad news, or come with one that is.
    assert events - told == {"skipped_step", "checkpoint", "scaled", "completion_redispatched"}


def remedies() -> list[str]:
    return [rule["annotations"]["description"] for rule in RULES] + [p.when_bad for _, row in ROWS for p in row]


@pytest.mark.parametrize("text", remedies())
def test_a_remedy_names_settings_that_there_are(text: str) -> None:
    schema = ConfigSchema()
    sections = set(schema.keys(()))
    named = re.findall(r"\b([a-z]+(?:\.[a-z_]+)+)", text)
    unknown = [name for name in named if name.split(".")[0] in sections and schema.at(tuple(name.split("."))) is None]
    assert unknown == []


def test_every_panel_asks_and_says_what_to_do() -> None:
    for _, row in ROWS:
        for panel in row:
            assert panel.title.endswith("?"), panel.title
            assert panel.when_bad.endswith("."), panel.title
            assert "\n" not in panel.when_bad
    shown = {panel["title"]: panel["description"] for panel in PANELS}
    for _, row in ROWS:
        for panel in row:
            assert shown[panel.title].startswith(f"{panel.when_bad}\n\n")


def test_names_and_labels_that_are_not_exported_are_seen() -> None:
    assert faults('sum by (run) (increase(ray_dphrl_step{run="a"}[5m] offset 1h)) > 0') == []
    assert faults("ray_dphrl_gone > 1") == ["ray_dphrl_gone"]
    assert faults("dphrl_step") == ["dphrl_step"]
    assert faults('ray_dphrl_step{engine="0"}') == ["engine"]
    assert faults("max by (run, status) (ray_dphrl_step)") == ["status"]
    assert faults("ray_dphrl_step and on (rnu) ray_dphrl_step") == ["rnu"]
    assert names_in("max by (run) (a) < on (run) group_left () (0.5 * b) unless c offset 1h") == {"a", "b", "c"}
    assert labels_in('a{k!="1", policy=~"x"} and on (dataset) b') == {"k", "policy", "dataset"}


# ------------------------------------------------------------ evaluated


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", str(alerts.ALERTS), cwd=ROOT)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """What a run exports, by Ray's own recorder."""
    record = {metric.name: 1.0 for metric in METRICS}
    record |= {"rollout/engine/0/tokens_per_s": 100.0, "rollout/engine/0/busy_fraction": 0.5, "events/resumed": 1.0}
    return exposition(monkeypatch, tmp_path, record, "recorded")


def test_a_run_exports_every_family(recorded: dict[str, float]) -> None:
    shown = {name for panel in PANELS for target in panel["targets"] for name in names_in(target["expr"])}
    asked = {name for rule in RULES for name in names_in(rule["expr"])}
    assert (shown | asked) - {series.partition("{")[0] for series in recorded} == set()


@needs_promtool
def test_every_panel_shows_what_a_run_exports(recorded: dict[str, float], tmp_path: Path) -> None:
    series = {name: f"{value:g}+1x30" if "_seconds_" in name else f"{value:g}x30" for name, value in recorded.items()}
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries = [query.replace("$run", "recorded").replace("$window", "15m") for query in queries]
    check_series(tmp_path, series, {f"count({query}) > bool 0": ["{}"] for query in queries}, "30m")


@dataclass(frozen=True)
class Case:
    """fires: series, with a sample a minute for four hours, at whose end the rule fires. quiet: one that differs from
    them in some series, so that it does not. labels: those of the alert, without its name."""

    fires: dict[str, str]
    quiet: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)


def event(name: str) -> str:
    return series_of("dphrl_events_total", event=name)


def engine(name: str, index: int) -> str:
    return series_of(f"dphrl_engine_{name}", engine=str(index))


def status(name: str) -> str:
    return series_of("dphrl_reward_status_total", status=name)


def pass_at(k: int, policy: str) -> str:
    return series_of("dphrl_pass_at_k", k=str(k), policy=policy, dataset="d")


STEP, SKIPPED, GAP = (series_of(f"dphrl_{name}") for name in ("step", "skipped_steps_total", "mean_logprob_gap"))
BUSY, WAITING, DISK = (
    series_of(f"dphrl_{name}") for name in ("rollout_busy_fraction", "waiting_share", "disk_free_share")
)
GRADING, ENGINES, WEIGHT = (
    series_of(f"dphrl_{name}") for name in ("completions_waiting", "rollout_engines", "importance_mean")
)
# Series of 241 samples, from 0 to 240 minutes. `_` is a minute without the series.
CONSTANT, RISING = "1x240", "0+1x240"
BORN_LATE = "_x235 1x5"  # a counter appears with its first count
LONG_AGO = "_x100 1x140"

CASES = {
    "DphrlNoStep": Case({STEP: "0+1x200 200x40"}, {STEP: "0+0.05x240"}),
    "DphrlSkippedSteps": Case({SKIPPED: BORN_LATE}, {SKIPPED: LONG_AGO}),
    "DphrlUnwell": Case(
        {event("entropy_collapse"): BORN_LATE},
        {event("entropy_collapse"): LONG_AGO, event("checkpoint"): RISING},
        {"event": "entropy_collapse"},
    ),
    "DphrlDiversityFalls": Case(
        {pass_at(8, "base"): "0.8x240", pass_at(8, "current"): "0.7x240"},
        {pass_at(8, "current"): "0.78x240", pass_at(1, "base"): "0.8x240", pass_at(1, "current"): "0.5x240"},
        {"dataset": "d", "k": "8"},
    ),
    "DphrlGapNearItsBound": Case(
        {event("rising_gap"): BORN_LATE}, {event("rising_gap"): LONG_AGO}, {"event": "rising_gap"}
    ),
    "DphrlGapRising": Case({GAP: "0.00001x150 0.0001x90"}, {GAP: "0.0000001x150 0.000001x90"}),
    "DphrlOffPolicy": Case({WEIGHT: "0.8x240"}, {WEIGHT: "1.02x240"}),
    "DphrlEngineIdle": Case(
        {engine("busy_fraction", 0): "0.9x240", engine("busy_fraction", 1): "0.1x240"},
        {engine("busy_fraction", 1): "0.8x240"},
        {"engine": "1"},
    ),
    "DphrlEngineHangs": Case(
        {engine("completions_pending", 0): "1+1x190 8x50", engine("completions_pending", 1): RISING},
        {engine("completions_pending", 0): "1+1x190 0x50"},
        {"engine": "0"},
    ),
    "DphrlEnginesIdle": Case({BUSY: "0.2x240"}, {BUSY: "0.6x240"}),
    "DphrlLearnerWaits": Case({WAITING: "0.9x240"}, {WAITING: "0.6x240"}),
    "DphrlGradersBehind": Case({GRADING: "5x240"}, {GRADING: "5x230 0 5x9"}),
    "DphrlLostOrRestarted": Case(
        {event("learner_restarted"): BORN_LATE},
        {event("learner_restarted"): LONG_AGO, event("scaled"): BORN_LATE},
        {"event": "learner_restarted"},
    ),
    "DphrlEnginesMissing": Case({ENGINES: "4x200 3x40"}, {ENGINES: "3x200 4x40"}),
    "DphrlNoVerdicts": Case(
        {status("correct"): "0+10x240", status("infrastructure_error"): "_x230 5x10"},
        {status("infrastructure_error"): "_x230 1x10"},
    ),
    "DphrlDamagedFile": Case(
        {event("export_failed"): BORN_LATE}, {event("export_failed"): LONG_AGO}, {"event": "export_failed"}
    ),
    "DphrlDiskNearlyFull": Case({DISK: "0.05x240"}, {DISK: "0.4x240"}),
}


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == RULE_NAMES


@needs_promtool
@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_when_it_should_and_only_then(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    labels = {"run": "a", **case.labels}
    used = set(re.findall(r"\$labels\.(\w+)", str(next(rule for rule in RULES if rule["alert"] == name))))
    assert used <= set(labels), "its words name a label that the alert has not"
    firing = f'count by ({", ".join(labels)}) (ALERTS{{alertname="{name}", alertstate="firing"}})'
    alert = "{" + ", ".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
    check_series(tmp_path, case.fires, {firing: [alert]}, "240m", alerts.ALERTS)
    check_series(tmp_path, {**case.fires, **case.quiet}, {firing: []}, "240m", alerts.ALERTS)


@needs_promtool
def test_a_rule_stops_when_its_run_has_ended(tmp_path: Path) -> None:
    ended = {STEP: "0+1x200 200x10 stale"}
    check_series(tmp_path, ended, {'ALERTS{alertname="DphrlNoStep"}': []}, "235m", alerts.ALERTS)


@needs_promtool
def test_what_a_resumed_run_counts_is_added_to_what_it_had(tmp_path: Path) -> None:
    """Its worker is another one for Ray, so its counters are new series that begin at their first count."""
    again = SKIPPED.replace('"w1"', '"w2"')
    query = next(t["expr"] for p in PANELS for t in p["targets"] if "skipped" in t["expr"])
    query = query.replace("$run", "a").replace("$window", "60m")
    check_series(tmp_path, {SKIPPED: "_x100 1x140", again: "_x230 2x10"}, {f"{query} == bool 2": ['{run="a"}']}, "240m")
    check_series(tmp_path, {SKIPPED: "_x100 1x100 3x40"}, {f"{query} > bool 1.9": ['{run="a"}']}, "240m")


@needs_promtool
def test_the_words_are_filled_in(tmp_path: Path) -> None:
    wanted = {
        "summary": "Run a loses Pass@8 on d",
        "description": "Run a: It is 70%, less than 90% of the initial policy's. What to do: Raise algorithm.eta or "
        "lower learner.lr, and go on from a checkpoint before the fall.",
    }
    name = "DphrlDiversityFalls"
    labels = {"run": "a", "severity": "warning", **CASES[name].labels}
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in CASES[name].fires.items()],
        "alert_rule_test": [
            {"eval_time": "10m", "alertname": name, "exp_alerts": [{"exp_labels": labels, "exp_annotations": wanted}]}
        ],
    }
    document = {"rule_files": [str(alerts.ALERTS)], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", "test.yaml", cwd=tmp_path)
