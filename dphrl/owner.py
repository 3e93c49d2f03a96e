"""A folder that one process writes has one owner at a time, and says who that is.

The owner holds a lock on the folder's file `.owner`, which the kernel frees however the process ends. Locks may not
reach other machines that share the folder, so the owner also renews the file's time: an owner on another machine that
was silent for long has gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dphrl.config.loading import InputError
from dphrl.durable import place_aside, remove_leftovers

OWNER_FILE = ".owner"
HEARTBEAT_S = 20.0
SILENT_S = 180.0
_READ_BYTES = 2**16
# What tells that a folder holds a run.
DELETED_LAST = ("metrics.jsonl", "config.yaml")


@dataclass(frozen=True)
class Claim:
    """Who owns a folder. boot: of the machine's kernel, another one after a reboot. started: the process's start in
    clock ticks after that, which tells it from a later process with the same number. since: UTC."""

    host: str
    pid: int
    boot: str
    started: int
    since: str
    command: str

    @classmethod
    def of_this_process(cls) -> Claim:
        program = Path(sys.argv[0]).name
        command = shlex.join(["dphrl" if program in ("__main__.py", "-c") else program, *sys.argv[1:]])
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(socket.gethostname(), os.getpid(), boot_id(), process_start(os.getpid()) or 0, since, command[:500])

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


class Owner:
    """A folder that this process owns. note: a line that says whom it was taken over from; "" for nobody."""

    def __init__(self, folder: Path, note: str) -> None:
        self.folder, self.note = folder, note

    def tell(self, say: Callable[[str], None]) -> None:
        """Say whom the folder was taken over from, if it was."""
        if self.note:
            say(self.note)

    def remove_leftovers(self) -> None:
        """Remove what killed writers left half-written; for when it is sure that the folder is a run's, or will be."""
        remove_leftovers(self.folder)

    def empty_folder(self) -> None:
        """Delete all that the folder holds, but stay its owner. Broken off anywhere, it leaves what still counts as a
        run, with all checkpoints or none. Raises InputError when something cannot be deleted."""
        path = checkpoints = self.folder / "checkpoints"  # in one rename: some of them would count as all
        try:
            if checkpoints.exists():
                os.replace(checkpoints, place_aside(checkpoints))
            names = {path.name for path in self.folder.iterdir()} - {OWNER_FILE, *DELETED_LAST}
            for path in (self.folder / name for name in (*sorted(names), *DELETED_LAST)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"{error.filename or path}: cannot be deleted ({reason}); delete it, then try again"
            ) from None


@contextmanager
def owned(folder: Path, on_loss: Callable[[str], None] = lambda reason: None) -> Iterator[Owner]:
    """Own `folder`, which is made. At the end it is free, and if nothing is in it deleted, with what was made above it.

    on_loss: called from a thread, with a line, when a process on another machine took the folder over, because this one
    was not heard of for long. Raises InputError, which says who owns the folder, when somebody does, or when it cannot
    be written.
    """
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        file, note, claim = _hold(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another run_dir, or an output elsewhere"
        ) from None
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(folder, file, claim, done, on_loss), name="owner", daemon=True)
    beating.start()
    try:
        yield Owner(folder, note)
    finally:
        done.set()
        beating.join()
        if _read(file) == claim:
            # Before the lock is given up: later it could be another's file.
            (folder / OWNER_FILE).unlink(missing_ok=True)
        os.close(file)
        with suppress(OSError):  # what is in use, or holds something, stays
            for place in (folder, *made):
                place.rmdir()


def _hold(folder: Path) -> tuple[int, str, Claim]:
    """The open owner file with this process's claim in it, and what `_take` returns."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file, is_locked = _lock(folder)
        try:
            return file, *_take(folder, file, is_locked=is_locked)
        except FileNotFoundError:
            os.close(file)
        except BaseException:
            os.close(file)
            raise


def _lock(folder: Path) -> tuple[int, bool | None]:
    """The open owner file, and whether it is locked now by this process; None where there are no locks."""
    path = folder / OWNER_FILE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        is_locked: bool | None = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_locked = False
        except OSError:  # a file system without locks
            is_locked = None
        # The owner before may have deleted the file between the two calls; then the lock is on a file without a name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file, is_locked
        os.close(file)
        folder.mkdir(parents=True, exist_ok=True)


def _take(folder: Path, file: int, *, is_locked: bool | None) -> tuple[str, Claim]:
    """Write this process's claim; returns whom it was taken from, as a line, and the claim. Raises InputError, and
    FileNotFoundError when the owner ended meanwhile and the file with it."""
    before, note = _read(file), ""
    if is_locked is False:
        deadline = time.monotonic() + 1.0
        while before is None and time.monotonic() < deadline:  # it may be about to write who it is
            time.sleep(0.05)
            before = _read(file)
        raise _refusal(folder, before)
    if before is not None and before.boot == boot_id():
        if process_start(before.pid) == before.started:
            raise _refusal(folder, before)
        note = f"{folder}: taken over from {before}, which has ended"
    elif before is not None:
        _wait_until_silent(folder, file, before)
        note = f"{folder}: taken over from {before}, which was not heard of for {SILENT_S / 60:.0f} minutes"
    claim = Claim.of_this_process()
    content = json.dumps(asdict(claim)).encode()
    # Longer first, shorter then: a reader never finds an empty file in the place of a claim.
    os.pwrite(file, content, 0)
    os.ftruncate(file, len(content))
    os.fsync(file)
    return note, claim


def _wait_until_silent(folder: Path, file: int, owner: Claim) -> None:
    """Returns when the owner, on another machine, was silent for so long that it has gone: a scheduler starts a run
    again on another node sooner than that. Raises InputError at the first sign of life, and FileNotFoundError when the
    owner ends."""
    heard = os.fstat(file).st_mtime_ns
    left_s = SILENT_S - _silence(file)
    if left_s > 0:
        with suppress(OSError):
            told = f"{folder} was being written by {owner}; waiting {left_s:.0f} s for a sign of life from it"
            print(f"dphrl: {told}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + left_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, left_s))
        named = (folder / OWNER_FILE).stat()
        if not os.path.samestat(named, os.fstat(file)):
            raise FileNotFoundError(f"{folder / OWNER_FILE} is another file now")
        if named.st_mtime_ns != heard:
            raise _refusal(folder, _read(file))


def _refusal(folder: Path, owner: Claim | None) -> InputError:
    who = str(owner) if owner else "another process"
    stop = f"stop it (there: kill -INT {owner.pid})" if owner else "stop it"
    return InputError(f"{folder} is being written by {who}; wait for its end, {stop}, or choose another run_name")


def _read(file: int) -> Claim | None:
    try:
        return Claim(**json.loads(os.pread(file, _READ_BYTES, 0)))
    except (OSError, ValueError, TypeError):
        return None


def _silence(file: int) -> float:
    """Seconds since the owner renewed the file's time, by the clock of the file system: machines may differ."""
    before = os.fstat(file)
    os.utime(file)
    now = os.fstat(file).st_mtime
    # This was no sign of life of the owner.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return now - before.st_mtime


def _beat(folder: Path, file: int, claim: Claim, done: threading.Event, on_loss: Callable[[str], None]) -> None:
    while not done.wait(HEARTBEAT_S):
        owner = _read(file)
        if owner is not None and owner != claim:
            on_loss(f"{folder} was taken over by {owner}, because this process was not heard of for long; it ends here")
            return
        with suppress(OSError):
            os.utime(file)


def boot_id() -> str:
    """Of this machine's kernel: another one after each start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks after boot; None when it has ended."""
    try:
        # The name, in parentheses, may hold anything; the fields after it are numbers, but for the state, the third.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
