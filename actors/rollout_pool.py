"""The rollout engines as one pool: prompts go to any engine that is free, weights go to all engines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import cast

from actors.device_turns import OwnDevices, Turns
from actors.dispatcher import Dispatcher
from actors.engine_load import EngineLoad
from actors.engine_repair import EngineRepair
from actors.waiting import Actor, within
from actors.weight_proof import WeightProof
from actors.weight_transfer.failures import SyncFailedError
from actors.weight_transfer.ledger import WeightSummary
from actors.weight_transfer.session import EngineSteps, open_transfer
from dphrl.config.schema import Config
from dphrl.protocols import WeightPublisher
from dphrl.types import Completion, Prompt


class RayRolloutPool:
    """`protocols.RolloutPool` over vLLM engines.

    probes: prompts that each refit is proved on; a pool without them can only generate. dtype: the learner's, for the
    default bound on the gap in log-probs. start_engine: see `EngineRepair`; without it, no engine is replaced. turns:
    whose turn it is on devices that engines share with the learner, if they do.
    """

    def __init__(
        self,
        engines: Sequence[Actor],
        config: Config,
        probes: Sequence[Prompt] = (),
        dtype: str = "float32",
        start_engine: Callable[[int], Awaitable[Actor]] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.engines, self.config = list(engines), config
        self._turns = turns or OwnDevices()
        self._loads = [EngineLoad() for _ in engines]
        # These five share one list, in which a replaced engine changes.
        self._work = Dispatcher(
            self.engines,
            self._loads,
            config.rollout.max_concurrent_sequences,
            all_at_once=config.deterministic,
        )
        self._steps = EngineSteps(self.engines, config.sync.timeout_s)
        self._transfer = open_transfer(self._steps, config)
        self._repair = EngineRepair(self.engines, config, start_engine)
        bound = config.sync.mean_gap_bound(dtype)
        self._proof = WeightProof(self.engines, probes, bound, self._steps, seed=config.seed)

    async def refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        """See `protocols.RolloutPool`. An engine that fails is replaced, or the run stops, by sync.on_failure.

        What engines are at when it begins, they go on with afterwards.
        """
        self._work.pause()
        try:
            return await self._refit(learner)
        finally:
            self._work.resume()

    async def _refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        num_replaced = 0
        if self.config.rollout.on_update == "finish":
            limit = self.config.rollout.timeout_s
            await within(self._work.drained(), limit, "rollout.timeout_s", "engines to finish what they are at")
        while True:
            try:
                gaps = await self._sync(learner)
            except SyncFailedError as failed:
                before = list(self.engines)
                num_replaced += await self._repair.replace(failed)
                for index, engine in enumerate(before):
                    if engine is not self.engines[index]:
                        self._work.replaced(index)
            else:
                replaced = {"sync/engines_replaced": float(num_replaced)} if num_replaced else {}
                return {**gaps, **replaced}

    async def _sync(self, learner: WeightPublisher) -> dict[str, float]:
        await self._steps.find_places()
        async with self._turns.sync():
            records = await self._transfer.send(learner)
        limit = self.config.sync.timeout_s
        sent = cast(WeightSummary, await within(learner.sent(), limit, "sync.timeout_s", "what the learner sent"))
        return await self._proof.check(records, sent, learner)

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncGenerator[Sequence[Completion], None]:
        await self._turns.decode()
        call = self._work.open(prompts, num_samples, seed, greedy=greedy, priority=priority)
        try:
            while call.num_missing or call.num_unread:
                yield await self._work.read(call, self.config.rollout.timeout_s)
        finally:
            self._work.close(call)

    def drain_metrics(self) -> Mapping[str, float]:
        speeds = {i: speed for i, load in enumerate(self._loads) if (speed := load.drain()) is not None}
        if not speeds:
            return {}
        metrics = {"rollout/busy_fraction": sum(speed.busy_fraction for speed in speeds.values()) / len(self._loads)}
        for i, speed in speeds.items():
            metrics[f"rollout/engine/{i}/tokens_per_s"] = speed.tokens_per_s
            metrics[f"rollout/engine/{i}/busy_fraction"] = speed.busy_fraction
        return metrics

    def live_metrics(self) -> Mapping[str, float]:
        """Queue depths at this moment. Any thread may call it."""
        pending = {f"queue/engine/{i}/completions_pending": load.num_pending for i, load in enumerate(self._loads)}
        return {"queue/prompts_waiting": self._work.num_waiting, **pending}
