"""One at a time, the lowest priority number first."""

from __future__ import annotations

import asyncio

from dphrl.priority import PriorityLock


def test_one_at_a_time_and_the_lowest_number_first() -> None:
    async def run() -> list[str]:
        lock, seen = PriorityLock(), []

        async def take(name: str, priority: int) -> None:
            async with lock.taken(priority):
                seen.append(f"{name} in")
                await asyncio.sleep(0)
                seen.append(f"{name} out")

        await asyncio.gather(take("a", 5), take("b", 2), take("c", 1), take("d", 2))
        return seen

    seen = asyncio.run(run())
    assert seen == [f"{name} {way}" for name in "acbd" for way in ("in", "out")], "a has it before anybody else comes"


def test_who_gives_up_is_in_nobody_s_way() -> None:
    async def run() -> None:
        lock = PriorityLock()
        began, ended = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with lock.taken(0):
                began.set()
                await ended.wait()

        async def take(priority: int) -> None:
            async with lock.taken(priority):
                raise KeyError("an error frees it as well")

        holding = asyncio.create_task(hold())
        await began.wait()
        impatient, patient = asyncio.create_task(take(1)), asyncio.create_task(take(2))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        ended.set()
        assert isinstance((await asyncio.wait_for(asyncio.gather(patient, return_exceptions=True), 5))[0], KeyError)
        async with asyncio.timeout(5), lock.taken(9):
            await holding

    asyncio.run(run())
