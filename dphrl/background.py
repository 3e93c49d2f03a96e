"""Work that may take its time beside work that may not, such as the writing of a checkpoint beside a training step."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

# A thread at this niceness gets a thirtieth of a core on which others compute, and all of one that is idle.
NICENESS = 15


def step_back() -> None:
    """From now on, this thread, and those that it starts, yield to the others of this machine. There is no way back."""
    with suppress(OSError):  # it has stepped back further already
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


async def in_background(call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a thread of its own that yields to others."""
    pool = ThreadPoolExecutor(1, "background", initializer=step_back)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
    finally:
        pool.shutdown(wait=False)
