"""The numbers of one step for metrics.jsonl: figures of its completions, and where the time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from dphrl.types import Completion, RewardStatus, RolloutGroup, TrainBatch

Metrics = dict[str, float]


class StepClock:
    """Make it when a step starts. It measures the whole step and, with `lap`, the parts that the loop waits for."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._laps: Metrics = {}

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Measure what runs inside as `time/<name>_s`."""
        started = time.perf_counter()
        yield
        self._laps[f"time/{name}_s"] = time.perf_counter() - started

    def stop(self) -> Metrics:
        """Seconds of every lap, and of the step until now."""
        return {**self._laps, "time/step_s": time.perf_counter() - self._started}


def step_metrics(batch: TrainBatch, sampled: Sequence[RolloutGroup], *told: Mapping[str, float]) -> Metrics:
    """One record of metrics.jsonl.

    sampled: every group of the step, also those that do not train. told: the metrics from the parts of the system and
    from the clock; they must hold `time/step_s`, and they hold the policy version after the update.
    """
    record = {"step": batch.step + 1, **rollout_metrics(sampled, batch.policy_version), **batch.metrics}
    for metrics in told:
        record |= metrics
    return {**record, **speeds(record)}


def speeds(record: Mapping[str, float]) -> Metrics:
    """What a step's counts and times say together; without those whose count or time the record lacks.

    The learner waits for rollouts and rewards whenever a step neither updates nor syncs: what else it does there, such
    as making the batch, takes milliseconds.
    """
    step_s, learn_s, sync_s = (record.get(f"time/{name}_s", 0.0) for name in ("step", "learn", "sync"))
    rates = {
        "rollout/tokens_per_s": (record.get("rollout/num_tokens"), step_s),
        "learner/tokens_per_s": (record.get("learner/num_tokens"), learn_s),
        "sync/gb_per_s": (record["sync/num_bytes"] / 1e9 if "sync/num_bytes" in record else None, sync_s),
        "time/waiting_share": (max(0.0, step_s - learn_s - sync_s) if "time/learn_s" in record else None, step_s),
    }
    return {name: amount / seconds for name, (amount, seconds) in rates.items() if amount is not None and seconds > 0}


def rollout_metrics(groups: Sequence[RolloutGroup], policy_version: int) -> Metrics:
    """Figures of the completions themselves: scores, statuses, lengths, staleness, groups without signal."""
    completions = [completion for group in groups for completion in group.completions]
    results = [result for group in groups for result in group.results]
    scores = [result.score for result in results if result.score is not None]
    signals = [result.training_score for result in results if result.training_score is not None]
    statuses = Counter(result.status for result in results)
    flat_groups = sum(not group.has_signal for group in groups)
    count = max(1, len(completions))
    return {
        "reward/mean": sum(scores) / max(1, len(scores)),
        "reward/signal_mean": sum(signals) / max(1, len(signals)),
        **{f"reward/status/{status}": float(statuses[status]) for status in RewardStatus},
        "reward/zero_variance_fraction": flat_groups / max(1, len(groups)),
        "rollout/num_tokens": float(sum(len(completion.token_ids) for completion in completions)),
        "rollout/completion_tokens_mean": sum(len(completion.token_ids) for completion in completions) / count,
        "rollout/truncated_fraction": sum(completion.truncated for completion in completions) / count,
        "rollout/staleness_max": float(max((policy_version - c.policy_version for c in completions), default=0)),
        "rollout/staleness_mean": _mean_staleness(completions, policy_version),
        "rollout/mixed_fraction": sum(bool(c.version_spans) for c in completions) / count,
    }


def _mean_staleness(completions: Sequence[Completion], policy_version: int) -> float:
    spans = [span for c in completions for span in (c.version_spans or ((c.policy_version, len(c.token_ids)),))]
    num_tokens = sum(size for _, size in spans)
    return sum((policy_version - version) * size for version, size in spans) / max(1, num_tokens)
