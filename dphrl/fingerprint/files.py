"""Hashes of values and of files. Those of large files are remembered, so that a machine reads a model's weights once.

A file counts as the same while its size, times and inode are. What is remembered lies in `hashes.json` in the cache
folder: $DPHRL_CACHE, else $XDG_CACHE_HOME/dphrl, else ~/.cache/dphrl. Where that cannot be written, a process remembers
for itself alone. Processes may write at the same time: the file is whole or absent, and an entry that another process
overwrote costs one more reading.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

log = logging.getLogger(__name__)

# Smaller files are read faster than they are looked up.
MIN_REMEMBERED_BYTES = 2**20
MAX_REMEMBERED = 1000
# The coarsest clock of a file system in use. A file that was changed less than this before it was read could be changed
# once more without another time.
CLOCK_GRAIN_NS = 2 * 10**9
# A disk or a network serves several readers faster than one, and hashing runs without the interpreter's lock.
NUM_READERS = 8

# Path -> size, mtime and ctime in ns, inode, and the SHA-256 of the content.
Memory = dict[str, list[int | str]]
_read_here: Memory = {}


def hash_value(value: object) -> str:
    """16 hex digits over the JSON form of `value`."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def hash_files(folder: Path, patterns: Sequence[str]) -> str:
    """16 hex digits over the names and contents of the files in `folder` that match a pattern."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    names = [path.relative_to(folder).as_posix() for path in paths]
    return hash_value(list(zip(names, hash_contents(paths), strict=True)))


def hash_contents(paths: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file's content, as 64 hex digits, read or remembered."""
    memory = {**_remembered(), **_read_here}
    with ThreadPoolExecutor(NUM_READERS) as pool:
        entries = list(pool.map(lambda path: _entry(path, memory), paths))
    new = {
        key: entry
        for path, (entry, lasting) in zip(paths, entries, strict=True)
        if lasting and memory.get(key := str(path.resolve())) != entry
    }
    if new:
        _read_here.update(new)
        _remember(new)
    return [str(entry[-1]) for entry, _ in entries]


def _entry(path: Path, memory: Memory) -> tuple[list[int | str], bool]:
    """What there is to remember of a file, and whether it should be."""
    with path.open("rb") as file:
        before = _state(file.fileno())
        large = before[0] >= MIN_REMEMBERED_BYTES
        if large and (known := memory.get(str(path.resolve()))) and known[:-1] == before:
            return known, True
        now = time.time_ns()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = _state(file.fileno()) == before and now - before[2] > CLOCK_GRAIN_NS
    return [*before, digest], large and settled


def _state(descriptor: int) -> list[int]:
    found = os.fstat(descriptor)
    # The time of change too: a copying tool can set the time of modification back, but not this one.
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def memory_path() -> Path | None:
    """The file that hashes are remembered in; None where there is no home folder to keep it in."""
    places = (("DPHRL_CACHE", ""), ("XDG_CACHE_HOME", "dphrl"))
    given = [Path(os.environ[name], inner) for name, inner in places if os.environ.get(name)]
    try:
        return [*given, Path("~/.cache/dphrl")][0].expanduser() / "hashes.json"
    except RuntimeError:
        return None


def _remembered() -> Memory:
    path = memory_path()
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return {key: entry for key, entry in _items(found) if isinstance(entry, list) and len(entry) == 5}


def _items(found: object) -> Iterable[tuple[str, object]]:
    return found.items() if isinstance(found, dict) else ()


def _remember(new: Memory) -> None:
    path = memory_path()
    if path is None:
        return
    # What was added last stays; a file that was read anew counts as added.
    kept = {key: entry for key, entry in _remembered().items() if key not in new} | new
    kept = dict(list(kept.items())[-MAX_REMEMBERED:])
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".hashes-", delete=False) as file:
            staging = Path(file.name)
            json.dump(kept, file)
        staging.chmod(0o644)  # users may share the folder
        os.replace(staging, path)
    except OSError as error:
        log.info("hashes of weights are not remembered for the next run: %s", error)
        if staging is not None:
            staging.unlink(missing_ok=True)
