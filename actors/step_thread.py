"""A thread that owns an engine: it steps while there is work, and does everything else between two steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Work(Protocol):
    """What is stepped. All of its methods run in the thread."""

    @property
    def ready(self) -> bool:
        """Whether a step would do anything now."""
        ...

    def step(self) -> None: ...

    def fail(self, error: Exception) -> None:
        """A step raised. Nothing is stepped any more until a call makes `ready` true again."""
        ...


class StepThread:
    """Calls run in the order in which they were handed over, each between two steps.

    One thread does everything, because vLLM's CPU threads belong to the thread that starts them, and because an engine
    must not step while its weights change.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._work: Work | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def open(self, make: Callable[[], Work]) -> None:
        """Make the work in the thread, and step it from now on. Raises what `make` raises."""

        def made() -> None:
            self._work = make()

        self._hand_over(made).result()

    async def do(self, call: Callable[[], T]) -> T:
        """The result of `call`, which runs in the thread before its next step."""
        return await asyncio.wrap_future(self._hand_over(call))

    def _hand_over(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def _run(self) -> None:
        while True:
            ready = self._work is not None and self._work.ready
            try:
                call, future = self._calls.get(block=not ready)
            except queue.Empty:
                self._step()
            else:
                _answer(call, future)

    def _step(self) -> None:
        assert self._work is not None
        try:
            self._work.step()
        except Exception as error:
            self._work.fail(error)


def _answer(call: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
