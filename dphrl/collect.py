"""Sampling and grading in one stream: completions are graded while others still decode.

Training steps, the reference stage and evaluation all collect their groups here. A training step collects its groups
through `StepCollector`, which may run one step ahead of the learner.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed, step_indices
from dphrl.protocols import Parts, RewardPool, RolloutPool
from dphrl.rewards.watch import RewardFailedError, RewardWatch
from dphrl.tracking.log import current_step
from dphrl.types import Completion, Prompt, RewardResult, RolloutGroup

log = logging.getLogger(__name__)

# At most this many deliveries wait for their verdicts. When the reward is slower than the engines, the stream then
# pauses, and completions stay in the processes that made them instead of filling this one.
MAX_UNGRADED = 512
# A service behind a reward may be away for a while. So a step without any verdict is told, and so many of them in a row
# stop the run.
MAX_FAILED_STEPS = 3


@dataclass(frozen=True)
class Collected:
    """Graded groups in the order of the prompts, and where the time went.

    rollout_s: seconds until the last completion arrived. reward_s: seconds that grading took after that.
    """

    groups: list[RolloutGroup]
    rollout_s: float
    reward_s: float

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for group in self.groups for completion in group.completions)


async def collect_groups(
    rollouts: RolloutPool,
    rewards: RewardPool,
    prompts: Sequence[Prompt],
    num_samples: int,
    *,
    seed: int,
    greedy: bool = False,
    on_graded: Callable[[int], None] = lambda num_completions: None,
    watch: RewardWatch | None = None,
) -> Collected:
    """`num_samples` graded completions for each of `prompts` (distinct prompt_ids).

    on_graded is called with the number of completions newly graded. Raises RuntimeError when the pool returns
    more or fewer completions than were asked for: training on a partial group would bias its baseline. `watch` sees
    every verdict as it comes, and may stop the collection with a RewardFailedError.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    assert len(by_id) == len(prompts), "prompts of one collection are distinct"
    graded: dict[str, list[tuple[Completion, RewardResult]]] = {prompt_id: [] for prompt_id in by_id}

    waiting = asyncio.Semaphore(MAX_UNGRADED)

    async def grade(completions: Sequence[Completion]) -> None:
        try:
            results = await rewards.grade([(by_id[c.prompt_id], c) for c in completions])
        finally:
            waiting.release()
        for completion, result in zip(completions, results, strict=True):
            graded[completion.prompt_id].append((completion, result))
            if watch is not None:
                watch.see(by_id[completion.prompt_id], completion, result)
        on_graded(len(completions))

    start = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as grading:
            async for completions in rollouts.generate(prompts, num_samples, seed=seed, greedy=greedy):
                await waiting.acquire()
                grading.create_task(grade(completions))
            rollout_s = time.perf_counter() - start
    except BaseExceptionGroup as group:
        # Several gradings may end with this error at once. One of them says it all.
        if failed := group.subgroup(RewardFailedError):
            raise failed.exceptions[0] from None
        raise
    reward_s = time.perf_counter() - start - rollout_s
    return Collected([_group(prompt, graded[prompt.prompt_id], num_samples) for prompt in prompts], rollout_s, reward_s)


def _group(prompt: Prompt, pairs: list[tuple[Completion, RewardResult]], num_samples: int) -> RolloutGroup:
    if len(pairs) != num_samples:
        raise RuntimeError(f"prompt {prompt.prompt_id}: {len(pairs)} completions came back, {num_samples} were asked")
    pairs.sort(key=lambda pair: pair[0].sample_index)
    return RolloutGroup(prompt, tuple(c for c, _ in pairs), tuple(r for _, r in pairs))


@dataclass(frozen=True)
class StepRollouts:
    """What a step sampled, and what of it is trained on.

    sampled: every group of the step. groups: those to train on, the same ones unless dynamic sampling leaves some out.
    metrics: the number of rounds, and where the time went, in seconds.
    """

    groups: Sequence[RolloutGroup]
    sampled: Sequence[RolloutGroup]
    metrics: dict[str, float]


class StepCollector:
    """Collects the groups of one step after another.

    With rollout.max_staleness = 0, a step's rollouts begin when `collect` is called for it. With a larger value, the
    engines already decode the next step's prompts, with the weights they have, while the learner updates on this step.
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt], parts: Parts) -> None:
        """prompts: those to explore, in the order of the training data."""
        self._config, self._prompts, self._parts = config, prompts, parts
        self._ahead: asyncio.Task[StepRollouts] | None = None
        self._watch = RewardWatch(config.reward.name)
        self._num_told = self._num_failed_steps = 0

    async def collect(self, step: int) -> StepRollouts:
        """The groups of `step` (from 0); call it for each step in turn.

        Raises RewardFailedError when the reward fails everywhere: from the start, or in MAX_FAILED_STEPS steps in a
        row.
        """
        rollouts = await (self._ahead or self._start(step))
        self._tell_failures(step, rollouts)
        overlaps = self._config.rollout.max_staleness > 0 and step + 1 < self._config.learner.num_steps
        self._ahead = self._start(step + 1) if overlaps else None
        return rollouts

    def _start(self, step: int) -> asyncio.Task[StepRollouts]:
        return asyncio.create_task(collect_step(self._config, self._prompts, self._parts, step, self._watch))

    def _tell_failures(self, step: int, rollouts: StepRollouts) -> None:
        for failure in self._watch.failures[self._num_told :]:
            log.info("%s", failure)
        self._num_told = len(self._watch.failures)
        failed = self._watch.failure_of(rollouts.sampled)
        self._num_failed_steps = self._num_failed_steps + 1 if failed else 0
        if failed and self._num_failed_steps == MAX_FAILED_STEPS:
            raise failed
        if failed:
            log.warning(
                "step %d: %s; no completion of this step is trained on, and %d such steps in a row stop the run",
                step + 1,
                failed,
                MAX_FAILED_STEPS,
            )


async def collect_step(
    config: Config, prompts: Sequence[Prompt], parts: Parts, step: int, watch: RewardWatch | None = None
) -> StepRollouts:
    """The groups of `step` (from 0).

    A group has no signal when all its scores are equal. Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) replaces
    such groups by those of further prompts, in at most dynamic_sampling_rounds rounds; then the step trains on what it
    has. With one round, every group stays. Prompts and seeds are a pure function of (seed, step, round).
    """
    # This sets the value of this task alone: the loop may still be at the step before.
    current_step.set(step + 1)
    max_rounds, num_prompts = config.algorithm.dynamic_sampling_rounds, config.rollout.num_prompts
    rounds: list[Collected] = []
    groups: list[RolloutGroup] = []
    while len(rounds) < max_rounds and len(groups) < num_prompts:
        place = step * max_rounds + len(rounds)
        chosen = [prompts[i] for i in step_indices(len(prompts), place, num_prompts, config.seed)]
        seed = derive_seed(config.seed, "rollout", place)
        collected = await collect_groups(
            parts.rollouts, parts.rewards, chosen, config.rollout.num_samples, seed=seed, watch=watch
        )
        rounds.append(collected)
        if not chosen:
            break
        groups += collected.groups if max_rounds == 1 else [group for group in collected.groups if group.has_signal]
    sampled = [group for collected in rounds for group in collected.groups]
    return StepRollouts(
        # When no group has a signal, the step takes those it sampled: they train nothing, but the step is defined.
        groups[:num_prompts] or sampled[:num_prompts],
        sampled,
        {
            "rollout/num_rounds": float(len(rounds)),
            "time/rollout_s": sum(collected.rollout_s for collected in rounds),
            "time/reward_s": sum(collected.reward_s for collected in rounds),
        },
    )
