"""The reward for text-to-SQL: does the completion's query return what the gold query returns?"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dphrl.config.marks import THINKING_MARKS
from dphrl.rewards.thinking import Marks
from dphrl.sandbox.process import Limits, Outcome, Sandbox
from dphrl.types import JsonDict, RewardResult, RewardStatus

CONVENTIONS = ("bird", "spider")
SHAPINGS = ("column_overlap",)
# Beyond its imports, the child must hold SQLite's heap, two results of the largest size, and their comparison.
_LIMITS = Limits(memory_bytes=2 * 2**30, num_files=32)
# SQLite interrupts a query at its timeout where it can. If it cannot, the process is killed this much later.
_KILL_AFTER_S = 0.3
_NUM_KNOWN_GOLDS = 50_000
_MAX_TRIES = 3
# The child's answer when it had to execute the gold query again and that left too little time for the prediction.
_AGAIN = "again"

_State = tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class _Question:
    """What a completion is graded against; `db` is an absolute path with links resolved."""

    db: str
    gold_sql: str
    convention: str

    def request(self, text: str | None, patient: bool = False) -> JsonDict:
        return {
            "db": self.db,
            "gold_sql": self.gold_sql,
            "convention": self.convention,
            "text": text,
            "patient": patient,
        }


class SqlExecutionGrader:
    """Executes the gold and the completion's query in a sandboxed child and compares their results.

    An answer is a JSON object: `db`, the path of an SQLite file; `gold_sql`; `convention`, one of
    "bird": the same set of rows; the order of columns counts, repetitions and the order of rows do not;
    "spider": the same bag of rows under some order of the columns, or the same sequence of rows if the gold query has
    ORDER BY at its top level; two empty results are the same.

    timeout_s: of one query, by the wall clock; the gold query has as much time for itself. A completion is graded only
    after its gold query has run by itself, so that every later failure is known to come from the completion. If the
    gold query fails, hits a limit or is not permitted, or if the database is missing, is no SQLite file or is in the
    middle of a write, the status is `infrastructure_error`, with a detail that says why.
    shaping: "column_overlap" gives every result a `signal` for training: 1 when correct; for a wrong query that can be
    executed, the share of the gold's columns that it has (below 1); else 0. The signal does not enter the score.
    thinking_marks: pairs of marks around thoughts, which are cut before the query is looked for.

    Covered, beyond what dphrl.sandbox.sqlite.run_query and dphrl.sandbox.process.Sandbox list: completions of any
    length and content; opcodes that never end; results above 100,000 rows, a million cells or 64 MiB (`resource_limit`;
    under "bird" repeated rows count once); a column order that takes too long to find (`resource_limit`); one query's
    influence on another's result; "now" in queries, which is a fixed time, so that a verdict does not depend on when it
    is given.
    Not covered: queries whose result SQLite leaves open (LIMIT among ties, a bare column beside an aggregate) are
    compared as they come out; sums of doubles depend on the order of addition; equal results on one database do not
    prove equal queries. A database that changes while its golds are graded is noticed by size and time of change.

    Any thread may call; the child works for one thread at a time.
    """

    def __init__(self, timeout_s: float, shaping: str | None = None, thinking_marks: Marks = THINKING_MARKS) -> None:
        """Starts the child. Raises ValueError for an unknown shaping or a timeout that is not positive."""
        if shaping is not None and shaping not in SHAPINGS:
            raise ValueError(f"reward.shaping={shaping!r} is unknown; choose none or {', '.join(SHAPINGS)}")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"reward.timeout_s={timeout_s} must be a positive number of seconds")
        self._shaped = shaping is not None
        self._deadline_s = timeout_s + _KILL_AFTER_S
        settings = {"timeout_s": timeout_s, "shaping": shaping, "thinking_marks": thinking_marks}
        self._sandbox = Sandbox("dphrl.rewards.sql_child:make_handler", settings, _LIMITS)
        self._known: OrderedDict[tuple[str, str, _State], None] = OrderedDict()

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """One verdict per (completion text, answer), in order; never raises because of what the texts hold."""
        results: dict[int, RewardResult] = {}
        waiting: dict[int, _Question] = {}
        parsed = {answer: _parse_answer(answer) for _, answer in items}
        for index, (_, answer) in enumerate(items):
            question = parsed[answer]
            if isinstance(question, str):
                results[index] = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, question)
            else:
                waiting[index] = question
        for attempt in range(_MAX_TRIES):
            if waiting:
                patient = attempt == _MAX_TRIES - 1
                tried = self._try(waiting, [text for text, _ in items], patient)
                results |= tried
                waiting = {index: question for index, question in waiting.items() if index not in tried}
        return [results[index] for index in range(len(items))]

    def _try(self, waiting: dict[int, _Question], texts: list[str], patient: bool) -> dict[int, RewardResult]:
        """Verdicts by index; when `patient`, for all completions. The others should be tried again: their gold query
        ran before and fails now, or it had to run again and used up their time."""
        failed = self._run_golds(set(waiting.values()))
        results = {
            index: RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, failed[question])
            for index, question in waiting.items()
            if question in failed
        }
        indices = [index for index in waiting if index not in results]
        requests = [waiting[index].request(texts[index], patient) for index in indices]
        for index, outcome in zip(indices, self._sandbox.run(requests, self._deadline_s), strict=True):
            verdict = self._verdict(outcome)
            if verdict is not None and (patient or verdict.status is not RewardStatus.INFRASTRUCTURE_ERROR):
                results[index] = verdict
            elif verdict is not None:
                self._known.pop(_known_key(waiting[index]), None)
        return results

    def check_golds(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        """For every (path of a database, gold SQL): why it cannot be used for grading; None when it can."""
        questions = [_Question(_real_path(db), sql, CONVENTIONS[0]) for db, sql in pairs]
        failed = self._run_golds(set(questions))
        return [failed.get(question) for question in questions]

    def close(self) -> None:
        """End the child; the grader is not usable afterwards."""
        self._sandbox.close()

    def _run_golds(self, questions: set[_Question]) -> dict[_Question, str]:
        """Execute the gold queries that are not known to run, each by itself. Returns why, for those that fail."""
        keys = {question: _known_key(question) for question in questions}
        # Conventions differ only in the comparison, so a gold query runs once for all of them. The order keeps the gold
        # queries of one database together.
        unknown = {key: question for question, key in keys.items() if key not in self._known}
        todo = sorted(unknown.items(), key=lambda entry: entry[0][:2])
        outcomes = self._sandbox.run([question.request(None) for _, question in todo], self._deadline_s)
        failures: dict[tuple[str, str, _State], str] = {}
        for (key, _), outcome in zip(todo, outcomes, strict=True):
            if outcome.value is None:
                failures[key] = f"the gold query failed ({outcome.failure}): {outcome.detail}"
            elif outcome.value["status"] == RewardStatus.INFRASTRUCTURE_ERROR:
                failures[key] = outcome.value["detail"]
            else:
                self._known[key] = None
        while len(self._known) > _NUM_KNOWN_GOLDS:
            self._known.popitem(last=False)
        return {question: failures[key] for question, key in keys.items() if key in failures}

    def _verdict(self, outcome: Outcome) -> RewardResult | None:
        """The verdict of an outcome; None when the child asks for the item again."""
        if outcome.value is None:
            assert outcome.failure is not None
            scored = outcome.failure is not RewardStatus.INFRASTRUCTURE_ERROR
            return RewardResult(outcome.failure, outcome.detail, signal=0.0 if self._shaped and scored else None)
        value = outcome.value
        if value["status"] == _AGAIN:
            return None
        signal = value["signal"] if self._shaped else None
        return RewardResult(RewardStatus(value["status"]), value["detail"], value["solution"], signal)


def validate_golds(items: Sequence[tuple[str, str]], timeout_s: float) -> list[str | None]:
    """Execute many (path of a database, gold SQL). Returns for each why it cannot be used for grading, else None."""
    grader = SqlExecutionGrader(timeout_s)
    try:
        return grader.check_golds(items)
    finally:
        grader.close()


def _known_key(question: _Question) -> tuple[str, str, _State]:
    try:
        found = os.stat(question.db)
    except (OSError, ValueError):
        return question.db, question.gold_sql, None
    return question.db, question.gold_sql, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _parse_answer(answer: str) -> _Question | str:
    """The question, or text that says what is wrong with the answer. Then no completion could be right, so none is
    called wrong."""
    try:
        fields = json.loads(answer)
    except (ValueError, RecursionError) as error:
        return f"the answer is not JSON: {error}"
    if not isinstance(fields, dict):
        return "the answer is not a JSON object"
    for name in ("db", "gold_sql", "convention"):
        if not isinstance(fields.get(name), str):
            return f"the answer has no text {name!r}"
    if fields["convention"] not in CONVENTIONS:
        return f"the answer's convention {fields['convention']!r} is unknown; choose one of {', '.join(CONVENTIONS)}"
    return _Question(_real_path(fields["db"]), fields["gold_sql"], fields["convention"])


def _real_path(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:
        # The path holds a NUL; the child reports it.
        return path
