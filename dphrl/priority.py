"""A lock for one at a time, in the order of their priorities."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PriorityLock:
    """Of those that wait, the one with the lowest priority number is next; of one number, the one that came first."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: set[tuple[int, int]] = set()
        self._taken = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, priority: int) -> AsyncIterator[None]:
        """Wait until it is free, and hold it."""
        caller = priority, next(self._numbers)
        self._waiting.add(caller)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._taken and caller == min(self._waiting))
                self._taken = True
        finally:
            # One that gives up while it waits may have been the next.
            self._waiting.remove(caller)
            await self._tell()
        try:
            yield
        finally:
            self._taken = False
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
