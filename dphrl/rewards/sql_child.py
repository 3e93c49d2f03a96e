"""What happens to one SQL completion inside the sandbox: extract, execute, compare.

All code that reads the model's text runs here, so that the process that trains never reads it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from dphrl.rewards import sql_compare
from dphrl.rewards.sql_parse import canonical_sql, extract_sql, orders_rows
from dphrl.rewards.thinking import UNFINISHED, Marks
from dphrl.sandbox.sqlite import QueryError, Result, run_query
from dphrl.sandbox.sqlite_file import Database, DatabaseUnusableError, file_state, limit_process_memory, open_database
from dphrl.types import JsonDict, RewardStatus

# Two replies that are no verdicts: the gold query was executed and nothing else was asked for; or the gold query left
# the prediction too little time.
GOLD_RAN, AGAIN = "gold_ran", "again"
# A prediction can have all the right columns and still be wrong, if its rows pair them wrongly. So its signal stays
# below 1.
MAX_WRONG_SIGNAL = 0.99
_MAX_CACHED_BYTES = 64 * 2**20
_MAX_DATABASES = 256
# Memory of a cell or a row besides its text: a Python object and a reference to it.
_OBJECT_BYTES = 64
_MAX_GOLD_SHARE = 0.1
_MAX_DETAIL_CHARS = 200
_MAX_SOLUTION_CHARS = 2_000


def make_handler(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    """Make the handler of the child. settings: `timeout_s` of one query, `shaping` ("column_overlap" or None),
    `thinking_marks` (pairs)."""
    limit_process_memory()
    marks = tuple((opening, closing) for opening, closing in settings["thinking_marks"])
    return _Judge(settings["timeout_s"], settings["shaping"] is not None, marks)


@dataclass(frozen=True, slots=True)
class _Gold:
    result: Result
    ordered: bool

    @property
    def num_bytes(self) -> int:
        rows = self.result.rows
        return self.result.num_bytes + _OBJECT_BYTES * len(rows) * (self.result.num_columns + 1)


class _Judge:
    """Handles {"db", "gold_sql", "convention", "text", "patient"}; if "text" is None, it only runs the gold query.

    Gold results are cached up to `_MAX_CACHED_BYTES`; the least recently used one is dropped first. When a database
    file changes, its cached results are no longer used.
    """

    def __init__(self, timeout_s: float, shaped: bool, marks: Marks) -> None:
        self._timeout_s = timeout_s
        self._marks = marks
        self._shaped = shaped
        self._databases: OrderedDict[str, Database] = OrderedDict()
        self._golds: OrderedDict[tuple[Database, str], _Gold] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, item: JsonDict) -> JsonDict:
        started = time.monotonic()
        deadline = started + self._timeout_s
        try:
            database = self._database(item["db"])
            gold = self._gold(database, item["gold_sql"], deadline)
        except DatabaseUnusableError as error:
            return _verdict(RewardStatus.INFRASTRUCTURE_ERROR, str(error))
        except QueryError as error:
            return _verdict(RewardStatus.INFRASTRUCTURE_ERROR, f"the gold query failed ({error.status}): {error}")
        except MemoryError:
            return _verdict(RewardStatus.INFRASTRUCTURE_ERROR, "the gold query failed: out of memory")
        if item["text"] is None:
            return {"status": GOLD_RAN}
        if time.monotonic() - started > _MAX_GOLD_SHARE * self._timeout_s and not item["patient"]:
            return {"status": AGAIN}
        try:
            return self._judge(item["text"], item["convention"], database, gold, deadline)
        except DatabaseUnusableError as error:
            return _verdict(RewardStatus.INFRASTRUCTURE_ERROR, str(error))
        except QueryError as error:
            return _verdict(error.status, str(error), signal=0.0)
        except Exception as error:
            # The same gold query worked on the same database a moment ago, so the text is to blame. A lack of memory
            # is different: then the process has to be replaced.
            if isinstance(error, (MemoryError, RecursionError)):
                raise
            return _verdict(RewardStatus.REFUSED, f"cannot be judged: {type(error).__name__}: {error}", signal=0.0)

    def _judge(self, text: str, convention: str, database: Database, gold: _Gold, deadline: float) -> JsonDict:
        sql = extract_sql(text, self._marks)
        if sql is None:
            raise QueryError(RewardStatus.UNPARSABLE, UNFINISHED)
        if not sql and "\x00" in text:
            raise QueryError(RewardStatus.REFUSED, "a NUL in the completion")
        result = run_query(database, sql, deadline, set_suffices=convention == "bird")
        expected, rows = gold.result.rows, result.rows
        try:
            if convention == "bird":
                same = sql_compare.same_by_bird(expected, rows)
            else:
                same = sql_compare.same_by_spider(expected, rows, gold.ordered)
        except sql_compare.ComparisonTooLargeError as error:
            raise QueryError(RewardStatus.RESOURCE_LIMIT, str(error)) from error
        if same:
            return _verdict(RewardStatus.CORRECT, solution=canonical_sql(sql, result.columns), signal=1.0)
        signal = 0.0
        if self._shaped and not result.is_set:
            overlap = sql_compare.column_overlap(expected, rows, gold.result.num_columns, result.num_columns)
            signal = min(overlap, MAX_WRONG_SIGNAL)
        # A wrong answer gets no canonical form, which costs as much as the query itself: this spelling is enough.
        solution = " ".join(sql.split())[:_MAX_SOLUTION_CHARS]
        return _verdict(RewardStatus.WRONG, _difference(gold.result, result), solution, signal)

    def _database(self, path: str) -> Database:
        known = self._databases.get(path)
        if known is None or known.state != file_state(path):
            known = self._databases[path] = open_database(path)
            if len(self._databases) > _MAX_DATABASES:
                self._databases.popitem(last=False)
        self._databases.move_to_end(path)
        return known

    def _gold(self, database: Database, sql: str, deadline: float) -> _Gold:
        key = database, sql
        gold = self._golds.get(key)
        if gold is None:
            gold = _Gold(run_query(database, sql, deadline), orders_rows(sql))
            self._golds[key] = gold
            self._cached_bytes += gold.num_bytes
            # The newest result stays whatever its size is, because it is used now.
            while self._cached_bytes > _MAX_CACHED_BYTES and len(self._golds) > 1:
                self._cached_bytes -= self._golds.popitem(last=False)[1].num_bytes
        self._golds.move_to_end(key)
        return gold


def _verdict(status: RewardStatus, detail: str = "", solution: str = "", signal: float | None = None) -> JsonDict:
    detail = " ".join(detail.split())[:_MAX_DETAIL_CHARS]
    return {"status": status, "detail": detail, "solution": solution, "signal": signal}


def _difference(gold: Result, result: Result) -> str:
    if (len(gold.rows), gold.num_columns) == (len(result.rows), result.num_columns):
        return f"other values in {_shape(result)}"
    return f"{_shape(result)} where the gold has {_shape(gold)}"


def _shape(result: Result) -> str:
    return f"{len(result.rows)} rows of {result.num_columns} columns"
