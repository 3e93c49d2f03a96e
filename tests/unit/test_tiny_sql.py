"""The embedded text-to-SQL task: its databases, problems and demonstrations, judged by executing the queries."""

from __future__ import annotations

import hashlib
import itertools
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dphrl.rewards.sql_execution import SqlExecutionGrader
from dphrl.tiny import ensure_databases
from dphrl.tiny.sql_database import GROUP_NAMES, SCHEMAS, YEARS
from dphrl.tiny.sql_task import (
    SHAPES,
    SPLITS,
    VOCABULARY,
    Question,
    is_held_out,
    make_demonstrations,
    make_problems,
)
from dphrl.types import RewardStatus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ensure_databases(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def databases(files: dict[str, Path]) -> Iterator[dict[str, sqlite3.Connection]]:
    connections = {name: sqlite3.connect(f"file:{path}?mode=ro", uri=True) for name, path in files.items()}
    yield connections
    for connection in connections.values():
        connection.close()


def bag(connection: sqlite3.Connection, sql: str) -> list[tuple[str]]:
    return sorted(connection.execute(sql))


def all_questions(split: str) -> dict[str, Question]:
    """Every question that the split could ask, by its text."""
    database = "company" if split == "out_of_domain" else "league"
    year_sets = [*itertools.combinations(YEARS, 1), *itertools.combinations(YEARS, 2)]
    questions = [
        Question(SCHEMAS[database], event, name, years)
        for name in GROUP_NAMES
        if is_held_out(name) == (split != "train")
        for event in SCHEMAS[database].events
        for years in year_sets
    ]
    return {question.text: question for question in questions}


def group_in(question: str) -> str:
    return question.split("'")[1]


# --- the databases ---


def content(path: Path) -> str:
    """A digest of every row of every table, in storage order."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return hashlib.sha256("\n".join(connection.iterdump()).encode()).hexdigest()
    finally:
        connection.close()


def test_databases_are_the_same_in_every_process(files: dict[str, Path], tmp_path: Path) -> None:
    code = "import sys, pathlib; from dphrl.tiny import ensure_databases; ensure_databases(pathlib.Path(sys.argv[1]))"
    environment = {"PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True)
    again = ensure_databases(tmp_path)
    assert {name: content(path) for name, path in again.items()} == {name: content(p) for name, p in files.items()}


def test_databases_are_read_only_small_and_alone_in_their_folder(files: dict[str, Path]) -> None:
    assert {name: path.name for name, path in files.items()} == {name: f"{name}.sqlite" for name in SCHEMAS}
    for path in files.values():
        assert path.stat().st_mode & 0o222 == 0
        assert path.stat().st_size < 3 * 2**20
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["company.sqlite", "league.sqlite"]


def test_a_second_call_builds_nothing_and_a_deleted_file_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPHRL_CACHE", str(tmp_path))
    built = ensure_databases()
    inodes = {name: path.stat().st_ino for name, path in built.items()}
    built["company"].unlink()
    again = ensure_databases()
    assert again == built
    assert again["league"].stat().st_ino == inodes["league"]
    assert content(again["company"])


def test_builders_may_race(files: dict[str, Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(ensure_databases, [tmp_path] * 4))
    assert all(paths == built[0] for paths in built)
    assert {name: content(path) for name, path in built[0].items()} == {name: content(p) for name, p in files.items()}
    assert sorted(entry.name for entry in built[0]["league"].parent.iterdir()) == ["company.sqlite", "league.sqlite"]


def test_the_schemas_share_no_name_but_the_year(databases: dict[str, sqlite3.Connection]) -> None:
    def names(connection: sqlite3.Connection) -> set[str]:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [row[1] for table in tables for row in connection.execute(f"PRAGMA table_info({table})")]
        return {*tables, *columns}

    assert names(databases["league"]) & names(databases["company"]) == {"year"}


def test_rows_have_the_flaws_the_questions_are_about(databases: dict[str, sqlite3.Connection]) -> None:
    def count(sql: str) -> int:
        return int(databases["league"].execute(f"SELECT COUNT(*) FROM ({sql})").fetchone()[0])

    num_teams = count("SELECT DISTINCT team FROM player")
    assert num_teams == len(GROUP_NAMES)
    namesakes = count("SELECT DISTINCT team FROM (SELECT team FROM player GROUP BY team, name HAVING COUNT(*) > 1)")
    nobodys = count("SELECT DISTINCT team, year FROM award WHERE player_id IS NULL")
    idle = count(
        "SELECT DISTINCT team FROM player WHERE player_id NOT IN (SELECT player_id FROM award WHERE player_id)"
    )
    repeated = count("SELECT player_id FROM award WHERE player_id GROUP BY player_id, year HAVING COUNT(*) > 1")
    for num, of in ((namesakes, num_teams), (nobodys, num_teams * len(YEARS)), (idle, num_teams)):
        assert 0.4 < num / of < 0.7
    assert repeated > num_teams
    assert count("SELECT * FROM award JOIN player USING (player_id) WHERE award.team <> player.team") == 0


# --- the problems ---


@pytest.mark.parametrize("split", SPLITS)
def test_each_shape_works_on_about_half_of_the_problems_and_none_on_all(
    split: str, databases: dict[str, sqlite3.Connection]
) -> None:
    problems = make_problems(split, 400, seed=3)
    assert len({problem.problem_id for problem in problems}) == len({problem.question for problem in problems}) == 400
    questions = all_questions(split)
    works = []
    for problem in problems:
        question, connection = questions[problem.question], databases[problem.database]
        gold = bag(connection, problem.gold_sql)
        assert gold
        works.append([bag(connection, question.query(shape)) == gold for shape in SHAPES])
    assert all(map(any, works))
    for per_shape in zip(*works, strict=True):
        assert 0.45 < sum(per_shape) / len(works) < 0.68
    # The near-perfect prompts: without them there would be nothing to rehearse.
    assert 0.07 < sum(map(all, works)) / len(works) < 0.2
    # Which shape works cannot be told from the kind of question.
    for num_years in (1, 2):
        of_kind = [w for w, p in zip(works, problems, strict=True) if len(questions[p.question].years) == num_years]
        for per_shape in zip(*of_kind, strict=True):
            assert 0.35 < sum(per_shape) / len(of_kind) < 0.75


def test_every_combination_of_shapes_occurs_in_every_kind_of_question() -> None:
    seen = set()
    questions = all_questions("held_out")
    for problem in make_problems("held_out", 1000, seed=0):
        question = questions[problem.question]
        seen.add((question.event.table, len(question.years), question.working_shapes()))
    assert len(seen) == 2 * 2 * 7


def test_no_evaluation_group_is_ever_trained_on() -> None:
    trained = {group_in(problem.question) for seed in (0, 1) for problem in make_problems("train", 2000, seed)}
    trained |= {group_in(question) for question, _ in make_demonstrations(3000, seed=0)}
    for split in ("held_out", "out_of_domain"):
        evaluated = {group_in(problem.question) for problem in make_problems(split, 500, seed=0)}
        assert not trained & evaluated
        assert all(map(is_held_out, evaluated))
    assert 0.15 < sum(map(is_held_out, GROUP_NAMES)) / len(GROUP_NAMES) < 0.25


def test_only_the_out_of_domain_split_asks_the_company() -> None:
    for split in SPLITS:
        named = {problem.database for problem in make_problems(split, 50, seed=0)}
        assert named == {"company" if split == "out_of_domain" else "league"}


def test_problems_depend_on_the_seed_alone() -> None:
    problems = make_problems("train", 50, seed=7)
    assert make_problems("train", 50, seed=7) == problems
    assert make_problems("train", 20, seed=7) == problems[:20]
    assert make_problems("train", 50, seed=8) != problems
    code = (
        "from dphrl.tiny.sql_task import *\n"
        "print(make_problems('held_out', 5, seed=1), make_demonstrations(5, seed=1), VOCABULARY)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = [make_problems("held_out", 5, seed=1), make_demonstrations(5, seed=1), VOCABULARY]
    assert outcome.stdout.strip() == " ".join(map(str, shown))
    # A fixed example: two machines, or two releases, must mean the same problems by the same seed.
    assert make_problems("held_out", 1, seed=1)[0].question == ("Which players of 'Late Bridge' won no award in 2020 ?")


@pytest.mark.parametrize(("split", "num_problems"), [("test", 1), ("train", -1), ("held_out", 1_000_000)])
def test_impossible_requests_name_the_value(split: str, num_problems: int) -> None:
    with pytest.raises(ValueError, match="test" if split == "test" else str(num_problems)):
        make_problems(split, num_problems, seed=0)


def test_the_reward_agrees_on_which_shapes_work_and_calls_slips_wrong(files: dict[str, Path]) -> None:
    items, expected = [], []
    for split in ("held_out", "out_of_domain"):
        questions = all_questions(split)
        for problem in make_problems(split, 40, seed=5):
            working = questions[problem.question].working_shapes()
            for shape in SHAPES:
                items.append((questions[problem.question].query(shape), problem.answer(files)))
                expected.append(RewardStatus.CORRECT if shape in working else RewardStatus.WRONG)
    answers = {problem.question: problem.answer(files) for problem in make_problems("train", 4000, seed=0)}
    for question, sql in make_demonstrations(200, seed=5, slip_rate=1.0, out_of_domain_share=0.0):
        if question in answers:
            items.append((sql, answers[question]))
            expected.append(RewardStatus.WRONG)
    assert len(items) > 300
    grader = SqlExecutionGrader(timeout_s=5.0)
    try:
        assert [result.status for result in grader.grade(items)] == expected
    finally:
        grader.close()


# --- the demonstrations ---


def test_demonstrations_give_the_gold_rows_and_slips_do_not(databases: dict[str, sqlite3.Connection]) -> None:
    asked = {name: all_questions(split) for name, split in (("league", "train"), ("company", "out_of_domain"))}
    # The company is asked about training offices here, about held-out ones in its split.
    company = SCHEMAS["company"]
    for question in list(asked["league"].values()):
        event = company.events[SCHEMAS["league"].events.index(question.event)]
        twin = Question(company, event, question.group_name, question.years)
        asked["company"][twin.text] = twin

    def is_right(question: str, sql: str) -> bool:
        name = "league" if question.startswith("Which players") else "company"
        return bag(databases[name], sql) == bag(databases[name], asked[name][question].gold_sql)

    exact = make_demonstrations(600, seed=1, slip_rate=0.0)
    assert all(is_right(*pair) for pair in exact)
    slipped = make_demonstrations(600, seed=1, slip_rate=1.0)
    assert not any(is_right(*pair) for pair in slipped)
    mixed = make_demonstrations(2000, seed=1)
    assert 0.17 < sum(not is_right(*pair) for pair in mixed) / len(mixed) < 0.23
    assert 0.22 < sum(question.startswith("Which employees") for question, _ in mixed) / len(mixed) < 0.28


def test_a_slip_changes_one_word_of_one_of_the_queries() -> None:
    questions = all_questions("train")
    for text, sql in make_demonstrations(200, seed=4, slip_rate=1.0, out_of_domain_share=0.0):
        words = sql.split()
        intended = [questions[text].query(shape).split() for shape in SHAPES]
        num_changes = [
            sum(word != other for word, other in zip(words, query, strict=True))
            for query in intended
            if len(query) == len(words)
        ]
        assert min(num_changes) == 1


def test_demonstrations_choose_evenly_among_the_shapes_that_work() -> None:
    questions = all_questions("train")
    chosen = dict.fromkeys(SHAPES, 0)
    for text, sql in make_demonstrations(8000, seed=2, slip_rate=0.0, out_of_domain_share=0.0):
        question = questions[text]
        if question.working_shapes() == frozenset(SHAPES):
            (shape,) = [shape for shape in SHAPES if question.query(shape) == sql]
            chosen[shape] += 1
    total = sum(chosen.values())
    assert total > 500
    for count in chosen.values():
        assert 0.27 < count / total < 0.40
