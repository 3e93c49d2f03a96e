"""Where a completion's SQL is, whether a query orders its rows, and when two spellings are one solution."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dphrl.rewards.sql_parse import canonical_sql, extract_sql, orders_rows


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("  SELECT 1 ;\n", "SELECT 1 ;"),
        ("-- all of it\nSELECT 1\n\nFROM t", "-- all of it\nSELECT 1\n\nFROM t"),
        ("/* a\n\nb */ SELECT 1", "/* a\n\nb */ SELECT 1"),
        ("```sql\nSELECT 1\n```", "SELECT 1"),
        ("```SQL\r\nSELECT 1\r\n```", "SELECT 1"),
        ("```sqlite\nSELECT 1\n```", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```sql SELECT 1```", "SELECT 1"),
        ("```SELECT 1```", "SELECT 1"),
        ("```SELECT\n1```", "SELECT\n1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("First:\n```sql\nSELECT 1\n```\nBetter:\n```sql\nSELECT 2\n```\nDone.", "SELECT 2"),
        ("```sql\nSELECT 1\n```\nwhich gives\n```\n1\n```", "SELECT 1"),
        ("```python\nprint(1)\n```\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("```python\nprint(1)\n```", ""),
        ("```sql\nSELECT `a``b` FROM `t`\n```", "SELECT `a``b` FROM `t`"),
        ("```sql\n```", ""),
        ("The query is:\nSELECT a\nFROM t", "SELECT a\nFROM t"),
        ("We need a join.\n\nSELECT a\nFROM t\n\nThis returns all a.", "SELECT a\nFROM t"),
        ("SQL: SELECT a FROM t", "SELECT a FROM t"),
        ("**Final SQL**: hm\n\nAnswer: select a from t", "select a from t"),
        ("The answer: `SELECT a FROM t`.", "SELECT a FROM t"),
        ("Try\nSELECT 1\n\nNo:\nSELECT 2\nUNION\nSELECT 3", "SELECT 2\nUNION\nSELECT 3"),
        ("It is\nWITH x AS (SELECT 1)\nSELECT * FROM x", "WITH x AS (SELECT 1)\nSELECT * FROM x"),
        (
            "It is\nWITH RECURSIVE x(n) AS (SELECT 1)\nSELECT * FROM x",
            "WITH RECURSIVE x(n) AS (SELECT 1)\nSELECT * FROM x",
        ),
        ("With this we get\nVALUES (1)", "VALUES (1)"),
        ('WITH "a b" AS (\nSELECT 1\n)\nSELECT * FROM "a b"', 'WITH "a b" AS (\nSELECT 1\n)\nSELECT * FROM "a b"'),
        ("WITH -- first\nx AS (\nSELECT 1)\nSELECT 2", "WITH -- first\nx AS (\nSELECT 1)\nSELECT 2"),
        ("It is\nWITH `x` AS (SELECT 1)\nSELECT 2", "WITH `x` AS (SELECT 1)\nSELECT 2"),
        ("SELECT 1<|im_end|>\n<|im_start|>user\nSELECT 2", "SELECT 1"),
        ("```sql\nSELECT 1\n```<|eot_id|>```sql\nSELECT 2\n```", "SELECT 1"),
        ("<think>\n```sql\nSELECT 1\n```\n</think>\nSELECT 2", "SELECT 2"),
        ("SELECT 1</think>```sql\nSELECT 2\n```", "SELECT 2"),
        ("<think>I could use SELECT 1", None),
        ("<think>\nSELECT 1\n\nSELECT 2\n", None),
        ("SELECT 1\n<thinking>or SELECT 2", None),
        ("<reasoning>SELECT 1</reasoning><answer>SELECT 2", "SELECT 2"),
        ("SELECT name FROM tag WHERE name = '<think>'", "SELECT name FROM tag WHERE name = '<think>'"),
        ("```sql\n-- <think> of it\nSELECT 1\n```", "-- <think> of it\nSELECT 1"),
        ("~~~sql\nSELECT 1\n~~~", "SELECT 1"),
        ("~~~\nSELECT 1", "SELECT 1"),
        ("```sql\nSELECT 1\n```\nor\n~~~sql\nSELECT 2\n~~~", "SELECT 2"),
        ("~~~sql\nSELECT 1\n```\n~~~", "SELECT 1\n```"),
        ("````sql\nSELECT 1\n````", "SELECT 1"),
        ("````sql\n```\nSELECT 1\n```\n````", "SELECT 1"),
        ("````markdown\nHere:\n```sql\nSELECT 1\n```\n````", "SELECT 1"),
        ("````\n```python\nprint(1)\n```\n````\nso\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("SELECT 1; DROP TABLE t", "SELECT 1; DROP TABLE t"),
        ("BEGIN;\nSELECT 1", "BEGIN;\nSELECT 1"),
        ("DELETE FROM t;\n\nSELECT 1", "DELETE FROM t;\n\nSELECT 1"),
        ("", ""),
        ("I do not know.", "I do not know."),
    ],
)
def test_extract_sql(text: str, sql: str | None) -> None:
    assert extract_sql(text) == sql


@given(st.text(alphabet=st.sampled_from("`sql \n;<>/thinkSELECTwith as(:\x00'\""), max_size=200))
@settings(max_examples=400, deadline=None)
def test_extraction_returns_part_of_any_text(text: str) -> None:
    # Where a thought is cut out of the middle of a query, its lines come from both sides.
    assert all(line in text for line in (extract_sql(text) or "").split("\n"))


@pytest.mark.parametrize(
    "text",
    [
        "with" + " " * 1_000_000 + "x",
        "with a as" + " " * 1_000_000 + "x",
        "\n" * 1_000_000,
        " \n" * 500_000 + "x",
        "a: " * 300_000,
        "```" * 300_000,
        "/*" * 500_000,
        "x\nwith a(" * 100_000,
        "--" * 500_000,
        "`" * 1_000_000,
        "`select " * 150_000,
        "<sql>select " * 100_000,
        "~~~\n" * 300_000,
        "".join("`" * length + "\n" for length in range(3, 1_500)),
        "<think>" * 150_000,
        "```<think>" * 100_000,
        "</think>select 1" * 70_000,
    ],
)
def test_extraction_is_linear(text: str) -> None:
    started = time.process_time()
    extract_sql(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 1;", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = (SELECT b FROM u ORDER BY c LIMIT 1)", False),
        ("SELECT a FROM t WHERE b IN (SELECT b FROM u ORDER BY c) ORDER BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT group_concat(a ORDER BY a) FROM t", False),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT * FROM x", False),
        ("WITH x AS (SELECT a FROM t) SELECT * FROM x ORDER BY a", True),
        ("SELECT 'order by' FROM t", False),
        ('SELECT "order" FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t /* ORDER BY a */", False),
        ("SELECT a FROM t ORDER /* x */ BY a", True),
        ("SELECT ')' FROM t ORDER BY a", True),
        ("SELECT [order by] FROM t", False),
        ("SELECT 'it''s (' FROM t ORDER BY a", True),
    ],
)
def test_orders_rows(sql: str, ordered: bool) -> None:
    assert orders_rows(sql) is ordered


COLUMNS = frozenset(["name", "age", "id", "country"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT name FROM singer", "select  NAME\nfrom Singer ;"),
        ("SELECT name FROM singer", "SELECT name FROM singer -- all"),
        ("SELECT T1.name FROM singer AS T1", "SELECT s.name FROM singer s"),
        ("SELECT name AS n FROM singer", "SELECT name FROM singer"),
        ("SELECT count(*) AS n FROM singer ORDER BY n", "SELECT COUNT(*) AS total FROM singer ORDER BY total"),
        ("SELECT `name` FROM [singer]", 'SELECT name FROM "singer"'),
        ('SELECT name FROM singer WHERE country = "France"', "SELECT name FROM singer WHERE country = 'France'"),
        ("WITH a AS (SELECT name FROM singer) SELECT * FROM a", "WITH b AS (SELECT name FROM singer) SELECT * FROM b"),
        ("SELECT name FROM singer WHERE age <> 3", "SELECT name FROM singer WHERE age != 3"),
    ],
)
def test_spellings_of_one_solution(one: str, other: str) -> None:
    assert canonical_sql(one, COLUMNS) == canonical_sql(other, COLUMNS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT name FROM singer WHERE country = 'France'", "SELECT name FROM singer WHERE country = 'france'"),
        ('SELECT name FROM singer WHERE country = "France"', 'SELECT name FROM singer WHERE country = "france"'),
        ("SELECT name FROM singer", "SELECT DISTINCT name FROM singer"),
        ("SELECT name FROM singer WHERE age > 3", "SELECT name FROM singer WHERE age > 3.0"),
        ("SELECT a.name FROM singer a JOIN singer b", "SELECT b.name FROM singer a JOIN singer b"),
        ("SELECT max(age) FROM singer", "SELECT age FROM singer ORDER BY age DESC LIMIT 1"),
    ],
)
def test_different_solutions(one: str, other: str) -> None:
    assert canonical_sql(one, COLUMNS) != canonical_sql(other, COLUMNS)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT " + "(" * 2000 + "1" + ")" * 2000,
        "SELECT 1" + " + 1" * 2000,
        "SELECT 1 FROM t WHERE " * 400,
        "SELECT '",
        "SELECT 1 ORDER",
    ],
)
def test_what_cannot_be_parsed_is_compared_by_its_text(sql: str) -> None:
    assert canonical_sql(sql, COLUMNS) == canonical_sql(sql + " ;", COLUMNS)


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("I think so.\n<answer>SELECT a FROM t</answer>", "SELECT a FROM t"),
        ("<sql>\nSELECT a\n\nFROM t\n</sql> is what I mean", "SELECT a\n\nFROM t"),
        ("<answer>```sql\nSELECT a FROM t\n```</answer>", "SELECT a FROM t"),
        ("<answer>42</answer> SELECT", "<answer>42</answer> SELECT"),
        ("<answer>SELECT a FROM t", "SELECT a FROM t"),
        ("<answer>SELECT a</answer> no: <answer>\n~~~sql\nSELECT b\n~~~\n</answer>", "SELECT b"),
        ("So the answer is `SELECT a FROM t`.", "SELECT a FROM t"),
        ("The query would be `SELECT a FROM t`, I think.", "SELECT a FROM t"),
        # A query that is quoted whole
        ("`SELECT a FROM t`", "SELECT a FROM t"),
        ("`SELECT `a` FROM `t``;", "SELECT `a` FROM `t`"),
        ("``SELECT `a` FROM t``", "SELECT `a` FROM t"),
        ("\"SELECT a FROM t WHERE b = 'x'\"", "SELECT a FROM t WHERE b = 'x'"),
        ("'SELECT a FROM t;'", "SELECT a FROM t;"),
        ("**SELECT a FROM t**.", "SELECT a FROM t"),
        ("\u201cSELECT a FROM t\u201d", "SELECT a FROM t"),
        ("```sql\n`SELECT a FROM t`\n```", "SELECT a FROM t"),
        ('<answer>"SELECT a FROM t"</answer>', "SELECT a FROM t"),
        ('"a" FROM "t"', '"a" FROM "t"'),
        ("SELECT a FROM t\n\nThis returns every a.", "SELECT a FROM t"),
        ("SELECT a FROM t;\n\nIt works because t is small.\n\nAsk me more!", "SELECT a FROM t;"),
        # What may belong to the statement stays, and so does a second one.
        ("SELECT a\n\nFROM t", "SELECT a\n\nFROM t"),
        ("SELECT a FROM t WHERE b = 'x\n\nThis y'", "SELECT a FROM t WHERE b = 'x\n\nThis y'"),
        ("SELECT a FROM (\n\nfoo )", "SELECT a FROM (\n\nfoo )"),
        ("SELECT a FROM t;\n\nDROP TABLE t", "SELECT a FROM t;\n\nDROP TABLE t"),
        ("SELECT a FROM t\n\nOh well; DROP TABLE t", "SELECT a FROM t\n\nOh well; DROP TABLE t"),
    ],
)
def test_queries_among_tags_quotes_and_remarks(text: str, sql: str) -> None:
    assert extract_sql(text) == sql
