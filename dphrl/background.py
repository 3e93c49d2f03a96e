"""Work beside other work: what may take its time, such as the writing of a checkpoint, and what may be given up."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound="asyncio.Future[Any]")

# A thread at this niceness gets a thirtieth of a core on which others compute, and all of one that is idle.
NICENESS = 15


def step_back() -> None:
    """From now on, this thread, and those that it starts, yield to the others of this machine. There is no way back."""
    with suppress(OSError):  # it has stepped back further already
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def one_of_many(task: F) -> F:
    """`task`, which may be given up for what failed before it: asyncio does not report its own failure then.

    asyncio reports it whenever Python happens to collect the task. On Python 3.11 that writes a traceback from within
    anything, and fails in a syntax tree that is being made at that moment.
    """
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def in_background(call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a thread of its own that yields to others."""
    pool = ThreadPoolExecutor(1, "background", initializer=step_back)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
    finally:
        pool.shutdown(wait=False)
