"""The training loop. It knows only the protocols: Ray and the inline mode run this same code.

A step: exploration prompts -> rollouts -> rewards -> advantages, joined by rehearsal rows of the reference
buffer -> one hybrid update -> every engine refit and proved to agree with the learner -> metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dphrl.algo.advantages import group_advantages, overlong_penalty
from dphrl.algo.reduce import row_weights
from dphrl.collect import Collected, collect_groups
from dphrl.config.schema import Config, LearnerConfig
from dphrl.data.schedule import derive_seed, step_indices
from dphrl.protocols import Learner, ReferenceStore, RewardPool, RolloutPool
from dphrl.tracking.log import current_step
from dphrl.types import (
    Completion,
    Prompt,
    ReferenceSample,
    RewardResult,
    RewardStatus,
    RolloutGroup,
    RowKind,
    TrainBatch,
    TrainRow,
)

Metrics = dict[str, float]


class StepObserver(Protocol):
    """What happens around the steps: tracking, checkpoints, evaluation."""

    async def after_step(self, step: int, metrics: Metrics, groups: Sequence[RolloutGroup]) -> None: ...


@dataclass(frozen=True)
class Parts:
    """The running system, behind its protocols."""

    learner: Learner
    rollouts: RolloutPool
    rewards: RewardPool


async def train(
    config: Config,
    prompts: Sequence[Prompt],
    parts: Parts,
    reference: ReferenceStore | None,
    observer: StepObserver,
    *,
    start_step: int = 0,
) -> None:
    """Run steps start_step .. num_steps - 1. Engines must have been refit; `reference` is None for plain RLVR."""
    exploration = prompts if reference is None else [p for p in prompts if p.prompt_id in reference.exploration]
    num_steps, overlap = config.learner.num_steps, config.rollout.max_staleness > 0
    upcoming: asyncio.Task[StepRollouts] | None = None
    for step in range(start_step, num_steps):
        started = time.perf_counter()
        current_step.set(step + 1)
        rollouts = await (upcoming or _start_rollouts(config, exploration, parts, step))
        # Overlap: the engines decode the next step's prompts with the present weights during this update.
        upcoming = _start_rollouts(config, exploration, parts, step + 1) if overlap and step + 1 < num_steps else None
        rehearsal = await reference.sample(step, config.reference.rows_per_step) if reference else []
        version = parts.learner.policy_version
        batch = make_batch(config, step, version, rollouts.groups, rehearsal)
        sampled = rollout_metrics(rollouts.sampled, version) | {"rollout/num_rounds": float(rollouts.num_rounds)}

        learn_started = time.perf_counter()
        learned = await parts.learner.update(batch)
        sync_started = time.perf_counter()
        synced = await parts.rollouts.refit(parts.learner)

        ended = time.perf_counter()
        timing = {
            **parts.rollouts.drain_metrics(),
            **parts.rewards.drain_metrics(),
            "rollout/tokens_per_s": sampled["rollout/num_tokens"] / (ended - started),
            "time/rollout_s": rollouts.rollout_s,
            "time/reward_s": rollouts.reward_s,
            "time/learn_s": sync_started - learn_started,
            "time/sync_s": ended - sync_started,
            "time/step_s": ended - started,
        }
        progress = {"step": step + 1, "policy_version": parts.learner.policy_version}
        metrics = {**progress, **sampled, **batch.metrics, **learned, **synced, **timing}
        await observer.after_step(step + 1, metrics, rollouts.sampled)


@dataclass(frozen=True)
class StepRollouts:
    """What a step sampled, and which groups of it train: the same ones, unless dynamic sampling left some out."""

    groups: Sequence[RolloutGroup]
    sampled: Sequence[RolloutGroup]
    num_rounds: int
    rollout_s: float
    reward_s: float


def _start_rollouts(config: Config, prompts: Sequence[Prompt], parts: Parts, step: int) -> asyncio.Task[StepRollouts]:
    return asyncio.create_task(collect_step(config, prompts, parts, step))


async def collect_step(config: Config, prompts: Sequence[Prompt], parts: Parts, step: int) -> StepRollouts:
    """A step's groups. With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups without signal, all of
    whose scores are equal, make room for further prompts, for dynamic_sampling_rounds at most; then the step trains
    on what it has. Prompts and seeds are a pure function of (seed, step, round)."""
    current_step.set(step + 1)  # this task's own: the loop may be at the step before
    max_rounds, num_prompts = config.algorithm.dynamic_sampling_rounds, config.rollout.num_prompts
    rounds: list[Collected] = []
    groups: list[RolloutGroup] = []
    while len(rounds) < max_rounds and len(groups) < num_prompts:
        place = step * max_rounds + len(rounds)
        chosen = [prompts[i] for i in step_indices(len(prompts), place, num_prompts, config.seed)]
        seed = derive_seed(config.seed, "rollout", place)
        collected = await collect_groups(parts.rollouts, parts.rewards, chosen, config.rollout.num_samples, seed=seed)
        rounds.append(collected)
        if not chosen:
            break
        groups += collected.groups if max_rounds == 1 else [group for group in collected.groups if has_signal(group)]
    sampled = [group for collected in rounds for group in collected.groups]
    return StepRollouts(
        # All equal everywhere: the flat groups train nothing, but the step stays well defined.
        groups[:num_prompts] or sampled[:num_prompts],
        sampled,
        len(rounds),
        sum(collected.rollout_s for collected in rounds),
        sum(collected.reward_s for collected in rounds),
    )


def has_signal(group: RolloutGroup) -> bool:
    """Whether the group's scores differ: otherwise every advantage is 0."""
    return len({r.training_score for r in group.results if r.training_score is not None}) > 1


def make_batch(
    config: Config,
    step: int,
    policy_version: int,
    groups: Sequence[RolloutGroup],
    rehearsal: Sequence[ReferenceSample],
) -> TrainBatch:
    """Rows of both kinds, cut into mini-batches that each carry their own global denominators.

    Raises RuntimeError when nothing can be trained on, or a completion is staler than the config allows.
    """
    check_staleness(groups, policy_version, config.rollout.max_staleness)
    num_parts = config.algorithm.num_minibatches
    minibatches = []
    for i in range(num_parts):
        mine = groups[i * len(groups) // num_parts : (i + 1) * len(groups) // num_parts]
        rows = rehearsal[i * len(rehearsal) // num_parts : (i + 1) * len(rehearsal) // num_parts]
        minibatch = policy_rows(mine, config) + reference_rows(rows, config)
        if minibatch:
            minibatches.append(tuple(minibatch))
    if not minibatches:
        raise RuntimeError(
            f"step {step + 1}: nothing to train on: no rehearsal rows, and none of {len(groups)} groups has a usable "
            "completion (reward failures and masked truncations are left out; see samples/ and run.log)"
        )
    lr = learning_rate(config.learner, step)
    num_tokens = sum(len(row.token_ids) for minibatch in minibatches for row in minibatch)
    metrics = {
        "divergence/num_rows": float(len(rehearsal)),
        "learner/lr": lr,
        "learner/num_tokens": float(num_tokens),
    }
    return TrainBatch(step, policy_version, tuple(minibatches), lr, metrics)


def policy_rows(groups: Sequence[RolloutGroup], config: Config) -> list[TrainRow]:
    """Exploration rows of one mini-batch: graded completions with their group-relative advantages."""
    chosen: list[tuple[Prompt, Completion, float]] = []
    for group in groups:
        advantages = group_advantages(shaped_scores(group, config), config.algorithm.advantage)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            masked = completion.truncated and config.rollout.truncated == "mask"
            if advantage is not None and completion.token_ids and not masked:
                chosen.append((group.prompt, completion, advantage))
    lengths = [len(completion.token_ids) for _, completion, _ in chosen]
    weights = row_weights(lengths, config.algorithm.aggregation, config.rollout.max_tokens)
    return [
        TrainRow(
            RowKind.POLICY,
            prompt.token_ids + completion.token_ids,
            len(prompt.token_ids),
            completion.logprobs,
            weight,
            advantage,
            completion.policy_version,
        )
        for (prompt, completion, advantage), weight in zip(chosen, weights, strict=True)
    ]


def shaped_scores(group: RolloutGroup, config: Config) -> list[float | None]:
    """The group's training scores less the length penalty; what metrics and accuracy report stays unshaped."""
    max_tokens, buffer_tokens = config.rollout.max_tokens, config.algorithm.overlong_buffer_tokens

    def shaped(completion: Completion, result: RewardResult) -> float | None:
        penalty = overlong_penalty(len(completion.token_ids), max_tokens, buffer_tokens)
        return None if result.training_score is None else result.training_score + penalty

    return [shaped(c, result) for c, result in zip(group.completions, group.results, strict=True)]


def reference_rows(samples: Sequence[ReferenceSample], config: Config) -> list[TrainRow]:
    """Rehearsal rows of one mini-batch, with a denominator of their own."""
    lengths = [len(sample.token_ids) for sample in samples]
    weights = row_weights(lengths, config.algorithm.aggregation, config.rollout.max_tokens)
    return [
        TrainRow(RowKind.REFERENCE, s.prompt_token_ids + s.token_ids, len(s.prompt_token_ids), s.logprobs, weight)
        for s, weight in zip(samples, weights, strict=True)
    ]


def check_staleness(groups: Sequence[RolloutGroup], policy_version: int, bound: int) -> None:
    """Raises RuntimeError when a completion lags the learner by more than `bound` updates."""
    for group in groups:
        for completion in group.completions:
            staleness = policy_version - completion.policy_version
            if not 0 <= staleness <= bound:
                raise RuntimeError(
                    f"a completion of prompt {completion.prompt_id} came from policy version "
                    f"{completion.policy_version}, the learner is at {policy_version}: outside "
                    f"rollout.max_staleness={bound}"
                )


def rollout_metrics(groups: Sequence[RolloutGroup], policy_version: int) -> Metrics:
    """What the completions themselves tell: scores by status, lengths, staleness, groups without signal."""
    completions = [completion for group in groups for completion in group.completions]
    results = [result for group in groups for result in group.results]
    scores = [result.score for result in results if result.score is not None]
    signals = [result.training_score for result in results if result.training_score is not None]
    statuses = Counter(result.status for result in results)
    flat_groups = sum(not has_signal(group) for group in groups)
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
    }


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Rate of `step` (from 0): linear warm-up, then constant or a line down to lr_final_fraction."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    return config.lr * (1 - (1 - config.lr_final_fraction) * min(1.0, done))
