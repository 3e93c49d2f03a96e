"""What one engine leaves to the system: the shared memory of its worker processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
# What Python's multiprocessing and vLLM call theirs. Ray's object store is mapped here too, and must keep its name.
PATTERNS = ("psm_*", "sem.mp-*", "vllm_dist_*")


def forget_names_of_shared_memory() -> list[str]:
    """Remove the names of the shared memory that this process and its children use; returns them.

    Memory without a name is freed when the last process that uses it ends, in whatever way that happens. With its name
    it would stay behind when an engine is killed, which is how Ray ends actors. Call it once all processes have what
    they share.
    """
    mapped: set[int] = set()
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with suppress(OSError):  # it may just have ended
            mapped |= _mapped_files(process)
    forgotten = []
    for path in (path for pattern in PATTERNS for path in SHARED_MEMORY.glob(pattern)):
        # The name that a process sees is not always that of the file: a semaphore is mapped before it gets its own.
        with suppress(FileNotFoundError):
            if path.stat().st_ino in mapped:
                path.unlink()
                forgotten.append(path.name)
    return sorted(forgotten)


def names_of_shared_memory() -> set[str]:
    """Those of Python's and vLLM's shared memory that are there now, whosever they are."""
    return {path.name for pattern in PATTERNS for path in SHARED_MEMORY.glob(pattern)}


def remove_orphans(before: Collection[str]) -> list[str]:
    """Remove the names of shared memory that nobody uses any more and that were not there `before`; returns them.

    A worker process that died while the engine started leaves such. Memory that any process has mapped, and that of
    other users, is left alone.
    """
    mapped: set[int] = set()
    for process in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        with suppress(OSError):  # of another user, or it has just ended
            mapped |= _mapped_files(process)
    removed = []
    for path in (SHARED_MEMORY / name for name in names_of_shared_memory().difference(before)):
        with suppress(FileNotFoundError):
            found = path.stat()
            if found.st_ino not in mapped and found.st_uid == os.getuid():
                path.unlink()
                removed.append(path.name)
    return sorted(removed)


def _mapped_files(process: int | str | None) -> set[int]:
    """The inodes of files in shared memory that a process has mapped."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if f"{SHARED_MEMORY}/" in line}
