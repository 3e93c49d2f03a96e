"""Sampling and grading in one stream: completions are graded while others still decode.

Training steps, the reference stage and evaluation all collect their groups here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dphrl.protocols import RewardPool, RolloutPool
from dphrl.types import Completion, Prompt, RewardResult, RolloutGroup

# Deliveries that wait for their verdicts. A reward slower than the engines then holds up the stream of completions,
# which stay where they were made, instead of filling this process.
MAX_UNGRADED = 512


@dataclass(frozen=True)
class Collected:
    """Graded groups in the order of the prompts, and where the time went.

    rollout_s: until the last completion arrived. reward_s: what grading added after that.
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
) -> Collected:
    """`num_samples` graded completions for each of `prompts` (distinct prompt_ids).

    on_graded is called with the number of completions newly graded. Raises RuntimeError when the pool returns
    another number of completions than asked for: training on a partial group would bias its baseline.
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
        on_graded(len(completions))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as grading:
        async for completions in rollouts.generate(prompts, num_samples, seed=seed, greedy=greedy):
            await waiting.acquire()
            grading.create_task(grade(completions))
        rollout_s = time.perf_counter() - start
    reward_s = time.perf_counter() - start - rollout_s
    return Collected([_group(prompt, graded[prompt.prompt_id], num_samples) for prompt in prompts], rollout_s, reward_s)


def _group(prompt: Prompt, pairs: list[tuple[Completion, RewardResult]], num_samples: int) -> RolloutGroup:
    if len(pairs) != num_samples:
        raise RuntimeError(f"prompt {prompt.prompt_id}: {len(pairs)} completions came back, {num_samples} were asked")
    pairs.sort(key=lambda pair: pair[0].sample_index)
    return RolloutGroup(prompt, tuple(c for c, _ in pairs), tuple(r for _, r in pairs))
