"""Finished completions on their way to whoever asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """Items are kept until the reader says that it has them, so an answer that is lost on its way is given again.

    It belongs to one event loop. `fail` ends it: all who wait, and all who come later, get the error.
    """

    def __init__(self) -> None:
        self._items: list[T] = []
        self._num_dropped = 0  # items that the reader has
        self._error: Exception | None = None
        self._more = asyncio.Event()

    def put(self, items: Sequence[T]) -> None:
        self._items += items
        self._more.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._more.set()

    async def after(self, num_seen: int) -> list[T]:
        """All items but the first `num_seen` ever put, as soon as there is one. num_seen: how many the reader has."""
        del self._items[: num_seen - self._num_dropped]
        self._num_dropped = max(self._num_dropped, num_seen)
        while not self._items:
            if self._error is not None:
                raise self._error
            self._more.clear()
            await self._more.wait()
        return list(self._items)
