"""Handlers for the sandbox's tests: each item names what its handler tries. Imported by the child process."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dphrl.sandbox import zygote

JsonDict = dict[str, Any]


def make(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    def handle(item: JsonDict) -> JsonDict:
        return {"said": _ACTIONS[item["do"]](item)}

    return handle


def make_nothing(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    raise OSError("no licence\nfor this")


def make_slow_grader(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    """Calls every answer wrong; one about "s+l+o+w" takes a minute, one about "d+i+e" ends the process."""

    def handle(item: JsonDict) -> JsonDict:
        if "s+l+o+w" in item["answer"]:
            time.sleep(60)
        if "d+i+e" in item["answer"]:
            os._exit(1)
        return {"status": "wrong", "detail": ""}

    return handle


def _echo(item: JsonDict) -> Any:
    return item.get("text", "")


def _sleep(item: JsonDict) -> str:
    time.sleep(item["s"])
    return "awake"


def _spin_in_c(item: JsonDict) -> int:
    """One C call that holds the interpreter: no Python signal handler would ever run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return len(str((1 << 200_000_000) ** 3))


def _burn_cpu(item: JsonDict) -> str:
    end = time.process_time() + item["s"]
    while time.process_time() < end:
        pass
    return "burnt"


def _segfault(item: JsonDict) -> str:
    return ctypes.string_at(0).decode()


def _exit(item: JsonDict) -> None:
    os._exit(0)


def _system_exit(item: JsonDict) -> None:
    sys.exit(0)


def _die_once(item: JsonDict) -> str:
    """Dies unless it is alone in its worker: the state that kills it was left by another item."""
    if _spoiled:
        os._exit(3)
    return "alive"


_spoiled: list[bool] = []


def _spoil(item: JsonDict) -> str:
    _spoiled.append(True)
    return "spoilt"


def _fill_python_memory(item: JsonDict) -> int:
    return len([bytes(2**20) for _ in range(2**14)])


def _fill_c_memory(item: JsonDict) -> int:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    num_blocks = 0
    while block := libc.malloc(ctypes.c_size_t(2**24)):
        ctypes.memset(block, 1, 2**24)
        num_blocks += 1
    return num_blocks


def _recurse(item: JsonDict) -> Any:
    return _recurse(item)


def _raise(item: JsonDict) -> None:
    raise KeyError("x" * 5_000 + "\nsecond line")


def _unserialisable(item: JsonDict) -> set[int]:
    return {1}


def _huge_reply(item: JsonDict) -> str:
    return "x" * (zygote.MAX_REPLY_BYTES + 1)


def _worker_socket() -> int:
    return next(fd for fd in range(3, 64) if _is_socket(fd))


def _is_socket(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return False


def _write_raw(item: JsonDict) -> str:
    payload = item["text"].encode("latin-1")
    os.write(_worker_socket(), zygote.framed(payload) if item["framed"] else payload)
    time.sleep(item.get("s", 0))
    return "said"


def _refused(attempt: Callable[[], Any]) -> str:
    """ "" when the attempt succeeds, else the kind of error."""
    try:
        attempt()
    except OSError as error:
        return type(error).__name__
    return ""


def _files(item: JsonDict) -> JsonDict:
    folder, victim = item["folder"], item["victim"]
    return {
        "write": _refused(lambda: open(f"{folder}/new", "w").write("x")),
        "create": _refused(lambda: os.open(f"{folder}/new", os.O_CREAT)),
        "append": _refused(lambda: open(victim, "a").write("x")),
        "truncate": _refused(lambda: os.truncate(victim, 0)),
        "unlink": _refused(lambda: os.unlink(victim)),
        "rename": _refused(lambda: os.rename(victim, f"{folder}/new")),
        "mkdir": _refused(lambda: os.mkdir(f"{folder}/new")),
        "symlink": _refused(lambda: os.symlink("/", f"{folder}/new")),
        "chmod": _refused(lambda: os.chmod(victim, 0)),
        "memfd": _refused(lambda: os.memfd_create("new")),
    }


def _network(item: JsonDict) -> JsonDict:
    return {
        "tcp": _refused(lambda: socket.create_connection(("127.0.0.1", item["port"]), 5)),
        "unix": _refused(lambda: socket.socket(socket.AF_UNIX)),
        "pair": _refused(socket.socketpair),
    }


def _processes(item: JsonDict) -> JsonDict:
    def thread() -> None:
        try:
            threading.Thread(target=time.sleep, args=(60,)).start()
        except RuntimeError as error:
            raise OSError from error

    return {
        "fork": _refused(os.fork),
        "program": _refused(lambda: subprocess.run(["true"])),
        "exec": _refused(lambda: os.execv("/bin/true", ["true"])),
        "thread": _refused(thread),
    }


def _others(item: JsonDict) -> JsonDict:
    return {
        "kill parent": _refused(lambda: os.kill(item["pid"], signal.SIGKILL)),
        "kill zygote": _refused(lambda: os.kill(os.getppid(), signal.SIGKILL)),
        "pidfd": _refused(lambda: os.pidfd_open(os.getppid())),
        "ptrace": str(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)),
        "memory": _refused(lambda: open(f"/proc/{os.getppid()}/mem", "r+b")),
    }


def _meddling(item: JsonDict) -> dict[str, int]:
    """The system's number for each refusal, 0 for what worked; all of it would change nothing if it did."""
    parent = item["pid"]
    priority, processors = item["priority"], item["processors"]
    pipe = os.pipe()[0]
    ioctl_owner = ctypes.byref(ctypes.c_int(parent))
    return {
        "kill": _number(lambda: os.kill(parent, 0)),
        "killpg": _number(lambda: os.killpg(os.getpgid(parent), 0)),
        "tkill": _number_of_call(200 if item["machine"] == "x86_64" else 130, parent, 0),
        "setpriority": _number(lambda: os.setpriority(os.PRIO_PROCESS, parent, priority)),
        "affinity": _number(lambda: os.sched_setaffinity(parent, processors)),
        "scheduler": _number(lambda: os.sched_setscheduler(parent, os.SCHED_OTHER, os.sched_param(0))),
        "param": _number(lambda: os.sched_setparam(parent, os.sched_param(0))),
        "prlimit": _number(lambda: resource.prlimit(parent, resource.RLIMIT_CORE, tuple(item["core"]))),
        "owner": _number(lambda: fcntl.fcntl(pipe, fcntl.F_SETOWN, parent)),
        "signal": _number(lambda: fcntl.fcntl(pipe, 10, 0)),
        "ioctl owner": _number_of_call(16 if item["machine"] == "x86_64" else 29, pipe, 0x8901, ioctl_owner),
        "shared memory": _number_of_call(30 if item["machine"] == "x86_64" else 196, 0, 0, 0),
    }


def _number(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


def _number_of_call(*arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syscall(*arguments) == -1 else 0


def _limits(item: JsonDict) -> JsonDict:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    names = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE")
    refused = {}
    for name in names:
        try:
            resource.setrlimit(getattr(resource, name), unlimited)
            refused[name] = ""
        except (OSError, ValueError) as error:
            refused[name] = type(error).__name__
    return {
        "refused": refused,
        "values": {name: resource.getrlimit(getattr(resource, name)) for name in names},
        "prctl": ctypes.CDLL(None).prctl(1, 0, 0, 0, 0),
        "files": _refused(lambda: [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]),
    }


def _environment(item: JsonDict) -> JsonDict:
    with open("/proc/self/environ", "rb") as environ:
        initial = environ.read().decode()
    return {"environ": dict(os.environ), "initial": initial, "stdin": sys.stdin.read(), "cwd": os.getcwd()}


def _free_child(item: JsonDict) -> int:
    """What unrestricted code may do: start a program that goes on by itself."""
    return subprocess.Popen(["sleep", "60"]).pid


def _pid(item: JsonDict) -> int:
    return os.getpid()


_ACTIONS: dict[str, Callable[[JsonDict], Any]] = {
    "echo": _echo,
    "sleep": _sleep,
    "spin in C": _spin_in_c,
    "burn CPU": _burn_cpu,
    "segfault": _segfault,
    "exit": _exit,
    "sys.exit": _system_exit,
    "die once": _die_once,
    "spoil": _spoil,
    "fill Python memory": _fill_python_memory,
    "fill C memory": _fill_c_memory,
    "recurse": _recurse,
    "raise": _raise,
    "unserialisable": _unserialisable,
    "huge reply": _huge_reply,
    "write raw": _write_raw,
    "files": _files,
    "network": _network,
    "processes": _processes,
    "others": _others,
    "meddling": _meddling,
    "limits": _limits,
    "environment": _environment,
    "free child": _free_child,
    "pid": _pid,
}
