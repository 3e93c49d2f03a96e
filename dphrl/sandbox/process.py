"""A child process that may hang, crash or be attacked by an item, at the cost of that item's result alone."""

from __future__ import annotations

import json
import logging
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum, auto

from dphrl.sandbox.launch import Zygote, ZygoteLostError, ZygoteStartError
from dphrl.sandbox.zygote import MAX_REPLY_BYTES, framed, take_frame
from dphrl.types import JsonDict, RewardStatus

# Items are written ahead of the replies, so that the worker need not wait for the parent between two items.
_WRITE_AHEAD_BYTES = 2**16
_READ_BYTES = 2**18

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker may use.

    memory_bytes: address space above what is mapped after its imports (RLIMIT_AS), so C code is bounded as well.
    cpu_s: CPU time of a worker (RLIMIT_CPU), a backstop behind the wall-clock deadline. A worker is replaced between
        two items once half of its memory or CPU time is used, so every item has at least the other half.
    num_files: open files, the worker's own handful included (RLIMIT_NOFILE).
    restricted: False lifts all of these, and leaves environment, files and network as they are. It is for code that
        the user wrote, which only has to be killable.
    """

    memory_bytes: int = 2**30
    cpu_s: int = 600
    num_files: int = 32
    restricted: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item: the handler's value, or why there is none.

    failure: TIMEOUT, RESOURCE_LIMIT or INFRASTRUCTURE_ERROR when `value` is None. detail: one short line.
    """

    value: JsonDict | None
    failure: RewardStatus | None = None
    detail: str = ""


class _Ending(Enum):
    """Why an exchange with a worker ended."""

    DONE = auto()
    RETIRED = auto()
    TIMEOUT = auto()
    DIED = auto()


class Sandbox:
    """Runs a handler on items in a child process with limits; whatever one item does there, the others get theirs.

    factory: "package.module:function". The child imports it and calls `function(settings)` once; what that returns,
    `Callable[[JsonDict], JsonDict]`, is the handler of every item. Each worker is a fork of the process that made this
    call, so the call must not open a connection or a file that items use, and must not start a thread. `settings`,
    items and values are JSON; nothing that the child says is ever unpickled.

    Covered, one test each: a handler past its deadline, inside C code that ignores signals too (killed); one that ends
    its process or crashes it (tried once more alone); memory in Python and C; CPU time; writing, creating, renaming and
    deleting files; the network; processes, threads and programs; signals to others; raising the limits again; the
    environment, which is empty; nonsense or gigabytes for a reply; the death of this process, which takes the
    children with it.
    Not covered: reading files that the user may read. A handler that lets an item execute code of its choosing can
    forge the values of that worker's later items. Without the system-call filter (an architecture other than x86_64
    and aarch64, or a kernel that refuses it; a warning says so) only memory, CPU time, the size of written files and
    the environment are limited. `Limits(restricted=False)` covers deadlines and deaths alone; processes that such
    code started are killed with it unless they left its process group.

    Linux only. Any thread may call; one `run` at a time, others wait. Not usable in a fork of this process.
    """

    def __init__(self, factory: str, settings: JsonDict, limits: Limits = Limits()) -> None:
        """Start the child and wait for its imports. Raises ValueError on a platform other than Linux or for a bad
        `factory`, RuntimeError with the child's error when it cannot start."""
        if sys.platform != "linux":
            raise ValueError(f"the sandbox needs Linux and this is {sys.platform}; grade on a Linux machine")
        if not all(factory.partition(":")):
            raise ValueError(f"factory={factory!r} is not of the form 'package.module:function'")
        self._recipe = factory, settings, asdict(limits)
        self._lock = threading.Lock()
        self._zygote: Zygote | None = Zygote(*self._recipe)
        self._worker: socket.socket | None = None
        self._closed = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, items: Sequence[JsonDict], deadline_s: float) -> list[Outcome]:
        """One outcome per item, in order. Each may take `deadline_s` of wall-clock time, counted from the reply
        before it. Raises RuntimeError after `close`."""
        with self._lock:
            try:
                return self._run(items, deadline_s)
            except BaseException:
                # Replies to this batch may still come; the next batch must not read them.
                self._stop()
                raise

    def close(self) -> None:
        """End the child; harmless when done twice. A `run` of another thread raises RuntimeError."""
        self._closed = True
        if (zygote := self._zygote) is not None:
            zygote.kill()  # an item may take as long as its deadline lets it
        with self._lock:
            self._stop()

    def _run(self, items: Sequence[JsonDict], deadline_s: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        num_deaths = num_losses = 0
        while (num_before := len(outcomes)) < len(items):
            # When a worker died, the first item without an outcome is tried once more, alone in a fresh worker.
            end = num_before + 1 if num_deaths else len(items)
            try:
                ending = self._exchange(items[num_before:end], deadline_s, outcomes)
                # This raises if the worker died because the zygote died, which is not the item's fault.
                cause = "" if ending is _Ending.DONE else self._end_worker()
            except (ZygoteLostError, ZygoteStartError) as loss:
                self._stop()
                failure = Outcome(None, RewardStatus.INFRASTRUCTURE_ERROR, str(loss))
                num_losses = num_losses + 1 if len(outcomes) == num_before else 1
                num_deaths = 0
                if isinstance(loss, ZygoteStartError):
                    # The zygote will not start for the next item either.
                    outcomes += [failure] * (len(items) - len(outcomes))
                elif num_losses == 2:
                    outcomes.append(failure)
                    num_losses = 0
                continue
            num_losses = 0
            if ending is not _Ending.DIED:
                num_deaths = 0
            elif num_deaths and len(outcomes) == num_before:
                outcomes.append(Outcome(None, RewardStatus.RESOURCE_LIMIT, f"its process died: {cause}"))
                num_deaths = 0
            else:
                num_deaths = 1
            if ending is _Ending.TIMEOUT:
                outcomes.append(Outcome(None, RewardStatus.TIMEOUT, f"no result after {deadline_s:g} s"))
        return outcomes

    def _exchange(self, items: Sequence[JsonDict], deadline_s: float, outcomes: list[Outcome]) -> _Ending:
        """Send items and append their outcomes until all are there or the worker cannot go on."""
        worker = self._connection()
        outbox, inbox = bytearray(), bytearray()
        num_sent, num_before = 0, len(outcomes)
        poll = select.poll()
        deadline = time.monotonic() + deadline_s
        while (num_received := len(outcomes) - num_before) < len(items):
            while num_sent < len(items) and len(outbox) < _WRITE_AHEAD_BYTES:
                outbox += framed(json.dumps({"index": num_sent, "item": items[num_sent]}).encode())
                num_sent += 1
            poll.register(worker, select.POLLIN | (select.POLLOUT if outbox else 0))
            events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            event = events[0][1] if events else 0
            if event & select.POLLOUT:
                # If the worker is gone, this is noticed when its replies are read.
                with suppress(OSError):
                    del outbox[: worker.send(outbox, socket.MSG_NOSIGNAL)]
            if event & ~select.POLLOUT:
                try:
                    if not (chunk := worker.recv(_READ_BYTES)):
                        return _Ending.DIED
                    inbox += chunk
                    if _take_replies(inbox, outcomes, num_before, num_sent):
                        return _Ending.RETIRED
                except (OSError, ValueError, RecursionError) as error:
                    _log.debug("a worker is given up: %s", error)
                    return _Ending.DIED
            # Bytes that complete no reply do not extend the time.
            if len(outcomes) - num_before > num_received:
                deadline = time.monotonic() + deadline_s
            elif time.monotonic() >= deadline:
                return _Ending.TIMEOUT
        return _Ending.DONE

    def _connection(self) -> socket.socket:
        if self._zygote is None:
            self._zygote = Zygote(*self._recipe)
        if self._closed:
            raise RuntimeError("the sandbox is closed; make another")
        if self._worker is None:
            self._worker = self._zygote.fork()
        return self._worker

    def _end_worker(self) -> str:
        assert self._zygote is not None
        assert self._worker is not None
        try:
            return self._zygote.end_worker()
        finally:
            self._worker.close()
            self._worker = None

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._zygote is not None:
            self._zygote.stop()
            self._zygote = None


def _take_replies(inbox: bytearray, outcomes: list[Outcome], num_before: int, num_sent: int) -> bool:
    """Move whole replies from `inbox` to `outcomes`. Returns whether the worker wants to be replaced. Raises ValueError
    for anything that is no reply to the next item: a frame too long, no JSON, another index, other types."""
    while (frame := take_frame(inbox, MAX_REPLY_BYTES)) is not None:
        reply = json.loads(frame)
        index = len(outcomes) - num_before
        if not isinstance(reply, dict) or reply.get("index") != index or index >= num_sent:
            raise ValueError("a reply to another item")
        value, failure, detail = reply.get("value"), reply.get("failure"), reply.get("detail", "")
        if not isinstance(value, dict) and not (isinstance(failure, str) and isinstance(detail, str)):
            raise ValueError("a reply of another form")
        outcomes.append(Outcome(value, None) if failure is None else Outcome(None, RewardStatus(failure), detail))
        if reply.get("retire"):
            return True
    return False
