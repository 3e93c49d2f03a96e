"""A run's numbers as Prometheus metrics, exported by the metrics agent that Ray runs on the driver's node.

Ray puts `ray_` before every name, so the gauge `dphrl_step` is scraped as `ray_dphrl_step`. Ray adds `_total` to the
name of a counter that does not end in it. A histogram becomes `_bucket`, `_sum` and `_count`; Ray computes the sum from
the middles of the buckets, so it is only approximate.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util import metrics as ray_metrics

from dphrl.tracking.metrics import BY_NAME
from dphrl.tracking.sinks import Policy, Status, Summaries, evaluation_record, finite_numbers

log = logging.getLogger(__name__)

RAY_PREFIX = "ray_"
# Ray's agent forgets a gauge that was not set for two of its report intervals (10 s by default, 1 s at least), but a
# step may take minutes. To set all gauges takes far less than a millisecond.
REFRESH_S = 1.0
STEP_BOUNDARIES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)

Tags = dict[str, str]


@dataclass(frozen=True)
class Family:
    """One metric family.

    key: name of an entry of metrics.jsonl, of an evaluation or of the pools; a `{tag}` in it becomes a tag. kind: a
    gauge keeps a step's value until the next step; a counter adds up the values of all steps; a histogram takes one
    value per step.
    """

    key: str
    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    description: str

    @property
    def tags(self) -> tuple[str, ...]:
        return ("run", *re.findall(r"{(\w+)}", self.key))

    def match(self, key: str) -> Tags | None:
        """The tags in `key`, the name of an entry; None for an entry of another family."""
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(self.key))
        found = re.fullmatch(pattern, key)
        return found and found.groupdict()


def _step(key: str, name: str, kind: Literal["gauge", "counter", "histogram"] = "gauge") -> Family:
    """The family of an entry whose unit and meaning are in dphrl.tracking.metrics."""
    return Family(key, name, kind, BY_NAME[key].unit, BY_NAME[key].meaning)


def _gauge(key: str, name: str, unit: str, description: str) -> Family:
    return Family(key, name, "gauge", unit, description)


FAMILIES: tuple[Family, ...] = (
    _step("step", "dphrl_step"),
    _step("policy_version", "dphrl_policy_version"),
    # What is learned.
    _step("reward/mean", "dphrl_reward_mean"),
    _step("reward/signal_mean", "dphrl_reward_signal_mean"),
    _step("reward/zero_variance_fraction", "dphrl_zero_variance_fraction"),
    _step("policy/loss", "dphrl_policy_loss"),
    _step("policy/clip_fraction", "dphrl_clip_fraction"),
    _step("policy/entropy", "dphrl_entropy"),
    _step("learner/grad_norm", "dphrl_grad_norm"),
    _step("learner/lr", "dphrl_learner_lr"),
    # What stays diverse.
    _step("divergence/loss", "dphrl_divergence_loss"),
    _step("divergence/log_u_mean", "dphrl_divergence_log_u_mean"),
    _step("divergence/continued_fraction", "dphrl_divergence_continued_fraction"),
    _step("divergence/num_rows", "dphrl_divergence_rows"),
    _gauge("evaluation/{policy}/{dataset}/pass@{k}", "dphrl_pass_at_k", "share", "Unbiased Pass@k, base or current."),
    _gauge("evaluation/{policy}/{dataset}/greedy", "dphrl_greedy", "share", "Prompts the greedy completion solves."),
    _gauge(
        "evaluation/{policy}/{dataset}/retention",
        "dphrl_retention",
        "share",
        "Of the prompts the base solves, those the current policy still solves.",
    ),
    _gauge(
        "evaluation/{policy}/{dataset}/distinct_correct",
        "dphrl_distinct_correct",
        "solutions",
        "Mean number of different correct solutions of a prompt.",
    ),
    # Time and work.
    _step("time/step_s", "dphrl_step_seconds", "histogram"),
    _step("time/rollout_s", "dphrl_rollout_seconds"),
    _step("time/reward_s", "dphrl_reward_seconds"),
    _step("time/learn_s", "dphrl_learn_seconds"),
    _step("time/sync_s", "dphrl_sync_seconds"),
    _step("rollout/tokens_per_s", "dphrl_tokens_per_s"),
    _gauge(
        "rollout/engine/{engine}/tokens_per_s",
        "dphrl_engine_tokens_per_s",
        "tokens/s",
        "Completion tokens of an engine over the time it was at work.",
    ),
    _step("time/waiting_share", "dphrl_waiting_share"),
    _step("learner/tokens_per_s", "dphrl_learner_tokens_per_s"),
    _step("learner/mfu", "dphrl_learner_mfu"),
    _step("sync/gb_per_s", "dphrl_sync_gb_per_s"),
    _step("rollout/busy_fraction", "dphrl_rollout_busy_fraction"),
    _gauge(
        "rollout/engine/{engine}/busy_fraction",
        "dphrl_engine_busy_fraction",
        "share",
        "Of the step's time, that in which an engine had work.",
    ),
    _step("rollout/num_tokens", "dphrl_rollout_tokens_total", "counter"),
    _step("rollout/completion_tokens_mean", "dphrl_completion_tokens_mean"),
    _step("rollout/num_rounds", "dphrl_rollout_rounds"),
    _gauge("queue/prompts_waiting", "dphrl_prompts_waiting", "prompts", "Prompts that no engine has been handed yet."),
    _gauge(
        "queue/engine/{engine}/completions_pending",
        "dphrl_engine_completions_pending",
        "completions",
        "Completions an engine was asked for and has not returned.",
    ),
    _gauge(
        "queue/completions_waiting",
        "dphrl_completions_waiting",
        "completions",
        "Completions that wait for a free reward worker.",
    ),
    _gauge("queue/reward_workers_busy", "dphrl_reward_workers_busy", "workers", "Reward workers at work."),
    # Health.
    Family(
        "reward/status/{status}",
        "dphrl_reward_status_total",
        "counter",
        "completions",
        "Completions graded, by the verdict's status.",
    ),
    _step("rollout/engines", "dphrl_rollout_engines"),
    _step("rollout/engines_replaced", "dphrl_rollout_engines_replaced_total", "counter"),
    _step("rollout/num_resubmitted", "dphrl_rollout_resubmitted_total", "counter"),
    _step("reward/latency_mean_s", "dphrl_reward_latency_mean_seconds"),
    _step("reward/latency_max_s", "dphrl_reward_latency_max_seconds"),
    _step("reward/num_retried", "dphrl_reward_retried_total", "counter"),
    _step("reward/num_restarts", "dphrl_reward_restarts_total", "counter"),
    _step("rollout/staleness_max", "dphrl_staleness"),
    _step("rollout/truncated_fraction", "dphrl_truncated_fraction"),
    _step("sync/logprob_gap_max", "dphrl_logprob_gap"),
    _step("sync/logprob_gap_mean", "dphrl_mean_logprob_gap"),
    _step("rollout/logprob_gap_max", "dphrl_rollout_logprob_gap"),
    _step("policy/importance_mean", "dphrl_importance_mean"),
    _step("policy/ratio_bounded_fraction", "dphrl_ratio_bounded_fraction"),
    _step("learner/skipped_steps", "dphrl_skipped_steps_total", "counter"),
    _step("learner/restarts", "dphrl_learner_restarts"),
    _gauge("disk/free_share", "dphrl_disk_free_share", "share", "Of the run folder's file system, what is free."),
    Family("events/{event}", "dphrl_events_total", "counter", "events", "What a person should know, by its name."),
)


class PrometheusSink:
    """`sinks.Sink` in a process that is connected to Ray.

    From `start` to `finish`, a thread sets every gauge once a second, and calls `live` for values that change within a
    step. After that Ray forgets the gauges, so a series ends when its run ends. When a step lacks a value, or the value
    is no finite number, its series pauses and does not repeat an old value.
    """

    name = "prometheus"

    def __init__(self, run_name: str, live: Callable[[], Mapping[str, float]] = dict) -> None:
        """live: the pools' queue depths at this moment, by the keys of FAMILIES; called from another thread."""
        self.run_name, self._live = run_name, live
        self._instruments: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._of_step: dict[str, float] = {}
        self._of_evaluation: dict[str, float] = {}
        self._ended = threading.Event()
        self._folder = Path()
        self._thread = threading.Thread(target=self._keep_fresh, name="prometheus", daemon=True)

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        self._folder = folder
        self._instruments = {family.name: self._instrument(family) for family in FAMILIES}
        self._thread.start()

    def log_step(self, record: Mapping[str, Any]) -> None:
        numbers = finite_numbers(record)
        for key, value in numbers.items():
            for family, tags in _families_of(key):
                if family.kind == "counter" and value > 0:
                    self._instruments[family.name].inc(value, tags=tags)
                elif family.kind == "histogram":
                    self._instruments[family.name].observe(value, tags=tags)
        with self._lock:
            self._of_step = numbers | self._disk()
        self.refresh()

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        with self._lock:
            self._of_evaluation |= evaluation_record(summaries, f"evaluation/{policy}")
        self.refresh()

    def _disk(self) -> dict[str, float]:
        """Once a step and not in the thread, so that a file system that hangs does not hide the other numbers."""
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            return {}
        return {"disk/free_share": usage.free / usage.total} if usage.total else {}

    def refresh(self) -> None:
        """Set every gauge to its newest value."""
        with self._lock:
            values = {**self._of_step, **self._of_evaluation}
        for key, value in {**values, **self._live()}.items():
            for family, tags in _families_of(key):
                if family.kind == "gauge":
                    self._instruments[family.name].set(value, tags=tags)

    def finish(self, status: Status) -> None:
        self.close()

    def close(self) -> None:
        """Stop setting gauges; a second call does nothing."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10 * REFRESH_S)

    def _keep_fresh(self) -> None:
        failing = False
        while not self._ended.wait(REFRESH_S):
            try:
                self.refresh()
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("prometheus: gauges are not refreshed: %s", error)
                failing = True

    def _instrument(self, family: Family) -> Any:
        unit = f" [{family.unit}]" if family.unit else ""
        options: dict[str, Any] = {"description": family.description + unit, "tag_keys": family.tags}
        if family.kind == "histogram":
            options["boundaries"] = list(STEP_BOUNDARIES_S)
        create = {"gauge": ray_metrics.Gauge, "counter": ray_metrics.Counter, "histogram": ray_metrics.Histogram}
        return create[family.kind](family.name, **options).set_default_tags({"run": self.run_name})


_known_keys: dict[str, list[tuple[Family, Tags]]] = {}


def _families_of(key: str) -> list[tuple[Family, Tags]]:
    """The families that an entry belongs to, usually one, with its tags.

    The result is remembered, because the same keys come every second.
    """
    if key not in _known_keys:
        matches = [(family, family.match(key)) for family in FAMILIES]
        _known_keys[key] = [(family, tags) for family, tags in matches if tags is not None]
    return _known_keys[key]


def metrics_url() -> str:
    """Where Ray's agent on this node exports the metrics of this process."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
