"""Runs one SELECT within limits, on a database file that nothing here can change.

It belongs inside a sandboxed child: a single opcode of SQLite can run for minutes (`printf('%.*c', 999999999, 'x')`),
and only killing its process stops it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import apsw

from dphrl.sandbox.sqlite_file import MAX_SQL_BYTES, Database, DatabaseUnusableError, connect
from dphrl.sandbox.sqlite_policy import Guard, status_of_sql_error
from dphrl.types import RewardStatus

MAX_ROWS = 100_000
MAX_CELLS = 1_000_000
MAX_RESULT_BYTES = 64 * 2**20
_OPCODES_PER_CHECK = 20_000

# Blanks and comments as SQLite's tokenizer reads them; a comment that never ends is a comment too. The group is atomic:
# a mismatch further on must not make a comment end later than it does.
_IGNORED = r"(?>[ \t\n\f\r\ufeff]|--[^\n]*|/\*.*?(?:\*/|\Z))"
_START = re.compile(rf"{_IGNORED}*+(?P<word>[A-Za-z_]*)", re.DOTALL)
_END = re.compile(rf"(?:;|{_IGNORED})*+\Z", re.DOTALL)
_QUERY_WORDS = frozenset(["select", "values", "with"])
_STATEMENTS = """
    alter analyze attach begin call commit copy create deallocate declare delete desc describe detach do drop end exec
    execute explain export grant import insert install kill load lock merge optimize pragma prepare reindex release
    rename replace reset restore revoke rollback savepoint set show start truncate unlock update upsert use vacuum
"""
_STATEMENT_WORDS = frozenset(_STATEMENTS.split())
_WRITE_IN_WITH = re.compile(r"\bas\s*(?:(?:not\s+)?materialized\s*)?\(\s*(?:insert|update|delete|replace)\b", re.I)


class QueryError(Exception):
    """A query that gives no result. status: UNPARSABLE, REFUSED, WRONG, TIMEOUT or RESOURCE_LIMIT."""

    def __init__(self, status: RewardStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True)
class Result:
    """rows: in the query's order, or each once and in any order when `is_set`. num_bytes: of all cells' texts.

    columns: names of the columns that the query read, in lower case.
    """

    rows: list[tuple[Any, ...]]
    num_columns: int
    columns: frozenset[str]
    num_bytes: int
    is_set: bool


def check_sql(sql: str) -> None:
    """Raises QueryError for a text that is not one query, as far as this can be seen without parsing it."""
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


def run_query(database: Database, sql: str, deadline: float, set_suffices: bool = False) -> Result:
    """The rows of one SELECT, VALUES, set operation or WITH over these.

    deadline: a time of time.monotonic(). set_suffices: above the limits, keep repeated rows once instead of failing,
    because a join without its condition can repeat a right answer millions of times. Raises QueryError when the query
    is not permitted, fails or hits a limit, DatabaseUnusableError when the file cannot be read, MemoryError when the
    process has no more memory.

    Covered: anything but one row-returning query (first word, SQLite's authorizer, its notion of read-only and of
    EXPLAIN, nothing but comments after the statement); functions and tables outside the lists of sqlite_policy;
    extensions, ATTACH, files of any kind; schemas that call functions; time between two opcodes; SQLite's memory;
    rows, cells and bytes of the result. Each query has its own connection, so none sees what another one left.
    Not covered: one opcode that runs long, and Python's own memory; the child's deadline and limits are there for that.
    """
    check_sql(sql)
    guard = Guard(database.tables)
    try:
        connection = connect(database.path)
        try:
            connection.authorizer = guard
            connection.set_progress_handler(lambda: time.monotonic() > deadline, _OPCODES_PER_CHECK)
            return _Query(connection, guard, set_suffices).run(sql)
        finally:
            connection.close(True)
    except apsw.Error as error:
        raise _meaning(error, sql, guard, database.path) from error


class _Query:
    """One execution of a query; it keeps what the trace learns before the first row."""

    def __init__(self, connection: apsw.Connection, guard: Guard, set_suffices: bool) -> None:
        self._connection = connection
        self._guard = guard
        self._set_suffices = set_suffices
        self._sql = self._statement = ""
        self._num_columns = 0

    def run(self, sql: str) -> Result:
        self._sql = sql
        self._connection.exec_trace = self._inspect
        try:
            fetched = _fetch(self._connection.execute(sql), self._set_suffices)
        except UnicodeDecodeError:
            fetched = self._fetch_bytes()
        return Result(
            fetched.rows, self._num_columns, frozenset(self._guard.columns), fetched.num_bytes, fetched.is_set
        )

    def _inspect(self, cursor: apsw.Cursor, statement: str, bindings: object) -> bool:
        """Called by apsw with each prepared statement before its first step; the SQL begins with the first statement.

        Raises QueryError for anything but one statement that returns rows.
        """
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

    def _fetch_bytes(self) -> _Fetched:
        """Run the query again for text that is not UTF-8, which data sets hold; different values stay different."""
        names = [f'"dphrl {index}"' for index in range(self._num_columns)]
        cells = (
            f"typeof({n}) = 'text', CASE typeof({n}) WHEN 'text' THEN CAST({n} AS BLOB) ELSE {n} END" for n in names
        )
        # Materialized, so that neither the query's order nor its plan depends on what is around it.
        wrapped = (
            f'WITH "dphrl result"({", ".join(names)}) AS MATERIALIZED (\n'
            + self._statement.rstrip(" \t\n\f\r;")
            + f'\n) SELECT {", ".join(cells)} FROM "dphrl result"'
        )
        self._connection.exec_trace = None
        fetched = _fetch(self._connection.execute(wrapped), self._set_suffices)
        fetched.rows = [
            tuple(
                value.decode(errors="surrogateescape") if is_text else value
                for is_text, value in zip(row[::2], row[1::2], strict=True)
            )
            for row in fetched.rows
        ]
        return fetched


@dataclass(slots=True)
class _Fetched:
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    num_cells: int = 0
    num_bytes: int = 0
    is_set: bool = False

    def add(self, row: tuple[Any, ...]) -> bool:
        """Add a row. Returns whether the result is still within the limits."""
        self.rows.append(row)
        self.num_cells += len(row)
        for cell in row:
            if isinstance(cell, (str, bytes)):
                self.num_bytes += len(cell)
        return len(self.rows) <= MAX_ROWS and self.num_cells <= MAX_CELLS and self.num_bytes <= MAX_RESULT_BYTES


def _fetch(cursor: apsw.Cursor, set_suffices: bool) -> _Fetched:
    fetched = _Fetched()
    for row in cursor:
        if not fetched.add(row):
            if set_suffices:
                return _fetch_set(chain(fetched.rows, cursor))
            raise _too_large()
    return fetched


def _fetch_set(rows: Iterable[tuple[Any, ...]]) -> _Fetched:
    fetched, seen = _Fetched(is_set=True), set()
    for row in rows:
        if row not in seen:
            seen.add(row)
            if not fetched.add(row):
                raise _too_large()
    return fetched


def _too_large() -> QueryError:
    limits = f"{MAX_ROWS:,} rows, {MAX_CELLS:,} cells or {MAX_RESULT_BYTES // 2**20} MiB"
    return QueryError(RewardStatus.RESOURCE_LIMIT, f"a result above {limits}")


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
