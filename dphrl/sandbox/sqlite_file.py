"""Opens database files so that reading them changes nothing, and depends on nothing but the files."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

import apsw

from dphrl.sandbox.sqlite_policy import is_internal

MAX_SQL_BYTES = 100_000
# Memory that SQLite may use in this process: caches, sorters, intermediate texts.
MAX_HEAP_BYTES = 400 * 2**20
# What "now" means in a query: results do not depend on when they are computed; gold and prediction see one time.
FROZEN_CLOCK_UNIX_S = 1_719_748_800  # 2024-06-30 12:00:00 UTC
_UNIX_EPOCH_JULIAN_MS = 210_866_760_000_000

_LIMITS = {
    apsw.SQLITE_LIMIT_LENGTH: 16 * 2**20,
    apsw.SQLITE_LIMIT_SQL_LENGTH: 2 * MAX_SQL_BYTES,
    apsw.SQLITE_LIMIT_COLUMN: 2000,
    apsw.SQLITE_LIMIT_EXPR_DEPTH: 1000,
    apsw.SQLITE_LIMIT_COMPOUND_SELECT: 500,
    apsw.SQLITE_LIMIT_VDBE_OP: 1_000_000,
    apsw.SQLITE_LIMIT_FUNCTION_ARG: 127,
    apsw.SQLITE_LIMIT_ATTACHED: 0,
    apsw.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    apsw.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    apsw.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    apsw.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_SETTINGS = {
    apsw.SQLITE_DBCONFIG_DEFENSIVE: 1,
    apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA: 0,
    apsw.SQLITE_DBCONFIG_WRITABLE_SCHEMA: 0,
    apsw.SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION: 0,
    apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER: 0,
    apsw.SQLITE_DBCONFIG_ENABLE_ATTACH_CREATE: 0,
    apsw.SQLITE_DBCONFIG_ENABLE_ATTACH_WRITE: 0,
    # A view is part of the data; what it reads and calls goes through the authorizer too.
    apsw.SQLITE_DBCONFIG_ENABLE_VIEW: 1,
    # More than a quarter of the gold queries of public data sets write string literals in double quotes.
    apsw.SQLITE_DBCONFIG_DQS_DML: 1,
    apsw.SQLITE_DBCONFIG_DQS_DDL: 1,
}

_SIDE_FILES = ("-wal", "-journal")
_MAGIC = b"SQLite format 3\x00"


class DatabaseUnusableError(Exception):
    """The file cannot be used for grading, whatever the query is; the message names the file."""


@dataclass(frozen=True, slots=True)
class Database:
    """A database file that passed the checks, with the state that it had then.

    tables: lower-case names of its ordinary tables and views.
    """

    path: str
    state: tuple[int, ...]
    tables: frozenset[str]


def limit_process_memory() -> None:
    """Limit SQLite's memory; to be called once in a process, before its first query."""
    apsw.hard_heap_limit(MAX_HEAP_BYTES)


def file_state(path: str) -> tuple[int, ...]:
    """A value that changes when the file, its write-ahead log or its journal changes. Raises DatabaseUnusableError when
    there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise DatabaseUnusableError(f"database {path!r} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DatabaseUnusableError(f"database {path!r} is not a regular file")
    beside = (_size(path + suffix) for suffix in _SIDE_FILES)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, *beside)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def open_database(path: str) -> Database:
    """Check the file and read the names of its tables. Raises DatabaseUnusableError for a file that is missing, is no
    SQLite database, cannot be parsed, or has unfinished changes beside it: a write-ahead log, or the journal of an
    interrupted write. Reading the file as immutable would ignore these."""
    path = os.path.realpath(path)
    state = file_state(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise DatabaseUnusableError(f"{path!r} is not an SQLite database")
        for suffix in _SIDE_FILES:
            if _size(path + suffix) > 0:
                _check_finished(path, suffix)
        connection = connect(path)
    except (OSError, apsw.Error) as error:
        raise DatabaseUnusableError(f"database {path!r} cannot be read: {error}") from error
    try:
        listed: list[Any] = connection.execute(
            "SELECT CAST(name AS BLOB), sql LIKE 'create virtual%' FROM sqlite_schema"
        ).fetchall()
    except (apsw.Error, UnicodeDecodeError) as error:
        raise DatabaseUnusableError(f"database {path!r} cannot be read: {error}") from error
    finally:
        connection.close(True)
    names = {name.decode(errors="replace").lower() for name, virtual in listed if name and not virtual}
    return Database(path, state, frozenset(name for name in names if not is_internal(name)))


def _check_finished(path: str, suffix: str) -> None:
    with open(path + suffix, "rb") as file:
        # With journal_mode=PERSIST, a finished journal keeps its size, and its header is zeros.
        if file.read(8).strip(b"\x00"):
            raise DatabaseUnusableError(
                f"database {path!r} has unfinished changes in {path + suffix!r}: open and close it once for writing"
            )


def connect(path: str) -> apsw.Connection:
    """A connection that can only read `path`. Raises apsw.Error."""
    connection = apsw.Connection(
        # Immutable: no lock and no journal beside the file, because its folder may not be writable.
        f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1",
        flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
        vfs=_still_clock().name,
        statementcachesize=0,
    )
    for limit, value in _LIMITS.items():
        connection.limit(limit, value)
    for setting, on in _SETTINGS.items():
        connection.config(setting, on)
    # Otherwise a sorter that outgrows its memory would write files.
    connection.execute("PRAGMA temp_store=MEMORY; PRAGMA cell_size_check=ON")
    connection.drop_modules(None)
    return connection


class _StillClock(apsw.VFS):
    """The system's files, and a clock that stands still."""

    name = "dphrl_still_clock"

    def __init__(self) -> None:
        super().__init__(self.name, "")

    def xCurrentTimeInt64(self) -> int:  # noqa: N802
        return _UNIX_EPOCH_JULIAN_MS + 1000 * FROZEN_CLOCK_UNIX_S

    def xCurrentTime(self) -> float:  # noqa: N802
        return self.xCurrentTimeInt64() / 86_400_000


@cache
def _still_clock() -> _StillClock:
    return _StillClock()
