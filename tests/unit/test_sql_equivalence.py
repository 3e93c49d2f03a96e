"""Equal and unequal queries under both conventions, on a small database; agreement with the labelled cases."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from dphrl.rewards.sql_execution import CONVENTIONS, SqlExecutionGrader
from dphrl.types import RewardStatus

DATA = Path(os.environ.get("DPHRL_DATA") or "../shared/data").resolve()
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="labelled cases are not here: set DPHRL_DATA")

SCHEMA = """
    CREATE TABLE singer(id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER, worth REAL, note);
    INSERT INTO singer VALUES
        (1, 'Ann', 'France', 30, 1.5, NULL), (2, 'Bob', 'France', 25, 2.0, ''), (3, 'Cid', 'Japan', 41, 0.1, 'x'),
        (4, 'Dee', 'Peru', 25, 0.2, x'78'), (5, 'Eve', 'Japan', NULL, 0.3, 7), (6, 'Ann', 'Peru', 30, 1.5, '7');
    CREATE TABLE song(song_id INTEGER PRIMARY KEY, singer_id INTEGER, title TEXT, sales INTEGER, released TEXT);
    INSERT INTO song VALUES
        (1, 1, 'Hey', 10, '2019-05-01'), (2, 1, 'Moon', 20, '2020-01-31'), (3, 3, 'Sun', 20, '2020-12-31'),
        (4, 4, 'It''s', 5, '2021-02-28'), (5, NULL, 'Lost', 0, NULL);
    CREATE TABLE empty(a INTEGER, b TEXT);
    CREATE TABLE wide(a, b, c, d); INSERT INTO wide VALUES (0,0,1,1), (0,1,0,1), (1,1,0,0), (1,0,1,0);
    CREATE TABLE "order"("group" TEXT, "two words" INTEGER); INSERT INTO "order" VALUES ('g', 1), ('h', 2);
    CREATE VIEW adults AS SELECT name, age FROM singer WHERE age >= 30;
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sql") / "music.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
        latin = (
            "INSERT INTO singer(id, name, country) VALUES (?, CAST(? AS TEXT), 'Chile')",
            [(7, b"Mu\xf1oz"), (8, b"Mu\xf2oz")],
        )
        connection.executemany(*latin)
    connection.close()
    return str(path)


@pytest.fixture(scope="module")
def grader() -> Iterator[SqlExecutionGrader]:
    grader = SqlExecutionGrader(timeout_s=5)
    yield grader
    grader.close()


def answer(db: object, gold: str, convention: str = "bird") -> str:
    return json.dumps({"db": str(db), "gold_sql": gold, "convention": convention})


# (gold, prediction, correct under bird, correct under spider)
EQUIVALENCE = [
    # Columns: order, number, repetition.
    ("SELECT name, age FROM singer", "SELECT age, name FROM singer", False, True),
    ("SELECT name, age FROM singer", "SELECT name, name FROM singer", False, False),
    ("SELECT name FROM singer", "SELECT name, age FROM singer", False, False),
    ("SELECT name, name FROM singer", "SELECT name FROM singer", False, False),
    ("SELECT name, age, name FROM singer", "SELECT name, name, age FROM singer", False, True),
    ("SELECT name AS a FROM singer", "SELECT name AS b FROM singer", True, True),
    ("SELECT a, b, c, d FROM wide", "SELECT d, c, b, a FROM wide", True, True),
    ("SELECT a, b, c, d FROM wide", "SELECT a, b, 1 - c, d FROM wide", False, False),
    ("SELECT a, b FROM wide", "SELECT b, a FROM wide", True, True),
    ("SELECT * FROM wide", "SELECT c, a, b, d FROM wide", False, True),
    ("SELECT id, age FROM singer WHERE age = 25",
     "SELECT CASE id WHEN 2 THEN 2 ELSE 25 END, CASE id WHEN 2 THEN 25 ELSE 4 END FROM singer WHERE age = 25",
     False, False),
    # Rows: repetition and order.
    ("SELECT country FROM singer", "SELECT DISTINCT country FROM singer", True, False),
    ("SELECT DISTINCT country FROM singer", "SELECT country FROM singer GROUP BY country", True, True),
    ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY name DESC", True, True),
    ("SELECT name FROM singer ORDER BY id", "SELECT name FROM singer ORDER BY id DESC", True, False),
    ("SELECT name FROM singer ORDER BY id", "SELECT name FROM singer", True, True),
    ("SELECT title FROM song ORDER BY title", "SELECT title FROM song", True, False),
    ("SELECT name, id FROM singer ORDER BY id", "SELECT id, name FROM singer ORDER BY id", False, True),
    ("SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song ORDER BY sales)",
     "SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song) ORDER BY id DESC", True, True),
    ("SELECT * FROM (SELECT name FROM singer ORDER BY id)", "SELECT name FROM singer ORDER BY id DESC", True, True),
    ("SELECT name FROM singer UNION SELECT title FROM song ORDER BY 1",
     "SELECT name FROM singer UNION SELECT title FROM song ORDER BY 1 DESC", True, False),
    ("SELECT country FROM singer UNION ALL SELECT country FROM singer", "SELECT country FROM singer", True, False),
    ("SELECT country FROM singer UNION SELECT country FROM singer", "SELECT DISTINCT country FROM singer", True, True),
    # LIMIT.
    ("SELECT title FROM song ORDER BY song_id LIMIT 2", "SELECT title FROM song WHERE song_id < 3", True, True),
    ("SELECT title FROM song ORDER BY song_id LIMIT 2 OFFSET 1",
     "SELECT title FROM song ORDER BY song_id LIMIT 1, 2", True, True),
    ("SELECT title FROM song ORDER BY song_id LIMIT 2",
     "SELECT title FROM song ORDER BY song_id LIMIT 3", False, False),
    ("SELECT max(age) FROM singer", "SELECT age FROM singer ORDER BY age DESC LIMIT 1", True, True),
    ("SELECT min(age) FROM singer", "SELECT age FROM singer ORDER BY age LIMIT 1", False, False),
    ("SELECT name FROM singer ORDER BY id LIMIT 0", "SELECT id, name FROM singer WHERE 0", True, True),
    # Nothing.
    ("SELECT name FROM singer WHERE age > 99", "SELECT id, age FROM singer WHERE age > 98", True, True),
    ("SELECT name FROM singer WHERE age > 99", "SELECT NULL", False, False),
    ("SELECT name FROM singer WHERE age > 99", "SELECT name FROM singer", False, False),
    ("SELECT name FROM singer WHERE age > 99", "SELECT nam FROM singer WHERE age > 99", False, False),
    ("SELECT name FROM singer WHERE age > 99", "DELETE FROM singer WHERE age > 99", False, False),
    ("SELECT name FROM singer WHERE age > 99", "", False, False),
    ("SELECT count(*) FROM empty", "SELECT 0", True, True),
    ("SELECT count(*) FROM empty", "SELECT a FROM empty", False, False),
    ("SELECT sum(a) FROM empty", "SELECT NULL", True, True),
    ("SELECT sum(a) FROM empty", "SELECT total(a) FROM empty", False, False),
    ("SELECT a FROM empty GROUP BY a", "SELECT b FROM empty", True, True),
    # NULL.
    ("SELECT age FROM singer WHERE id = 5", "SELECT 0", False, False),
    ("SELECT note FROM singer WHERE id = 1", "SELECT note FROM singer WHERE id = 2", False, False),
    ("SELECT count(*) FROM singer", "SELECT count(age) FROM singer", False, False),
    ("SELECT name FROM singer WHERE age < 30", "SELECT name FROM singer WHERE NOT age >= 30", True, True),
    ("SELECT name FROM singer WHERE age <> 30", "SELECT name FROM singer WHERE age IS NOT 30", False, False),
    ("SELECT title FROM song WHERE singer_id IS NULL", "SELECT title FROM song WHERE singer_id = NULL", False, False),
    ("SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM song WHERE singer_id > 0) AND id < 7",
     "SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM song) AND id < 7", False, False),
    # Types and values.
    ("SELECT 1", "SELECT 1.0", True, True),
    ("SELECT 1", "SELECT '1'", False, False),
    ("SELECT 1", "SELECT TRUE", True, True),
    ("SELECT 7 / 2", "SELECT 7 / 2.0", False, False),
    ("SELECT 'x'", "SELECT x'78'", False, False),
    ("SELECT 0.3", "SELECT 0.1 + 0.2", False, False),
    ("SELECT 9007199254740993", "SELECT 9007199254740993.0", False, False),
    ("SELECT note FROM singer WHERE id = 5", "SELECT note FROM singer WHERE id = 6", False, False),
    ("SELECT avg(age) FROM singer", "SELECT sum(age) * 1.0 / count(age) FROM singer", True, True),
    ("SELECT CAST(worth AS INTEGER) FROM singer WHERE id = 2", "SELECT worth FROM singer WHERE id = 2", True, True),
    ("SELECT -0.0", "SELECT 0", True, True),
    # Text.
    ("SELECT name FROM singer WHERE country = 'France'",
     'SELECT name FROM singer WHERE country = "France"', True, True),
    ("SELECT name FROM singer WHERE country = 'France'",
     "SELECT name FROM singer WHERE country = 'france'", False, False),
    ("SELECT name FROM singer WHERE country = 'France'",
     "SELECT name FROM singer WHERE country LIKE 'france'", True, True),
    ("SELECT name FROM singer WHERE country = 'France'",
     "SELECT name FROM singer WHERE country = 'France '", False, False),
    ("SELECT name FROM singer WHERE id = 7", "SELECT name FROM singer WHERE id = 7", True, True),
    ("SELECT name FROM singer WHERE id = 7", "SELECT name FROM singer WHERE id = 8", False, False),
    ("SELECT name, id FROM singer ORDER BY id", "SELECT id, name FROM singer ORDER BY id", False, True),
    ('SELECT "group", "two words" FROM "order"', "SELECT [group], `two words` FROM `order`", True, True),
    ("SELECT title FROM song WHERE title = 'It''s'", 'SELECT title FROM song WHERE title = "It\'s"', True, True),
    ("SELECT 'é'", "SELECT 'e\u0301'", False, False),
    # Rewrites.
    ("SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song)",
     "SELECT DISTINCT s.name FROM singer s JOIN song o ON s.id = o.singer_id", True, True),
    ("SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song)",
     "SELECT s.name FROM singer s JOIN song o ON s.id = o.singer_id", True, False),
    ("SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song)",
     "SELECT name FROM singer s WHERE EXISTS (SELECT 1 FROM song WHERE singer_id = s.id)", True, True),
    ("SELECT s.name, o.title FROM singer s, song o WHERE s.id = o.singer_id",
     "SELECT name, title FROM singer LEFT JOIN song ON id = singer_id", False, False),
    ("SELECT s.name, o.title FROM singer s LEFT JOIN song o ON s.id = o.singer_id",
     "SELECT s.name, o.title FROM song o RIGHT JOIN singer s ON s.id = o.singer_id", True, True),
    ("SELECT country, count(*) FROM singer GROUP BY country HAVING count(*) > 1",
     "WITH n AS (SELECT country, count(*) AS c FROM singer GROUP BY country) SELECT country, c FROM n WHERE c > 1",
     True, True),
    ("SELECT max(sales) FROM song",
     "SELECT sales FROM (SELECT sales, rank() OVER (ORDER BY sales DESC) r FROM song) WHERE r = 1", True, False),
    ("SELECT name FROM singer WHERE age BETWEEN 25 AND 30",
     "SELECT name FROM singer WHERE age IN (25, 26, 30)", True, True),
    ("SELECT name FROM singer WHERE age > 25 AND country = 'Peru' OR country = 'Japan'",
     "SELECT name FROM singer WHERE age > 25 AND (country = 'Peru' OR country = 'Japan')", False, False),
    ("SELECT name, age FROM adults", "SELECT name, age FROM singer WHERE age >= 30", True, True),
    ("SELECT title FROM song WHERE strftime('%Y', released) = '2020'",
     "SELECT title FROM song WHERE released LIKE '2020%'", True, True),
    ("SELECT title FROM song WHERE released < date('now', '-4 years')",
     "SELECT title FROM song WHERE released < '2020-06-30'", True, True),
    ("SELECT iif(age > 26, 'old', 'young') FROM singer WHERE id < 4",
     "SELECT CASE WHEN age > 26 THEN 'old' ELSE 'young' END FROM singer WHERE id < 4", True, True),
    ("SELECT name || ' ' || country FROM singer WHERE id < 7",
     "SELECT printf('%s %s', name, country) FROM singer WHERE id < 7", True, True),
    ("SELECT country FROM singer WHERE id < 3 INTERSECT SELECT country FROM singer WHERE id > 1",
     "VALUES ('France')", True, True),
    ("SELECT group_concat(name, ';') FROM singer WHERE country = 'France'", "SELECT 'Ann;Bob'", True, True),
    ("SELECT count(*) FROM singer",
     "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 8) SELECT max(n) FROM c", True, True),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction", "bird", "spider"), EQUIVALENCE)
def test_equivalence(
    grader: SqlExecutionGrader, database: str, gold: str, prediction: str, bird: bool, spider: bool
) -> None:
    items = [(prediction, answer(database, gold, convention)) for convention in CONVENTIONS]
    assert [result.score == 1 for result in grader.grade(items)] == [bird, spider]


def test_every_gold_is_right_by_itself(grader: SqlExecutionGrader, database: str) -> None:
    items = [(f"```sql\n{gold};\n```", answer(database, gold, c)) for gold, *_ in EQUIVALENCE for c in CONVENTIONS]
    assert {result.status for result in grader.grade(items)} == {RewardStatus.CORRECT}


@needs_data
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_agrees_with_every_labelled_equivalence(grader: SqlExecutionGrader, convention: str) -> None:
    rows = [json.loads(line) for line in (DATA / "labels/sql_equivalence.jsonl").read_text().splitlines()]
    items = [(r["pred_sql"], answer(DATA / f"sql/dbs/{r['db']}.sqlite", r["gold_sql"], convention)) for r in rows]
    results = grader.grade(items)
    wrong = [r["id"] for r, x in zip(rows, results, strict=True) if (x.score == 1) != bool(r[f"expected_{convention}"])]
    assert wrong == []


@needs_data
def test_real_golds_are_right_by_themselves(grader: SqlExecutionGrader) -> None:
    rows = [json.loads(line) for line in (DATA / "sql/pairs.jsonl").read_text().splitlines()][::25]
    items = [
        (r["gold_sql"], answer(DATA / f"sql/dbs/{r['db']}.sqlite", r["gold_sql"], convention))
        for r in rows
        if not r["tie_sensitive"]
        for convention in CONVENTIONS
    ]
    assert {result.status for result in grader.grade(items)} == {RewardStatus.CORRECT}
