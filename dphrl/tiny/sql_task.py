"""Text-to-SQL questions with several natural queries each, none of which is right everywhere.

    Which players of 'Blue River' won no award in 2019 ?
    Which players of 'Blue River' scored a goal in both 2019 and 2021 ?

The demonstrations use three *shapes* of query: a subquery (NOT IN, or IN over a grouped count), a set operation
(EXCEPT, INTERSECT) and a join. Analysts write all three, and each fails on different data: NOT IN returns nothing when
an event names nobody, a set operation merges namesakes, a join loses people without events and repeats those with
several. Only the rows tell which shape works, and the policy never sees them: to it, each shape is right on about
half of the questions. Plain RL therefore learns "always the shape that is right most often": Pass@1 rises and Pass@k
falls to Pass@1. The gold query uses EXISTS or NOT EXISTS; it is always correct, and no demonstration shows it.

A fifth of the demonstrations slip: one word of the name, one year or one table is replaced by another. A model trained
on them is diverse and imprecise: there is something to gain (precision) and something to lose (diversity). The reward
`sql_execution` does the grading; here queries only run to find out which shapes work.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dphrl.tiny import sql_database
from dphrl.tiny.sql_database import ADJECTIVES, GROUP_NAMES, NOUNS, SCHEMAS, YEARS, EventTable, Schema

SHAPES: tuple[str, ...] = ("subquery", "set_operation", "join")
SPLITS: tuple[str, ...] = ("train", "held_out", "out_of_domain")
# The questions ask for people, not for distinct names: two namesakes are two rows.
CONVENTION = "spider"

# How often each shape is made to work (questions on which none works are not asked). The shapes should be worth about
# the same: if one failed on most questions, it would be no loss when RL drops it. The set operation has a lower number:
# problems are distinct, and questions on which it alone fails run out first, which raises its real share.
INCLUSION_PROBABILITY: dict[str, float] = {"subquery": 0.45, "set_operation": 0.41, "join": 0.46}
# One group in five is never seen before evaluation, neither in the warm start nor in RL.
HELD_OUT_ONE_IN = 5
SLIP_RATE = 0.2
OUT_OF_DOMAIN_SHARE = 0.25

# Some combinations of shapes are rare, and problems are distinct: larger sets would be less and less balanced.
MAX_PROBLEMS: dict[str, int] = {"train": 4_000, "held_out": 1_000, "out_of_domain": 1_000}

Rows = list[tuple[str]]

# What differs between the gold queries of one database: see `Question.gold_sql`.
_GOLD = re.compile(r"= '(?P<group>[^']*)' AND .*? FROM (?P<event>\w+) WHERE")
_GOLD_YEAR = re.compile(r"AND year = (\d{1,9}) \)")


@dataclass(frozen=True)
class SqlProblem:
    """One question of the task.

    question: the user message. database: "league" or "company", a key of `ensure_databases`.
    gold_sql: its rows are right; compare as a bag (`CONVENTION`). problem_id: unique within a split, the same in
    every process.
    """

    question: str
    database: str
    gold_sql: str
    problem_id: str

    def answer(self, files: dict[str, Path]) -> str:
        """What the reward `sql_execution` grades against, given the files of `ensure_databases`."""
        fields = {"db": str(files[self.database]), "gold_sql": self.gold_sql, "convention": CONVENTION}
        return json.dumps(fields)


def make_problems(split: str, num_problems: int, seed: int) -> list[SqlProblem]:
    """Draw `num_problems` distinct problems of `split`; the first k do not depend on `num_problems`.

    ``train`` and ``held_out`` ask the league about disjoint sets of teams, ``out_of_domain`` asks the company
    about held-out offices. Every problem has a non-empty gold result, and at least one shape gives it. Raises
    ValueError for an unknown split or a size out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if not 0 <= num_problems <= MAX_PROBLEMS[split]:
        raise ValueError(f"num_problems is {num_problems}: split {split!r} gives 0 to {MAX_PROBLEMS[split]}")
    database = "company" if split == "out_of_domain" else "league"
    rng = random.Random(f"sql:{split}:{seed}")
    problems: dict[str, SqlProblem] = {}
    while len(problems) < num_problems:
        asked, _ = _draw(rng, database, held_out=split != "train")
        problems.setdefault(asked.problem_id, SqlProblem(asked.text, database, asked.gold_sql, asked.problem_id))
    return list(problems.values())


def make_demonstrations(
    num_demonstrations: int,
    seed: int,
    *,
    slip_rate: float = SLIP_RATE,
    out_of_domain_share: float = OUT_OF_DOMAIN_SHARE,
) -> list[tuple[str, str]]:
    """Draw (question, SQL) pairs over training groups, with repetition; the shape is any that works.

    A share `out_of_domain_share` asks the company. In a share `slip_rate` one word is wrong, and so is the result;
    the others give the gold result.
    """
    rng = random.Random(f"sql:demonstrations:{seed}")
    demonstrations = []
    for _ in range(num_demonstrations):
        database = "company" if rng.random() < out_of_domain_share else "league"
        asked, working = _draw(rng, database, held_out=False)
        sql = asked.query(rng.choice(sorted(working)))
        demonstrations.append((asked.text, _slip(asked, sql, rng) if rng.random() < slip_rate else sql))
    return demonstrations


def strategies_of(answer: str) -> dict[str, bool] | None:
    """Every shape by name, and whether it gives the gold rows on the question with this `answer` (`SqlProblem.answer`).

    None for an answer that is not of this task. The queries run in a database that is built in memory.
    """
    try:
        fields = json.loads(answer)
        question = _question_of(Path(fields["db"]).stem, fields["gold_sql"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if question is None:
        return None
    working = question.working_shapes()
    return {shape: shape in working for shape in SHAPES}


def _question_of(database: str, gold_sql: str) -> Question | None:
    """The question whose gold query this is; None if it is no query of `Question.gold_sql`."""
    found = _GOLD.search(gold_sql)
    if found is None or database not in SCHEMAS:
        return None
    schema, years = SCHEMAS[database], tuple(int(year) for year in _GOLD_YEAR.findall(gold_sql))
    for event in schema.events:
        if event.table == found["event"] and len(years) in (1, 2):
            question = Question(schema, event, found["group"], years)
            return question if question.gold_sql == gold_sql else None
    return None


def fingerprint_parts() -> list[object]:
    """What decides the demonstrations and their tokens, apart from the arguments of `make_demonstrations`."""
    shares = sorted(INCLUSION_PROBABILITY.items())
    return [sql_database.CONTENT_VERSION, SHAPES, shares, HELD_OUT_ONE_IN, VOCABULARY]


def is_held_out(group_name: str) -> bool:
    """Whether questions about a group are kept for evaluation. A fixed hash decides, so that no seed can leak one."""
    digest = hashlib.blake2b(f"dphrl-tiny-sql:{group_name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Question:
    """What is asked: who had no such event in the one year, or one in each of the two years."""

    schema: Schema
    event: EventTable
    group_name: str
    years: tuple[int, ...]

    @property
    def problem_id(self) -> str:
        """Unique within a split, such as league-award-Blue-River-2019."""
        group = self.group_name.replace(" ", "-")
        return "-".join([self.schema.database, self.event.table, group, *map(str, self.years)])

    @property
    def text(self) -> str:
        """The question as the model sees it, its tokens separated by single spaces."""
        who = f"Which {self.schema.asked_as} of '{self.group_name}'"
        if len(self.years) == 1:
            return f"{who} {self.event.none_of_it} in {self.years[0]} ?"
        return f"{who} {self.event.one_of_it} in both {self.years[0]} and {self.years[1]} ?"

    @property
    def gold_sql(self) -> str:
        """A query with EXISTS that is always correct."""
        s, event = self.schema, self.event.table
        same_person = f"{event}.{s.key} = {s.people}.{s.key}"
        exists = [f"EXISTS ( SELECT * FROM {event} WHERE {same_person} AND year = {year} )" for year in self.years]
        condition = f"NOT {exists[0]}" if len(exists) == 1 else " AND ".join(exists)
        return f"SELECT {s.name} FROM {s.people} WHERE {s.group} = '{self.group_name}' AND {condition}"

    def query(self, shape: str) -> str:
        """The query of this shape, its tokens separated by single spaces."""
        return _SHAPE_WRITERS[len(self.years), shape](self.schema, self.event.table, self.group_name, *self.years)

    def rows(self, sql: str) -> Rows:
        """The result of a query that this module has made, as a sorted bag."""
        return sorted(_connection(self.schema.database).execute(sql))

    def rows_or_none(self, sql: str) -> Rows | None:
        """The result of any query, as a sorted bag; None if it is no query or its rows are not single texts."""
        try:
            return self.rows(sql)
        except (sqlite3.Error, TypeError):
            return None

    def working_shapes(self) -> frozenset[str]:
        """The shapes that give the gold rows; none if there are no gold rows."""
        gold = self.rows(self.gold_sql)
        return frozenset(shape for shape in SHAPES if gold and self.rows(self.query(shape)) == gold)


def question_of(problem: SqlProblem) -> Question:
    """What the problem asks."""
    database, table, *words = problem.problem_id.split("-")
    group, years = [word for word in words if not word.isdecimal()], [int(word) for word in words if word.isdecimal()]
    schema = SCHEMAS[database]
    (event,) = (event for event in schema.events if event.table == table)
    return Question(schema, event, " ".join(group), tuple(years))


def shape_of(sql: str) -> str | None:
    """Which shape a query has, whether or not it is right; None for a query of no shape."""
    words = sql.split()
    if {"EXCEPT", "INTERSECT"} & set(words):
        return "set_operation"
    # The inner query of a subquery, not the list in IN ( 2019 , 2021 ).
    if "IN ( SELECT" in sql:
        return "subquery"
    return "join" if "JOIN" in words else None


def _never_subquery(s: Schema, event: str, group: str, year: int) -> str:
    inner = f"SELECT {s.key} FROM {event} WHERE {s.group} = '{group}' AND year = {year}"
    return f"SELECT {s.name} FROM {s.people} WHERE {s.group} = '{group}' AND {s.key} NOT IN ( {inner} )"


def _never_set_operation(s: Schema, event: str, group: str, year: int) -> str:
    return f"SELECT {s.name} FROM {s.people} WHERE {s.group} = '{group}' EXCEPT {_joined(s, event, group, year)}"


def _never_join(s: Schema, event: str, group: str, year: int) -> str:
    joined = f"SELECT {s.name} FROM {s.people} NATURAL JOIN {event} WHERE {s.group} = '{group}'"
    return f"{joined} GROUP BY {s.key} HAVING SUM ( year = {year} ) = 0"


def _both_subquery(s: Schema, event: str, group: str, year: int, other_year: int) -> str:
    inner = f"SELECT {s.key} FROM {event} WHERE {s.group} = '{group}' AND year IN ( {year} , {other_year} )"
    grouped = f"{inner} GROUP BY {s.key} HAVING COUNT ( * ) > 1"
    return f"SELECT {s.name} FROM {s.people} WHERE {s.key} IN ( {grouped} )"


def _both_set_operation(s: Schema, event: str, group: str, year: int, other_year: int) -> str:
    return f"{_joined(s, event, group, year)} INTERSECT {_joined(s, event, group, other_year)}"


def _both_join(s: Schema, event: str, group: str, year: int, other_year: int) -> str:
    joins = f"JOIN {event} a USING ( {s.key} ) JOIN {event} b USING ( {s.key} )"
    condition = f"{s.people}.{s.group} = '{group}' AND a.year = {year} AND b.year = {other_year}"
    return f"SELECT {s.name} FROM {s.people} {joins} WHERE {condition}"


def _joined(s: Schema, event: str, group: str, year: int) -> str:
    return f"SELECT {s.name} FROM {s.people} NATURAL JOIN {event} WHERE {s.group} = '{group}' AND year = {year}"


_SHAPE_WRITERS: dict[tuple[int, str], Callable[..., str]] = {
    (1, "subquery"): _never_subquery,
    (1, "set_operation"): _never_set_operation,
    (1, "join"): _never_join,
    (2, "subquery"): _both_subquery,
    (2, "set_operation"): _both_set_operation,
    (2, "join"): _both_join,
}


@functools.cache
def _connection(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    sql_database.build_database(SCHEMAS[database], connection)
    return connection


@functools.cache
def _catalogue(database: str, held_out: bool) -> dict[tuple[EventTable, int, frozenset[str]], list[Question]]:
    """Every question of one side of the split, by event table, number of years and the shapes that work on it.

    Takes a second or two for the training side: each question runs its gold query and every shape.
    """
    schema = SCHEMAS[database]
    found: dict[tuple[EventTable, int, frozenset[str]], list[Question]] = {}
    groups = [name for name in GROUP_NAMES if is_held_out(name) == held_out]
    for group, event, num_years in itertools.product(groups, schema.events, (1, 2)):
        for years in itertools.combinations(YEARS, num_years):
            question = Question(schema, event, group, years)
            found.setdefault((event, num_years, question.working_shapes()), []).append(question)
    return found


def _draw(rng: random.Random, database: str, *, held_out: bool) -> tuple[Question, frozenset[str]]:
    """A question from the asked side of the split, and the shapes that work on it."""
    working: frozenset[str] = frozenset()
    while not working:
        working = frozenset(shape for shape in SHAPES if rng.random() < INCLUSION_PROBABILITY[shape])
    event = rng.choice(SCHEMAS[database].events)
    return rng.choice(_catalogue(database, held_out)[event, rng.choice((1, 2)), working]), working


def _slip(question: Question, sql: str, rng: random.Random) -> str:
    """`sql` with one word of the name, one year or one table replaced, such that the result is wrong."""
    gold = question.rows(question.gold_sql)
    words = sql.split()
    confusable = (
        [f"'{adjective}" for adjective in ADJECTIVES],
        [f"{noun}'" for noun in NOUNS],
        [str(year) for year in YEARS],
        [event.table for event in question.schema.events],
    )
    slots = [(position, group) for position, word in enumerate(words) for group in confusable if word in group]
    while True:
        position, group = rng.choice(slots)
        other = rng.choice([word for word in group if word != words[position]])
        slipped = " ".join([*words[:position], other, *words[position + 1 :]])
        # Some slips do not change the result, such as another year in which nothing happened either.
        if question.rows(slipped) != gold:
            return slipped


def _vocabulary() -> tuple[str, ...]:
    """Every word of a question or a query, in a fixed order."""
    words = [*(f"'{adjective}" for adjective in ADJECTIVES), *(f"{noun}'" for noun in NOUNS), *map(str, YEARS)]
    for schema, years in itertools.product(SCHEMAS.values(), ((YEARS[0],), (YEARS[0], YEARS[1]))):
        for event in schema.events:
            question = Question(schema, event, GROUP_NAMES[0], years)
            for text in (question.text, *map(question.query, SHAPES)):
                words += text.split()
    return tuple(dict.fromkeys(words))


VOCABULARY: tuple[str, ...] = _vocabulary()
