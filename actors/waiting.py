"""Waiting for actors: never without a deadline, and always saying for what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")
Actor = Any  # Ray's handles carry no static type of their methods.


async def within(waiting: Awaitable[T], seconds: float, setting: str, what: str) -> T:
    """`waiting`'s result. Raises TimeoutError that says what was waited for, and which setting bounds it."""
    try:
        return await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        raise TimeoutError(f"waited {seconds:g} s ({setting}) for {what}") from None
