"""The loop's protocols over Ray actors."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from dphrl.algo.partition import Split
from dphrl.config import Config
from dphrl.policy import resolve_dtype
from dphrl.protocols import Learner
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, TrainBatch
from dphrl.update import combine_rank_metrics

Actor = Any  # Ray's handles carry no static type of their methods.

# Largest |engine - learner| log-prob after a sync, by the engine's dtype, where the config gives none.
DEFAULT_MAX_LOGPROB_GAP = {"torch.float32": 1e-3, "torch.bfloat16": 0.5}


class RayLearner:
    """`protocols.Learner`: every call goes to all ranks at once."""

    def __init__(self, ranks: Sequence[Actor]) -> None:
        self.ranks = ranks
        self._policy_version = 0

    @property
    def policy_version(self) -> int:
        return self._policy_version

    async def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        if not sequences:
            return []
        shared = ray.put(sequences)
        parts = await asyncio.gather(*[rank.score.remote(shared) for rank in self.ranks])
        scored = {index: logprobs for part in parts for index, logprobs in part.items()}
        return [scored[i] for i in range(len(sequences))]

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        shared = ray.put(batch)
        parts = await asyncio.gather(*[rank.update.remote(shared) for rank in self.ranks])
        self._policy_version += 1
        return combine_rank_metrics(parts)

    async def publish(self) -> list[ray.ObjectRef[Any]]:
        """References to the present weights in the object store, in chunks."""
        return (await asyncio.gather(*[rank.publish.remote() for rank in self.ranks]))[0]

    async def save(self, folder: Path) -> None:
        await asyncio.gather(*[rank.save.remote(str(folder)) for rank in self.ranks])

    async def load(self, folder: Path, policy_version: int) -> None:
        await asyncio.gather(*[rank.load.remote(str(folder), policy_version) for rank in self.ranks])
        self._policy_version = policy_version


class RayRolloutPool:
    """`protocols.RolloutPool` over vLLM engines: work goes to whichever engine is free."""

    def __init__(self, engines: Sequence[Actor], config: Config, probes: Sequence[Prompt]) -> None:
        self.engines, self.config, self.probes = engines, config, probes
        self._probe_seeds = itertools.count()
        gap = config.sync.max_logprob_gap
        self.max_gap = DEFAULT_MAX_LOGPROB_GAP[str(resolve_dtype(config.model.dtype))] if gap is None else gap

    async def refit(self, learner: Learner) -> Mapping[str, float]:
        """All engines to the learner's version, then the proof: probes sampled by each are scored by the learner.

        Raises RuntimeError when an engine does not acknowledge the version or its log-probs are off.
        """
        assert isinstance(learner, RayLearner)
        version, chunks = learner.policy_version, await learner.publish()
        acknowledged = await asyncio.gather(*[_push_weights(engine, chunks, version) for engine in self.engines])
        if set(acknowledged) != {version}:
            raise RuntimeError(f"engines acknowledged versions {sorted(set(acknowledged))} after a sync to {version}")
        gaps = [await self._probe(index, learner) for index in range(len(self.engines))]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if not gaps[worst] <= self.max_gap:
            raise RuntimeError(
                f"after the sync to policy version {version}, log-probs of rollout engine {worst} are off the "
                f"learner's by {gaps[worst]:.3g} (sync.max_logprob_gap={self.max_gap:g}): it samples from another "
                "policy than the one trained. Check model.dtype and model.attention, or raise the bound if the "
                "difference is numerical"
            )
        return {"sync/logprob_gap_max": gaps[worst]}

    async def _probe(self, index: int, learner: Learner) -> float:
        completions: list[Completion] = []
        seed = next(self._probe_seeds)
        async for ref in self.engines[index].generate.remote(self.probes, 1, seed):
            completions += await ref
        prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in self.probes}
        scored = await learner.score(
            [((*prompt_ids[c.prompt_id], *c.token_ids), len(prompt_ids[c.prompt_id])) for c in completions]
        )
        gaps = [
            abs(ours - theirs)
            for completion, logprobs in zip(completions, scored, strict=True)
            for ours, theirs in zip(logprobs, completion.logprobs, strict=True)
        ]
        # A NaN must not pass a comparison, nor hide behind max().
        return math.inf if any(math.isnan(gap) for gap in gaps) else max(gaps)

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False
    ) -> AsyncIterator[Sequence[Completion]]:
        # One engine takes all at once: its scheduler batches best. Several take two helpings each, so that a
        # slow one holds back the step by half a share at most.
        share = len(prompts) if len(self.engines) == 1 else math.ceil(len(prompts) / (2 * len(self.engines)))
        waiting = [(i, prompts[i : i + share]) for i in range(0, len(prompts), max(1, share))]
        waiting.reverse()
        finished: asyncio.Queue[Sequence[Completion] | None] = asyncio.Queue()

        async def serve(engine: Actor) -> None:
            while waiting:
                start, mine = waiting.pop()
                async for ref in engine.generate.remote(mine, num_samples, seed + start, greedy):
                    finished.put_nowait(await ref)

        async def serve_all() -> None:
            try:
                async with asyncio.timeout(self.config.rollout.timeout_s), asyncio.TaskGroup() as group:
                    for engine in self.engines:
                        group.create_task(serve(engine))
            except TimeoutError:
                raise RuntimeError(
                    f"rollouts: {len(prompts)} prompts x {num_samples} samples did not finish within "
                    f"rollout.timeout_s={self.config.rollout.timeout_s:g}"
                ) from None
            finally:
                finished.put_nowait(None)

        serving = asyncio.create_task(serve_all())
        try:
            while (completions := await finished.get()) is not None:
                yield completions
            await serving
        finally:
            serving.cancel()


async def _push_weights(engine: Actor, chunks: Sequence[ray.ObjectRef[Any]], version: int) -> int:
    # One engine runs calls in order, so nothing is awaited until its acknowledgement; failures surface there
    # too, because an update that failed leaves the session closed.
    calls = [engine.start_weight_update.remote()]
    calls += [engine.update_weights.remote(chunk) for chunk in chunks]
    calls += [engine.finish_weight_update.remote(version)]
    return int((await asyncio.gather(*calls))[-1])


class RayRewardPool:
    """`protocols.RewardPool` over reward workers; an item's infrastructure error is retried on another worker."""

    def __init__(self, workers: Sequence[Actor], config: Config) -> None:
        self.workers, self.num_retries = workers, config.reward.num_retries
        self._turn = itertools.count()

    async def grade(self, items: Sequence[tuple[Prompt, Completion]]) -> list[RewardResult]:
        pairs = [(completion.text, prompt.answer) for prompt, completion in items]
        results: list[RewardResult] = [RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "not graded")] * len(pairs)
        pending = list(range(len(pairs)))
        for _ in range(1 + self.num_retries):
            for i, result in zip(pending, await self._grade_once([pairs[i] for i in pending]), strict=True):
                results[i] = result
            pending = [i for i in pending if results[i].status is RewardStatus.INFRASTRUCTURE_ERROR]
            if not pending:
                break
        return results

    async def _grade_once(self, pairs: Sequence[tuple[str, str]]) -> list[RewardResult]:
        worker = self.workers[next(self._turn) % len(self.workers)]
        try:
            return await worker.grade.remote(pairs)
        except ray.exceptions.RayError as error:
            return [RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"reward worker: {error}")] * len(pairs)


class RayReferenceStore:
    """`protocols.ReferenceStore` over the buffer actor."""

    def __init__(self, actor: Actor, split: Split) -> None:
        self.actor = actor
        self.near_perfect = frozenset(split.near_perfect)
        self.exploration = frozenset(split.exploration)

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        return list(await self.actor.sample.remote(step, num_rows))
