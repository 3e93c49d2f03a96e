"""Finished completions are kept until their reader says that it has them."""

from __future__ import annotations

import asyncio

import pytest

from actors.outbox import Outbox


def test_items_are_given_again_until_the_reader_has_them() -> None:
    async def read() -> None:
        box: Outbox[str] = Outbox()
        box.put(["a", "b"])
        assert await box.after(0) == ["a", "b"]
        assert await asyncio.wait_for(box.after(0), 1) == ["a", "b"], "the first answer may not have arrived"
        box.put(["c"])
        assert await box.after(1) == ["b", "c"]
        assert await box.after(2) == ["c"]
        waiting = asyncio.create_task(box.after(3))
        await asyncio.sleep(0)
        assert not waiting.done()
        box.put(["d"])
        assert await asyncio.wait_for(waiting, 1) == ["d"]

    asyncio.run(read())


def test_a_failure_reaches_who_waits_and_who_comes_later_after_what_was_finished() -> None:
    async def read() -> None:
        box: Outbox[str] = Outbox()
        waiting = asyncio.create_task(box.after(0))
        await asyncio.sleep(0)
        box.fail(ConnectionError("gone"))
        with pytest.raises(ConnectionError, match="gone"):
            await asyncio.wait_for(waiting, 1)
        box.put(["a"])
        assert await box.after(0) == ["a"]
        with pytest.raises(ConnectionError, match="gone"):
            await box.after(1)

    asyncio.run(read())
