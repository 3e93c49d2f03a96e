"""From graded groups and rehearsal rows to a training batch: advantages, denominators, the rate of the step.

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np

from dphrl.algo.advantages import GroupFields, group_advantages, overlong_penalty
from dphrl.algo.policy_losses import ZERO_WITHOUT_ADVANTAGE, Bools, get_policy_loss, token_choice
from dphrl.algo.reduce import row_weights
from dphrl.config.learner import LearnerConfig
from dphrl.config.schema import Config
from dphrl.types import (
    Completion,
    Prompt,
    ReferenceSample,
    RewardResult,
    RolloutGroup,
    RowKind,
    TrainBatch,
    TrainRow,
)


def make_batch(
    config: Config,
    step: int,
    policy_version: int,
    groups: Sequence[RolloutGroup],
    rehearsal: Sequence[ReferenceSample],
) -> TrainBatch:
    """The batch of `step` (from 0): rows of both kinds, cut into mini-batches with a global denominator of their own.

    Raises RuntimeError when no row can be trained on, or when a completion is staler than the config allows.
    """
    check_staleness(groups, policy_version, config.rollout.max_staleness)
    num_parts = config.algorithm.num_minibatches
    minibatches, shares, num_left_out = [], [], 0
    for i in range(num_parts):
        mine = groups[i * len(groups) // num_parts : (i + 1) * len(groups) // num_parts]
        rows = rehearsal[i * len(rehearsal) // num_parts : (i + 1) * len(rehearsal) // num_parts]
        explored = with_choice(policy_rows(mine, config), config, step, i)
        kept = rows_that_count(explored, config)
        minibatch = kept + reference_rows(rows, config)
        if minibatch:
            minibatches.append(tuple(minibatch))
            shares.append(total_weight(kept) / total_weight(explored) if explored else 0.0)
            num_left_out += len(explored) - len(kept)
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
        "learner/num_rows_left_out": float(num_left_out),
        "learner/num_tokens": float(num_tokens),
    }
    return TrainBatch(step, policy_version, tuple(minibatches), lr, metrics, tuple(shares))


def policy_rows(groups: Sequence[RolloutGroup], config: Config) -> list[TrainRow]:
    """Exploration rows of one mini-batch: graded completions with their group-relative advantages."""
    chosen: list[tuple[Prompt, Completion, float]] = []
    method = config.algorithm.advantage
    for group in groups:
        advantages = group_advantages(shaped_scores(group, config), method.name, group_fields(group), **method.params)
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


def with_choice(rows: Sequence[TrainRow], config: Config, step: int, minibatch: int) -> list[TrainRow]:
    """Exploration rows of one mini-batch, with the tokens that the policy loss chooses among all of them."""
    method = config.algorithm.policy_loss
    choose = token_choice(get_policy_loss(method.name, **method.params))
    if choose is None:
        return list(rows)
    logprobs_N = np.array([logprob for row in rows for logprob in row.logprobs])
    counts = [row.num_completion_tokens for row in rows]
    advantages_N = np.repeat(np.array([row.advantage for row in rows]), counts)
    # The orders of prompts are made of (seed, epoch) and (seed, step, 1).
    rng = np.random.default_rng([config.seed, step, 2, minibatch])
    places = _places(choose(logprobs_N, advantages_N, rng), counts)
    return [replace(row, chosen=chosen) for row, chosen in zip(rows, places, strict=True)]


def _places(marked_N: Bools, num_tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """Of each row, of so many completion tokens, the places of those that are marked."""
    ends = [0, *accumulate(num_tokens)]
    return [tuple(np.flatnonzero(marked_N[start:end]).tolist()) for start, end in pairwise(ends)]


def rows_that_count(rows: Sequence[TrainRow], config: Config) -> list[TrainRow]:
    """Exploration rows of one mini-batch without those that add nothing to the loss or its gradient.

    Such a row has an advantage of exactly 0, a policy loss that vanishes there and has chosen none of its tokens, and
    no other term that reads it. The others keep their weights, in which it stays counted. Where no row would remain the
    shortest does: the optimizer then steps with the gradient that all of them have together, and metrics have something
    to be a mean of.
    """
    algorithm = config.algorithm
    read_elsewhere = algorithm.entropy_bonus > 0 or (config.uses_divergence and algorithm.estimator != "reference")
    if not rows or read_elsewhere or algorithm.policy_loss.name not in ZERO_WITHOUT_ADVANTAGE:
        return list(rows)
    return [row for row in rows if row.advantage or row.chosen] or [min(rows, key=lambda row: row.num_tokens)]


def total_weight(rows: Sequence[TrainRow]) -> float:
    return sum(row.weight * row.num_completion_tokens for row in rows)


def shaped_scores(group: RolloutGroup, config: Config) -> list[float | None]:
    """The group's training scores minus the length penalty; metrics and accuracy keep the scores without it."""
    max_tokens, buffer_tokens = config.rollout.max_tokens, config.algorithm.overlong_buffer_tokens

    def shaped(completion: Completion, result: RewardResult) -> float | None:
        penalty = overlong_penalty(len(completion.token_ids), max_tokens, buffer_tokens)
        return None if result.training_score is None else result.training_score + penalty

    return [shaped(c, result) for c, result in zip(group.completions, group.results, strict=True)]


def group_fields(group: RolloutGroup) -> GroupFields:
    """What an advantage may read of the group besides its scores, each computed when it is read."""
    return {
        "logprobs": lambda: [sum(completion.logprobs) for completion in group.completions],
        "clusters": lambda: group.strategies,
    }


def reference_rows(samples: Sequence[ReferenceSample], config: Config) -> list[TrainRow]:
    """Rehearsal rows of one mini-batch, with a denominator of their own.

    With algorithm.rehearsal_tokens: entropy it is over the tokens that count. Raises ValueError when a sample has no
    entropies then.
    """
    algorithm, max_tokens = config.algorithm, float(config.rollout.max_tokens)
    counts = [len(sample.token_ids) for sample in samples]
    places: Sequence[tuple[int, ...] | None] = [None] * len(samples)
    if algorithm.rehearsal_share is not None:
        places = undecided = undecided_tokens(samples, algorithm.rehearsal_share)
        counts = [len(chosen) for chosen in undecided]
        max_tokens *= algorithm.rehearsal_share  # so that a mean stays a mean
    weights = row_weights(counts, algorithm.aggregation, max_tokens)
    return [
        TrainRow(
            RowKind.REFERENCE,
            sample.prompt_token_ids + sample.token_ids,
            len(sample.prompt_token_ids),
            sample.logprobs,
            weight,
            chosen=chosen,
        )
        for sample, weight, chosen in zip(samples, weights, places, strict=True)
    ]


def undecided_tokens(samples: Sequence[ReferenceSample], share: float) -> list[tuple[int, ...]]:
    """Of each sample, the places of its tokens among that share of all samples' tokens at which the initial policy was
    most undecided, by entropy: rounded to whole tokens, but at least one. Of equal ones, those that come first.

    Raises ValueError when a sample has no entropies.
    """
    if any(len(sample.entropies) != len(sample.token_ids) for sample in samples):
        raise ValueError("algorithm.rehearsal_tokens: entropy needs a reference buffer with entropies; fill it again")
    entropies_N = np.array([entropy for sample in samples for entropy in sample.entropies])
    marked_N = np.zeros(len(entropies_N), dtype=np.bool_)
    if len(entropies_N):
        marked_N[np.argsort(-entropies_N, kind="stable")[: max(1, round(share * len(entropies_N)))]] = True
    return _places(marked_N, [len(sample.token_ids) for sample in samples])


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


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Rate of `step` (from 0): linear warm-up, then constant or a straight line down to lr x lr_final_fraction."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    return config.lr * (1 - (1 - config.lr_final_fraction) * min(1.0, done))
