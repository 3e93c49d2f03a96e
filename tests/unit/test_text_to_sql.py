"""Text-to-SQL data: layouts, schemas as they are read and written, gold queries that do not run, the real databases."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dphrl.config.data import DataConfig, DatasetConfig, RewardConfig
from dphrl.data.golds import CheckedGolds, check_golds, refuse_or_drop
from dphrl.data.loading import load_problems
from dphrl.data.problems import Problem
from dphrl.data.sql_schema import ForeignKey, Schema, TableView, quote_name, read_schema, render_lines, render_schema
from dphrl.data.text_to_sql import query_faults
from dphrl.rewards import sql_execution
from dphrl.rewards.sql_execution import validate_golds
from dphrl.types import JsonDict

REAL = Path(os.environ.get("DPHRL_DATA") or "../shared/data") / "sql"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="no databases here: set DPHRL_DATA")


def _make_database(path: Path, script: str = "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1);") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def _write(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


def _dataset(path: Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(name="d", kind="text_to_sql", path=str(path), **settings)


def _load(path: Path, **settings: Any) -> list[Problem]:
    return load_problems(_dataset(path, **settings), seed=0)


def _check(path: Path, **settings: Any) -> CheckedGolds:
    """As a run does it: what is dropped is in `bad`, what may not be dropped is raised."""
    dataset = _dataset(path, **settings)
    problems = load_problems(dataset, seed=0)
    checked = check_golds(problems, dataset.kind, RewardConfig(name="sql_execution"))
    refuse_or_drop(checked.bad, len(problems), dataset, DataConfig(train=dataset))
    return checked


# ------------------------------------------------------------ layouts

SPIDER = {"db_id": "pets", "question": "How many?", "query": "SELECT count(*) FROM t", "sql": {"select": []}}
BIRD = {"db_id": "pets", "question": "How many?", "evidence": "all", "SQL": "SELECT count(*) FROM t", "difficulty": "x"}
PLAIN = {"db": "pets", "question": "How many?", "gold_sql": "SELECT count(*) FROM t"}


@pytest.mark.parametrize(
    ("file", "row", "database", "evidence"),
    [
        ("dev.json", SPIDER, "database/pets/pets.sqlite", ""),
        ("train_spider.json", SPIDER, "database/pets/pets.sqlite", ""),
        ("dev.json", BIRD, "dev_databases/pets/pets.sqlite", "all"),
        ("train.json", BIRD, "train_databases/pets/pets.sqlite", "all"),
        ("pairs.jsonl", PLAIN, "dbs/pets.sqlite", ""),
        ("pairs.jsonl", PLAIN | {"evidence": None}, "dbs/pets.sqlite", ""),
        ("pairs.jsonl", PLAIN | {"db": "pets.db"}, "dbs/pets.db", ""),
    ],
)
def test_layouts(tmp_path: Path, file: str, row: object, database: str, evidence: str) -> None:
    path = _make_database(tmp_path / database)
    problem = _load(_write(tmp_path / file, [row]), convention="spider")[0]
    assert (problem.problem_id, problem.text, problem.kind) == ("d-0", "How many?", "text_to_sql")
    assert json.loads(problem.answer) == {
        "db": str(path), "gold_sql": "SELECT count(*) FROM t", "convention": "spider"
    }  # fmt: skip
    assert problem.location == f"{tmp_path / file}{':1' if file.endswith('l') else '[0]'}"
    assert problem.sql is not None
    assert problem.sql.evidence == evidence
    assert [table.name for table in problem.sql.schema.tables] == ["t"]


@pytest.mark.parametrize(("layout", "row"), [("spider", SPIDER), ("bird", BIRD)])
def test_layouts_by_name(tmp_path: Path, layout: str, row: JsonDict) -> None:
    """A folder as the benchmark is distributed, with other files in it, and one word that says what it is."""
    _make_database(tmp_path / "database" / "pets" / "pets.sqlite")
    _write(tmp_path / "tables.json", [{"db_id": "pets"}])
    # The other layout's field holds another query, which must not be taken.
    _write(tmp_path / "train_all.json", [{"gold_sql": "SELECT 2"} | row])
    problem = load_problems(DatasetConfig.model_validate({"name": "d", "layout": layout, "path": str(tmp_path)}), 0)[0]
    assert (problem.text, problem.kind) == ("How many?", "text_to_sql")
    answer = json.loads(problem.answer)
    assert (answer["gold_sql"], answer["convention"]) == ("SELECT count(*) FROM t", layout)
    with pytest.raises(ValueError, match=rf"it looks like {layout}: set layout: {layout}, or set answer_field"):
        load_problems(DatasetConfig(name="d", path=str(tmp_path)), 0)


def test_databases_and_fields_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_database(tmp_path / "elsewhere" / "pets.sqlite")
    row = {"base": "pets", "q": "How many?", "gold": "SELECT 1", "hint": "all", "query": "SELECT 2"}
    path = _write(tmp_path / "rows" / "a.jsonl", [row])
    monkeypatch.setenv("MY_DATABASES", str(tmp_path / "elsewhere"))
    names = {"prompt_field": "q", "answer_field": "gold", "database_field": "base", "evidence_field": "hint"}
    problem = _load(path, databases="$MY_DATABASES", max_schema_tokens=7, **names)[0]
    assert problem.sql is not None
    assert (problem.sql.evidence, problem.sql.max_schema_tokens) == ("all", 7)
    assert json.loads(problem.answer)["gold_sql"] == "SELECT 1"
    assert json.loads(problem.answer)["convention"] == "bird"
    monkeypatch.chdir(tmp_path)
    relative = _load(path, databases="elsewhere", **names)[0]
    assert Path(json.loads(relative.answer)["db"]) == tmp_path / "elsewhere" / "pets.sqlite"


def test_problems_of_a_database_share_its_schema(tmp_path: Path) -> None:
    _make_database(tmp_path / "dbs" / "pets.sqlite")
    first, second = _load(_write(tmp_path / "a.jsonl", [PLAIN, PLAIN | {"question": "Who?"}]))
    assert first.sql is not None
    assert second.sql is not None
    assert first.sql.schema is second.sql.schema


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "q", "db": "pets"}, {}, r"a\.jsonl:2: no field 'gold_sql' or 'query' or 'SQL' or 'sql'; it has"),
        (
            {"question": "q", "SQL": "SELECT 1"},
            {},
            r"a\.jsonl:2: no field 'db_id' or 'db'; it has question, SQL; set d",
        ),
        (PLAIN | {"question": None}, {}, r"a\.jsonl:2: the question \('question'\) is empty"),
        (PLAIN | {"db": ""}, {}, r"a\.jsonl:2: 'db' is empty"),
        (PLAIN, {"evidence_field": "hint"}, r"a\.jsonl:2: no field 'hint'; it has db, .*; set evidence_field of"),
        (PLAIN, {"databases": "/no/such/folder"}, r"data set d: databases '/no/such/folder' is no folder; correct it"),
        (PLAIN, {"databases": "$NO_SUCH_THING/x"}, "variable NO_SUCH_THING is not set"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, settings: dict[str, Any], message: str) -> None:
    _make_database(tmp_path / "dbs" / "pets.sqlite")
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        _load(path, **settings)
    assert "\n" not in str(caught.value)


def test_without_a_folder_of_databases_the_usual_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder database, dev_databases, .* in .*; set databases"):
        _load(_write(tmp_path / "a.jsonl", [PLAIN]))


# ------------------------------------------------------------ databases that are missing or broken


def test_rows_without_a_database_are_listed_or_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _make_database(tmp_path / "dbs" / "pets.sqlite")
    _make_database(tmp_path / "dbs" / "empty.sqlite", "")
    (tmp_path / "dbs" / "text.sqlite").write_text("not a database, however long it is " * 50)
    names = ["lost", "pets", "empty", "text", *["gone"] * 30]
    path = _write(tmp_path / "dev.json", [SPIDER | {"db_id": name} for name in names])
    with pytest.raises(ValueError, match="33 of 34 rows have no gold to grade against") as caught:
        _check(path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{path}[0]: 'SELECT count(*) FROM t': database 'lost' is neither {tmp_path}/dbs/lost/lost.sqlite" in message
    assert f"{path}[2]: 'SELECT count(*) FROM t': {tmp_path}/dbs/empty.sqlite holds no tables" in message
    assert f"{tmp_path}/dbs/text.sqlite cannot be read: file is not a database" in message
    assert "dev.json[5]" in message
    assert "dev.json[6]" not in message
    assert message.endswith("and 28 more; correct databases, or add the files, or set data.invalid_gold: drop")

    kept = _check(path, invalid_gold="drop")
    assert [problem.problem_id for problem in kept.problems] == ["d-1"]
    assert len(kept.bad) == 33
    with pytest.raises(ValueError, match=r"1 of 1 rows have no gold .* add the files$"):
        _check(path, invalid_gold="drop", limit=1)


def test_a_pending_write_ahead_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (a)")
        connection.commit()
        with pytest.raises(ValueError, match=r"a\.sqlite-wal holds changes .* PRAGMA wal_checkpoint"):
            read_schema(path, 0)
    assert read_schema(path, 0).tables[0].name == "t"


# ------------------------------------------------------------ schemas


def test_a_schema_is_read_and_written_normalised(tmp_path: Path) -> None:
    path = _make_database(
        tmp_path / "100% what#?.sqlite",
        """
        create table "singer" ("Singer_ID" int primary key autoincrement, name  varchar ( 20 ) not null, x);
        create table [order] ("Free Meals (%)" real, `a``b` text, at INTEGER references SINGER,
          gone INTEGER references nowhere(id), odd INTEGER references singer(missing));
        create table pair (a integer, b integer, c integer generated always as (a + b), primary key (b, a),
          foreign key (B, a) references pair(a, b), foreign key (a) references "order"(AT));
        create view loud as select name from singer;
        create view broken as select * from nowhere;
        insert into "order" values (0.5, 'it''s
two lines', 1, null, 2), (1, x'00ff', 1, null, 2), (null, ?, 1, null, 2);
        """.replace("int primary key", "integer primary key").replace("?", f"'{'x' * 50}'"),
    )  # fmt: skip
    schema = read_schema(path, 2)
    assert [table.name for table in schema.tables] == ["singer", "order", "pair", "loud"]
    pair = schema.tables[2]
    assert pair.foreign_keys == (ForeignKey(("b", "a"), "pair", ("a", "b")), ForeignKey(("a",), "order", ("at",)))
    text = render_schema([TableView.whole(table, 3) for table in schema.tables])
    assert text == "\n".join(
        [
            "CREATE TABLE singer (", "  Singer_ID INTEGER PRIMARY KEY,", "  name VARCHAR ( 20 ),", "  x", ");", "",
            "CREATE TABLE `order` (", "  `Free Meals (%)` REAL,", "  `a``b` TEXT,", "  at INTEGER,",
            "  gone INTEGER,", "  odd INTEGER,", "  FOREIGN KEY (at) REFERENCES singer(Singer_ID)", ");",
            "-- Example rows:", "-- (0.5, 'it''s two lines', 1, NULL, 2)", "-- (1.0, <2 bytes>, 1, NULL, 2)", "",
            "CREATE TABLE pair (", "  a INTEGER,", "  b INTEGER,", "  c INTEGER,", "  PRIMARY KEY (b, a),",
            "  FOREIGN KEY (b, a) REFERENCES pair(a, b),", "  FOREIGN KEY (a) REFERENCES `order`(at)", ");", "",
            "CREATE TABLE loud (", "  name VARCHAR ( 20 )", ");",
        ]
    )  # fmt: skip
    long_row = read_schema(path, 3).tables[1].sample_rows[2]
    assert long_row[1] == "'" + "x" * 37 + "...'"
    assert read_schema(path, 0).tables[1].sample_rows == ()


def test_text_that_is_not_utf8_is_shown_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = _make_database(tmp_path / "a.sqlite", "CREATE TABLE t (a); INSERT INTO t VALUES (CAST(x'4dfc6c' AS TEXT));")
    assert read_schema(path, 1).tables[0].sample_rows == (("'M\ufffdl'",),)


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    path = _make_database(tmp_path / "a.sqlite")
    before = (path.stat().st_mtime_ns, path.read_bytes())
    read_schema(path, 3)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.sqlite"]


NAMES = st.lists(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: not name.lower().startswith("sqlite_")
    ),
    min_size=2,
    max_size=5,
    unique_by=str.lower,
)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, key_size=st.integers(0, 2))
def test_whatever_the_names_what_is_written_is_the_schema_that_was_read(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], key_size: int
) -> None:
    table, *columns = names
    key = ", ".join(map(quote_name, columns[:key_size]))
    constraint = f", PRIMARY KEY ({key})" if key else ""
    folder = tmp_path_factory.mktemp("names")
    declared = f"CREATE TABLE {quote_name(table)} ({' TEXT, '.join(map(quote_name, columns))} INT{constraint});"
    schema = read_schema(_make_database(folder / "a.sqlite", declared), 0)
    again = read_schema(_make_database(folder / "b.sqlite", _whole_text(schema)), 0)
    assert again.tables == schema.tables
    assert list(schema.tables[0].columns) == columns


@pytest.mark.parametrize("name", ["order", "Group", "to", "select", "index", "2nd", "a b", "", "naïve", "a-b", "left"])
def test_names_that_need_quotes_get_them(name: str) -> None:
    assert quote_name(name) == f"`{name}`"


@pytest.mark.parametrize("name", ["name", "date", "Year", "_x", "type", "rank", "key", "offset"])
def test_names_that_need_no_quotes_get_none(name: str) -> None:
    assert quote_name(name) == name


def _whole_text(schema: Schema) -> str:
    return render_schema([TableView.whole(table) for table in schema.tables])


# ------------------------------------------------------------ gold queries


@pytest.fixture
def golds(tmp_path: Path) -> Path:
    _make_database(tmp_path / "dbs" / "pets.sqlite")
    queries = ["SELECT a FROM t", "SELECT b FROM t", "SELECT a FROM t", "SELECT b FROM t", "SELEC a"]
    return _write(tmp_path / "a.jsonl", [PLAIN | {"gold_sql": query} for query in queries])


def test_gold_queries_that_fail_are_listed_or_dropped(golds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(items: Sequence[tuple[str, str]], timeout_s: float) -> list[str | None]:
        asked.append(len(items))
        return validate_golds(items, timeout_s)

    monkeypatch.setattr(sql_execution, "validate_golds", counted)
    with pytest.raises(ValueError, match="3 of 5 rows have no gold to grade against") as caught:
        _check(golds)
    message = str(caught.value)
    assert "\n" not in message
    for line, query in ((2, "SELECT b FROM t"), (4, "SELECT b FROM t"), (5, "SELEC a")):
        assert f"{golds}:{line}: '{query}': the gold query does not run: " in message
    assert "no such column: b" in message
    assert message.endswith("; mend or remove the rows, or set data.invalid_gold: drop")
    # Twice the same query on the same database is run once.
    assert asked == [3]

    checked = _check(golds, invalid_gold="drop")
    assert [problem.problem_id for problem in checked.problems] == ["d-0", "d-2"]
    done: list[int] = []
    faults = query_faults(_load(golds), 10, done.append)
    assert [fault is None for fault in faults] == [True, False, True, False, False]
    assert sum(done) == 5


def test_a_long_list_of_failures_is_cut_short(golds: Path) -> None:
    path = _write(golds, [PLAIN | {"gold_sql": f"SELECT b{i} FROM t" if i else " "} for i in range(450)])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the gold query is empty; .*a\.jsonl:5: [^;]*; and 445 more; m"):
        _check(path)


# ------------------------------------------------------------ the real databases


@needs_data
def test_every_real_schema_reads_and_is_written_as_sql() -> None:
    paths = sorted((REAL / "dbs").glob("*.sqlite"))
    assert len(paths) > 100
    for path in paths:
        schema = read_schema(path, 3)
        tables = [table for table in schema.tables if not table.is_view]
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(render_schema([TableView.whole(table, 3) for table in tables]))
            for table in tables:
                listed = connection.execute(f"PRAGMA table_info({quote_name(table.name)})").fetchall()
                assert {name: kind for _, name, kind, *_ in listed} == table.columns, path
        assert all(len(row) == len(table.columns) for table in tables for row in table.sample_rows), path
        assert all("\n" not in line for table in tables for line in render_lines(TableView.whole(table, 3))), path


@needs_data
def test_the_real_pairs_load_by_split() -> None:
    path = REAL / "pairs.jsonl"
    train = _load(path, where={"source": "spider-train"}, exclude_where={"tie_sensitive": True})
    dev = _load(path, where={"source": "spider-dev"}, exclude_where={"tie_sensitive": True})
    assert (len(train), len(dev)) == (4500, 967)
    databases = [{json.loads(problem.answer)["db"] for problem in split} for split in (train, dev)]
    assert databases[0].isdisjoint(databases[1])


@needs_data
def test_real_gold_queries_run() -> None:
    dataset = _dataset(REAL / "pairs.jsonl", where={"source": "spider-dev"}, exclude_where={"tie_sensitive": True})
    problems = load_problems(dataset, 0)[::10]
    assert check_golds(problems, dataset.kind, RewardConfig(name="sql_execution")) == CheckedGolds(problems)
