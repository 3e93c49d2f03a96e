"""Folders for temporary files that do not outlive their process for long, in whatever way it ends.

The folder's name says whose it is: the namespace of process ids, the process and when it started. A killed process
leaves its folder behind, and the next one of dphrl on that machine removes it.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from dphrl.owner import process_start

# Read once: an engine makes its scratch folder the place of all its other temporary files.
PLACE = Path(tempfile.gettempdir())
POLL_S = 0.1
_NAME = re.compile(r"dphrl-(?P<what>[a-z0-9-]+)-(?P<namespace>\d+)-(?P<pid>\d+)-(?P<started>\d+)")


def scratch_folder(what: str) -> Path:
    """This process's folder for temporary files of a kind (small letters, digits and hyphens), private to its user;
    made at the first call.

    It is removed when the process ends by itself. Folders of processes that were killed are removed now.
    """
    remove_left_folders()
    folder = PLACE / f"dphrl-{what}-{_namespace()}-{os.getpid()}-{process_start(os.getpid())}"
    if not folder.exists():
        folder.mkdir(mode=0o700)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def remove_left_folders(*, patience_s: float = 0.0, of: str = "") -> list[str]:
    """Remove the scratch folders of this user's processes that have ended; returns their names.

    patience_s: how long processes whose folders are of this kind may take to end. Processes of another container on
    this machine have another namespace; of these nobody here knows.
    """
    removed, deadline = [], time.monotonic() + patience_s
    while True:
        found = [(folder, match) for folder in PLACE.glob("dphrl-*") if (match := _NAME.fullmatch(folder.name))]
        mine = [(folder, match) for folder, match in found if int(match["namespace"]) == _namespace()]
        at_work = [match for _, match in mine if process_start(int(match["pid"])) == int(match["started"])]
        for folder, match in mine:
            if match not in at_work and _is_own(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        if of not in [match["what"] for match in at_work] or time.monotonic() >= deadline:
            return sorted(removed)
        time.sleep(POLL_S)


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _is_own(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not folder.is_symlink()
