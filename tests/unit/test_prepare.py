"""Data preparation: made-up rows and archives become what the presets read."""

from __future__ import annotations

import io
import json
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dphrl.config.data import DatasetConfig
from dphrl.config.loading import load_config
from dphrl.data import prepare
from dphrl.data.loading import load_problems
from dphrl.data.source import Row
from dphrl.experiments.suite import load_suite
from tests.unit.fake_hub import FakeHub

CC_BY = "Creative Commons Attribution 3.0 Unported License (CC BY 3.0)"
# Every spelling that the data set has for it.
OPEN = [CC_BY, "Creative Commons License  (CC BY)", "Creative Commons Attribution License (CC BY)"]
CC_BY_NC = "Creative Commons Attribution-NonCommercial-ShareAlike 3.0 (CC BY-NC-SA 3.0)"


def row(**fields: Any) -> Row:
    return Row("hub:1", fields)


# ------------------------------------------------------------ mathematics


def test_a_worked_solution_gives_its_box() -> None:
    solution = r"Adding, $1+1=\boxed{2}$, so that \[ x = \boxed{\frac{1}{2}}. \]"
    assert prepare.worked_row(row(problem="p", solution=solution)) == {"question": "p", "answer": r"\frac{1}{2}"}
    assert prepare.worked_row(row(problem="p", solution="no box")) is None
    assert prepare.worked_row(row(question="p", answer="7")) == {"question": "p", "answer": "7"}
    with pytest.raises(ValueError, match="hub:1: no solution; it has problem"):
        prepare.worked_row(row(problem="p"))


@pytest.mark.parametrize("licence", OPEN)
def test_openly_licensed_college_problems_stay_with_their_attribution(licence: str) -> None:
    fields = {"question": "q", "answer": "$1$", "data_source": "college_math.Book", "license": licence}
    assert prepare.college_row(row(**fields)) == fields


@pytest.mark.parametrize("licence", [CC_BY_NC, "(CC BY-SA 4.0)", "CC BY NC", "All rights reserved"])
def test_other_college_problems_are_left_out(licence: str) -> None:
    assert prepare.college_row(row(question="q", answer="1", data_source="b", license=licence)) is None


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"final_answer": ["$8$", "$9$"]}, "$8$, $9$"),
        ({"final_answer": "2"}, "2"),
        ({"final_answer": ["0.3"], "error": "1e-2"}, None),
        ({"final_answer": None}, None),
        ({"final_answer": []}, None),
    ],
)
def test_olympiad_answers(fields: dict[str, Any], answer: str | None) -> None:
    converted = prepare.olympiad_row(row(question="Find n.", context="Let n > 1.", **fields))
    assert converted == (None if answer is None else {"question": "Let n > 1.\n\nFind n.", "answer": answer})


def test_training_rows_are_distinct_and_in_no_test_set() -> None:
    problems = [("one", "1"), ("One ", "2"), ("two", ""), ("three", "3"), ("four", "4")]
    rows = [row(problem=problem, solution=rf"\boxed{{{answer}}}") for problem, answer in problems]
    converted, num_left_out = prepare.convert_rows(rows, prepare.worked_row)
    assert ([each["question"] for each in converted], num_left_out) == (["one", "One", "three", "four"], 1)
    kept, num_repeated, num_held_out = prepare.fit_to_train_on(converted, held_out={"three": "a test"})
    assert [each["question"] + each["answer"] for each in kept] == ["one1", "four4"]
    assert (num_repeated, num_held_out) == (1, 1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """Stands in for the hub, with a row or two of every set's own form."""
    rows = {
        "HuggingFaceH4/MATH-500": [{"problem": "What is 2+2?", "solution": "s", "answer": "4"}],
        "di-zhang-fdu/College_Math_Test": [
            {"question": "c", "answer": "$1$", "license": CC_BY, "data_source": "b"},
            {"question": "c", "answer": "$1$", "license": CC_BY, "data_source": "b"},
            {"question": "d", "answer": "$2$", "license": CC_BY_NC, "data_source": "b"},
        ],
        "Hothan/OlympiadBench": [{"question": "o", "final_answer": ["$3$"], "context": None, "error": None}],
        "HuggingFaceH4/aime_2024": [{"problem": "a", "answer": "025"}],
        "math-ai/amc23": [{"question": "m", "answer": 27.0}],
        "EleutherAI/hendrycks_math": [
            {"problem": "what is  2+2?", "solution": r"\boxed{4}"},
            {"problem": "What is 3+3?", "solution": r"\boxed{6}"},
        ],
    }
    found = FakeHub(tmp_path / "hub", monkeypatch)
    for math_set in (*prepare.TEST_SETS, prepare.TRAIN_SET):
        subsets = [subset for subset in math_set.subsets if subset]
        folders = [f"{subset}/" for subset in subsets] or [""]
        files = {f"{folder}{math_set.split}.jsonl": rows[math_set.hub] for folder in folders}
        found.add(math_set.hub, files, subsets)
    return found


def test_mathematics_from_the_hub(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["math", "--to", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    # A test set keeps its repetitions.
    assert said[1] == "math/college_math_ccby.jsonl: 2 problems, 1 left out"
    # Seven subjects with the same two rows: one problem is a test's, the other counts once.
    assert said[-1] == (
        "math/train.jsonl: 1 problems, 0 left out, 6 repeated, 7 that a test set has "
        "(compared: math500, college_math_ccby, olympiad, aime24, amc23)"
    )
    assert ("EleutherAI/hendrycks_math", "prealgebra") in hub.loaded
    assert ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP") in hub.loaded
    assert ["test.jsonl", "README.md"] in hub.downloaded
    assert not [*tmp_path.rglob(".*")]


@pytest.mark.parametrize("suite", ["paper-llama8b-math", "paper-qwen-math"])
def test_the_suites_read_what_is_prepared(
    suite: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare.main(["math", "--to", str(tmp_path)]) == 0
    monkeypatch.setenv("DPHRL_DATA", str(tmp_path))
    data = load_suite(suite).config("dph-f", 0, "runs").data
    answers = {each.name: load_problems(each, seed=0)[0].answer for each in (data.train, *data.evaluation)}
    assert answers == {
        **{"math": "6", "math500": "4", "college-math": "$1$", "olympiad": "$3$", "aime24": "025", "amc23": "27"}
    }


def test_files_go_before_the_hub_and_one_failure_does_not_hold_up_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeHub(tmp_path / "hub", monkeypatch).offline = True
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "train.jsonl").write_text(json.dumps({"problem": "p", "solution": r"\boxed{1}"}) + "\n")
    (downloads / "aime24.json").write_text(json.dumps([{"problem": "a", "answer": "1"}]))
    assert prepare.main(["math", "--to", str(tmp_path), "--from", str(downloads)]) == 2
    said = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "math").iterdir()) == ["aime24.jsonl", "train.jsonl"]
    assert "(compared: aime24)" in said.out
    lines = said.err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("prepare: error: data set ") and "or give a file" in line for line in lines)


# ------------------------------------------------------------ text-to-SQL


def database(tmp_path: Path) -> bytes:
    path = tmp_path / "made.sqlite"
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE singer (name TEXT)")
        connection.execute("INSERT INTO singer VALUES ('Joe')")
    connection.close()
    return path.read_bytes()


def archive(path: Path, members: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def questions(*databases: str, gold: str = "SQL") -> str:
    return json.dumps([{"question": "Who?", "db_id": name, gold: "SELECT name FROM singer"} for name in databases])


def nested(members: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def bird(tmp_path: Path) -> list[str]:
    """The two archives as they are distributed: databases in an archive of their own, and macOS's leftovers."""
    db = database(tmp_path)
    train = {"train_databases/a/a.sqlite": db, "train_databases/a/database_description/t.csv": "x"}
    dev = {"dev_databases/b/b.sqlite": db, "__MACOSX/dev_databases/b/._b.sqlite": "junk"}
    first = {"train/train.json": questions("a", "a"), "train/train_databases.zip": nested(train)}
    second = {"dev_20240627/dev.json": questions("b"), "dev_20240627/dev_databases.zip": nested(dev)}
    second["__MACOSX/dev.json"] = "junk"
    return [str(archive(tmp_path / "train.zip", first)), str(archive(tmp_path / "dev.zip", second))]


def test_bird_is_where_its_preset_looks(
    bird: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "data"
    assert prepare.main(["bird", "--to", str(to), "--from", *bird]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bird/train: train.json 2 questions; 1 databases, 1 of them newly unpacked",
        "bird/dev: dev.json 1 questions; 1 databases, 1 of them newly unpacked",
    ]
    monkeypatch.setenv("DPHRL_DATA", str(to))
    data = load_config("paper/sql-dph-f").data
    assert len(load_problems(data.train, seed=0)) == 2
    (problem,) = load_problems(data.evaluation[0], seed=0)
    assert problem.sql is not None
    assert json.loads(problem.answer)["db"] == str(to / "bird/dev/dev_databases/b/b.sqlite")
    # Nothing else, least of all half a file or a copy of the inner archive.
    assert len([path for path in to.rglob("*") if path.is_file()]) == 4

    assert prepare.main(["bird", "--to", str(to), "--from", bird[1]]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"bird/train: not there, no train.json in {bird[1]}",
        "bird/dev: dev.json 1 questions; 1 databases, 0 of them newly unpacked",
    ]


def test_spider_is_where_its_preset_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = database(tmp_path)
    members = {
        "spider_data/dev.json": questions("b", gold="query"),
        "spider_data/train_spider.json": questions("a", gold="query"),
        "spider_data/test_data/dev.json": questions("elsewhere", gold="query"),
        "spider_data/database/a/a.sqlite": db,
        "spider_data/database/b/b.sqlite": db,
        "spider_data/database/unused/unused.sqlite": db,
        "spider_data/test_database/c/c.sqlite": db,
    }
    to = tmp_path / "data"
    assert prepare.main(["spider", "--to", str(to), "--from", str(archive(tmp_path / "s.zip", members))]) == 0
    monkeypatch.setenv("DPHRL_DATA", str(to))
    spider = load_config("paper/sql-dph-f").data.evaluation[1]
    assert len(load_problems(spider, seed=0)) == 1
    train = DatasetConfig(name="t", kind="text_to_sql", path=str(to / "spider/train_spider.json"), convention="spider")
    assert len(load_problems(train, seed=0)) == 1
    assert sorted(path.name for path in (to / "spider/database").iterdir()) == ["a", "b"]


def test_no_member_leaves_the_folder(tmp_path: Path) -> None:
    db = database(tmp_path)
    members = {
        "dev.json": questions("b"),
        "../../evil/dev.json": "[]",
        "dev_databases/b/b.sqlite": db,
        "../dev_databases/../dev_databases/../../out/out.sqlite": db,
        "dev_databases/../...sqlite": db,
        "/dev_databases/x/x.sqlite": db,
    }
    to = tmp_path / "deep" / "data"
    assert prepare.main(["bird", "--to", str(to), "--from", str(archive(tmp_path / "evil.zip", members))]) == 0
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path) for path in written} - {"evil.zip", "made.sqlite"} == {
        "deep/data/bird/dev/dev.json",
        "deep/data/bird/dev/dev_databases/b/b.sqlite",
    }
    evil = archive(tmp_path / "evil.zip", {"dev.json": questions("../x"), "dev_databases/../x/../x.sqlite": db})
    assert prepare.main(["bird", "--to", str(to), "--from", str(evil)]) == 2


def wrong_archives(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    db = database(tmp_path)
    made = {
        "missing databases": {"dev.json": questions("a", "b", "c"), "dev_databases/b/b.sqlite": db},
        "no databases": {"dev.json": questions("a")},
        "no questions": {"readme.txt": "hello"},
        "not JSON": {"dev.json": "{", "dev_databases/b/b.sqlite": db},
        "not questions": {"dev.json": "{}", "dev_databases/b/b.sqlite": db},
        "not a database": {"dev.json": questions("b"), "dev_databases/b/b.sqlite": "version https://git-lfs"},
    }
    words = {
        "missing databases": "2 of the 3 databases that questions name are not in dev_databases: a, c;",
        "no databases": "neither dev_databases/<db>/<db>.sqlite nor dev_databases.zip",
        "no questions": "no train.json or dev.json in",
        "not JSON": "dev.json: not JSON",
        "not questions": "not a list of questions with a db_id each",
        "not a database": "dev_databases/b/b.sqlite in the archive is no SQLite database",
    }
    paths = {name: archive(tmp_path / f"{name}.zip", members) for name, members in made.items()}
    (tmp_path / "no archive.zip").write_text("<html>")
    return {
        **{name: (path, words[name]) for name, path in paths.items()},
        "no archive": (tmp_path / "no archive.zip", "cannot be read as a zip archive"),
        "absent": (tmp_path / "absent.zip", "does not exist; correct the path"),
    }


def test_what_is_wrong_with_an_archive_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (path, words) in wrong_archives(tmp_path).items():
        assert prepare.main(["bird", "--to", str(tmp_path / "data"), "--from", str(path)]) == 2, name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("prepare: error: ")
        assert words in line
    # No file of questions says that databases are there when they are not.
    assert not [*(tmp_path / "data").rglob("dev.json")]
    assert not [*(tmp_path / "data").rglob("*.partial")]


def test_a_full_disk_is_said_before_it_is_full(
    bird: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    assert prepare.main(["bird", "--to", str(tmp_path / "data"), "--from", *bird]) == 2
    assert "GB needed, 0.0 GB free; give another --to" in capsys.readouterr().err


# ------------------------------------------------------------ the command


def test_mistakes_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DPHRL_DATA", raising=False)
    archive(tmp_path / "a.zip", {})
    for arguments, words in [
        (["math"], "--to: give the folder for the data, or set DPHRL_DATA"),
        (["bird", "--to", "d"], "--from: give the archives you downloaded, which hold train.json and dev.json"),
        (["math", "--to", "d", "--from", str(tmp_path / "a.zip")], "must be one folder for math"),
    ]:
        assert prepare.main(arguments) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        prepare.main(["wikipedia", "--to", "d"])
    assert caught.value.code == 2


def test_help_names_sources_and_licences() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dphrl.data.prepare", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    for word in ("bird", "--from", "CC BY-SA 4.0", "EleutherAI/hendrycks_math", "math/aime24.jsonl"):
        assert word in done.stdout
