"""The table of metric families and the sink that fills them; no Ray cluster runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import actors.prometheus
from actors.prometheus import FAMILIES, RAY_PREFIX, PrometheusSink
from dphrl.tracking.metrics import BY_NAME
from dphrl.types import RewardStatus

# Entries of metrics.jsonl whose names hold a part that varies or that only a run on Ray has; queue depths and
# evaluations are no entries of it.
ELSEWHERE = ("evaluation/", "disk/", "queue/", "rollout/engine/", "rollout/tokens_per_s", "reward/status/", "events/")


class Recorded:
    """Stands for ray.util.metrics: remembers what it was told, and refuses what Ray refuses."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}

    def kind(self, kind: str) -> Callable[..., Any]:
        recorded = self

        class Instrument:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], **options: Any) -> None:
                assert description
                assert bool(options.get("boundaries")) == (kind == "Histogram")
                recorded.kinds[name] = kind
                self.name, self.tag_keys, self.default_tags = name, tag_keys, dict[str, str]()

            def set_default_tags(self, tags: dict[str, str]) -> Any:
                self.default_tags = tags
                return self

            def _record(self, value: float, tags: dict[str, str]) -> None:
                merged = {**self.default_tags, **tags}
                assert set(merged) == set(self.tag_keys)
                recorded.values.setdefault((self.name, tuple(sorted(merged.items()))), []).append(value)

            inc = set = observe = _record

        return Instrument

    def of(self, name: str, **tags: str) -> list[float]:
        return self.values.get((name, tuple(sorted({"run": "a", **tags}.items()))), [])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    fake = Recorded()
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(actors.prometheus.ray_metrics, kind, fake.kind(kind))
    # Nothing is refreshed but by the test.
    monkeypatch.setattr(actors.prometheus, "REFRESH_S", 1e6)
    return fake


@pytest.fixture
def sink(recorded: Recorded) -> Iterator[PrometheusSink]:
    made = PrometheusSink("a")
    made.start({}, Path())
    yield made
    made.close()


# ------------------------------------------------------------ the table


def test_names_are_unique_and_fit_prometheus() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names) == len({family.key for family in FAMILIES})
    for family in FAMILIES:
        assert family.name.startswith("dphrl_")
        assert family.name.replace("_", "").isalnum()
        # Ray appends it where it is missing, so only with it the table holds the name that is scraped.
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.description.endswith(".")


def test_entries_are_those_of_metrics_jsonl() -> None:
    for family in FAMILIES:
        assert family.key in BY_NAME or family.key.startswith(ELSEWHERE), family.key


def test_all_that_every_step_has_is_exported() -> None:
    required = [metric.name for metric in BY_NAME.values() if metric.required]
    missing = [name for name in required if not actors.prometheus._families_of(name)]
    assert missing == [], "add them to FAMILIES and to the rows of cluster.dashboards.grafana"


@pytest.mark.parametrize(
    ("key", "name", "tags"),
    [
        ("step", "dphrl_step", {}),
        ("reward/status/timeout", "dphrl_reward_status_total", {"status": "timeout"}),
        ("rollout/engine/3/tokens_per_s", "dphrl_engine_tokens_per_s", {"engine": "3"}),
        ("queue/engine/0/completions_pending", "dphrl_engine_completions_pending", {"engine": "0"}),
        (
            "evaluation/base/team/math-500/pass@16",
            "dphrl_pass_at_k",
            {"policy": "base", "dataset": "team/math-500", "k": "16"},
        ),
        ("evaluation/current/gsm8k/retention", "dphrl_retention", {"policy": "current", "dataset": "gsm8k"}),
    ],
)
def test_an_entry_finds_its_family_and_tags(key: str, name: str, tags: dict[str, str]) -> None:
    ((family, found),) = actors.prometheus._families_of(key)
    assert (family.name, found) == (name, tags)
    assert family.tags == ("run", *tags)


def test_an_entry_of_no_family_is_left_out() -> None:
    assert actors.prometheus._families_of("something/new") == []
    assert actors.prometheus._families_of("evaluation/base/d/num_prompts") == []


# ------------------------------------------------------------ the sink


def test_a_step_sets_counts_and_observes(sink: PrometheusSink, recorded: Recorded) -> None:
    statuses = {f"reward/status/{status}": 0.0 for status in RewardStatus}
    first = {"step": 1, "reward/mean": 0.25, "time/step_s": 2.5, **statuses, "reward/status/correct": 3.0}
    sink.log_step(first)
    sink.log_step({**first, "step": 2, "reward/status/timeout": 1.0})
    assert recorded.of("dphrl_step") == [1, 2]
    assert recorded.of("dphrl_step_seconds") == [2.5, 2.5]
    # Ray refuses to add 0 to a counter.
    assert recorded.of("dphrl_reward_status_total", status="correct") == [3.0, 3.0]
    assert recorded.of("dphrl_reward_status_total", status="timeout") == [1.0]
    assert recorded.of("dphrl_reward_status_total", status="wrong") == []
    assert recorded.kinds["dphrl_reward_status_total"] == "Counter"
    assert recorded.kinds["dphrl_step_seconds"] == "Histogram"


def test_gauges_are_set_again_and_counters_are_not(sink: PrometheusSink, recorded: Recorded) -> None:
    sink.log_step({"step": 1, "time/step_s": 2.5, "reward/status/wrong": 3.0})
    sink.refresh()
    assert recorded.of("dphrl_step") == [1, 1]
    assert recorded.of("dphrl_step_seconds") == [2.5]
    assert recorded.of("dphrl_reward_status_total", status="wrong") == [3.0]


def test_what_a_step_lacks_is_not_repeated(sink: PrometheusSink, recorded: Recorded) -> None:
    sink.log_step({"step": 1, "policy/loss": 0.5, "policy/entropy": 1.0})
    sink.log_step({"step": 2, "policy/loss": math.nan})
    sink.refresh()
    assert recorded.of("dphrl_policy_loss") == [0.5]
    assert recorded.of("dphrl_entropy") == [1.0]
    assert recorded.of("dphrl_step") == [1, 2, 2]


def test_the_disk_of_the_run_folder_is_looked_at_once_a_step(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        if len(asked) > 1:
            raise OSError("stale file handle")
        return SimpleNamespace(total=200, used=150, free=50)

    monkeypatch.setattr(actors.prometheus.shutil, "disk_usage", usage)
    sink = PrometheusSink("a")
    sink.start({}, tmp_path)
    sink.log_step({"step": 1})
    sink.refresh()
    assert recorded.of("dphrl_disk_free_share") == [0.25, 0.25]
    sink.log_step({"step": 2})  # it cannot be seen: no number, and no error
    sink.close()
    assert (asked, recorded.of("dphrl_disk_free_share")) == ([tmp_path, tmp_path], [0.25, 0.25])
    assert recorded.of("dphrl_step") == [1, 1, 2]


def test_evaluations_of_base_and_current_stay(sink: PrometheusSink, recorded: Recorded) -> None:
    summary = {"dataset": "d", "split": "test", "pass@8": 0.5, "retention": None, "per_prompt": [], "num_prompts": 4}
    sink.log_evaluation(0, "base", [summary])
    sink.log_evaluation(10, "current", [{**summary, "pass@8": 0.75, "retention": 0.9}])
    sink.log_step({"step": 11})
    assert recorded.of("dphrl_pass_at_k", policy="base", dataset="d", k="8") == [0.5] * 3
    assert recorded.of("dphrl_pass_at_k", policy="current", dataset="d", k="8") == [0.75] * 2
    assert recorded.of("dphrl_retention", policy="base", dataset="d") == []
    assert recorded.of("dphrl_retention", policy="current", dataset="d") == [0.9] * 2


def test_queues_are_read_between_steps_until_the_end(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.prometheus, "REFRESH_S", 0.001)
    asked = threading.Semaphore(0)

    def live() -> dict[str, float]:
        asked.release()
        return {"queue/prompts_waiting": 7.0}

    sink = PrometheusSink("a", live)
    sink.start({}, Path())
    assert asked.acquire(timeout=30)
    assert asked.acquire(timeout=30)
    sink.finish("finished")
    num_set = len(recorded.of("dphrl_prompts_waiting"))
    assert num_set >= 2
    assert set(recorded.of("dphrl_prompts_waiting")) == {7.0}
    sink.close()
    assert len(recorded.of("dphrl_prompts_waiting")) == num_set


def test_a_failing_refresh_is_one_warning_and_goes_on(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(actors.prometheus, "REFRESH_S", 0.001)
    asked = threading.Semaphore(0)

    def live() -> dict[str, float]:
        asked.release()
        raise RuntimeError("pool is gone")

    sink = PrometheusSink("a", live)
    sink.start({}, Path())
    for _ in range(3):
        assert asked.acquire(timeout=30)
    sink.close()
    assert [record.getMessage() for record in caplog.records] == ["prometheus: gauges are not refreshed: pool is gone"]


# ------------------------------------------------------------ what Ray makes of it


def test_ray_takes_every_family() -> None:
    """Its real classes, which check names, tags and boundaries also where no cluster runs."""
    sink = PrometheusSink("a", lambda: {"queue/prompts_waiting": 1.0})
    sink.start({}, Path())
    sink.log_step({family.key.replace("{", "").replace("}", ""): 1.0 for family in FAMILIES})
    sink.close()


def test_ray_exports_the_names_of_the_table() -> None:
    """By the recorder that its agent has in a cluster."""
    prometheus_client = pytest.importorskip("prometheus_client")
    recorder_module = pytest.importorskip("ray._private.telemetry.open_telemetry_metric_recorder")
    recorder = recorder_module.OpenTelemetryMetricRecorder(gauge_metric_ttl_seconds=60)
    for family in FAMILIES:
        if family.kind == "histogram":
            recorder.register_histogram_metric(family.name, family.description, [1.0, 2.0])
        elif family.kind == "counter":
            recorder.register_counter_metric(family.name, family.description)
        else:
            recorder.register_gauge_metric(family.name, family.description)
        recorder.set_metric_value(family.name, dict.fromkeys(family.tags, "x"), 1.5)
    text = prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()
    scraped = {line.split("{")[0] for line in text.splitlines() if line.startswith(f"{RAY_PREFIX}dphrl_")}
    suffixes = {"gauge": [""], "counter": [""], "histogram": ["_bucket", "_sum", "_count"]}
    assert scraped == {RAY_PREFIX + family.name + suffix for family in FAMILIES for suffix in suffixes[family.kind]}
