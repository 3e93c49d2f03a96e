"""Waiting for actors, always with a deadline and with an error that says what was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, TypeVar

T = TypeVar("T")
Actor = Any  # Ray's handles have no static types for their methods.


async def limited(waiting: Awaitable[T], seconds: float) -> T:
    """The result of `waiting`. Raises TimeoutError.

    Python 3.11's `asyncio.wait_for` loses a cancellation that comes in the same turn as the result; this does not.
    """
    async with asyncio.timeout(seconds):
        return await waiting


async def within(waiting: Awaitable[T], seconds: float, setting: str, what: str) -> T:
    """The result of `waiting`. Raises TimeoutError: what was waited for, since when, and which setting is the limit."""
    began = datetime.now(UTC)
    try:
        return await limited(waiting, seconds)
    except TimeoutError:
        raise TimeoutError(f"waited {seconds:g} s ({setting}) for {what}, since {began:%H:%M:%S} UTC") from None
