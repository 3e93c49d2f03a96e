"""The names that metrics.jsonl, TensorBoard and the report share, with the meaning and unit of each number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dphrl.types import RewardStatus


@dataclass(frozen=True)
class Metric:
    """One number of a step's record. unit: "" for a number without one. required: every step's record has it.

    absent_value: the value of an absent entry, for a term that some runs do not have.
    """

    name: str
    unit: str
    meaning: str
    required: bool = True
    absent_value: float | None = None


def _optional(name: str, unit: str, meaning: str) -> Metric:
    return Metric(name, unit, meaning, required=False)


METRICS: tuple[Metric, ...] = (
    Metric("step", "steps", "Steps completed, this one included; counts from 1."),
    Metric("policy_version", "updates", "Weight updates behind the policy after this step."),
    Metric("reward/mean", "score", "Mean score of the step's graded completions; infrastructure errors left out."),
    *(
        Metric(f"reward/status/{status}", "completions", f"Completions of the step graded {status}.")
        for status in RewardStatus
    ),
    _optional("reward/signal_mean", "", "Mean of what advantages are made of; the score unless the reward is shaped."),
    _optional("reward/latency_mean_s", "s", "From a completion's hand-over to its verdict, waiting included."),
    _optional("reward/latency_max_s", "s", "The longest of those."),
    _optional("reward/num_retried", "completions", "Gradings repeated after an infrastructure error."),
    _optional("reward/num_restarts", "workers", "Reward workers started again because they died or gave no verdict."),
    _optional("reward/zero_variance_fraction", "share", "Groups whose scores are all equal: they teach nothing."),
    Metric("policy/loss", "nats", "Clipped policy loss, mean over the step's exploration tokens or sequences."),
    Metric(
        "policy/clip_fraction",
        "share",
        "Exploration tokens, left out ones included, at which the trust region cut the gradient.",
    ),
    _optional(
        "policy/ratio_bounded_fraction",
        "share",
        "Exploration tokens, left out ones included, whose probability ratio was held at e^20 or e^-20; 0 when well.",
    ),
    Metric(
        "policy/entropy",
        "nats",
        "Mean entropy of the next-token distribution at the exploration tokens that were not left out.",
    ),
    _optional(
        "policy/importance_mean",
        "ratio",
        "Mean ratio of learner to engine, bounded by importance_cap, over the same tokens; near 1.",
    ),
    _optional(
        "policy/importance_affected", "share", "The same tokens' share whose importance weight was cut or masked."
    ),
    _optional(
        "policy/chosen_fraction",
        "share",
        "Exploration tokens that kl_cov penalises, or clip_cov leaves out.",
    ),
    _optional(
        "policy/chosen_penalty", "nats", "What kl_cov adds at the tokens it chose, beta included; mean over all."
    ),
    Metric(
        "divergence/loss",
        "nats",
        "Mean f(u) over the rehearsal tokens that count, before eta; 0 before the first update and in plain RLVR.",
        absent_value=0.0,
    ),
    _optional("divergence/log_u_mean", "nats", "Mean log(pi_theta / pi_ref) over the rehearsal tokens."),
    _optional("divergence/continued_fraction", "share", "Rehearsal tokens beyond the exact range, on the tangent."),
    _optional("divergence/num_rows", "rows", "Rehearsal rows of the step."),
    Metric("sync/logprob_gap_max", "nats", "Largest |engine - learner| log-prob over the probes after the sync."),
    _optional(
        "sync/logprob_gap_mean", "nats", "The mean of the same over an engine's probes; of the engine that is off most."
    ),
    _optional("sync/num_bytes", "bytes", "The model's weights, as they are sent; each engine gets them all."),
    _optional("sync/gb_per_s", "GB/s", "Those bytes over the whole sync, its proof included."),
    _optional("rollout/logprob_gap_max", "nats", "The largest over the completions trained on, before the update."),
    Metric("rollout/staleness_max", "updates", "Largest number of updates between a token and its use."),
    Metric("rollout/num_tokens", "tokens", "Completion tokens sampled for the step."),
    _optional("rollout/tokens_per_s", "tokens/s", "Completion tokens over the whole step's time."),
    _optional("rollout/staleness_mean", "updates", "Mean number of updates between a token and its use."),
    _optional("rollout/mixed_fraction", "share", "Completions during which new weights came."),
    _optional("rollout/num_rounds", "", "Prompts sampled over the step's own; above 1 with dynamic sampling."),
    _optional("rollout/engines", "engines", "Engines that have weights and get work, after the step's sync."),
    _optional(
        "rollout/engines_replaced", "engines", "Engines that joined since the step before in the place of failed ones."
    ),
    _optional(
        "rollout/num_resubmitted",
        "completions",
        "Asked for again since the step before: their engine failed or left, or their deadline passed.",
    ),
    _optional("queue/steps_ready", "steps", "Steps that were sampled and graded when the learner took this one."),
    _optional(
        "rollout/busy_fraction",
        "share",
        "Of the time since the step before, that in which an engine had work; their mean.",
    ),
    _optional("rollout/completion_tokens_mean", "tokens", "Mean length of a completion."),
    _optional("rollout/truncated_fraction", "share", "Completions that the token limit ended."),
    Metric("learner/grad_norm", "", "Gradient norm before clipping, mean over the step's optimizer steps."),
    _optional(
        "learner/skipped_steps",
        "steps",
        "Optimizer steps that left weights and optimizer alone, as loss or gradient norm was not finite.",
    ),
    _optional("learner/lr", "", "Learning rate of the step."),
    _optional("learner/restarts", "restarts", "Times that this process started the learner anew; absent if none."),
    _optional(
        "learner/num_rows_left_out",
        "rows",
        "Exploration rows with an advantage of 0, which add nothing: counted in the denominators, not computed.",
    ),
    _optional("learner/num_tokens", "tokens", "Prompt and completion tokens of all rows that were not left out."),
    _optional("learner/tokens_per_s", "tokens/s", "Those tokens over the time of the update."),
    _optional(
        "learner/mfu",
        "share",
        "Of its GPUs' peak arithmetic, what the update needed: 6 operations a token and weight, plus attention.",
    ),
    Metric("time/step_s", "s", "The whole step, from its first wait to the engines' refit."),
    Metric(
        "time/rollout_s",
        "s",
        "In which engines worked on the step, until its last completion; with staleness, beside updates.",
    ),
    Metric("time/reward_s", "s", "What grading added after the last completion."),
    Metric("time/learn_s", "s", "The learner's update."),
    Metric("time/sync_s", "s", "Bringing the engines to the new weights, the probe of the gap included."),
    _optional(
        "time/waiting_share", "share", "Of the step's time, that in which the learner waited for graded rollouts."
    ),
)
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
REQUIRED: tuple[str, ...] = tuple(metric.name for metric in METRICS if metric.required)


def complete_step(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the absent_value of every term this run does not have."""
    absent = {m.name: m.absent_value for m in METRICS if m.absent_value is not None and m.name not in record}
    return {**record, **absent}


def step_problems(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a step's record: required names that are missing, values that are no finite number."""
    problems = [f"{name} is missing" for name in REQUIRED if name not in record]
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            problems.append(f"{name} is {value!r}, not a number")
        elif not math.isfinite(value):
            problems.append(f"{name} is {value}")
    return problems


def validate_step(record: Mapping[str, Any]) -> None:
    """Raises ValueError, which lists every problem that `step_problems` finds."""
    if problems := step_problems(record):
        raise ValueError(f"metrics of step {record.get('step', '?')}: {'; '.join(problems)}")
