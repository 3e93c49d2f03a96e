"""Loads questions about SQLite databases, with gold queries: Spider, BIRD, or rows of your own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dphrl.config.data import DatasetConfig
from dphrl.config.layouts import LAYOUTS
from dphrl.data.messages import read_question
from dphrl.data.problems import Problem, SqlContext
from dphrl.data.source import Row, expand_path, find_field, has_field, load_rows, read_text
from dphrl.data.sql_schema import Schema, read_schema

logger = logging.getLogger(__name__)

QUESTION_FIELDS = ("question",)
GOLD_FIELDS = ("gold_sql", "query", "SQL", "sql")
DATABASE_FIELDS = ("db_id", "db")
EVIDENCE_FIELDS = ("evidence", "external_knowledge")
DATABASE_FOLDERS = ("database", "dev_databases", "train_databases", "dbs")
_MAX_LISTED = 20
# Each chunk starts a child process (half a second), and progress is reported between chunks.
_CHUNK = 400


def load_text_to_sql(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """One problem for each row; its answer is a JSON string with db (path), gold_sql and convention.

    `seed` has no effect. Raises ValueError, with file and line, for a row that lacks question, database or gold query;
    and one ValueError for all databases that are missing or cannot be read. With `invalid_gold: drop` the rows of such
    databases are left out instead, and a warning counts them.
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
    schemas: dict[str, Schema | str] = {}
    problems, bad = [], []
    for index, row in enumerate(rows):
        question, earlier = read_question(row, question_field, dataset)
        gold = _required(row, gold_field, dataset, "answer_field")
        database = _required(row, database_field, dataset, "database_field")
        if database not in schemas:
            schemas[database] = _schema_or_reason(folder, database, dataset.num_sample_rows)
        schema = schemas[database]
        if isinstance(schema, str):
            bad.append(f"{row.location}: {schema}")
            continue
        answer = json.dumps({"db": str(schema.path), "gold_sql": gold, "convention": dataset.convention})
        context = SqlContext(schema, _evidence(row, evidence_fields, dataset), dataset.max_schema_tokens)
        problem_id = f"{dataset.name}-{index}"
        problems.append(
            Problem(problem_id, question, answer, dataset.name, dataset.kind, context, row.location, earlier)
        )
    if bad:
        _refuse(bad, len(rows), "have no readable database", "correct databases, add the files", dataset)
        logger.warning("Data set %s: %d of %d rows dropped, no readable database", dataset.name, len(bad), len(rows))
    return problems


def check_golds(
    problems: Sequence[Problem],
    dataset: DatasetConfig,
    timeout_s: float,
    advance: Callable[[int], object] | None = None,
) -> tuple[list[Problem], int]:
    """Run every gold query once: if it does not run, no completion can be graded. Returns the problems that are left
    and the number that was dropped (0 unless `invalid_gold: drop`).

    timeout_s: for one query. advance: called with the number of problems newly checked. Raises ValueError, one line
    with file and line of the rows, when gold queries fail and may not be dropped, or when none is left.
    """
    # Imported here, not at the top: the parser behind it takes a while to import, and few runs use SQL.
    from dphrl.rewards.sql_execution import validate_golds

    kept: list[Problem] = []
    bad = []
    reasons: dict[tuple[str, str], str | None] = {}
    for start in range(0, len(problems), _CHUNK):
        chunk = problems[start : start + _CHUNK]
        golds = [_gold(problem) for problem in chunk]
        # Paraphrases of a question share a gold query.
        new = [gold for gold in dict.fromkeys(golds) if gold not in reasons]
        reasons |= zip(new, validate_golds(new, timeout_s), strict=True)
        for problem, gold in zip(chunk, golds, strict=True):
            if (reason := reasons[gold]) is None:
                kept.append(problem)
            else:
                bad.append(f"{problem.location}: {reason}")
        if advance is not None:
            advance(len(chunk))
    if bad:
        _refuse(bad, len(problems), "have a gold query that does not run", "mend or remove them", dataset)
    return kept, len(bad)


def _gold(problem: Problem) -> tuple[str, str]:
    answer = json.loads(problem.answer)
    return answer["db"], answer["gold_sql"]


def _refuse(bad: Sequence[str], num_rows: int, fault: str, remedy: str, dataset: DatasetConfig) -> None:
    """Raises ValueError unless the bad rows may be dropped and other rows are left."""
    if dataset.invalid_gold == "drop" and len(bad) < num_rows:
        return
    listed = "; ".join(" ".join(line.split()) for line in bad[:_MAX_LISTED])
    more = f"; and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else ""
    drop = "" if dataset.invalid_gold == "drop" else ", or set its invalid_gold: drop"
    raise ValueError(f"data set {dataset.name}: {len(bad)} of {num_rows} rows {fault}: {listed}{more}; {remedy}{drop}")


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


def _schema_or_reason(folder: Path, database: str, num_sample_rows: int) -> Schema | str:
    candidates = [folder / database / f"{database}.sqlite", folder / f"{database}.sqlite", folder / database]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return f"database {database!r} is neither {candidates[0]} nor {candidates[1]}"
    try:
        return read_schema(path, num_sample_rows)
    except ValueError as error:
        return str(error)
