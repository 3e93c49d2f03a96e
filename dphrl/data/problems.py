"""A problem: what a row of any kind of data set becomes before a prompt is made from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dphrl.data.messages import Message
from dphrl.data.sql_schema import Schema


@dataclass(frozen=True, slots=True)
class SqlContext:
    """What a text-to-SQL prompt shows besides the question.

    schema: one object for all problems of a database. evidence: "" where the row has none. max_schema_tokens: None
    sets no limit besides that of the whole prompt.
    """

    schema: Schema
    evidence: str = ""
    max_schema_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why no completion can be graded against a row's gold, and what the user can do about all rows of that kind."""

    reason: str
    remedy: str = "mend or remove the rows"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its gold answer.

    problem_id: "<data set>-<row>", unique within a data set because rows are numbered (from 0).
    answer: only the reward interprets it; never empty after `dphrl.data.golds.check_golds`.
    earlier: the turns of a chat before the question, such as a system turn or examples.
    location: "file:line" or "file[index]" of its row, "" for a problem that comes from no file.
    fault: what the loader found wrong with the gold, so that all such rows are refused or dropped together.
    """

    problem_id: str
    text: str
    answer: str
    dataset: str
    kind: str = "math"
    sql: SqlContext | None = None
    location: str = field(default="", compare=False)
    earlier: tuple[Message, ...] = ()
    fault: Fault | None = None
