"""PromQL for tests: which metrics and labels an expression names; and promtool, Prometheus's own checker, where it is
installed (Debian, Ubuntu: it is in the package prometheus)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import actors.prometheus
from actors.prometheus import FAMILIES, RAY_PREFIX, PrometheusSink

# What Prometheus stores for a family of each kind.
SERIES = {"gauge": [""], "counter": [""], "histogram": ["_bucket", "_sum", "_count"]}
EXPORTED = {f"{RAY_PREFIX}{family.name}{suffix}": family for family in FAMILIES for suffix in SERIES[family.kind]}
# What Ray adds to the tags of a metric.
RAY_LABELS = {"Component": "core_worker", "NodeAddress": "10.0.0.1", "SessionName": "session_1", "WorkerId": "w1"}
WORDS = {"and", "or", "unless", "offset", "bool"}
GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed here")


def names_in(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r"{[^}]*}|\[[^\]]*\]|\boffset \S+", " ", GROUPING.sub(" ", expression))
    return set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - WORDS


def labels_in(expression: str) -> set[str]:
    """The labels that an expression chooses, groups or matches by."""
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = [label.strip() for _, labels in GROUPING.findall(expression) for label in labels.split(",")]
    return {*matched, *grouped} - {""}


def faults(expression: str) -> list[str]:
    """What an expression names that no run exports: metrics, and labels that none of its metrics has."""
    names = names_in(expression)
    known = {tag for name in names & set(EXPORTED) for tag in EXPORTED[name].tags}
    if any(name.endswith("_bucket") for name in names):
        known.add("le")
    return sorted(names - set(EXPORTED)) + sorted(labels_in(expression) - known)


def series_of(name: str, **labels: str) -> str:
    """One series of a run called `a`, as Prometheus writes it, with the labels that Ray adds."""
    chosen = {**RAY_LABELS, "run": "a", **labels}
    inner = ", ".join(f'{key}="{value}"' for key, value in sorted(chosen.items()))
    return f"{RAY_PREFIX}{name}{{{inner}}}"


def promtool(*arguments: str, cwd: Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def check_series(
    folder: Path, series: Mapping[str, str], wanted: Mapping[str, Sequence[str]], at: str, rule_file: Path | None = None
) -> None:
    """Let promtool evaluate expressions over series that have a sample a minute (`0+1x30`), at a time such as `30m`.

    wanted: of each expression, the label sets that its result should have, each with the value 1.
    """
    queries = [
        {"expr": expression, "eval_time": at, "exp_samples": [{"labels": labels, "value": 1} for labels in found]}
        for expression, found in wanted.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": queries}
    files = [str(rule_file)] if rule_file else []
    document = {"rule_files": files, "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", "test.yaml", cwd=folder)


class Recorder:
    """Stands for ray.util.metrics: hands what a sink records to the recorder that Ray's agent has in a cluster."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def kind(self, kind: str) -> Any:
        recorder = self._recorder

        class Instrument:
            def __init__(self, name: str, description: str, tag_keys: Sequence[str], boundaries: Sequence[float] = ()):
                extra = [list(boundaries)] if kind == "histogram" else []
                getattr(recorder, f"register_{kind}_metric")(name, description, *extra)
                self._name, self._default = name, dict[str, str]()

            def set_default_tags(self, tags: Mapping[str, str]) -> Any:
                self._default = dict(tags)
                return self

            def _record(self, value: float, tags: Mapping[str, str]) -> None:
                recorder.set_metric_value(self._name, {**RAY_LABELS, **self._default, **tags}, value)

            inc = set = observe = _record

        return Instrument


def exposition(
    monkeypatch: pytest.MonkeyPatch, folder: Path, record: Mapping[str, float], run: str
) -> dict[str, float]:
    """What the agent's URL shows after a step and evaluations of a run: each series of dphrl with its value."""
    prometheus_client = pytest.importorskip("prometheus_client")
    module = pytest.importorskip("ray._private.telemetry.open_telemetry_metric_recorder")
    agents = module.OpenTelemetryMetricRecorder(gauge_metric_ttl_seconds=600)
    # A meter of its own: OpenTelemetry gives two recorders of one process the same instruments.
    provider = module.MeterProvider(metric_readers=[module.PrometheusMetricReader()])
    agents.meter = provider.get_meter(__name__)
    recorder = Recorder(agents)
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(actors.prometheus.ray_metrics, kind, recorder.kind(kind.lower()))
    live = {"queue/prompts_waiting": 3.0, "queue/engine/0/completions_pending": 8.0}
    live |= {"queue/completions_waiting": 2.0, "queue/reward_workers_busy": 1.0}
    sink = PrometheusSink(run, lambda: live)
    sink.start({}, folder)
    summary = {"dataset": "factor", "greedy": 0.5, "pass@1": 0.5, "pass@8": 0.75, "distinct_correct": 1.5}
    sink.log_evaluation(0, "base", [summary])
    sink.log_evaluation(1, "current", [summary | {"retention": 0.9}])
    sink.log_step(record)
    text = prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()
    sink.close()
    provider.shutdown()
    # Of this run: another test of the same process may have a recorder, too.
    lines = [line for line in text.splitlines() if line.startswith(f"{RAY_PREFIX}dphrl_") and f'run="{run}"' in line]
    return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}
