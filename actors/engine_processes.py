"""What one engine is to the system: its worker processes, and the names of what they share."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

from dphrl.scratch import remove_left_folders, scratch_folder

log = logging.getLogger(__name__)

# What an engine's last words get to reach those who wait for it.
LAST_WORDS_S = 0.5
# What the processes of a run that has ended get to end as well.
ENDING_S = 5.0
SHARED_MEMORY = Path("/dev/shm")
# What Python's multiprocessing and vLLM call theirs. Ray's object store is mapped here too, and must keep its name.
PATTERNS = ("psm_*", "sem.mp-*", "vllm_dist_*")
# vLLM's sockets lie in the folder for temporary files, each under a UUID.
MAX_SOCKET_PATH, SOCKET_NAME_CHARS = 107, 37
SOCKET_NAME = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def scratch_of_engines(run_folder: Path) -> str:
    """The kind of scratch folder that the engines of a run have."""
    return f"engine-{hashlib.blake2b(str(run_folder.absolute()).encode(), digest_size=4).hexdigest()}"


def keep_temporary_files_together(run_folder: Path) -> None:
    """From now on, what this process writes as temporary files lies in a folder that goes with the process.

    vLLM leaves a file for each engine that is killed, and sockets for one that is killed while it starts.
    """
    from torch._inductor.runtime import cache_dir_utils

    # But what torch has compiled shall be found again: this fixes its cache where it is.
    cache_dir_utils.cache_dir()
    folder = str(scratch_folder(scratch_of_engines(run_folder)))
    # For the engine's own processes too. The kernel takes no longer path for a socket; where TMPDIR is long, they stay
    # in it.
    fits = len(folder) + SOCKET_NAME_CHARS <= MAX_SOCKET_PATH
    os.environ.setdefault("VLLM_RPC_BASE_PATH", folder if fits else tempfile.gettempdir())
    tempfile.tempdir = folder


def remove_files_of_ended_engines(run_folder: Path) -> None:
    """To be called when all engines of a run are ended: one that was still starting could not remove its files, and its
    end takes a moment."""
    remove_left_folders(of=scratch_of_engines(run_folder), patience_s=ENDING_S)


def forget_names_of_shared_memory() -> list[str]:
    """Remove the names of the shared memory that this process and its children use; returns them.

    Memory without a name is freed when the last process that uses it ends, in whatever way that happens. With its name
    it would stay behind when an engine is killed, which is how Ray ends actors. Call it once all processes have what
    they share.
    """
    mapped: set[int] = set()
    for process in _own_processes():
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


def forget_names_of_sockets() -> list[str]:
    """Remove the names of vLLM's sockets between this process and its children; returns them.

    Those who are connected stay so, and nobody else is to come. A killed engine would leave the names behind.
    """
    opened: set[str] = set()
    for file in (file for process in _own_processes() for file in Path("/proc").glob(f"{process}/fd/*")):
        with suppress(OSError):  # it may just have been closed
            opened.add(os.readlink(file))
    forgotten, folder = [], Path(os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir())
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        inode, path = [*line.split(), ""][6:8]  # most have no path
        if f"socket:[{inode}]" in opened and Path(path).parent == folder and SOCKET_NAME.fullmatch(Path(path).name):
            with suppress(FileNotFoundError):  # both ends of a connection have the path
                os.unlink(path)
                forgotten.append(path)
    return sorted(forgotten)


def _own_processes() -> list[int | None]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]


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


def end_with_any_worker(tell: Callable[[Exception], None]) -> None:
    """From now on, end this process as soon as one of its worker processes ends; `tell` gets the reason first.

    vLLM's executor may wait in a collective for a worker that is dead, and say nothing for as long as that takes. The
    other workers end with this process.
    """
    workers = multiprocessing.active_children()

    def watch() -> None:
        connection.wait([worker.sentinel for worker in workers])
        time.sleep(0.05)  # until its exit code can be read
        gone = ", ".join(f"{worker.pid} {_end_of(worker.exitcode)}" for worker in workers if not worker.is_alive())
        error = RuntimeError(f"the engine's worker process {gone}")
        log.error("%s; the engine ends too", error)
        tell(error)
        time.sleep(LAST_WORDS_S)
        os._exit(1)

    if workers:
        threading.Thread(target=watch, name="workers", daemon=True).start()


def _end_of(exit_code: int | None) -> str:
    return f"was ended by signal {-exit_code}" if exit_code is not None and exit_code < 0 else "ended"


def _mapped_files(process: int | str | None) -> set[int]:
    """The inodes of files in shared memory that a process has mapped."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if f"{SHARED_MEMORY}/" in line}
