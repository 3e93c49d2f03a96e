"""What an engine that was killed while it started leaves on its machine: shared memory that still has a name.

A running engine has none: see `forget_names_of_shared_memory`. While one starts, the names are kept in the run's
folder, so that the run's next engine on that machine can remove what the one before could not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actors.engine_processes import SHARED_MEMORY, _mapped_files, names_of_shared_memory, remove_orphans
from dphrl.durable import write_whole
from dphrl.owner import boot_id, process_start

FOLDER = ".starting"
INTERVAL_S = 0.5


@contextmanager
def remembering_shared_memory(run_folder: Path) -> Iterator[None]:
    """For the start of an engine: first remove what a killed one of this run left on this machine, then keep the names
    of this one's until the start has ended."""
    folder = run_folder / FOLDER
    remove_remembered(folder)
    record = folder / f"{boot_id()}-{os.getpid()}.json"
    done = threading.Event()
    keeping = threading.Thread(target=_keep, args=(record, done), name="leftovers", daemon=True)
    keeping.start()
    try:
        yield
    finally:
        done.set()
        keeping.join()
        record.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def remove_remembered(folder: Path) -> list[str]:
    """Remove the shared memory that engines of this machine had which have ended; returns the names.

    Only what they themselves mapped, what belongs to this user, and what no process has mapped any more.
    """
    removed = []
    for record in folder.glob(f"{boot_id()}-*.json"):
        try:
            told = json.loads(record.read_text())
            if process_start(int(told["pid"])) == told["started"]:
                continue
            of_others = names_of_shared_memory().difference(told["names"])
            removed += remove_orphans(before=of_others)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # cut off, or gone
        record.unlink(missing_ok=True)
    return sorted(removed)


def _keep(record: Path, done: threading.Event) -> None:
    known: set[str] = set()
    while not done.wait(INTERVAL_S):
        with suppress(OSError):  # the run's folder may be out of reach for a moment
            names = known | _own_names()
            if names != known:
                told = {"pid": os.getpid(), "started": process_start(os.getpid()), "names": sorted(names)}
                write_whole(record, json.dumps(told))
                known = names


def _own_names() -> set[str]:
    """Names of the shared memory that this process and its children have mapped."""
    mapped: set[int] = set()
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with suppress(OSError):  # it may just have ended
            mapped |= _mapped_files(process)
    names = set()
    for name in names_of_shared_memory():
        with suppress(OSError):
            if (SHARED_MEMORY / name).stat().st_ino in mapped:
                names.add(name)
    return names
