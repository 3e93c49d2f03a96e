"""One sync of weights, from the learner to all engines, as the driver runs it.

A transfer's `send` brings every engine to the learner's present weights. Each step that an engine takes on the way has
the limit sync.timeout_s and goes through `EngineSteps`, so an engine that fails is named, and none is waited for
without end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, cast

from actors.waiting import Actor, within
from actors.weight_transfer.backends import engine_backend
from actors.weight_transfer.failures import EngineFailure, SendOutcome, SyncFailedError
from actors.weight_transfer.ledger import EngineRecord
from dphrl.config.runtime import SyncConfig
from dphrl.config.schema import Config
from dphrl.protocols import WeightChunk, WeightPublisher

T = TypeVar("T")


class Transfer(Protocol):
    """A way for weights to reach the engines."""

    async def send(self, learner: WeightPublisher) -> list[EngineRecord]:
        """Bring all engines to the learner's present weights and version; each engine's record, in order.

        Raises SyncFailedError, which names the engines that failed; all others have taken the weights or are `cut`.
        """
        ...


class WeightSender(Protocol):
    """What a learner does for `TrainerTransfer`, besides publishing."""

    async def send_weights(self, engines: Sequence[Actor], width: int, limit_s: float) -> SendOutcome:
        """One session with all engines, each of `width` workers; limit_s is of each step.

        Raises RuntimeError when the learner itself fails.
        """
        ...


class EngineSteps:
    """Waits for one engine's answer at a time, each within the same limit.

    engines: the pool's own list, in which a replaced engine changes.
    """

    def __init__(self, engines: Sequence[Actor], limit_s: float) -> None:
        self.engines, self.limit_s = engines, limit_s
        self._places: dict[int, tuple[Actor, str]] = {}

    async def step(self, index: int, doing: str, waiting: Awaitable[T]) -> T:
        """The result of `waiting`, which is for engine `index`. doing: what it is asked for, as in "take weights".

        Raises SyncFailedError about this engine when it takes too long, raises, or dies.
        """
        began = time.monotonic()
        try:
            return await asyncio.wait_for(waiting, self.limit_s)
        except SyncFailedError:
            raise
        except Exception as error:
            took = time.monotonic() - began
            failure = EngineFailure.of(index, doing, took, error, self.limit_s)
            raise SyncFailedError([self.placed(failure)]) from error

    def placed(self, failure: EngineFailure) -> EngineFailure:
        """The failure with the place of its engine, if that is known."""
        engine, place = self._places.get(failure.index, (None, ""))
        return replace(failure, place=place) if engine is self.engines[failure.index] else failure

    async def find_places(self) -> None:
        """Ask each engine that is new where it runs, so that a later failure can tell."""
        await self.all([self._find_place(i) for i in range(len(self.engines)) if not self._is_known(i)])

    async def all(self, steps: Sequence[Awaitable[T]]) -> list[T]:
        """All results. Every step runs to its own end; then the failures of all are raised as one SyncFailedError."""
        results = await asyncio.gather(*steps, return_exceptions=True)
        failed = [result for result in results if isinstance(result, SyncFailedError)]
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, SyncFailedError):
                raise result
        if failed:
            raise SyncFailedError(
                [failure for error in failed for failure in error.failures],
                [index for error in failed for index in error.cut],
            )
        return [result for result in results if not isinstance(result, BaseException)]

    def _is_known(self, index: int) -> bool:
        return index in self._places and self._places[index][0] is self.engines[index]

    async def _find_place(self, index: int) -> None:
        engine = self.engines[index]
        self._places[index] = engine, await self.step(index, "answer", engine.ready.remote())


class ObjectStoreTransfer:
    """Weights go to Ray's object store in chunks, and every engine reads them there.

    Sessions of different engines do not depend on each other: where one fails, the others end theirs.
    """

    def __init__(self, steps: EngineSteps, config: SyncConfig) -> None:
        self.steps, self.config = steps, config

    async def send(self, learner: WeightPublisher) -> list[EngineRecord]:
        version, limit = learner.policy_version, self.config.timeout_s
        chunks = await within(learner.publish(), limit, "sync.timeout_s", "the learner to publish its weights")
        records = await self.steps.all([self._push(i, chunks, version) for i in range(len(self.steps.engines))])
        return check_versions(records, version)

    async def _push(self, index: int, chunks: Sequence[WeightChunk], version: int) -> EngineRecord:
        # An engine runs its calls in order, so all are sent at once. The first that fails leaves the session closed,
        # so those behind it fail too.
        engine, step = self.steps.engines[index], self.steps.step
        started = engine.start_weight_update.remote()
        taken = [engine.update_weights.remote(chunk) for chunk in chunks]
        finished = engine.finish_weight_update.remote(version)
        await step(index, "start a weight update", started)
        for i, one in enumerate(taken, 1):
            await step(index, f"take chunk {i} of {len(taken)} of the weights", one)
        return await step(index, "finish its weight update", finished)


class TrainerTransfer:
    """Weights go through vLLM's own trainer side, in the learner's ranks: by nccl, or by ipc.

    The learner's rank 0 asks the engines itself, because it sends while they receive. All engines are in one session:
    where one fails, those that have not ended theirs are cut.
    """

    def __init__(self, steps: EngineSteps, config: Config) -> None:
        self.steps, self.config = steps, config

    async def send(self, learner: WeightPublisher) -> list[EngineRecord]:
        sending = cast(WeightSender, learner)
        outcome = await sending.send_weights(
            self.steps.engines, self.config.rollout.tensor_parallel, self.config.sync.timeout_s
        )
        if outcome.failures:
            raise SyncFailedError(map(self.steps.placed, outcome.failures), outcome.cut)
        return check_versions(list(outcome.records), learner.policy_version)


def check_versions(records: list[EngineRecord], version: int) -> list[EngineRecord]:
    """The same records. Raises RuntimeError when an engine acknowledges another version."""
    acknowledged = {record.policy_version for record in records}
    if acknowledged != {version}:
        raise RuntimeError(f"engines acknowledged versions {sorted(acknowledged)} after a sync to {version}")
    return records


def open_transfer(steps: EngineSteps, config: Config) -> Transfer:
    """The transfer of the backend that the engines were started for."""
    if engine_backend(config.sync) == "object_store":
        return ObjectStoreTransfer(steps, config.sync)
    return TrainerTransfer(steps, config)
