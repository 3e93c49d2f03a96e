"""How a command is stopped before its end: by Ctrl-C, or by a scheduler's SIGTERM. SIGUSR1 asks for a checkpoint.

Signals only leave a request. Work that may end anywhere, such as a start or an evaluation whose chunks are on disk,
ends at once. Work that is to end well, such as a training step, is done within `held`: it is finished first, and what
follows asks `check`. A second Ctrl-C ends everything at once: nothing may be saved then, but what is on disk is whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Collection, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

Result = TypeVar("Result")

STOPS = (signal.SIGINT, signal.SIGTERM)
# `timeout` and shells that pass a signal on send the same one twice within moments; a person takes longer.
ECHO_S = 0.3


class Stopped(KeyboardInterrupt):
    """The command was asked to end. at_once: a second time, so that nothing may be saved any more."""

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.at_once = number, at_once

    @property
    def status(self) -> int:
        """The exit status, as shells write it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class StopRequest:
    """What was asked of this process so far. Without `listening` it stays empty, and all methods may be used.
    at_once: whether it was asked a second time, so that nothing may be waited for. lost: after `abandon`, why the run's
    folder is another's, so that nothing may be written there any more; else "".

    SIGINT (Ctrl-C): end after what is `held`, else now. SIGTERM: the same, and what `unless_stopped` waits for is given
    up. The same signal again, or Ctrl-C after SIGTERM: end now. SIGUSR1: save at the next opportunity, and go on.

    saves: whether the command makes checkpoints. To others SIGUSR1 means nothing.
    """

    def __init__(self, *, saves: bool = False) -> None:
        self._saves = saves
        self._number: int | None = None
        self._heard_at = 0.0
        self.lost = ""
        self.at_once = False
        self._wants_save = False
        self._num_held = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[Any] | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._given_up_by: Collection[int] = ()

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Within it, signals make requests. A signal that this process was started to ignore stays ignored.

        In another thread than the main one Python allows no handlers, and signals do what they did before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        heard = [n for n in (*STOPS, signal.SIGUSR1) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """asyncio.run, stopped by signals. The first error of a task group is raised as itself: users read the cause.

        Raises Stopped, and RuntimeError after `abandon`.
        """
        try:
            with asyncio.Runner() as runner:
                runner.get_loop().set_default_executor(_Threads(self))
                runner.get_loop().set_exception_handler(_report)
                return runner.run(self._run(work))
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from group

    async def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        try:
            return await work
        except asyncio.CancelledError:
            self.check()
            raise
        finally:
            self._loop = self._main = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is done within is finished before a first request ends the command. Raises Stopped at its end."""
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1
        if not self._num_held:
            self.check()

    async def unless_stopped(self, work: Awaitable[Result], by: Collection[int] = STOPS) -> Result:
        """The result of `work`, which these signals end at once although it is held. Raises Stopped when they do."""
        task = asyncio.ensure_future(work)
        self._waiting, self._given_up_by = task, by
        if self._number in by:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled() and self._number in by:
                self.check()
            raise
        finally:
            self._waiting = None

    def check(self) -> None:
        """Raises Stopped when the command was asked to end, and RuntimeError after `abandon`."""
        if self.lost:
            raise RuntimeError(self.lost)
        if self._number is not None:
            raise Stopped(self._number, at_once=self.at_once)

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for (SIGUSR1) since this was called before."""
        wanted, self._wants_save = self._wants_save, False
        return wanted

    def abandon(self, reason: str) -> None:
        """End the work that `run` does with this error, held or not; any thread may call it."""
        self.lost = reason
        self._cancel(self._main)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # Python calls this in the main thread between two steps of whatever runs there, torch's computation included.
        if number == signal.SIGUSR1:
            self._wants_save = self._saves
            if self._saves:
                _tell("a checkpoint is saved after the present step")
            return
        now = time.monotonic()
        if number == self._number and now - self._heard_at < ECHO_S:
            return
        is_second = self._number is not None and (self._number, number) != (signal.SIGINT, signal.SIGTERM)
        self._number, self._heard_at = number, now
        if is_second:
            self.at_once = True
            raise Stopped(number, at_once=True)
        if self._num_held:
            _tell("finishing what must not be cut off, then stopping; once more stops at once")
            if number in self._given_up_by:
                self._cancel(self._waiting)
        elif self._main is not None:
            self._cancel(self._main)
        else:
            raise Stopped(number)

    def _cancel(self, task: asyncio.Task[Any] | None) -> None:
        if self._loop is not None and task is not None:
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(task.cancel)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """As asyncio does, but for a signal that came while some task was at work: that the command was stopped is told."""
    if not isinstance(context.get("exception"), Stopped):
        loop.default_exception_handler(context)


class _Threads(ThreadPoolExecutor):
    """Threads for what blocks. Who asks a second time to end does not wait for them: one may hang, as a reward does."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__(thread_name_prefix="asyncio")
        self._stop = stop

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait and not self._stop.at_once, cancel_futures=cancel_futures)


def end_process(status: int) -> NoReturn:
    """End this process with the exit status of a command that a signal stopped, even if one of its threads hangs."""
    hang = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    if hang:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def keep_handlers() -> Iterator[None]:
    """For calls into libraries that set handlers of their own, such as Ray's for SIGTERM: puts back what was there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _tell(line: str) -> None:
    # Not print: the signal may have come in the middle of one.
    with suppress(OSError):
        os.write(2, f"dphrl: {line}\n".encode())
