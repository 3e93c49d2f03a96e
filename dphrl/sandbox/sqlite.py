"""One SELECT, on a database file that nothing here can change, within limits.

For the inside of a sandboxed child: a single opcode of SQLite can run for minutes (`printf('%.*c', 999999999, 'x')`)
and is stopped by killing its process, never from within.
"""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

import apsw

from dphrl.sandbox.sqlite_policy import Guard, is_internal, status_of_sql_error
from dphrl.types import RewardStatus

MAX_SQL_BYTES = 100_000
MAX_ROWS = 100_000
MAX_CELLS = 1_000_000
MAX_RESULT_BYTES = 64 * 2**20
# Of SQLite in this process: caches, sorters, intermediate texts.
MAX_HEAP_BYTES = 400 * 2**20
# "now" in a query: results are the same whenever they are computed, and gold and prediction see one time of day.
FROZEN_CLOCK_UNIX_S = 1_719_748_800  # 2024-06-30 12:00:00 UTC
_UNIX_EPOCH_JULIAN_MS = 210_866_760_000_000
_OPCODES_PER_CHECK = 20_000

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

_MAGIC = b"SQLite format 3\x00"
# Blanks and comments as SQLite's tokenizer has them; one that never ends is one too. Atomic: a failure further on must
# not make a comment end later than it does.
_IGNORED = r"(?>[ \t\n\f\r\ufeff]|--[^\n]*|/\*.*?(?:\*/|\Z))"
_START = re.compile(rf"{_IGNORED}*+(?P<word>[A-Za-z_]*)", re.DOTALL)
_END = re.compile(rf"(?:;|{_IGNORED})*+\Z", re.DOTALL)
_QUERY_WORDS = frozenset(["select", "values", "with"])
_STATEMENT_WORDS = frozenset(
    "alter analyze attach begin call commit copy create deallocate declare delete desc describe detach do drop end exec "
    "execute explain export grant handler import insert install kill load lock merge optimize pragma prepare reindex "
    "release rename replace reset restore revoke rollback savepoint set show start truncate unlock update upsert use "
    "vacuum".split()
)
_WRITE_IN_WITH = re.compile(r"\bas\s*(?:(?:not\s+)?materialized\s*)?\(\s*(?:insert|update|delete|replace)\b", re.I)


class DatabaseUnusableError(Exception):
    """The file cannot be graded against, whatever the query; the message names it."""


class QueryError(Exception):
    """A query that gives no result. status: UNPARSABLE, REFUSED, WRONG, TIMEOUT or RESOURCE_LIMIT."""

    def __init__(self, status: RewardStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class Database:
    """A database file that was fit for use, in the state it was in then.

    tables: lower-case names of its ordinary tables and views.
    """

    path: str
    state: tuple[int, ...]
    tables: frozenset[str]


@dataclass(frozen=True, slots=True)
class Result:
    """rows: in the query's order. columns: names that the query read, in lower case. num_bytes: of all cells."""

    rows: list[tuple[Any, ...]]
    num_columns: int
    columns: frozenset[str]
    num_bytes: int


def limit_process_memory() -> None:
    """Once in a process, before its first query."""
    apsw.hard_heap_limit(MAX_HEAP_BYTES)


def file_state(path: str) -> tuple[int, ...]:
    """Changes when the file does. Raises DatabaseUnusableError where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise DatabaseUnusableError(f"database {path!r} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DatabaseUnusableError(f"database {path!r} is not a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_database(path: str) -> Database:
    """Check the file and read its tables' names. Raises DatabaseUnusableError for one that is missing, is no SQLite
    database, cannot be parsed, or has changes outside it: a write-ahead log or the journal of a broken-off write,
    which reading it as immutable would ignore."""
    path = os.path.realpath(path)
    state = file_state(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise DatabaseUnusableError(f"{path!r} is not an SQLite database")
        for suffix in ("-wal", "-journal"):
            if os.path.exists(path + suffix):
                with open(path + suffix, "rb") as file:
                    # A journal that was finished with keeps its size under journal_mode=PERSIST, zeros for a header.
                    if file.read(8).strip(b"\x00"):
                        raise DatabaseUnusableError(
                            f"database {path!r} has unfinished changes in {suffix[1:]!r}: "
                            "open and close it once with write access"
                        )
        connection = _connect(path)
    except (OSError, apsw.Error) as error:
        raise DatabaseUnusableError(f"database {path!r} cannot be read: {error}") from error
    try:
        rows = connection.execute("SELECT CAST(name AS BLOB), sql LIKE 'create virtual%' FROM sqlite_schema").fetchall()
    except (apsw.Error, UnicodeDecodeError) as error:
        raise DatabaseUnusableError(f"database {path!r} cannot be read: {error}") from error
    finally:
        connection.close(True)
    names = {name.decode(errors="replace").lower() for name, virtual in rows if not virtual}
    return Database(path, state, frozenset(name for name in names if not is_internal(name)))


def check_sql(sql: str) -> None:
    """Raises QueryError for a text that is not one query, as far as that shows without parsing it."""
    try:
        num_bytes = len(sql.encode())
    except UnicodeEncodeError:
        raise QueryError(RewardStatus.REFUSED, "a lone surrogate in the SQL") from None
    if "\x00" in sql:
        raise QueryError(RewardStatus.REFUSED, "a NUL in the SQL")
    if num_bytes > MAX_SQL_BYTES:
        raise QueryError(RewardStatus.RESOURCE_LIMIT, f"SQL of {num_bytes} bytes; at most {MAX_SQL_BYTES}")
    start = _START.match(sql)
    first = start["word"].lower() if start else ""
    if first not in _QUERY_WORDS:
        if first in _STATEMENT_WORDS:
            raise QueryError(RewardStatus.REFUSED, f"{first.upper()} is not a query")
        raise QueryError(RewardStatus.UNPARSABLE, "no SQL query")


def run_query(database: Database, sql: str, deadline: float) -> Result:
    """The rows of one SELECT, VALUES, set operation or WITH over these.

    deadline: on time.monotonic(). Raises QueryError when the query is not permitted, fails or hits a limit,
    DatabaseUnusableError when the file cannot be read, MemoryError when the process has no more.

    Covered: anything but one row-returning query (first word, SQLite's authorizer, its notion of read-only and of
    EXPLAIN, nothing but comments after the statement); functions and tables outside the lists of sqlite_policy;
    extensions, ATTACH, files of any kind; schemas that call functions; time between two opcodes; SQLite's memory;
    rows, cells and bytes of the result. Each query has a connection of its own, so none sees what another left.
    Not covered: one opcode that runs long, memory of Python's own; the child's deadline and limits are there for that.
    """
    check_sql(sql)
    guard = Guard(database.tables)
    try:
        connection = _connect(database.path)
        try:
            connection.authorizer = guard
            connection.set_progress_handler(lambda: time.monotonic() > deadline, _OPCODES_PER_CHECK)
            return _Query(connection, guard).run(sql)
        finally:
            connection.close(True)
    except apsw.Error as error:
        raise _meaning(error, sql, guard, database.path) from error


class _Query:
    """One execution; holds what the trace learns before the first row."""

    def __init__(self, connection: apsw.Connection, guard: Guard) -> None:
        self._connection = connection
        self._guard = guard
        self._sql = self._statement = ""
        self._num_columns = 0

    def run(self, sql: str) -> Result:
        self._sql = sql
        self._connection.exec_trace = self._inspect
        try:
            rows, num_bytes = _fetch(self._connection.execute(sql))
        except UnicodeDecodeError:
            rows, num_bytes = self._run_for_bytes()
        return Result(rows, self._num_columns, frozenset(self._guard.columns), num_bytes)

    def _inspect(self, cursor: apsw.Cursor, statement: str, bindings: object) -> bool:
        """Called by apsw with each prepared statement before its first step; the statement begins the text."""
        if not cursor.has_vdbe:
            return True
        if cursor.is_explain:
            raise QueryError(RewardStatus.REFUSED, "EXPLAIN is not a query")
        description = cursor.get_description()
        if not cursor.is_readonly or not description:
            raise QueryError(RewardStatus.REFUSED, "not a row-returning query")
        if self._statement or not _END.match(self._sql, len(statement)):
            raise QueryError(RewardStatus.REFUSED, "more than one statement")
        self._statement, self._num_columns = statement, len(description)
        return True

    def _run_for_bytes(self) -> tuple[list[tuple[Any, ...]], int]:
        """Once more for text that is not UTF-8, which data sets hold: decoded so that no two values fall together."""
        names = [f'"dphrl {index}"' for index in range(self._num_columns)]
        cells = (f"typeof({n}) = 'text', CASE typeof({n}) WHEN 'text' THEN CAST({n} AS BLOB) ELSE {n} END" for n in names)
        # Materialized, so that neither the query's order nor its plan depends on what is around it.
        wrapped = (
            f'WITH "dphrl result"({", ".join(names)}) AS MATERIALIZED (\n'
            + self._statement.rstrip(" \t\n\f\r;")
            + f'\n) SELECT {", ".join(cells)} FROM "dphrl result"'
        )
        self._connection.exec_trace = None
        raw, num_bytes = _fetch(self._connection.execute(wrapped))
        rows = [
            tuple(
                value.decode(errors="surrogateescape") if is_text else value
                for is_text, value in zip(row[::2], row[1::2], strict=True)
            )
            for row in raw
        ]
        return rows, num_bytes


def _connect(path: str) -> apsw.Connection:
    connection = apsw.Connection(
        # Immutable: no locks and no journal beside the file, which may lie in a folder that cannot be written.
        f"file:{quote(path)}?mode=ro&immutable=1",
        flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI,
        vfs=_still_clock().name,
        statementcachesize=0,
    )
    for limit, value in _LIMITS.items():
        connection.limit(limit, value)
    for setting, on in _SETTINGS.items():
        connection.config(setting, on)
    # Sorters that outgrow memory would write files otherwise.
    connection.execute("PRAGMA temp_store=MEMORY; PRAGMA cell_size_check=ON")
    connection.drop_modules(None)
    return connection


class _StillClock(apsw.VFS):  # type: ignore[misc]
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


def _fetch(cursor: apsw.Cursor) -> tuple[list[tuple[Any, ...]], int]:
    rows: list[tuple[Any, ...]] = []
    num_cells = num_bytes = 0
    for row in cursor:
        num_cells += len(row)
        for cell in row:
            if isinstance(cell, (str, bytes)):
                num_bytes += len(cell)
        rows.append(row)
        if len(rows) > MAX_ROWS or num_cells > MAX_CELLS or num_bytes > MAX_RESULT_BYTES:
            raise QueryError(
                RewardStatus.RESOURCE_LIMIT,
                f"a result above {MAX_ROWS:,} rows, {MAX_CELLS:,} cells or {MAX_RESULT_BYTES // 2**20} MiB",
            )
    return rows, num_bytes


def _meaning(error: apsw.Error, sql: str, guard: Guard, path: str) -> QueryError | DatabaseUnusableError | MemoryError:
    message = str(error)
    if guard.denied:
        return QueryError(RewardStatus.REFUSED, f"{guard.denied} is not permitted")
    if isinstance(error, apsw.InterruptError):
        return QueryError(RewardStatus.TIMEOUT, "the query ran out of time")
    if isinstance(error, (apsw.NoMemError, apsw.TooBigError, apsw.FullError)) or (
        getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_NOMEM
    ):
        return QueryError(RewardStatus.RESOURCE_LIMIT, f"the query needs too much memory: {message}")
    if isinstance(error, apsw.BindingsError):
        return QueryError(RewardStatus.REFUSED, "parameters have no values here")
    if isinstance(error, (apsw.AuthError, apsw.ReadOnlyError)):
        return QueryError(RewardStatus.REFUSED, message)
    if isinstance(error, (apsw.CorruptError, apsw.NotADBError, apsw.IOError, apsw.CantOpenError)):
        return DatabaseUnusableError(f"database {path!r} cannot be read: {message}")
    if isinstance(error, apsw.SQLError):
        status = status_of_sql_error(message, sql)
        if status is RewardStatus.UNPARSABLE and _WRITE_IN_WITH.search(sql):
            status = RewardStatus.REFUSED
        return QueryError(status, message)
    return QueryError(RewardStatus.WRONG, message)
