"""The rollout engines as one pool: prompts go to any engine that is free, weights go to all engines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import cast

from actors.engine_load import EngineLoad
from actors.engine_repair import EngineRepair
from actors.waiting import Actor, within
from actors.weight_proof import WeightProof, max_mean_gap
from actors.weight_transfer.failures import SyncFailedError
from actors.weight_transfer.ledger import WeightSummary
from actors.weight_transfer.session import EngineSteps, open_transfer
from dphrl.config.schema import Config
from dphrl.protocols import WeightPublisher
from dphrl.types import Completion, Prompt


class RayRolloutPool:
    """`protocols.RolloutPool` over vLLM engines.

    probes: prompts that each refit is proved on; a pool without them can only generate. dtype: the learner's, for the
    default bound on the gap in log-probs. start_engine: see `EngineRepair`; without it, no engine is replaced.
    """

    def __init__(
        self,
        engines: Sequence[Actor],
        config: Config,
        probes: Sequence[Prompt] = (),
        dtype: str = "float32",
        start_engine: Callable[[int], Awaitable[Actor]] | None = None,
    ) -> None:
        self.engines, self.config = list(engines), config
        self._loads = [EngineLoad() for _ in engines]
        self._num_waiting = 0  # prompts that no engine has been handed yet
        # These four share one list, in which a replaced engine changes.
        self._steps = EngineSteps(self.engines, config.sync.timeout_s)
        self._transfer = open_transfer(self._steps, config)
        self._repair = EngineRepair(self.engines, config, start_engine)
        self._proof = WeightProof(self.engines, probes, max_mean_gap(config.sync, dtype), self._steps)

    async def refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        """See `protocols.RolloutPool`. An engine that fails is replaced, or the run stops, by sync.on_failure."""
        num_replaced = 0
        while True:
            try:
                gaps = await self._sync(learner)
            except SyncFailedError as failed:
                num_replaced += await self._repair.replace(failed)
            else:
                replaced = {"sync/engines_replaced": float(num_replaced)} if num_replaced else {}
                return {**gaps, **replaced}

    async def _sync(self, learner: WeightPublisher) -> dict[str, float]:
        await self._steps.find_places()
        records = await self._transfer.send(learner)
        limit = self.config.sync.timeout_s
        sent = cast(WeightSummary, await within(learner.sent(), limit, "sync.timeout_s", "what the learner sent"))
        return await self._proof.check(records, sent, learner)

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False
    ) -> AsyncIterator[Sequence[Completion]]:
        # A single engine gets all prompts at once, because its scheduler batches best. Of several, each takes about
        # two helpings, so that a slow engine delays the step by half a share at most.
        share = len(prompts) if len(self.engines) == 1 else math.ceil(len(prompts) / (2 * len(self.engines)))
        waiting = [prompts[i : i + share] for i in range(0, len(prompts), max(1, share))]
        waiting.reverse()
        self._num_waiting += len(prompts)
        finished: asyncio.Queue[Sequence[Completion] | None] = asyncio.Queue()

        async def serve(engine: Actor, load: EngineLoad) -> None:
            while waiting:
                mine = waiting.pop()
                self._num_waiting -= len(mine)
                with load.helping(len(mine) * num_samples) as deliver:
                    async for ref in engine.generate.remote(mine, num_samples, seed, greedy):
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
            # The limit is for the time between deliveries, because the time of a whole collection depends on its size.
            while (completions := await within(finished.get(), limit, "rollout.timeout_s", "a completion")) is not None:
                yield completions
            await serving
        finally:
            serving.cancel()
            # `waiting` is empty here unless something failed.
            self._num_waiting -= sum(len(mine) for mine in waiting)
            waiting.clear()

    def drain_metrics(self) -> Mapping[str, float]:
        rates = {f"rollout/engine/{i}/tokens_per_s": load.drain() for i, load in enumerate(self._loads)}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def live_metrics(self) -> Mapping[str, float]:
        """Queue depths at this moment. Any thread may call it."""
        pending = {f"queue/engine/{i}/completions_pending": load.num_pending for i, load in enumerate(self._loads)}
        return {"queue/prompts_waiting": self._num_waiting, **pending}
