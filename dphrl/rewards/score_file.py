"""Grades a file of completions as a stream, in order, in bounded memory."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO

from dphrl.config.data import RewardConfig
from dphrl.config.loading import InputError
from dphrl.outputs import check_output, streamed_output
from dphrl.rewards.base import Grader, build_grader
from dphrl.sandbox.zygote import die_with_parent
from dphrl.stopping import StopRequest
from dphrl.tracking.console import Console
from dphrl.types import RewardResult, RewardStatus

Pair = tuple[str, str]

# Rows that a worker gets at once, and batches that wait for each worker: enough that no worker runs out of work.
BATCH_ROWS = 64
BATCHES_PER_WORKER = 4
# A longer line is a sign of a broken file, not of a long completion.
MAX_LINE_BYTES = 64 * 2**20
MAX_PROBLEMS_SHOWN = 20
CONVENTIONS = ("bird", "spider")


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive good rows; indices count every row of the file, bad ones too."""

    indices: Sequence[int]
    pairs: Sequence[Pair]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RowFields:
    """Which fields of a row hold what is graded. answer: of mathematics; a query's row has names of its own."""

    completion: str = "completion"
    answer: str = "answer"


def score_file(
    source: str,
    output: Path | None,
    reward: RewardConfig,
    num_workers: int,
    *,
    opening: str = "",
    fields: RowFields = RowFields(),
) -> None:
    """Grade `source` (a .jsonl path, or "-") into `output` (None: standard output), one JSON line per good row.

    opening: the mark with which every prompt opened a thought, so that the completions begin inside one; "" for none.
    Raises InputError when the input cannot be read, or the output not be written. If rows are malformed, it raises
    InputError with file and line of each, but only after it has graded and written all good rows. Raises Stopped after
    a signal. Rows are written as they are graded, each as a whole; the first ones take the place of what `output` held.
    """
    problems = _Problems(source)
    statuses: Counter[str] = Counter()
    with ExitStack() as stack, StopRequest().listening() as stop:
        rows, total_bytes = _open_input(source, stack)
        write = _open_output(output, source, stack)
        stack.callback(_say_counts, statuses)
        grade = stack.enter_context(closing(_Workers(reward, num_workers))).grade
        # Progress goes to standard error, because the results may go to standard output. It is counted in bytes,
        # because the number of rows is not known.
        console = Console(sys.stderr)
        advance = stack.enter_context(console.task(f"grading {source} (bytes)", total_bytes))
        batches = _batches(_parse(rows, reward.name, opening, fields, problems))
        for batch, results in grade(batches):
            lines = [json.dumps(_record(index, r)) + "\n" for index, r in zip(batch.indices, results, strict=True)]
            with stop.held():
                write("".join(lines))
                statuses.update(result.status for result in results)
            advance(batch.num_bytes)
        write("")  # where no row was good, the result is empty
    if problems.lines:
        raise InputError(*problems.lines)


def _say_counts(statuses: Counter[str]) -> None:
    counts = ", ".join(f"{statuses[status]} {status}" for status in RewardStatus if statuses[status])
    Console(sys.stderr).info(f"{statuses.total()} graded: {counts or 'none'}")


def _record(index: int, result: RewardResult) -> dict[str, object]:
    return {
        "index": index,
        "score": None if result.score is None else int(result.score),
        "status": str(result.status),
        "detail": result.detail,
    }


# ------------------------------------------------------------------------------------------------- reading


def _open_input(source: str, stack: ExitStack) -> tuple[IO[bytes], int | None]:
    if source == "-":
        return sys.stdin.buffer, None
    try:
        file = stack.enter_context(Path(source).open("rb"))  # noqa: SIM115  (the stack closes it)
        return file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); give an existing .jsonl file") from error


def _open_output(output: Path | None, source: str, stack: ExitStack) -> Callable[[str], None]:
    if output is None:
        return _print
    if source != "-" and output.exists() and output.samefile(source):
        raise InputError(f"{output}: is the input too; give another file for the results")
    check_output(output)
    return stack.enter_context(streamed_output(output))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Problems:
    """Problems of rows: keeps the first ones and counts the others, because a file of the wrong kind has millions."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._first: list[str] = []
        self._num_more = 0

    def add(self, line_number: int, problem: object) -> None:
        if len(self._first) < MAX_PROBLEMS_SHOWN:
            self._first.append(f"{self._source}:{line_number}: {problem}")
        else:
            self._num_more += 1

    @property
    def lines(self) -> list[str]:
        return self._first + ([f"and {self._num_more} more bad rows"] if self._num_more else [])


def _parse(
    rows: IO[bytes], name: str, opening: str, fields: RowFields, problems: _Problems
) -> Iterator[tuple[int, Pair | None, int]]:
    """(index, pair, bytes) of every row. The pair is None for a malformed row, and `problems` then names the row."""
    is_sql = name == "sql_execution"
    read_pair = _sql_pair if is_sql else _math_pair
    index = number = 0
    while line := rows.readline(MAX_LINE_BYTES + 1):
        number += 1
        num_bytes = len(line)
        if not line.strip():
            continue
        try:
            if num_bytes > MAX_LINE_BYTES:
                num_bytes += _skip_line(rows)
                raise ValueError(f"more than {MAX_LINE_BYTES} bytes; split the file into one object a line")
            row = _as_object(line)
            completion, answer = read_pair(row, fields)
            pair: Pair | None = (opening + completion, answer)
            # The row is well-formed, so it gets a verdict (infrastructure_error). It is named as well, because only
            # the user can correct it.
            if is_sql and (missing := _missing_database(row)):
                problems.add(number, missing)
        except ValueError as error:
            problems.add(number, error)
            pair = None
        yield index, pair, num_bytes
        index += 1


def _skip_line(rows: IO[bytes]) -> int:
    num_bytes = 0
    while part := rows.readline(MAX_LINE_BYTES):
        num_bytes += len(part)
        if part.endswith(b"\n"):
            break
    return num_bytes


def _as_object(line: bytes) -> dict[str, object]:
    try:
        # "utf-8-sig" removes the mark that some editors write at the start of a file.
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a line of JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object; write {{...}}")
    return row


def _math_pair(row: dict[str, object], fields: RowFields) -> Pair:
    answer = row.get(fields.answer)
    # A data set may write the answer 42 as a number; NaN and infinity are no answers.
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
        row = row | {fields.answer: text}
    return _text(row, fields.completion), _text(row, fields.answer, filled=True)


def _sql_pair(row: dict[str, object], fields: RowFields) -> Pair:
    completion, database = _text(row, fields.completion), _text(row, "db", filled=True)
    gold = _text(row, "gold_sql", filled=True)
    convention = row.get("convention")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r:.40}; write one of {', '.join(CONVENTIONS)}")
    return completion, json.dumps({"db": os.path.abspath(database), "gold_sql": gold, "convention": convention})


def _missing_database(row: dict[str, object]) -> str | None:
    database = row.get("db")
    if not isinstance(database, str) or os.path.isfile(database):
        return None
    return f"db {database!r:.200} is no file; correct the path (relative ones start at the working folder)"


def _text(row: dict[str, object], field: str, *, filled: bool = False) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        keys = ", ".join(map(repr, row)) or "no keys"
        problem = f"is {value!r:.40}" if field in row else f"is missing, the row has {keys:.200}"
        raise ValueError(f"{field} {problem}; it must be text")
    if filled and not value.strip():
        raise ValueError(f"{field} is empty; fill it in or remove the row")
    return value


def _batches(rows: Iterable[tuple[int, Pair | None, int]]) -> Iterator[Batch]:
    indices: list[int] = []
    pairs: list[Pair] = []
    num_bytes = 0
    for index, pair, size in rows:
        num_bytes += size
        if pair is not None:
            indices.append(index)
            pairs.append(pair)
        # The size is bounded too: long completions must not add up to gigabytes that wait for workers.
        if len(pairs) == BATCH_ROWS or num_bytes > 2**22:
            yield Batch(indices, pairs, num_bytes)
            indices, pairs, num_bytes = [], [], 0
    if num_bytes:
        yield Batch(indices, pairs, num_bytes)


# ------------------------------------------------------------------------------------------------- grading

_grader: Grader | None = None


def _start_worker(reward: RewardConfig) -> None:
    global _grader
    # Ctrl-C in a terminal reaches every process of the group; only the parent decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker waits for work, and would for ever: it has both ends of that pipe, so a dead parent closes none.
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(parent.pid)
    _grader = build_grader(reward)


def _grade_in_worker(pairs: Sequence[Pair]) -> list[RewardResult]:
    assert _grader is not None, "the pool's initializer ran"
    return _grader.grade(pairs)


class _Workers:
    """Processes with one grader each; a single worker is this process. Results come in the order of the batches."""

    def __init__(self, reward: RewardConfig, num_workers: int) -> None:
        self._reward, self._num_workers = reward, num_workers
        self._own = build_grader(reward) if num_workers == 1 else None
        self._pool = None if self._own else self._start()

    def _start(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a forked copy of a process with threads may hold a lock that nobody will release.
        return ProcessPoolExecutor(self._num_workers, get_context("spawn"), _start_worker, (self._reward,))

    def grade(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[RewardResult]]]:
        if self._own is not None:
            for batch in batches:
                yield batch, self._own.grade(batch.pairs)
            return
        waiting: deque[tuple[Batch, Future[list[RewardResult]]]] = deque()
        for batch in batches:
            if len(waiting) == self._num_workers * BATCHES_PER_WORKER:
                yield self._finish(waiting)
            waiting.append((batch, self._submit(batch)))
        while waiting:
            yield self._finish(waiting)

    def _submit(self, batch: Batch) -> Future[list[RewardResult]]:
        assert self._pool is not None
        try:
            return self._pool.submit(_grade_in_worker, batch.pairs)
        except BrokenProcessPool:
            self._pool = self._start()
            return self._pool.submit(_grade_in_worker, batch.pairs)

    def _finish(self, waiting: deque[tuple[Batch, Future[list[RewardResult]]]]) -> tuple[Batch, list[RewardResult]]:
        batch, future = waiting.popleft()
        try:
            return batch, future.result()
        except BrokenProcessPool:
            pass
        try:
            # A worker itself (not its child) was killed from outside, and the batches of all workers were lost with it.
            return batch, self._submit(batch).result()
        except BrokenProcessPool as error:
            lost = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"the grading process died twice: {error}")
            return batch, [lost] * len(batch.pairs)

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            # Workers may still be grading, but nobody waits for that: every result that counts has been taken.
            for process in processes:
                process.kill()
