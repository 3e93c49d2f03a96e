"""What a query cannot do: one test an attack. Nothing is written, everything ends, and the next query is unharmed."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dphrl.rewards.sql_execution import SqlExecutionGrader
from dphrl.sandbox.sqlite import QueryError, run_query
from dphrl.sandbox.sqlite_file import DatabaseUnusableError, open_database
from dphrl.types import RewardResult, RewardStatus

TIMEOUT_S = 0.6
# For the kill and for a machine that has other things to do.
SLACK_S = 1.5
NUM_ROWS = 3_000


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database whose author was hostile as well: views and columns that call functions, virtual tables, triggers."""
    path = tmp_path_factory.mktemp("hostile") / "a b?c#d%41.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, age REAL);"
            "CREATE TABLE notes(body); INSERT INTO notes VALUES ('x');"
            "CREATE VIEW young AS SELECT name FROM t WHERE age < 3;"
            "CREATE VIEW lucky AS SELECT random() AS r;"
            "CREATE VIEW catalog AS SELECT sql FROM sqlite_master;"
            "CREATE VIEW evil AS SELECT load_extension('/tmp/x.so') AS r;"
            "CREATE TRIGGER later AFTER INSERT ON t BEGIN DELETE FROM t; END;"
            "CREATE VIRTUAL TABLE words USING fts4(body);"
        )
        rows = [(f"name {number}", float(number % 7)) for number in range(NUM_ROWS)]
        connection.execute("DROP TRIGGER later")
        connection.executemany("INSERT INTO t(name, age) VALUES (?, ?)", rows)
        connection.execute("ANALYZE")
        connection.execute("CREATE TRIGGER later AFTER INSERT ON t BEGIN DELETE FROM t; END")
    connection.close()
    return path


@pytest.fixture(scope="module")
def grader() -> Iterator[SqlExecutionGrader]:
    grader = SqlExecutionGrader(TIMEOUT_S)
    yield grader
    grader.close()


def attack(grader: SqlExecutionGrader, database: Path, text: str) -> RewardResult:
    """The verdict on `text`, after checking that it ended in time, changed no file and harmed no neighbour."""
    folder = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in database.parent.iterdir()}
    answer = {"db": str(database), "gold_sql": "SELECT count(*) FROM t", "convention": "bird"}
    started = time.monotonic()
    result, after = grader.grade([(text, json.dumps(answer)), ("SELECT count(id) FROM t", json.dumps(answer))])
    assert time.monotonic() - started < TIMEOUT_S + SLACK_S
    assert after.status is RewardStatus.CORRECT
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in database.parent.iterdir()} == folder
    return result


@pytest.mark.parametrize(
    "sql",
    [
        "ATTACH '{folder}/new.db' AS x",
        "ATTACH DATABASE '/etc/passwd' AS x",
        "DETACH main",
        "VACUUM",
        "VACUUM INTO '{folder}/copy.db'",
        "PRAGMA journal_mode=WAL",
        "PRAGMA writable_schema=ON",
        "PRAGMA table_info(t)",
        "EXPLAIN SELECT 1",
        "EXPLAIN QUERY PLAN SELECT 1",
        "ANALYZE",
        "REINDEX",
        "BEGIN IMMEDIATE",
        "COMMIT",
        "ROLLBACK",
        "RELEASE x",
        "INSERT INTO t(name) VALUES ('x')",
        "INSERT INTO t(name) VALUES ('x') RETURNING id",
        "REPLACE INTO t(id) VALUES (1)",
        "UPDATE t SET age = 1 RETURNING age",
        "DELETE FROM t",
        "CREATE TEMP TABLE x AS SELECT 1",
        "CREATE VIEW x AS SELECT 1",
        "CREATE VIRTUAL TABLE temp.x USING fts5(a)",
        "DROP TABLE t",
        "ALTER TABLE t ADD COLUMN x",
        "WITH x AS (SELECT 1) DELETE FROM t",
        "WITH x AS (SELECT 1) INSERT INTO t(age) SELECT * FROM x RETURNING age",
        "WITH x AS (DELETE FROM t RETURNING id) SELECT * FROM x",
        "/* SELECT */ DELETE FROM t",
        "-- SELECT\nDELETE FROM t",
        "\ufeffDELETE FROM t",
        # Several statements, hidden in the ways in which tokenizers differ.
        "SELECT 1; DELETE FROM t",
        "SELECT 1; SELECT count(*) FROM t",
        "SELECT ';' ; DELETE FROM t",
        "SELECT 1;-- \nDELETE FROM t",
        "SELECT 1 /* /* */ ; DELETE FROM t -- */",
        "SELECT 1; /* a */ SELECT 3000 /* b */",
        "SELECT count(*) FROM t;\x0c\n;SELECT 2",
        "```sql\nSELECT 1;\nDROP TABLE t;\n```",
        # Functions: extensions, files, process state, values that differ between calls.
        "SELECT load_extension('/lib/x.so')",
        "SELECT LOAD_EXTENSION ('/lib/x.so', 'f')",
        "SELECT readfile('/etc/passwd')",
        "SELECT writefile('{folder}/x', 'x')",
        "SELECT edit('x', 'vi')",
        "SELECT random() + count(*) FROM t",
        "SELECT count(*) FROM t ORDER BY random()",
        "SELECT hex(randomblob(4))",
        "SELECT zeroblob(1000000000)",
        "SELECT sqlite_version()",
        "SELECT sqlite_compileoption_used('X')",
        "SELECT last_insert_rowid()",
        "SELECT changes() + total_changes()",
        "SELECT fts3_tokenizer('simple', x'4141414141414141')",
        "SELECT rtreecheck('main', 't')",
        "SELECT name FROM t WHERE name MATCH 'x'",
        "SELECT name FROM t WHERE name REGEXP '(a+)+$'",
        "SELECT count(*) FROM t WHERE (SELECT \"load_extension\"('x'))",
        # Tables that are none.
        "SELECT * FROM sqlite_master",
        "SELECT * FROM main.sqlite_schema",
        "SELECT count(*) FROM \"sqlite_master\"",
        "SELECT * FROM sqlite_temp_master",
        "SELECT * FROM sqlite_stat1",
        "SELECT * FROM sqlite_dbpage",
        "SELECT * FROM dbstat",
        "SELECT * FROM pragma_table_info('t')",
        "SELECT count(*) FROM pragma_database_list",
        "SELECT * FROM t, pragma_query_only(0)",
        "SELECT * FROM json_each('[1]')",
        "SELECT count(*) FROM json_tree('[1]')",
        "SELECT * FROM generate_series(1, 3)",
        "SELECT * FROM bytecode('SELECT 1')",
        "SELECT * FROM carray(1, 2)",
        "SELECT * FROM t(1)",
        "SELECT * FROM words",
        "SELECT * FROM words WHERE words MATCH 'x'",
        "SELECT * FROM fts5vocab",
        # Views do not lend permissions.
        "SELECT * FROM lucky",
        "SELECT * FROM catalog",
        "SELECT * FROM evil",
        # Values that are not there.
        "SELECT ?",
        "SELECT ?999999",
        "SELECT :a, @b, $c",
        # Characters.
        "SELECT 'a\x00b'",
        "SELECT 1\x00; DELETE FROM t",
        "\x00SELECT 1",
        "SELECT '\ud800'",
    ],
)  # fmt: skip
def test_refused(grader: SqlExecutionGrader, database: Path, sql: str) -> None:
    result = attack(grader, database, sql.replace("{folder}", str(database.parent)))
    assert result.status is RewardStatus.REFUSED
    assert result.score == 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT /* never closed",
        "SELECT 'never closed",
        "SELECT FROM t",
        "SELECT 1 UNION DELETE FROM t",
        "SELECT * INTO OUTFILE '/tmp/x' FROM t",
        "(SELECT 1)",
        "SELECT 1::int",
        ".shell ls",
        "",
        "-- SELECT 1",
        "/* SELECT 1 */",
        ";",
        ";DELETE FROM t",
        "\u200bSELECT 1",
        "SELECT 1 UNION SELECT 2 ORDER BY 1 UNION SELECT 3",
        "```python\nimport os\n```",
    ],
)
def test_unparsable(grader: SqlExecutionGrader, database: Path, sql: str) -> None:
    assert attack(grader, database, sql).status is RewardStatus.UNPARSABLE


_COUNTER = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
# Each of these common tables reads the one before twice.
_DOUBLING = (
    "WITH c0(x) AS (SELECT 1)"
    + "".join(f", c{n}(x) AS (SELECT a.x FROM c{n - 1} a, c{n - 1} b)" for n in range(1, 40))
    + " SELECT count(*) FROM c39"
)


@pytest.mark.parametrize(
    ("sql", "statuses"),
    [
        # Time.
        ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c", "timeout"),
        ("SELECT count(*) FROM t a, t b, t c", "timeout"),
        ("SELECT count(*) FROM t a JOIN t b ON a.name LIKE '%' || b.name || '%' JOIN t c ON c.age < b.age", "timeout"),
        ("SELECT a.name FROM t a, t b, t c ORDER BY a.name || b.name || c.name LIMIT 1", "timeout resource_limit"),
        ("SELECT count(DISTINCT a.name || b.name || c.age) FROM t a, t b, t c", "timeout resource_limit"),
        ("SELECT sum(a.age) OVER (ORDER BY b.age ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) FROM t a, t b",
         "timeout resource_limit"),
        # One opcode that no handler interrupts: the process is killed.
        ("SELECT instr(printf('%.*c', 9000000, 'a'), printf('%.*c', 4000000, 'a') || 'b')", "timeout"),
        ("SELECT printf('%.*c', 16000000, 'a') LIKE '%' || printf('%.*c', 900, 'a') || 'b'", "timeout"),
        ("SELECT printf('%.*c', 900000, 'a') LIKE '%a%a%a%a%a%a%ab'", "wrong"),
        ("SELECT printf('%.*c', 900000, 'a') GLOB '*a*a*a*a*a*a*ab'", "wrong"),
        # Memory.
        ("SELECT printf('%.*c', 999999999, 'x')", "resource_limit"),
        ("SELECT upper(printf('%.*c', 999999999, 'x'))", "resource_limit"),
        ("SELECT replace(printf('%.*c', 30000, 'a'), 'a', printf('%.*c', 30000, 'b'))", "resource_limit timeout"),
        ("SELECT hex(hex(hex(hex(hex(printf('%.*c', 900000, 'a'))))))", "resource_limit timeout"),
        (_COUNTER + "SELECT group_concat(x, printf('%.*c', 1000, 'a')) FROM c", "resource_limit timeout"),
        (_COUNTER + "SELECT json_group_array(x) FROM c", "resource_limit timeout"),
        (_COUNTER + "SELECT printf('%.*c', 1000000, 'a') FROM c", "resource_limit timeout"),
        ("WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) SELECT count(*) FROM c",
         "resource_limit timeout"),
        ("SELECT json(printf('%.*c', 5000000, '['))", "wrong resource_limit"),
        ("SELECT printf('%*d', 2147483647, 1)", "resource_limit"),
        ("SELECT concat(" + ", ".join(["printf('%.*c', 9000000, 'a')"] * 100) + ")", "resource_limit timeout"),
        # Rows and columns.
        ("SELECT * FROM t a, t b", "resource_limit timeout"),
        (_COUNTER + "SELECT x FROM c", "resource_limit timeout"),
        ("SELECT " + "*, " * 999 + "* FROM t", "resource_limit"),
        ("SELECT * FROM t ORDER BY " + ", ".join(["name"] * 3000), "resource_limit"),
        # The parser and the planner.
        ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "resource_limit"),
        ("SELECT " + "-" * 2 + "\n" + "- " * 20_000 + "1", "resource_limit"),
        ("SELECT 1" + " + 1" * 5000, "resource_limit"),
        ("SELECT 1" + " UNION SELECT 1" * 600, "resource_limit"),
        ("SELECT " + "abs(" * 3000 + "1" + ")" * 3000, "resource_limit"),
        ("SELECT coalesce(" + ", ".join("1" * 2000) + ")", "resource_limit"),
        ("SELECT count(*) FROM " + ", ".join(f"t t{number}" for number in range(100)), "resource_limit"),
        ("SELECT 1 FROM " + "(SELECT * FROM " * 2000 + "t" + ")" * 2000, "resource_limit"),
        (_DOUBLING, "timeout resource_limit"),
        ("SELECT name LIKE '" + "%_" * 20_000 + "' FROM t", "resource_limit"),
        ("SELECT '" + "a" * 2_000_000 + "'", "resource_limit"),
        ("SELECT " + "/*" * 40_000 + "1", "unparsable"),
        ("`" * 60_000, "unparsable"),
        ("```" * 60_000 + "SELECT", "unparsable"),
        ("SELECT 1 WHERE 1 IN (" + "1," * 40_000 + "1)", "wrong"),
    ],
)  # fmt: skip
def test_bounded(grader: SqlExecutionGrader, database: Path, sql: str, statuses: str) -> None:
    assert attack(grader, database, sql).status in statuses.split()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM nowhere",
        "SELECT nowhere FROM t",
        "SELECT * FROM sqlite_sequence",
        "SELECT * FROM young",
        "SELECT * FROM other.t",
        "SELECT sum(name, age) FROM t",
        "SELECT abs(-9223372036854775807 - 1)",
        "SELECT json('{')",
        "SELECT count(*) FROM t GROUP BY count(*)",
        "SELECT 9e999, -9e999",
        "SELECT x'00ff', CAST(x'ff00' AS TEXT)",
    ],
)
def test_permitted_and_wrong(grader: SqlExecutionGrader, database: Path, sql: str) -> None:
    assert attack(grader, database, sql).status is RewardStatus.WRONG


def test_no_query_sees_what_another_left(database: Path) -> None:
    opened = open_database(str(database))
    before = run_query(opened, "SELECT name LIKE 'NAME 1' FROM t WHERE id = 2", time.monotonic() + 5).rows
    for sql in ("PRAGMA case_sensitive_like=ON", "CREATE TEMP TABLE t(name)", "SELECT 1; PRAGMA case_sensitive_like=1"):
        with pytest.raises(QueryError):
            run_query(opened, sql, time.monotonic() + 5)
    assert run_query(opened, "SELECT name LIKE 'NAME 1' FROM t WHERE id = 2", time.monotonic() + 5).rows == before


def test_now_is_a_fixed_time(database: Path) -> None:
    sql = "SELECT datetime('now'), CURRENT_TIMESTAMP, date(), julianday('now'), unixepoch()"
    first = run_query(open_database(str(database)), sql, time.monotonic() + 5).rows
    assert first == [("2024-06-30 12:00:00", "2024-06-30 12:00:00", "2024-06-30", 2460492.0, 1719748800)]


def test_text_that_is_not_utf8_is_kept_apart(database: Path) -> None:
    sql = "SELECT CAST(x'41ff' AS TEXT), 1 UNION ALL SELECT CAST(x'41fe' AS TEXT), 2.5 UNION ALL SELECT x'41ff', NULL"
    rows = run_query(open_database(str(database)), sql + " ORDER BY 2 DESC; -- end", time.monotonic() + 5).rows
    assert rows == [("A\udcfe", 2.5), ("A\udcff", 1), (b"A\xff", None)]


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "wal", "journal", "truncated"])
def test_unusable_databases(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.sqlite"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "not a database, but long enough to look like a file of some sort")
    elif kind != "missing":
        with sqlite3.connect(path) as connection:
            connection.executescript("CREATE TABLE t(a); INSERT INTO t VALUES (1)")
        connection.close()
        if kind == "truncated":
            os.truncate(path, 100)
        else:
            path.with_name(path.name + f"-{kind}").write_bytes(b"\xd9\xd5\x05\xf9" * 16)
    with pytest.raises(DatabaseUnusableError, match=str(path)):
        open_database(str(path))


@pytest.mark.parametrize("mode", ["wal", "persist"])
def test_finished_databases_of_every_journal_mode_can_be_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "d.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.executescript("CREATE TABLE t(a); INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)")
    connection.close()
    assert run_query(open_database(str(path)), "SELECT a FROM t", time.monotonic() + 5).rows == [(1,), (2,)]
