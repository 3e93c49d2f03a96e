"""One sync of weights, from the learner to all engines, as the driver runs it.

A transfer's `send` brings every engine to the learner's present weights. Each step that an engine takes on the way has
the limit sync.timeout_s and goes through `EngineSteps`, so an engine that fails is named, and none is waited for
without end.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

from actors.last_words import is_lost_object
from actors.waiting import Actor, limited
from actors.weight_transfer.backends import engine_backend
from actors.weight_transfer.failures import EngineFailure, Place, SendOutcome, SyncFailedError
from actors.weight_transfer.ledger import EngineRecord
from dphrl.config.runtime import SyncConfig
from dphrl.config.schema import Config
from dphrl.protocols import LearnerLostError, WeightChunk, WeightPublisher

T = TypeVar("T")
# Chunks that an engine is handed at a time: the one that it loads, and the next.
MAX_CHUNKS_TAKEN = 2


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

    engines: those of the present sync, by number.
    """

    def __init__(self, engines: Mapping[int, Actor], limit_s: float) -> None:
        self.engines, self.limit_s = dict(engines), limit_s
        self._places: dict[int, tuple[Actor, Place]] = {}

    async def step(self, index: int, doing: str, waiting: Awaitable[T]) -> T:
        """The result of `waiting`, which is for engine `index`. doing: what it is asked for, as in "take weights".

        Raises SyncFailedError about this engine when it takes too long, raises, or dies, and LearnerLostError when what
        it was given is gone from Ray's object store with whoever put it there.
        """
        began = time.monotonic()
        try:
            return await limited(waiting, self.limit_s)
        except SyncFailedError:
            raise
        except Exception as error:
            if is_lost_object(error):
                raise LearnerLostError(
                    f"the learner's weights were gone from Ray's object store when rollout engine {index} was to "
                    f"{doing}: the process or the node that sent them died"
                ) from error
            took = time.monotonic() - began
            failure = EngineFailure.of(index, doing, took, error, self.limit_s)
            raise SyncFailedError([self.placed(failure)]) from error

    def placed(self, failure: EngineFailure) -> EngineFailure:
        """The failure with the place of its engine, if that is known."""
        return replace(failure, place=self.place_of(failure.index))

    def place_of(self, index: int) -> Place | None:
        """Where an engine runs, if it has said so."""
        engine, place = self._places.get(index, (None, None))
        return place if engine is self.engines.get(index) else None

    async def find_places(self) -> None:
        """Ask each engine that is new where it runs, so that a later failure can tell."""
        await self.all([self._find_place(i) for i in self.engines if self.place_of(i) is None])

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

    async def _find_place(self, index: int) -> None:
        engine = self.engines[index]
        self._places[index] = engine, await self.step(index, "answer", engine.ready.remote())


class ObjectStoreTransfer:
    """Weights go to Ray's object store in chunks, and every engine reads them there.

    While engines load a chunk, the learner packs and puts the next ones. A chunk leaves the store when all engines have
    taken it. Sessions of different engines do not depend on each other: where one fails, the others end theirs.
    """

    def __init__(self, steps: EngineSteps, config: SyncConfig) -> None:
        self.steps, self.config = steps, config

    async def send(self, learner: WeightPublisher) -> list[EngineRecord]:
        version = learner.policy_version
        fleet = _Fleet(self.steps)
        # An engine first ends what it is at, and only then do the learner's ranks begin to gather and wait for it.
        await fleet.each("start a weight update", lambda engine: engine.start_weight_update.remote())
        await self._send_chunks(fleet, learner)
        records = await fleet.each(
            "finish its weight update", lambda engine: engine.finish_weight_update.remote(version)
        )
        fleet.raise_failures()
        return check_versions(records, version)

    async def _send_chunks(self, fleet: _Fleet, learner: WeightPublisher) -> None:
        taking: deque[asyncio.Task[Any]] = deque()
        stream = learner.publish()
        try:
            for number in itertools.count(1):
                # The learner has a limit of its own for each chunk: only it can tell whether it is lost.
                if (chunk := await anext(stream, None)) is None:
                    break
                taking.append(asyncio.create_task(_take(fleet, number, chunk)))
                del chunk
                # The next chunk is with an engine before it has loaded this one, so that it never waits for the call.
                if len(taking) == MAX_CHUNKS_TAKEN:
                    await taking.popleft()
            for taken in taking:
                await taken
        finally:
            for taken in taking:
                taken.cancel()
            await asyncio.gather(*taking, return_exceptions=True)


async def _take(fleet: _Fleet, number: int, chunk: WeightChunk) -> None:
    await fleet.each(f"take chunk {number} of the weights", lambda engine: engine.update_weights.remote(chunk))


class _Fleet:
    """The engines that have not failed in this session."""

    def __init__(self, steps: EngineSteps) -> None:
        self._steps = steps
        self._failed: dict[int, SyncFailedError] = {}

    async def each(self, doing: str, call: Callable[[Actor], Awaitable[T]]) -> list[T]:
        """The same step of every engine that has not failed; their results, without those of engines that fail now.

        Raises SyncFailedError when none is left.
        """

        async def one(index: int) -> list[T]:
            try:
                return [await self._steps.step(index, doing, call(self._steps.engines[index]))]
            except SyncFailedError as error:
                # What was on its way to it fails as well, but the first failure tells why.
                self._failed.setdefault(index, error)
                return []

        left = [i for i in self._steps.engines if i not in self._failed]
        results = await asyncio.gather(*[one(i) for i in left])
        if len(self._failed) == len(self._steps.engines):
            self.raise_failures()
        return [result for found in results for result in found]

    def raise_failures(self) -> None:
        """Raises one SyncFailedError about all engines that failed, if any did."""
        failures = [failure for _, error in sorted(self._failed.items()) for failure in error.failures]
        if failures:
            raise SyncFailedError(failures)


class TrainerTransfer:
    """Weights go through vLLM's own trainer side, in the learner's ranks: by nccl, or by ipc.

    The learner's rank 0 asks the engines itself, because it sends while they receive. All engines are in one session:
    where one fails, those that have not ended theirs are cut.
    """

    def __init__(self, steps: EngineSteps, config: Config) -> None:
        self.steps, self.config = steps, config

    async def send(self, learner: WeightPublisher) -> list[EngineRecord]:
        sending = cast(WeightSender, learner)
        # The learner counts the engines of its group from 0.
        numbers = list(self.steps.engines)
        outcome = await sending.send_weights(
            list(self.steps.engines.values()), self.config.rollout.tensor_parallel, self.config.sync.timeout_s
        )
        if outcome.failures:
            failures = [replace(failure, index=numbers[failure.index]) for failure in outcome.failures]
            raise SyncFailedError(map(self.steps.placed, failures), [numbers[i] for i in outcome.cut])
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
