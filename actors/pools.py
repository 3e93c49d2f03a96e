"""The loop's protocols over Ray actors."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.engine_load import EngineLoad
from actors.waiting import Actor, within
from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed
from dphrl.learner.update import combine_rank_metrics
from dphrl.protocols import Learner
from dphrl.reference.split import Split
from dphrl.types import Completion, Prompt, ReferenceSample, TrainBatch

# Largest |engine - learner| log-prob after a sync, by the learner's dtype, where the config gives none.
DEFAULT_MAX_LOGPROB_GAP = {"float32": 1e-3, "bfloat16": 0.5}
# Enough to go through prefill, cache and decode; the whole cluster waits for probes.
PROBE_TOKENS = 32


class RayLearner:
    """`protocols.Learner`: every call goes to all ranks at once."""

    def __init__(self, ranks: Sequence[Actor], dtype: str = "", layout: str = "") -> None:
        self.ranks, self.dtype, self.layout = ranks, dtype, layout
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
        await asyncio.gather(*[rank.load.remote(str(folder)) for rank in self.ranks])
        self._policy_version = policy_version


class RayRolloutPool:
    """`protocols.RolloutPool` over vLLM engines: work goes to whichever engine is free."""

    def __init__(
        self, engines: Sequence[Actor], config: Config, probes: Sequence[Prompt] = (), dtype: str = "float32"
    ) -> None:
        self.engines, self.config, self.probes = engines, config, probes
        self._probe_seeds = itertools.count()
        self._loads = [EngineLoad() for _ in engines]
        self._num_waiting = 0  # prompts that no engine has been handed yet
        bound = config.sync.max_logprob_gap
        self.max_gap = DEFAULT_MAX_LOGPROB_GAP[dtype] if bound is None else bound

    async def refit(self, learner: Learner) -> Mapping[str, float]:
        """All engines to the learner's version, then the proof: probes sampled by each are scored by the learner.

        Raises RuntimeError when an engine does not acknowledge the version or its log-probs are off.
        """
        assert isinstance(learner, RayLearner)
        version, chunks = learner.policy_version, await learner.publish()
        pushed = asyncio.gather(*[_push_weights(engine, chunks, version) for engine in self.engines])
        acknowledged = await within(pushed, self.config.sync.timeout_s, "sync.timeout_s", "engines to take new weights")
        if set(acknowledged) != {version}:
            raise RuntimeError(f"engines acknowledged versions {sorted(set(acknowledged))} after a sync to {version}")
        gaps = await within(self._probe(learner), self.config.sync.timeout_s, "sync.timeout_s", "probes of the engines")
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if not gaps[worst] <= self.max_gap:
            raise RuntimeError(
                f"after the sync to policy version {version}, log-probs of rollout engine {worst} are off the "
                f"learner's by {gaps[worst]:.3g} (sync.max_logprob_gap={self.max_gap:g}): it samples from another "
                "policy than the one trained. Check model.dtype and model.attention, or raise the bound if the "
                "difference is numerical"
            )
        return {"sync/logprob_gap_max": gaps[worst]}

    async def _probe(self, learner: Learner) -> list[float]:
        """Each engine's largest gap on probe completions it samples now; one forward pass scores them all."""
        seed = next(self._probe_seeds)
        sampled = await asyncio.gather(*[self._sample_probes(engine, seed) for engine in self.engines])
        prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in self.probes}
        flat = [completion for completions in sampled for completion in completions]
        scored = await learner.score(
            [((*prompt_ids[c.prompt_id], *c.token_ids), len(prompt_ids[c.prompt_id])) for c in flat]
        )
        logprobs = iter(scored)
        return [max(_largest_gap(next(logprobs), c.logprobs) for c in completions) for completions in sampled]

    async def _sample_probes(self, engine: Actor, seed: int) -> list[Completion]:
        stream = engine.generate.remote(self.probes, 1, seed, max_tokens=PROBE_TOKENS)
        return [completion async for ref in stream for completion in await ref]

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False
    ) -> AsyncIterator[Sequence[Completion]]:
        # One engine takes all at once: its scheduler batches best. Several take two helpings each, so that a
        # slow one holds back the step by half a share at most.
        share = len(prompts) if len(self.engines) == 1 else math.ceil(len(prompts) / (2 * len(self.engines)))
        waiting = [(i, prompts[i : i + share]) for i in range(0, len(prompts), max(1, share))]
        waiting.reverse()
        self._num_waiting += len(prompts)
        finished: asyncio.Queue[Sequence[Completion] | None] = asyncio.Queue()

        async def serve(engine: Actor, load: EngineLoad) -> None:
            while waiting:
                start, mine = waiting.pop()
                self._num_waiting -= len(mine)
                with load.helping(len(mine) * num_samples) as deliver:
                    async for ref in engine.generate.remote(mine, num_samples, derive_seed(seed, start), greedy):
                        completions = await ref
                        deliver(completions)
                        finished.put_nowait(completions)

        async def serve_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for engine, load in zip(self.engines, self._loads, strict=True):
                        group.create_task(serve(engine, load))
            finally:
                finished.put_nowait(None)

        serving = asyncio.create_task(serve_all())
        limit = self.config.rollout.timeout_s
        try:
            # The clock starts again with every completion: how long a whole collection takes depends on its size.
            while (completions := await within(finished.get(), limit, "rollout.timeout_s", "a completion")) is not None:
                yield completions
            await serving
        finally:
            serving.cancel()
            # Empty unless something failed.
            self._num_waiting -= sum(len(mine) for _, mine in waiting)
            waiting.clear()

    def drain_metrics(self) -> Mapping[str, float]:
        rates = {f"rollout/engine/{i}/tokens_per_s": load.drain() for i, load in enumerate(self._loads)}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def live_metrics(self) -> Mapping[str, float]:
        """Queue depths at this moment, from any thread."""
        pending = {f"queue/engine/{i}/completions_pending": load.num_pending for i, load in enumerate(self._loads)}
        return {"queue/prompts_waiting": self._num_waiting, **pending}


def _largest_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    # A NaN must not pass a comparison, nor hide behind max().
    return math.inf if any(math.isnan(gap) for gap in gaps) else max(gaps)


async def _push_weights(engine: Actor, chunks: Sequence[ray.ObjectRef[Any]], version: int) -> int:
    # One engine runs calls in order, so nothing is awaited until its acknowledgement; failures surface there
    # too, because an update that failed leaves the session closed.
    calls = [engine.start_weight_update.remote()]
    calls += [engine.update_weights.remote(chunk) for chunk in chunks]
    calls += [engine.finish_weight_update.remote(version)]
    return int((await asyncio.gather(*calls))[-1])


class RayReferenceStore:
    """`protocols.ReferenceStore` over the buffer actor."""

    def __init__(self, actor: Actor, split: Split) -> None:
        self.actor = actor
        self.near_perfect = frozenset(split.near_perfect)
        self.exploration = frozenset(split.exploration)

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        return list(await self.actor.sample.remote(step, num_rows))
