"""Loads questions about SQLite databases, with gold queries: Spider, BIRD, or rows of your own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dphrl.config.data import DatasetConfig
from dphrl.config.layouts import LAYOUTS
from dphrl.data.messages import read_question
from dphrl.data.problems import Fault, Problem, SqlContext
from dphrl.data.source import Row, expand_path, find_field, has_field, load_rows, read_text
from dphrl.data.sql_schema import Schema, read_schema

QUESTION_FIELDS = ("question",)
GOLD_FIELDS = ("gold_sql", "query", "SQL", "sql")
DATABASE_FIELDS = ("db_id", "db")
EVIDENCE_FIELDS = ("evidence", "external_knowledge")
DATABASE_FOLDERS = ("database", "dev_databases", "train_databases", "dbs")
# Each chunk starts a child process (half a second), and progress is reported between chunks.
_CHUNK = 400


def load_text_to_sql(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """One problem for each row; its answer is a JSON string with db (path), gold_sql and convention.

    A row whose gold query is empty, or whose database is missing or cannot be read, has a fault. `seed` has no effect.
    Raises ValueError, with file and line, for a row that lacks question or database.
    """
    layout = LAYOUTS[dataset.layout] if dataset.layout else None
    question_fields = (layout.prompt,) if layout else QUESTION_FIELDS
    gold_fields = layout.answer_fields if layout else GOLD_FIELDS
    rows = load_rows(dataset, [*question_fields, *gold_fields, *DATABASE_FIELDS, *EVIDENCE_FIELDS])
    question_field = find_field(rows, dataset, "prompt_field", question_fields)
    gold_field = find_field(rows, dataset, "answer_field", gold_fields)
    database_field = find_field(rows, dataset, "database_field", DATABASE_FIELDS)
    evidence_fields: Sequence[str] = EVIDENCE_FIELDS
    if dataset.evidence_field is not None:
        evidence_fields = [find_field(rows, dataset, "evidence_field", ())]
    folder = _database_folder(dataset)
    schemas: dict[str, Schema | Fault] = {}
    problems = []
    for index, row in enumerate(rows):
        question, earlier = read_question(row, question_field, dataset)
        gold = read_text(row, gold_field, dataset, "answer_field")
        database = _required(row, database_field, dataset, "database_field")
        if database not in schemas:
            schemas[database] = _schema_or_fault(folder, database, dataset.num_sample_rows)
        schema = schemas[database]
        fault = schema if isinstance(schema, Fault) else None if gold else Fault("the gold query is empty")
        context = None
        if isinstance(schema, Schema):
            context = SqlContext(schema, _evidence(row, evidence_fields, dataset), dataset.max_schema_tokens)
        db = str(context.schema.path) if context else database
        answer = json.dumps({"db": db, "gold_sql": gold, "convention": dataset.convention})
        problems.append(
            Problem(
                *(f"{dataset.name}-{index}", question, answer, dataset.name, dataset.kind, context),
                location=row.location,
                earlier=earlier,
                fault=fault,
            )
        )
    return problems


def query_faults(
    problems: Sequence[Problem], timeout_s: float, advance: Callable[[int], object] = lambda count: None
) -> list[Fault | None]:
    """Run every gold query once: if it does not run, no completion can be graded. Returns what is wrong with each.

    timeout_s: for one query. advance: called with the number of problems newly checked.
    """
    # Imported here, not at the top: the parser behind it takes a while to import, and few runs use SQL.
    from dphrl.rewards.sql_execution import validate_golds

    faults: list[Fault | None] = []
    reasons: dict[tuple[str, str], str | None] = {}
    for start in range(0, len(problems), _CHUNK):
        chunk = problems[start : start + _CHUNK]
        golds = [_gold(problem) for problem in chunk]
        # Paraphrases of a question share a gold query.
        new = [gold for gold in dict.fromkeys(golds) if gold is not None and gold not in reasons]
        if new:
            reasons |= zip(new, validate_golds(new, timeout_s), strict=True)
        for problem, gold in zip(chunk, golds, strict=True):
            reason = None if gold is None else reasons[gold]
            faults.append(problem.fault if reason is None else Fault(f"the gold query does not run: {reason}"))
        advance(len(chunk))
    return faults


def _gold(problem: Problem) -> tuple[str, str] | None:
    """(path of the database, query); None for a query that is known not to run."""
    if problem.fault is not None:
        return None
    answer = json.loads(problem.answer)
    return answer["db"], answer["gold_sql"]


def _required(row: Row, field: str, dataset: DatasetConfig, setting: str) -> str:
    text = read_text(row, field, dataset, setting)
    if not text:
        raise ValueError(f"{row.location}: {field!r} is empty; remove the row")
    return text


def _evidence(row: Row, fields: Sequence[str], dataset: DatasetConfig) -> str:
    there = [field for field in fields if has_field(row.fields, field)]
    return next(filter(None, (read_text(row, field, dataset, "evidence_field") for field in there)), "")


def _database_folder(dataset: DatasetConfig) -> Path:
    if dataset.databases is not None:
        folder = Path(expand_path(dataset.databases))
        if not folder.is_dir():
            raise ValueError(f"data set {dataset.name}: databases {str(folder)!r} is no folder; correct it")
        return Path(os.path.abspath(folder))
    path = Path(os.path.abspath(expand_path(dataset.path)))
    beside = path if path.is_dir() else path.parent
    for name in DATABASE_FOLDERS:
        if (beside / name).is_dir():
            return beside / name
    raise ValueError(
        f"data set {dataset.name}: no folder {', '.join(DATABASE_FOLDERS)} in {beside}; set databases to the folder "
        "of its SQLite files"
    )


def _schema_or_fault(folder: Path, database: str, num_sample_rows: int) -> Schema | Fault:
    candidates = [folder / database / f"{database}.sqlite", folder / f"{database}.sqlite", folder / database]
    path = next((path for path in candidates if path.is_file()), None)
    remedy = "correct databases, or add the files"
    if path is None:
        return Fault(f"database {database!r} is neither {candidates[0]} nor {candidates[1]}", remedy)
    try:
        return read_schema(path, num_sample_rows)
    except ValueError as error:
        return Fault(str(error), remedy)
