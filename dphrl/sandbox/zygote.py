"""The child's side of `Sandbox`: imports once, then forks a limited worker whenever the parent asks for one.

There are two processes. The *zygote* holds the handler and obeys the parent over a control socket (one byte a command);
it never sees an item. The *worker* is its fork: it gives up what it could do harm with, then answers items over its own
socket. The zygote also ends the worker: a child that has not been waited for keeps its process id, so the signal cannot
hit another process. Each of the two dies when its parent dies.

This module imports only the standard library, because what is loaded here is loaded in every worker.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dphrl.sandbox import seccomp

JsonDict = dict[str, Any]
Handler = Callable[[JsonDict], JsonDict]

FORK, END = b"F", b"E"
FRAME_HEADER = struct.Struct(">I")
MAX_REPLY_BYTES = 16 * 2**20
MAX_DETAIL_CHARS = 300
RESOURCE_LIMIT, INFRASTRUCTURE_ERROR = "resource_limit", "infrastructure_error"
# How often the zygote checks that its parent still lives; a fork of the parent may keep the socket open.
_PARENT_CHECK_S = 5.0
_READ_BYTES = 2**16
_STATM = "/proc/self/statm"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def main(control_fd: int, options: JsonDict) -> None:
    """Serve the parent until it closes the control socket or dies. options: as `launch.Zygote` makes them."""
    # An ignored SIGCHLD is inherited from the parent, and would let the kernel reuse a worker's number at once.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # An import that hangs must not outlive a parent that is gone.
    signal.alarm(int(options["start_s"]))
    control = socket.socket(fileno=control_fd)
    try:
        module, _, name = options["factory"].partition(":")
        handler = getattr(importlib.import_module(module), name)(options["settings"])
        if options["limits"]["restricted"] and not (missing := seccomp.unsupported()):
            missing = _filter_works()
    except BaseException as error:
        control.send(json.dumps({"error": _describe(error)}).encode())
        return
    signal.alarm(0)
    control.send(json.dumps({"missing": missing if options["limits"]["restricted"] else ""}).encode())
    # The garbage collector leaves alone all objects that exist now, so that workers share their memory pages.
    gc.collect()
    gc.freeze()
    _silence(error_too=options["limits"]["restricted"])
    _serve_parent(control, handler, options["limits"])


def _serve_parent(control: socket.socket, handler: Handler, limits: JsonDict) -> None:
    parent, worker = os.getppid(), 0
    while os.getppid() == parent:
        if not select.select([control], [], [], _PARENT_CHECK_S)[0]:
            continue
        command = control.recv(1)
        if command not in (FORK, END):
            break
        cause, worker = _end(worker), 0
        if command == END:
            control.send(json.dumps({"cause": cause}).encode())
            continue
        ours, theirs = socket.socketpair()
        worker = os.fork()
        if worker == 0:
            control.close()
            theirs.close()
            _work(ours, handler, limits)
        ours.close()
        socket.send_fds(control, [b"{}"], [theirs.fileno()])
        theirs.close()
    _end(worker)


def _end(worker: int) -> str:
    """Kill the worker and what it started, wait for it, and say how it died ("" when there was no worker)."""
    if not worker:
        return ""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(worker, signal.SIGKILL)
    status = os.waitpid(worker, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit status {os.WEXITSTATUS(status)}"


def _work(connection: socket.socket, handler: Handler, limits: JsonDict) -> None:
    """Run as the worker; this never returns into the zygote's code."""
    try:
        # The worker first says whether it could limit itself. If it dies later, an item has caused that.
        _write(connection.fileno(), json.dumps({"error": _prepare(limits)}).encode())
        _answer(connection.fileno(), handler, limits)
    finally:
        os._exit(1)


def _prepare(limits: JsonDict) -> str:
    """Limit this worker. Returns what went wrong, "" if nothing did."""
    try:
        zygote = os.getppid()
        os.setpgid(0, 0)
        die_with_parent(zygote)
        if limits["restricted"]:
            _give_up(limits)
    except OSError as error:
        return _describe(error)
    return ""


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread ends that started it, in the process `parent`."""
    _prctl(_PR_SET_PDEATHSIG, number)
    # It may have ended before the kernel was told.
    if os.getppid() != parent:
        os._exit(1)


def _give_up(limits: JsonDict) -> None:
    """Give up for good what a handler does not need. The memory limit is on top of what is mapped already."""
    os.environ.clear()
    os.chdir("/")
    statm = os.open(_STATM, os.O_RDONLY)
    mapped = _mapped_bytes(statm)
    os.close(statm)
    for limit, value in (
        (resource.RLIMIT_AS, mapped + limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_NOFILE, limits["num_files"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    _prctl(_PR_SET_DUMPABLE, 0)
    if not seccomp.unsupported():
        seccomp.install()


def _mapped_bytes(statm: int) -> int:
    return int(os.pread(statm, 100, 0).split()[0]) * resource.getpagesize()


def _filter_works() -> str:
    """Try the filter in a process of its own. Returns why the kernel refuses it, "" if it does not."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            seccomp.install()
        except OSError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    refusal = os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(child, 0)
    return refusal


def _answer(connection: int, handler: Handler, limits: JsonDict) -> None:
    """Read framed items, write one framed reply for each, until the parent closes."""
    buffer = bytearray()
    # The file stays open, because a handler may use up the files that the worker may open.
    statm = os.open(_STATM, os.O_RDONLY)
    mapped_at_start = _mapped_bytes(statm)
    while True:
        while (frame := take_frame(buffer)) is None:
            chunk = os.read(connection, _READ_BYTES)
            if not chunk:
                return
            buffer += chunk
        request = json.loads(frame)
        del frame
        reply = _reply(handler, request)
        # Each item must find half of the limits unused. What earlier items left behind goes away with the worker.
        if limits["restricted"] and (
            time.process_time() > limits["cpu_s"] / 2
            or _mapped_bytes(statm) - mapped_at_start > limits["memory_bytes"] / 2
        ):
            reply["retire"] = True
        _write(connection, _encoded(request["index"], reply))


def _reply(handler: Handler, request: JsonDict) -> JsonDict:
    try:
        return {"value": handler(request["item"])}
    except MemoryError:
        # What is left of the memory is fragmented, so a later item could fail because of this one.
        return {"failure": RESOURCE_LIMIT, "detail": "MemoryError", "retire": True}
    except RecursionError:
        return {"failure": RESOURCE_LIMIT, "detail": "RecursionError"}
    except Exception as error:
        return {"failure": INFRASTRUCTURE_ERROR, "detail": _describe(error)}


def _encoded(index: int, reply: JsonDict) -> bytes:
    try:
        encoded = json.dumps({"index": index, **reply}).encode()
        if len(encoded) <= MAX_REPLY_BYTES:
            return encoded
        failure = RESOURCE_LIMIT, f"a reply of {len(encoded)} bytes"
    except MemoryError:
        failure = RESOURCE_LIMIT, "MemoryError"
    except Exception as error:
        failure = INFRASTRUCTURE_ERROR, f"the reply is not JSON: {_describe(error)}"
    return json.dumps({"index": index, "failure": failure[0], "detail": failure[1]}).encode()


def take_frame(buffer: bytearray, max_bytes: int | None = None) -> bytes | None:
    """Take the first frame from `buffer`; None while it is incomplete. Raises ValueError for one above `max_bytes`."""
    if len(buffer) < FRAME_HEADER.size:
        return None
    (length,) = FRAME_HEADER.unpack_from(buffer)
    if max_bytes is not None and length > max_bytes:
        raise ValueError(f"a frame of {length} bytes")
    end = FRAME_HEADER.size + length
    if len(buffer) < end:
        return None
    frame = bytes(buffer[FRAME_HEADER.size : end])
    del buffer[:end]
    return frame


def framed(payload: bytes) -> bytes:
    """The payload with its length before it, as `take_frame` reads it."""
    return FRAME_HEADER.pack(len(payload)) + payload


def _write(connection: int, payload: bytes) -> None:
    rest = memoryview(framed(payload))
    while rest:
        rest = rest[os.write(connection, rest) :]


def _silence(error_too: bool) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2) if error_too else (0,):
        os.dup2(null, standard)
    os.close(null)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _describe(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:MAX_DETAIL_CHARS]
