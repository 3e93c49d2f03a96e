"""Engines that were lost, and the new ones in their places."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from actors.waiting import Actor
from actors.weight_transfer.failures import EngineFailure
from dphrl.config.schema import Config
from dphrl.protocols import EnginesLostError

log = logging.getLogger(__name__)

RESUME = "--resume goes on from the last checkpoint"
STOPPED = f"rollout.on_failure is stop, so the run stops; replace starts another engine instead. {RESUME}"
SHARED = (
    "Its GPU is the learner's too, and vLLM cannot start beside a learner that holds memory there, so the run stops. "
    f"{RESUME}"
)


class CannotPlaceError(RuntimeError):
    """No node has room for the engine, so that trying again does not help. The message has the arithmetic."""


class EngineStarter(Protocol):
    """Whoever makes the engines' actors."""

    @property
    def can_replace(self) -> bool:
        """Whether another engine can start while the learner is up."""
        ...

    async def start(self, index: int) -> Actor:
        """End the engine of this number, dead or alive, and start another, which is stale; returns it once it is up.

        Raises CannotPlaceError when there is no room for it, and whatever its start raises.
        """
        ...

    async def end(self, index: int) -> None:
        """End the engine of this number, dead or alive, and free what it held."""
        ...


class EngineRepair:
    """Starts other engines in the background, while the pool goes on with those it has.

    up: engines that are there and have no weights yet, by number, for the pool to take. A number that fails more than
    rollout.max_replacements times, or finds no room, is given up.
    """

    def __init__(self, config: Config, starter: EngineStarter | None = None) -> None:
        """starter: None where nobody can start engines; then every one that fails is given up."""
        self._config, self._starter = config, starter
        self.up: dict[int, Actor] = {}
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._num_failures: Counter[int] = Counter()
        self._causes: dict[int, EngineFailure] = {}

    def lost(self, failure: EngineFailure) -> None:
        """An engine failed: start another, or give it up. Returns at once.

        Raises EnginesLostError when the run is to stop instead.
        """
        if self._config.rollout.on_failure == "stop":
            raise EnginesLostError(f"{failure}. {STOPPED}")
        if self._starter is not None and not self._starter.can_replace:
            raise EnginesLostError(f"{failure}. {SHARED}")
        if self._may_start_again(failure):
            self.begin(failure.index)

    @property
    def numbers(self) -> frozenset[int]:
        """Of the engines that are up or on their way."""
        return frozenset(self.up) | frozenset(self._starting)

    def begin(self, index: int) -> None:
        """Start an engine of this number in the background."""
        self._starting[index] = asyncio.create_task(self._start(index))

    async def until_up(self) -> None:
        """Returns when an engine is up, or one that was to come has been given up.

        Raises EnginesLostError when none is up and none is coming.
        """
        if self.up:
            return
        if not self._starting:
            last = next(reversed(self._causes.values()), None)
            raise EnginesLostError(f"no rollout engine is left; the last one lost: {last}. {RESUME}")
        await asyncio.wait([*self._starting.values()], return_when=asyncio.FIRST_COMPLETED)

    def forget(self, index: int) -> None:
        """Nobody wants an engine of this number any more; what it did is forgotten."""
        self.up.pop(index, None)
        self._causes.pop(index, None)
        del self._num_failures[index]
        if (starting := self._starting.pop(index, None)) is not None:
            starting.cancel()

    async def end(self, index: int) -> None:
        """End the engine of this number."""
        if self._starter is not None:
            await self._starter.end(index)

    def tell_joined(self, index: int, where: Mapping[str, object]) -> bool:
        """Say that the engine has its weights; returns whether it came in the place of one that failed."""
        cause = self._causes.pop(index, None)
        if cause is not None:
            log.warning(
                "rollout engine %d is replaced: another serves in its place",
                index,
                extra={"event": "engine_replaced", "facts": {"engine": index, **where, "reason": cause.reason}},
            )
        return cause is not None

    async def _start(self, index: int) -> None:
        try:
            while not await self._try_to_start(index):
                pass
        finally:
            self._starting.pop(index, None)

    async def _try_to_start(self, index: int) -> bool:
        """Whether it is decided: the engine is up, or given up."""
        assert self._starter is not None
        began, limit = time.monotonic(), self._config.learner.timeout_s
        try:
            self.up[index] = await self._starter.start(index)
        except Exception as error:
            failure = EngineFailure.of(index, "start", time.monotonic() - began, error, limit)
            hopeless = isinstance(error, CannotPlaceError)
            return not self._may_start_again(replace(failure, setting="learner.timeout_s"), hopeless=hopeless)
        return True

    def _may_start_again(self, failure: EngineFailure, *, hopeless: bool = False) -> bool:
        """Whether another start may help; else the engine is given up."""
        index, most = failure.index, self._config.rollout.max_replacements
        self._causes.pop(index, None)
        self._causes[index] = failure  # the last of all
        self._num_failures[index] += 1
        if self._starter is not None and not hopeless and self._num_failures[index] <= most:
            if failure.doing == "start":
                log.warning("%s; starting it again", failure)
            return True
        why = "" if hopeless or self._starter is None else f"; it was started again {most} times (max_replacements)"
        log.error(
            "rollout engine %d is given up%s: %s",
            *(index, why, failure),
            extra={"event": "engine_given_up", "facts": failure.facts()},
        )
        if self._starter is not None:
            self._ending = asyncio.create_task(self._starter.end(index))
        return False
