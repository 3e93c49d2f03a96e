"""Threads that yield to others."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from dphrl.background import NICENESS, in_background, step_back


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_background_work_yields_and_nothing_else_does() -> None:
    before = niceness()

    async def work() -> tuple[int, int]:
        return await in_background(niceness), await asyncio.to_thread(niceness)

    assert asyncio.run(work()) == (max(before, NICENESS), before)
    assert niceness() == before


def test_an_error_comes_through_and_no_thread_stays() -> None:
    async def work() -> None:
        await in_background(int, "x")

    with pytest.raises(ValueError, match="'x'"):
        asyncio.run(work())
    until = time.monotonic() + 30
    while any(thread.name.startswith("background") for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_stepping_back_twice_is_harmless() -> None:
    thread = threading.Thread(target=lambda: (step_back(), step_back()))
    thread.start()
    thread.join()
