"""The rollout engines as one pool: prompts go to any engine that is free, weights go to all engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import cast

from actors.device_turns import OwnDevices, Turns
from actors.dispatcher import Dispatcher
from actors.engine_repair import EngineRepair, EngineStarter
from actors.waiting import Actor, within
from actors.weight_proof import WeightProof
from actors.weight_transfer.failures import EngineFailure, SyncFailedError
from actors.weight_transfer.ledger import WeightSummary
from actors.weight_transfer.session import EngineSteps, open_transfer
from dphrl.config.schema import Config
from dphrl.protocols import EnginesLostError, WeightPublisher
from dphrl.types import Completion, Prompt

log = logging.getLogger(__name__)


class RayRolloutPool:
    """`protocols.RolloutPool` over vLLM engines.

    Lifecycle of an engine: it has a number for as long as the run wants one there. It joins at a refit, and gets work
    from then on. One that fails, at work or in a sync, leaves at once: others are asked for what it was at, and another
    starts in its place in the background, joins at the next refit, and bears its number. When none is left, the first
    that is up again is refit at once, from the learner of the last refit.

    engines: those that have joined, by number.
    """

    def __init__(
        self,
        engines: Mapping[int, Actor] | Sequence[Actor],
        config: Config,
        probes: Sequence[Prompt] = (),
        dtype: str = "float32",
        starter: EngineStarter | None = None,
        turns: Turns | None = None,
    ) -> None:
        """probes: prompts that each refit is proved on; a pool without them can only generate. dtype: the learner's,
        for the default bound on the gap in log-probs. starter: see `EngineRepair`; without it, no engine is replaced.
        turns: whose turn it is at the learner, and on devices that engines share with it."""
        self.engines = dict(engines) if isinstance(engines, Mapping) else dict(enumerate(engines))
        self.config, self._turns = config, turns or OwnDevices()
        rollout = config.rollout
        self._work = Dispatcher(
            rollout.max_concurrent_sequences,
            self._fails_at_work,
            deadline_s=rollout.completion_timeout_s or rollout.timeout_s / 2,
            all_at_once=config.deterministic,
        )
        for index, engine in self.engines.items():
            self._work.add(index, engine)
        self._steps = EngineSteps(self.engines, config.sync.timeout_s)
        self._transfer = open_transfer(self._steps, config)
        bound = config.sync.mean_gap_bound(dtype)
        self._proof = WeightProof(self._steps, probes, bound, seed=config.seed)
        self._repair = EngineRepair(config, starter)
        self._learner: WeightPublisher | None = None
        self._refitting = asyncio.Lock()
        self._rescue: asyncio.Task[None] | None = None
        self._stopped: Exception | None = None
        self._num_replaced = self._num_told = 0

    # ---------------------------------------------------------------------------------- weights

    async def refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        """See `protocols.RolloutPool`. Engines that have come up join; one that fails leaves, and the others end it.

        What engines are at when it begins, they go on with afterwards. Raises EnginesLostError when no engine is left,
        or when an engine failed and the run is to stop then.
        """
        self._learner = learner
        async with self._refitting:
            if not isinstance(self._stopped, EnginesLostError):
                self._stopped = None  # a learner that was lost has a successor now
            self._work.pause()
            try:
                metrics = await self._refit(learner)
            except Exception as error:
                self._stop(error)
                raise
            self._work.resume()
            return metrics

    async def _refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        if self.config.rollout.on_update == "finish":
            limit = self.config.rollout.timeout_s
            await within(self._work.drained(), limit, "rollout.timeout_s", "engines to finish what they are at")
        joining: set[int] = set()
        while True:
            await self._until_one_is_there()
            joining |= self._admit()
            # Nobody waits for an engine that starts, because the learner can work meanwhile.
            async with self._turns.refit():
                try:
                    gaps = await self._sync(learner)
                except SyncFailedError as failed:
                    self._fail_in_sync(failed)
                    continue
            if self.engines:  # they may have died while the learner judged their probes
                self._tell_joined(joining)
                return gaps

    async def _sync(self, learner: WeightPublisher) -> dict[str, float]:
        self._steps.engines = dict(self.engines)
        await self._steps.find_places()
        async with self._turns.sync():
            records = await self._transfer.send(learner)
        sent = cast(WeightSummary, await learner.sent())  # which has a limit of its own
        return await self._proof.check(dict(zip(self._steps.engines, records, strict=True)), sent, learner)

    async def _until_one_is_there(self) -> None:
        while self._stopped is None and not self.engines and not self._repair.up:
            await self._repair.until_up()
        if self._stopped is not None:
            raise self._stopped

    def _admit(self) -> set[int]:
        up = dict(self._repair.up)
        self._repair.up.clear()
        for index, engine in up.items():
            self.engines[index] = engine
            self._work.add(index, engine)
        return set(up)

    def _tell_joined(self, joining: set[int]) -> None:
        for index in joining.intersection(self.engines):
            place = self._steps.place_of(index)
            where = {"node": place.node, "pid": place.process} if place else {}
            self._num_replaced += self._repair.tell_joined(index, where)

    # ---------------------------------------------------------------------------------- failures

    def _fail_in_sync(self, failed: SyncFailedError) -> None:
        for failure in failed.failures:
            self._lose(failure, self._steps.engines[failure.index])
        for index in sorted(failed.cut):
            words = "the sync broke off in which it was beside an engine that failed"
            cut = self._steps.placed(EngineFailure(index, "take weights", None, "raised", words))
            self._lose(cut, self._steps.engines[index])

    def _fails_at_work(self, index: int, engine: Actor, error: Exception) -> None:
        failure = EngineFailure.of(index, "return completions", None, error, self._work.deadline_s)
        self._lose(self._steps.placed(replace(failure, setting="rollout.completion_timeout_s")), engine)

    def _lose(self, failure: EngineFailure, engine: Actor) -> None:
        if self.engines.get(failure.index) is not engine:
            return  # it was lost before: by its work, or by a sync
        del self.engines[failure.index]
        num_resubmitted = self._work.lose(failure.index, str(failure))
        log.warning(
            "%s; it had %d completion(s) to return",
            *(failure, num_resubmitted),
            extra={"event": "engine_lost", "facts": {**failure.facts(), "num_resubmitted": num_resubmitted}},
        )
        try:
            self._repair.lost(failure)
        except EnginesLostError as error:
            self._stop(error)
            return
        self._rescue_work()

    def _rescue_work(self) -> None:
        # A refit that is under way waits for the next engine by itself.
        if not self.engines and not self._refitting.locked() and (self._rescue is None or self._rescue.done()):
            self._rescue = asyncio.create_task(self._refit_when_one_is_up())

    async def _refit_when_one_is_up(self) -> None:
        try:
            await self._until_one_is_there()
            if self._learner is None:
                raise EnginesLostError("no rollout engine is left, and nobody gave any weights for another")
            if not self.engines:
                await self.refit(self._learner)
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        # Later ones are consequences, but for engines that are gone: another learner does not bring them back.
        if not isinstance(self._stopped, EnginesLostError):
            self._stopped = error if isinstance(error, EnginesLostError) else self._stopped or error
        self._work.end(self._stopped)

    # ---------------------------------------------------------------------------------- more or fewer engines

    @property
    def numbers(self) -> frozenset[int]:
        """Of the engines that serve, are up, or are on their way."""
        return frozenset(self.engines) | self._repair.numbers

    def is_up(self, index: int) -> bool:
        """Whether an engine of this number waits for the next refit."""
        return index in self._repair.up

    def add(self, index: int) -> None:
        """Have one more engine start, of a number that none has; it joins at a refit."""
        self._repair.begin(index)

    async def remove(self, index: int) -> None:
        """End an engine; others get what it was at. Others must be there, or on their way.

        A sync ends with the engines with which it began.
        """
        async with self._refitting:
            self._repair.forget(index)
            self.engines.pop(index, None)
            self._work.lose(index)
        self._rescue_work()
        await self._repair.end(index)

    # ---------------------------------------------------------------------------------- work

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncGenerator[Sequence[Completion], None]:
        await self._turns.decode()
        if self._stopped is not None:
            raise self._stopped
        call = self._work.open(prompts, num_samples, seed, greedy=greedy, priority=priority)
        try:
            while call.num_missing or call.num_unread:
                yield await self._work.read(call, self.config.rollout.timeout_s)
        finally:
            self._work.close(call)

    def drain_metrics(self) -> Mapping[str, float]:
        loads = self._work.loads
        metrics = {
            "rollout/engines": float(len(self.engines)),
            "rollout/engines_replaced": float(self._num_replaced),
            "rollout/num_resubmitted": float(self._work.num_resubmitted - self._num_told),
        }
        self._num_replaced, self._num_told = 0, self._work.num_resubmitted
        speeds = {i: speed for i, load in loads.items() if (speed := load.drain()) is not None}
        if speeds:
            busy = sum(speed.busy_fraction for speed in speeds.values()) / len(loads)
            metrics["rollout/busy_fraction"] = busy
        for i, speed in speeds.items():
            metrics[f"rollout/engine/{i}/tokens_per_s"] = speed.tokens_per_s
            metrics[f"rollout/engine/{i}/busy_fraction"] = speed.busy_fraction
        return metrics

    def live_metrics(self) -> Mapping[str, float]:
        """Queue depths at this moment. Any thread may call it."""
        pending = {f"queue/engine/{i}/completions_pending": load.num_pending for i, load in self._work.loads.items()}
        return {"queue/prompts_waiting": self._work.num_waiting, **pending}
