"""Whether a run's numbers are well: checks on the steps' records, and what is told of them.

Each check is a function of the records so far, the newest last, and of the configuration; it returns what is wrong, or
None. `HealthChecks` makes events of what they find, each once until it has healed, and says when the run has to stop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from dphrl.config.health import HealthConfig
from dphrl.config.schema import Config

log = logging.getLogger(__name__)

# What the checks read of a record; the history of a long run keeps no more.
READ = (
    "step",
    "reward/mean",
    "reward/zero_variance_fraction",
    "policy/loss",
    "policy/entropy",
    "policy/clip_fraction",
    "divergence/loss",
    "sync/logprob_gap_mean",
    "learner/grad_norm",
    "learner/skipped_steps",
)
# A finding is told again only after so many steps without it.
HEALED_AFTER = 10
# Explosions: the median of the newest steps against that of the steps before them, once there are enough of these.
NEWEST, BEFORE, ENOUGH = 3, 50, 20
# Trends: the newest steps against the first ones.
FEW = 5
# Below this many nats a token a divergence is small, whatever it was before.
SMALL_DIVERGENCE = 0.1

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """message: what is wrong, without the step. remedy: what to do. facts: the numbers behind it."""

    message: str
    remedy: str
    facts: Mapping[str, float]


def exploding_divergence(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    found = _jump(records, "divergence/loss")
    if found is None or found[1] <= max(SMALL_DIVERGENCE, config.divergence_factor * found[0]):
        return None
    before, now = found
    return Finding(
        f"the divergence from the initial policy is {now:.3g} nats a token; over the steps before it was {before:.3g}",
        "lower learner.lr or raise algorithm.eta, and go on from a checkpoint before it grew: move later ones away, "
        "then --resume --insist learner.lr=...",
        {"divergence": now, "median_before": before},
    )


def entropy_collapse(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    found = _since_the_start(records, "policy/entropy")
    if found is None or found[1] >= config.entropy_share * found[0]:
        return None
    first, now = found
    return Finding(
        f"the policy's entropy has fallen to {now:.3g} nats; in the first steps it was {first:.3g}",
        "raise algorithm.eta or algorithm.clip_high, lower learner.lr, or use a divergence if there is none",
        {"entropy": now, "at_the_start": first},
    )


def one_reward(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    newest = records[-config.flat_steps :]
    if len(newest) < config.flat_steps or not all(map(_has_one_score, newest)):
        return None
    return Finding(
        f"every completion of each of the last {config.flat_steps} steps has the same score, now "
        f"{newest[-1]['reward/mean']:g}",
        "read samples/: an answer format that the reward does not find, or data that is too hard or too easy",
        {"score": newest[-1]["reward/mean"], "steps": config.flat_steps},
    )


def no_signal(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    newest = records[-config.flat_steps :]
    flat = len(newest) == config.flat_steps and all(r.get("reward/zero_variance_fraction") == 1.0 for r in newest)
    if not flat or all(map(_has_one_score, newest)):  # that is told by `one_reward`
        return None
    return Finding(
        f"in each of the last {config.flat_steps} steps no prompt has completions of different scores",
        "raise rollout.num_samples or rollout.temperature, set algorithm.dynamic_sampling_rounds above 1, or take "
        "prompts that the model solves now and then",
        {"mean_score": newest[-1]["reward/mean"], "steps": config.flat_steps},
    )


def rising_gap(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    found = _since_the_start(records, "sync/logprob_gap_mean")
    if found is None or found[1] <= max(config.gap_share * gap_bound, 2 * found[0]):
        return None
    first, now = found
    return Finding(
        f"the mean gap between engines and learner has risen from {first:.2g} to {now:.2g} nats; beyond "
        f"{gap_bound:.2g} the run stops",
        "lower learner.lr; if the model is well, raise sync.max_mean_logprob_gap",
        {"gap": now, "at_the_start": first, "bound": gap_bound},
    )


def clipping(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    newest = _numbers(records[-FEW:], "policy/clip_fraction")
    if len(newest) < FEW or median(newest) <= config.clip_share:
        return None
    return Finding(
        f"the trust region cuts the gradient of {median(newest):.0%} of the tokens",
        "lower learner.lr or algorithm.num_minibatches, or widen algorithm.clip_low and algorithm.clip_high",
        {"clip_fraction": median(newest)},
    )


def exploding_gradient(records: Sequence[Record], config: HealthConfig, gap_bound: float) -> Finding | None:
    found = _jump(records, "learner/grad_norm")
    if found is None or not 0 < config.gradient_factor * found[0] < found[1]:
        return None
    before, now = found
    return Finding(
        f"the gradient's norm is {now:.3g}; over the steps before it was {before:.3g}",
        "lower learner.lr or learner.grad_clip, and look at samples/ of these steps",
        {"grad_norm": now, "median_before": before},
    )


# By the name of the event and of its setting in the section health.
CHECKS: dict[str, Callable[[Sequence[Record], HealthConfig, float], Finding | None]] = {
    check.__name__: check
    for check in (
        exploding_divergence,
        entropy_collapse,
        one_reward,
        no_signal,
        rising_gap,
        clipping,
        exploding_gradient,
    )
}


class HealthChecks:
    """Looks at each step's record and tells, as events, what is wrong.

    past: the records of the steps before, of a run that is resumed; what was wrong in them is not told again.
    gap_bound: nats, beyond which the sync stops the run.
    """

    def __init__(self, config: Config, gap_bound: float, past: Sequence[Record] = ()) -> None:
        self._config, self._gap_bound = config, gap_bound
        self._records: list[dict[str, Any]] = []
        self._steps_until_healed: dict[str, int] = {}
        self._skips_in_a_row = 0
        for record in past:
            self._fresh(record)
        # The user has seen that the run stopped, and goes on.
        self._skips_in_a_row = 0

    def check(self, record: Record) -> str | None:
        """Log an event for all that is wrong and was not told yet; returns why the run has to stop, if it has to."""
        step, why = record["step"], self._skipped(record)
        for name, finding in self._fresh(record).items():
            said = f"step {step}: {finding.message}; {finding.remedy}"
            log.warning(said, extra={"event": name, "step": step, "facts": finding.facts})
            if getattr(self._config.health, name) == "stop":
                ways = f"go on with --resume --insist KEY=VALUE, or health.{name}=warn"
                why = why or f"{said}; {ways}"
        return why

    def _fresh(self, record: Record) -> dict[str, Finding]:
        """What the checks find now and did not find before."""
        self._records.append({name: record[name] for name in READ if name in record})
        fresh = {}
        for name, check in CHECKS.items():
            if getattr(self._config.health, name) == "off":
                continue
            if finding := check(self._records, self._config.health, self._gap_bound):
                if name not in self._steps_until_healed:
                    fresh[name] = finding
                self._steps_until_healed[name] = HEALED_AFTER
            elif name in self._steps_until_healed:
                self._steps_until_healed[name] -= 1
                if not self._steps_until_healed[name]:
                    del self._steps_until_healed[name]
        return fresh

    def _skipped(self, record: Record) -> str | None:
        """Tell of optimizer steps that were skipped; returns why to stop after too many steps in a row with one."""
        count, limit = round(record.get("learner/skipped_steps") or 0), self._config.learner.max_skipped_steps
        if not count:
            self._skips_in_a_row = 0
            return None
        self._skips_in_a_row += 1
        losses = ("policy/loss", "divergence/loss", "policy/entropy")
        of_loss = any(name in record and _number(record, name) is None for name in losses)
        what = "loss" if of_loss else "gradient norm"
        said = f"step {record['step']}: the {what} was not finite"
        log.warning(
            f"{said}, so {count} optimizer step(s) were skipped; weights and optimizer are as they were",
            extra={
                "event": "skipped_step",
                "step": record["step"],
                "facts": {"skipped": count, "not_finite": what, "in_a_row": self._skips_in_a_row},
            },
        )
        if self._skips_in_a_row < limit:
            return None
        return (
            f"{said}, as in {limit} steps in a row (learner.max_skipped_steps); likely causes: a learning rate that is "
            "too high, log-probs of a sample that are no numbers, a kernel that overflows in this dtype; look at "
            f"samples/ of step {record['step']}, lower learner.lr, and go on from the last checkpoint with --resume "
            "--insist learner.lr=..."
        )


def _number(record: Record, name: str) -> float | None:
    """The entry as a finite number. What was not finite is null in metrics.jsonl."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _numbers(records: Sequence[Record], name: str) -> list[float]:
    return [value for record in records if (value := _number(record, name)) is not None]


def _jump(records: Sequence[Record], name: str) -> tuple[float, float] | None:
    """(median over the steps before, median of the newest); None as long as there are too few."""
    values = _numbers(records[-BEFORE - NEWEST :], name)
    if len(values) < ENOUGH + NEWEST:
        return None
    return median(values[:-NEWEST]), median(values[-NEWEST:])


def _since_the_start(records: Sequence[Record], name: str) -> tuple[float, float] | None:
    """(mean of the first steps, median of the newest); None as long as these overlap."""
    if len(records) < 2 * FEW:
        return None
    first, now = _numbers(records[:FEW], name), _numbers(records[-FEW:], name)
    return (fmean(first), median(now)) if first and now else None


def _has_one_score(record: Record) -> bool:
    return record.get("reward/zero_variance_fraction") == 1.0 and record.get("reward/mean") in (0.0, 1.0)
