"""Waits of the driver: their limits, and the cancellation of who waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.dispatcher import Dispatcher
from actors.waiting import limited, within


def test_what_comes_in_time_is_returned_and_what_does_not_is_told() -> None:
    async def run() -> None:
        assert await limited(asyncio.sleep(0, "result"), 5) == "result"
        with pytest.raises(TimeoutError):
            await limited(asyncio.sleep(60), 0.01)
        with pytest.raises(TimeoutError, match=r"^waited 0\.01 s \(a\.setting\) for an answer, since .* UTC$"):
            await within(asyncio.sleep(60), 0.01, "a.setting", "an answer")

    asyncio.run(run())


@pytest.mark.parametrize("wait", [limited, lambda waiting, s: within(waiting, s, "a.setting", "an answer")])
def test_a_cancellation_that_comes_with_the_result_is_not_lost(wait: Any) -> None:
    async def run() -> None:
        answer = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(wait(answer, 60))
        await asyncio.sleep(0)
        answer.set_result("result")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


def test_a_reader_that_is_cancelled_when_a_completion_comes_ends() -> None:
    async def run() -> None:
        work = Dispatcher(1, lambda *_: None)
        call = work.open([], 1, 0, greedy=False)
        reading = asyncio.create_task(work.read(call, 60))
        await asyncio.sleep(0)
        call.deliver([])
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(run())
