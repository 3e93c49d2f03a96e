"""The SQL reward around its comparison: whose fault a failure is, solutions, the finer signal, threads."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dphrl.config.data import RewardConfig
from dphrl.rewards.base import build_grader
from dphrl.rewards.sql_execution import CONVENTIONS, SqlExecutionGrader, validate_golds
from dphrl.types import RewardStatus

DATA = Path(os.environ.get("DPHRL_DATA") or "../shared/data").resolve()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="labelled cases are not here: set DPHRL_DATA")

SCHEMA = """
    CREATE TABLE singer(id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER);
    INSERT INTO singer VALUES (1, 'Ann', 'France', 30), (2, 'Bob', 'France', 25), (3, 'Cid', 'Japan', 41);
"""
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c"
# One opcode, which only the end of its process stops.
UNINTERRUPTIBLE = "SELECT instr(printf('%.*c', 9000000, 'a'), printf('%.*c', 4000000, 'a') || 'b')"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sql") / "music.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
    connection.close()
    return str(path)


@pytest.fixture(scope="module")
def grader() -> Iterator[SqlExecutionGrader]:
    grader = build_grader(RewardConfig(name="sql_execution", timeout_s=5))
    assert isinstance(grader, SqlExecutionGrader)
    yield grader
    grader.close()


def answer(db: object, gold: str, convention: str = "bird") -> str:
    return json.dumps({"db": str(db), "gold_sql": gold, "convention": convention})


@pytest.mark.parametrize(
    ("gold", "detail"),
    [
        ("SELECT nothing_such FROM singer", "gold query failed (wrong): no such column"),
        ("SELECT FROM singer", "gold query failed (unparsable)"),
        ("DELETE FROM singer", "gold query failed (refused): DELETE"),
        ("SELECT random()", "gold query failed (refused): function random"),
        ("SELECT printf('%.*c', 99999999, 'x')", "gold query failed (resource_limit)"),
        (ENDLESS, "gold query failed (timeout)"),
        (UNINTERRUPTIBLE, "gold query failed (timeout)"),
        ("SELECT '\ud800'", "gold query failed (refused)"),
    ],
)  # fmt: skip
def test_a_gold_that_fails_is_nobody_s_zero(database: str, gold: str, detail: str) -> None:
    short = SqlExecutionGrader(timeout_s=0.5)
    try:
        results = short.grade([("SELECT 1", answer(database, gold)), ("SELECT 2", answer(database, "SELECT 2"))])
        assert results[0].status is RewardStatus.INFRASTRUCTURE_ERROR
        assert results[0].score is None
        assert detail in results[0].detail
        assert results[1].status is RewardStatus.CORRECT
    finally:
        short.close()


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"db": "x", "gold_sql": "SELECT 1"}', "no text 'convention'"),
        ('{"db": 1, "gold_sql": "SELECT 1", "convention": "bird"}', "no text 'db'"),
        ('{"db": "x", "gold_sql": "SELECT 1", "convention": "wikisql"}', "'wikisql' is unknown"),
        (answer("/nowhere/x.sqlite", "SELECT 1"), "/nowhere/x.sqlite"),
        (answer("/", "SELECT 1"), "not a regular file"),
        (answer(__file__, "SELECT 1"), "not an SQLite database"),
        (answer("a\x00b", "SELECT 1"), "null byte"),
    ],
)
def test_an_answer_that_cannot_be_used_is_nobody_s_zero(grader: SqlExecutionGrader, text: str, detail: str) -> None:
    (result,) = grader.grade([("SELECT 1", text)])
    assert result.status is RewardStatus.INFRASTRUCTURE_ERROR
    assert detail in result.detail


@pytest.mark.parametrize(
    "bomb",
    [
        UNINTERRUPTIBLE,
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT json_group_array(x) FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    ],
)
def test_a_prediction_cannot_take_its_gold_or_its_neighbours_down(database: str, bomb: str) -> None:
    short = SqlExecutionGrader(timeout_s=0.5)
    try:
        items = [
            ("SELECT count(*) FROM singer", answer(database, "SELECT 3")),
            (bomb, answer(database, "SELECT 3")),
        ] * 2
        statuses = [result.status for result in short.grade([*items, (bomb, answer(database, "SELECT 4"))])]
        assert statuses[0] == statuses[2] == RewardStatus.CORRECT
        assert {statuses[1], statuses[3], statuses[4]} <= {RewardStatus.TIMEOUT, RewardStatus.RESOURCE_LIMIT}
    finally:
        short.close()


def test_a_set_may_repeat_its_rows_beyond_the_limits(grader: SqlExecutionGrader, database: str) -> None:
    repeated = "SELECT a.name FROM singer a, " + ", ".join(f"singer b{number}" for number in range(11))
    items = [(repeated, answer(database, "SELECT name FROM singer", convention)) for convention in CONVENTIONS]
    statuses = [result.status for result in grader.grade(items)]
    assert statuses == [RewardStatus.CORRECT, RewardStatus.RESOURCE_LIMIT]
    (other,) = grader.grade([(repeated, answer(database, "SELECT name FROM singer WHERE id < 3"))])
    assert other.status is RewardStatus.WRONG


def test_a_changed_database_is_read_anew(grader: SqlExecutionGrader, tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    for number in (1, 2):
        path.unlink(missing_ok=True)
        with sqlite3.connect(path) as connection:
            connection.executescript(f"CREATE TABLE t{number}(a); INSERT INTO t{number} VALUES ({number})")
        connection.close()
        (result,) = grader.grade([(f"SELECT {number}", answer(path, f"SELECT a FROM t{number}"))])
        assert result.status is RewardStatus.CORRECT
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE t2 SET a = 3")
    connection.close()
    (result,) = grader.grade([("SELECT 2", answer(path, "SELECT a FROM t2"))])
    assert result.status is RewardStatus.WRONG


def test_solutions_count_distinct_queries(grader: SqlExecutionGrader, database: str) -> None:
    gold = answer(database, "SELECT name FROM singer WHERE country = 'France'")
    texts = [
        "SELECT name FROM singer WHERE country = 'France'",
        '```sql\nselect T1.NAME as n from Singer as T1 where T1.Country = "France";\n```',
        'SELECT s.name FROM singer s WHERE s.country = "France"',
        "SELECT name FROM singer WHERE country LIKE 'France'",
    ]
    solutions = [result.solution for result in grader.grade([(text, gold) for text in texts])]
    assert len(set(solutions[1:3])) == 1
    assert len(set(solutions)) == 3
    (wrong,) = grader.grade([("SELECT 1", gold)])
    assert wrong.solution == "SELECT 1"


def test_the_signal_is_finer_than_the_score(database: str) -> None:
    shaped = build_grader(RewardConfig(name="sql_execution", timeout_s=2, shaping="column_overlap"))
    gold = answer(database, "SELECT id, name FROM singer WHERE id < 3")
    texts = {
        "SELECT id, name FROM singer WHERE id < 3": 1.0,
        "SELECT id, age FROM singer WHERE id < 3": 0.5,
        "SELECT name, id FROM singer WHERE id < 3": 0.99,
        "SELECT id FROM singer": 0.0,
        "SELECT nothing_such FROM singer": 0.0,
        "no idea": 0.0,
    }
    try:
        results = shaped.grade([(text, gold) for text in texts])
        assert [result.signal for result in results] == list(texts.values())
        assert [result.score for result in results] == [1, 0, 0, 0, 0, 0]
        (broken,) = shaped.grade([("SELECT 1", answer(database, "SELECT x"))])
        assert broken.signal is None
    finally:
        shaped.close()


def test_validate_golds(database: str) -> None:
    reasons = validate_golds([(database, "SELECT 1"), (database, "SELECT x"), ("/nowhere", "SELECT 1")], timeout_s=1)
    assert reasons[0] is None
    assert "no such column" in (reasons[1] or "")
    assert "/nowhere" in (reasons[2] or "")


@pytest.mark.parametrize(
    ("timeout_s", "shaping"), [(0, None), (-1, None), (float("nan"), None), (float("inf"), None), (1, "rows")]
)
def test_bad_settings_are_refused(timeout_s: float, shaping: str | None) -> None:
    with pytest.raises(ValueError, match="reward"):
        SqlExecutionGrader(timeout_s, shaping)


def test_threads_may_share_a_grader(grader: SqlExecutionGrader, database: str) -> None:
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            results = grader.grade([(f"SELECT {number}", answer(database, f"SELECT {n}")) for n in range(4)])
            if [result.score for result in results] != [int(n == number) for n in range(4)]:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_data
def test_labelled_attacks(tmp_path: Path) -> None:
    short = SqlExecutionGrader(timeout_s=0.5)
    try:
        for line in (DATA / "labels/hostile_sql.jsonl").read_text().splitlines():
            row = json.loads(line)
            sql = row["sql"].replace("{TMP}", str(tmp_path))
            if repeat := row.get("sql_repeat"):
                sql = sql.replace(repeat["placeholder"], repeat["unit"] * repeat["n"])
            gold = answer(DATA / f"sql/dbs/{row['db']}.sqlite", "SELECT 1")
            started = time.monotonic()
            result, after = short.grade([(sql, gold), ("SELECT 1", gold)])
            assert time.monotonic() - started < 1.5, row["id"]
            assert after.status is RewardStatus.CORRECT
            assert result.status is not RewardStatus.INFRASTRUCTURE_ERROR, row["id"]
            if row["must"] == "refuse":
                assert result.status in (RewardStatus.REFUSED, RewardStatus.UNPARSABLE), row["id"]
        assert list(tmp_path.iterdir()) == []
    finally:
        short.close()
