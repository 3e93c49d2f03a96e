"""Whose turn it is on GPUs that engines share with the learner.

A step goes: engines decode; they sleep, and drop weights and cache; the learner takes its state back and updates; it
puts the state away again; engines wake their weights, take the new ones, and wake their cache. Outside of updates the
learner keeps its weights on the GPU, so that it can score and publish beside engines that are awake.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import Enum
from typing import Any, Protocol

from actors.last_words import is_death, is_device_failure
from actors.waiting import Actor, within
from actors.weight_transfer.failures import last_words
from dphrl.protocols import LearnerLostError

WEIGHTS, CACHE = "weights", "kv_cache"


class Turns(Protocol):
    """Asked by the learner and by the pool of engines before they use their devices."""

    async def decode(self) -> None:
        """Call it before engines generate; it returns when they can."""
        ...

    def refit(self) -> AbstractAsyncContextManager[None]:
        """The learner sends its weights and judges the engines in this block, and does nothing else meanwhile."""
        ...

    def sync(self) -> AbstractAsyncContextManager[None]:
        """Engines take the learner's weights in this block, and can generate after it."""
        ...

    def update(self) -> AbstractAsyncContextManager[None]:
        """The learner updates in this block. Engines need new weights afterwards."""
        ...

    def restore(self) -> AbstractAsyncContextManager[None]:
        """The learner saves or loads its whole state in this block. Engines keep their weights."""
        ...


class OwnDevices:
    """`Turns` of engines and a learner that share no device.

    Only the learner's own work has turns: an engine that comes in the place of a dead one may need weights at any time,
    and the learner's ranks send them together, as they update together.
    """

    def __init__(self) -> None:
        self._learner_at_work = asyncio.Lock()

    async def decode(self) -> None:
        return

    @asynccontextmanager
    async def sync(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with self._learner_at_work:
            yield

    refit = update = restore = _alone


class _Engines(Enum):
    AWAKE = "awake"
    ASLEEP = "asleep, with their weights in host memory"
    EMPTY = "asleep, without weights"
    HALF = "awake but for their cache"


class DeviceTurns:
    """`Turns` of engines and a learner on the same GPUs.

    Lifecycle: engines start alone, while the learner holds nothing; `make_room` before the learner loads its model;
    then any order of turns. A turn that fails leaves the devices as they are, and the run has to stop.
    """

    def __init__(self, engines: Sequence[Actor], ranks: Sequence[Actor], timeout_s: float) -> None:
        """engines, ranks: the lists that the system keeps up to date, as either may be started again. timeout_s: for
        each move of weights or state (sync.timeout_s)."""
        self.engines, self.ranks, self.timeout_s = engines, ranks, timeout_s
        self._engines, self._state_is_here = _Engines.AWAKE, False
        self._moving = asyncio.Lock()

    async def make_room(self) -> None:
        """Engines sleep, and the learner is about to load its model, with all of its state on its devices."""
        self._moving = asyncio.Lock()  # a lock belongs to an event loop, and every run has its own
        async with self._moving:
            if self._engines is _Engines.HALF:  # the learner before this one was lost in the midst of a sync
                await self._wake([CACHE])
                self._engines = _Engines.AWAKE
            await self._sleep(2)
            self._state_is_here = True

    async def decode(self) -> None:
        """Raises RuntimeError when engines have dropped their weights and got no others."""
        async with self._moving:
            if self._engines is _Engines.EMPTY:
                raise RuntimeError("engines that share the learner's GPUs have no weights since its update; refit them")
            await self._offload()
            if self._engines is _Engines.ASLEEP:
                await self._wake([WEIGHTS, CACHE])
            self._engines = _Engines.AWAKE

    @asynccontextmanager
    async def refit(self) -> AsyncIterator[None]:
        yield  # nothing refits engines that share devices but the loop, which does one thing after another

    @asynccontextmanager
    async def sync(self) -> AsyncIterator[None]:
        async with self._moving:
            await self._offload()
            asleep = self._engines is not _Engines.AWAKE
            if asleep:
                await self._wake([WEIGHTS])
                self._engines = _Engines.HALF
            yield
            # The cache comes last, because weights may take more memory while they change.
            if asleep:
                await self._wake([CACHE])
            self._engines = _Engines.AWAKE

    @asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        async with self._moving:
            await self._sleep(2)
            await self._reload()
            yield

    @asynccontextmanager
    async def restore(self) -> AsyncIterator[None]:
        async with self._moving:
            if self._engines is _Engines.AWAKE:
                await self._sleep(1)
            await self._reload()
            yield

    async def _sleep(self, level: int) -> None:
        if self._engines is _Engines.AWAKE:
            await self._all_engines(f"sleep (level {level})", lambda engine: engine.sleep.remote(level))
        # Engines that sleep already keep what they put into host memory. It is not used: after an update it is old.
        self._engines = _Engines.EMPTY if level == 2 else _Engines.ASLEEP

    async def _wake(self, tags: list[str]) -> None:
        await self._all_engines(f"wake up ({' and '.join(tags)})", lambda engine: engine.wake_up.remote(tags))

    async def _offload(self) -> None:
        if self._state_is_here:
            await self._all_ranks("put its state away", lambda rank: rank.offload.remote())
            self._state_is_here = False

    async def _reload(self) -> None:
        if not self._state_is_here:
            await self._all_ranks("take its state back", lambda rank: rank.reload.remote())
            self._state_is_here = True

    async def _all_ranks(self, what: str, call: Callable[[Actor], Awaitable[Any]]) -> None:
        """Raises LearnerLostError when a rank is gone or hangs."""
        try:
            await self._all("learner rank", self.ranks, what, call)
        except (TimeoutError, RuntimeError) as error:
            cause = error.__cause__ or error
            if isinstance(error, TimeoutError) or is_death(cause) or is_device_failure(cause):
                raise LearnerLostError(str(error)) from error
            raise

    async def _all_engines(self, what: str, call: Callable[[Actor], Awaitable[Any]]) -> None:
        await self._all("rollout engine", self.engines, what, call)

    async def _all(
        self, role: str, actors: Sequence[Actor], what: str, call: Callable[[Actor], Awaitable[Any]]
    ) -> None:
        async def one(index: int, actor: Actor) -> None:
            try:
                await within(call(actor), self.timeout_s, "sync.timeout_s", f"{role} {index} to {what}")
            except TimeoutError:
                raise
            except Exception as error:
                raise RuntimeError(f"{role} {index} did not {what} on a shared GPU: {last_words(error)}") from error

        await asyncio.gather(*[one(index, actor) for index, actor in enumerate(actors)])
