"""Sampling and grading in one stream: completions are graded while others still decode.

Training steps, the reference stage and evaluation all collect their groups here. A training step collects its groups
through `StepCollector`, which may run rollout.max_staleness steps ahead of the learner.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from dphrl.background import one_of_many
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed, replacement_indices, spread, step_indices
from dphrl.protocols import EnginesLostError, LearnerLostError, OnGraded, Parts, RewardPool, RolloutPool
from dphrl.rewards.watch import RewardFailedError, RewardWatch
from dphrl.tracking.events import current_step
from dphrl.types import Completion, Prompt, RewardResult, RolloutGroup

log = logging.getLogger(__name__)

# At most this many deliveries wait for their verdicts. When the reward is slower than the engines, the stream then
# pauses, and completions stay in the processes that made them instead of filling this one.
MAX_UNGRADED = 512
# So many chunks of a long collection are with the engines at a time: many enough to keep all engines of a large cluster
# at work, few enough that a kill does not cost much.
MAX_OPEN_CHUNKS = 64
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
    priority: int = 0,
    on_graded: OnGraded = lambda num_completions, num_tokens: None,
    on_group: Callable[[RolloutGroup], None] = lambda group: None,
    watch: RewardWatch | None = None,
) -> Collected:
    """`num_samples` graded completions for each of `prompts` (distinct prompt_ids).

    on_graded is called with every few completions that are graded, and on_group with each group as soon as it is
    whole. Raises RuntimeError when the pool returns more or fewer completions than were asked for: training on a
    partial group would bias its baseline. `watch` sees every verdict as it comes, and may stop the collection with a
    RewardFailedError. Several collections at a time share the engines, and none waits for the end of another.
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
            prompt, pairs = by_id[completion.prompt_id], graded[completion.prompt_id]
            pairs.append((completion, result))
            if watch is not None:
                watch.see(prompt, completion, result)
            if len(pairs) == num_samples:
                on_group(_group(prompt, pairs, num_samples))
        on_graded(len(completions), sum(len(completion.token_ids) for completion in completions))

    start = time.perf_counter()
    with one_failure():
        async with asyncio.TaskGroup() as grading:
            # Closed at once when grading fails, so that engines stop working for it.
            sampling = rollouts.generate(prompts, num_samples, seed=seed, greedy=greedy, priority=priority)
            async with aclosing(sampling) as stream:
                async for completions in stream:
                    await waiting.acquire()
                    grading.create_task(grade(completions))
            rollout_s = time.perf_counter() - start
    reward_s = time.perf_counter() - start - rollout_s
    return Collected([_group(prompt, graded[prompt.prompt_id], num_samples) for prompt in prompts], rollout_s, reward_s)


@contextmanager
def one_failure() -> Iterator[None]:
    """Of tasks that fail together in this block, the error that says it all: the reward's, that of a setting, or the
    loss of a part of the run."""
    try:
        yield
    except BaseExceptionGroup as group:
        if failed := group.subgroup((RewardFailedError, InputError, LearnerLostError, EnginesLostError)):
            raise _first(failed) from None
        raise


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


async def collect_chunks(chunks: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Collect one chunk after another, so that engines never run empty between two.

    Each begins in its order, while MAX_OPEN_CHUNKS others may still wait for their last completions.
    """
    open_chunks = asyncio.Semaphore(MAX_OPEN_CHUNKS)

    async def collect(chunk: Callable[[], Awaitable[None]]) -> None:
        try:
            await chunk()
        finally:
            open_chunks.release()

    with one_failure():
        async with asyncio.TaskGroup() as collecting:
            for chunk in chunks:
                await open_chunks.acquire()
                collecting.create_task(collect(chunk))


def _group(prompt: Prompt, pairs: list[tuple[Completion, RewardResult]], num_samples: int) -> RolloutGroup:
    if len(pairs) != num_samples:
        raise RuntimeError(f"prompt {prompt.prompt_id}: {len(pairs)} completions came back, {num_samples} were asked")
    pairs.sort(key=lambda pair: pair[0].sample_index)
    return RolloutGroup(prompt, tuple(c for c, _ in pairs), tuple(r for _, r in pairs))


@dataclass(frozen=True)
class StepRollouts:
    """What a step sampled, and what of it is trained on.

    sampled: every group of the step. groups: those to train on, the same ones unless dynamic sampling leaves some out.
    began_s, sampled_s: when the step began, and when its last completion came, by time.perf_counter. metrics: the
    number of rounds, and where the time went, in seconds.
    """

    groups: Sequence[RolloutGroup]
    sampled: Sequence[RolloutGroup]
    began_s: float
    sampled_s: float
    metrics: dict[str, float]


class StepCollector:
    """Collects the groups of one step after another.

    With rollout.max_staleness = 0, a step's rollouts begin when `collect` is called for it. With k, those of the next k
    steps begin as well: the engines work on them behind those of the step, while its last completions end and while the
    learner updates, and take new weights on the way. So at its use a token is at most k updates old, and at most k
    steps wait for the learner.
    """

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], parts: Parts, replayed: Sequence[Prompt] = ()
    ) -> None:
        """prompts: those to explore, replayed: near-perfect ones of which each step takes config.num_replayed. Both are
        in the order of the training data."""
        self._config, self._prompts, self._parts, self._replayed = config, prompts, parts, replayed
        self._begun: deque[asyncio.Task[StepRollouts]] = deque()
        self._watch = RewardWatch(config.reward.name)
        self._num_told = self._num_failed_steps = 0
        self._sampled_s = -math.inf  # when the last completion of the step before came

    async def collect(self, step: int) -> StepRollouts:
        """The groups of `step` (from 0); call it for each step in turn.

        Raises RewardFailedError when the reward fails everywhere: from the start, or in MAX_FAILED_STEPS steps in a
        row.
        """
        num_ready = sum(task.done() for task in self._begun)
        last = min(step + self._config.rollout.max_staleness, self._config.learner.num_steps - 1)
        while (following := step + len(self._begun)) <= last:
            self._begun.append(self._begin(following))
        rollouts = await self._begun.popleft()
        rollouts.metrics["queue/steps_ready"] = float(num_ready)
        # While the step before was being sampled, the engines worked on that one.
        rollouts.metrics["time/rollout_s"] = max(0.0, rollouts.sampled_s - max(rollouts.began_s, self._sampled_s))
        self._sampled_s = max(rollouts.sampled_s, self._sampled_s)
        self._tell_failures(step, rollouts)
        return rollouts

    def close(self) -> None:
        """Give up the steps that nobody will collect, because the run ends."""
        for task in self._begun:
            task.cancel()

    def _begin(self, step: int) -> asyncio.Task[StepRollouts]:
        asked = self._config, self._prompts, self._parts, step, self._watch, self._replayed
        return one_of_many(asyncio.create_task(collect_step(*asked)))

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
    config: Config,
    prompts: Sequence[Prompt],
    parts: Parts,
    step: int,
    watch: RewardWatch | None = None,
    replayed: Sequence[Prompt] = (),
) -> StepRollouts:
    """The groups of `step` (from 0): of `prompts`, with config.num_replayed of `replayed` in the place of as many.

    A group has no signal when all its scores are equal. Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) asks for
    another prompt as soon as a group turns out to have none, up to dynamic_sampling_rounds times as many prompts as the
    step has; then the step trains on what it has. With one round, every group stays. The step's own prompts follow the
    order of the epoch, which passes over none; those in the place of others come from an order of their own. All of
    this is a pure function of (seed, step).
    """
    # This sets the value of this task alone: the loop may still be at the step before.
    current_step.set(step + 1)
    max_rounds, num_prompts = config.algorithm.dynamic_sampling_rounds, config.rollout.num_prompts
    again = step_indices(len(replayed), step, config.num_replayed, derive_seed(config.seed, "replay"))
    own = step_indices(len(prompts), step, num_prompts - len(again), config.seed)
    spare = iter(replacement_indices(len(prompts), step, own, config.seed) if max_rounds > 1 else [])
    seed = derive_seed(config.seed, "rollout", step)
    found: list[list[RolloutGroup]] = []
    times: list[Collected] = []
    num_asked = 0

    async def collect(place: int, asked: Sequence[Prompt]) -> None:
        collected = await collect_groups(
            parts.rollouts,
            parts.rewards,
            asked,
            config.rollout.num_samples,
            seed=seed,
            priority=step,
            on_group=replace_flat,
            watch=watch,
        )
        found[place] = collected.groups
        times.append(collected)

    def ask(asked: Sequence[Prompt]) -> None:
        nonlocal num_asked
        num_asked += len(asked)
        found.append([])
        collecting.create_task(collect(len(found) - 1, asked))

    def replace_flat(group: RolloutGroup) -> None:
        if not group.has_signal and num_asked < max_rounds * num_prompts and (more := next(spare, None)) is not None:
            ask([prompts[more]])

    began = time.perf_counter()
    with one_failure():
        async with asyncio.TaskGroup() as collecting:
            ask(spread([prompts[i] for i in own], [replayed[i] for i in again]))
    sampled = [group for groups in found for group in groups]
    groups = sampled if max_rounds == 1 else [group for group in sampled if group.has_signal]
    reward_s = min(collected.reward_s for collected in times)
    sampled_s = time.perf_counter() - reward_s
    return StepRollouts(
        # When no group has a signal, the step takes those it sampled: they train nothing, but the step is defined.
        groups[:num_prompts] or sampled[:num_prompts],
        sampled,
        began,
        sampled_s,
        {"rollout/num_rounds": len(sampled) / max(1, len(own) + len(again)), "time/reward_s": reward_s},
    )
