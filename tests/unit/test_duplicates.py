"""Rows that ask the same question: repetitions, contradictions, and questions of an evaluation that are trained on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from dphrl.config.data import DataConfig, DatasetConfig, RewardConfig
from dphrl.data.duplicates import find_repeats, identity, num_shared
from dphrl.data.golds import refuse_or_drop, same_golds
from dphrl.data.loading import load_problems
from dphrl.data.messages import Message
from dphrl.data.problems import Problem
from dphrl.rewards import base
from dphrl.rewards.math_answer import MathAnswerGrader
from dphrl.types import Prompt, RewardResult, RewardStatus

MATH = partial(same_golds, reward=RewardConfig(name="math_answer"))


def _problem(row: int, text: str, gold: str, *earlier: Message) -> Problem:
    return Problem(f"d-{row}", text, gold, "d", location=f"a:{row + 1}", earlier=earlier)


def _problems(*rows: tuple[str, str]) -> list[Problem]:
    return [_problem(index, text, gold) for index, (text, gold) in enumerate(rows)]


def _ids(problems: Sequence[Problem]) -> list[str]:
    return [problem.problem_id for problem in problems]


def test_an_equal_question_with_an_equal_gold_is_a_repetition() -> None:
    problems = _problems(("q", "1/2"), ("r", "7"), (" q\n", "0.5"), ("q", "1/2"), ("R", "7"), ("s", "7"))
    repeats = find_repeats(problems, MATH)
    assert repeats.problems == problems
    assert repeats.repeated == {"d-2", "d-3"}
    assert repeats.contradictory == []


def test_contradictory_golds_are_named_in_pairs() -> None:
    rows = [("q", "1"), ("q", "2"), ("r", "7"), ("q", "1.0"), ("q", "3"), ("r", "7")]
    repeats = find_repeats(_problems(*rows), MATH)
    assert _ids(repeats.problems) == ["d-2", "d-5"]
    assert repeats.repeated == {"d-5"}
    assert [str(bad) for bad in repeats.contradictory] == [
        "a:1: '1': the same question has the gold '2' at a:2",
        "a:2: '2': the same question has the gold '1' at a:1",
        "a:4: '1.0': the same question has the gold '2' at a:2",
        "a:5: '3': the same question has the gold '1' at a:1",
    ]
    dataset = DatasetConfig(name="d")
    with pytest.raises(
        ValueError, match=r"4 of 6 rows .*; leave the row with the right gold, or set data.invalid_gold"
    ):
        refuse_or_drop(repeats.contradictory, len(rows), dataset, DataConfig(train=dataset))


def test_one_hundred_copies_are_compared_once() -> None:
    asked: list[int] = []

    def same(pairs: Sequence[tuple[Problem, Problem]]) -> list[bool]:
        asked.append(len(pairs))
        return MATH(pairs)

    rows = [("q", "1/2"), ("r", "7"), ("q", "0.5")] * 100
    repeats = find_repeats(_problems(*rows), same)
    assert len(repeats.repeated) == 298
    assert not {"d-0", "d-1"} & repeats.repeated
    # Golds of one spelling need no grader.
    assert asked == [1]


@pytest.mark.parametrize(
    ("there", "back", "same"),
    [
        ("correct", "wrong", True),
        ("wrong", "correct", True),
        ("wrong", "unparsable", False),
        # Nobody knows, so nobody is accused.
        ("timeout", "wrong", True),
    ],
)
def test_golds_differ_when_neither_is_right_for_the_other(
    monkeypatch: pytest.MonkeyPatch, there: str, back: str, same: bool
) -> None:
    class Told(MathAnswerGrader):
        def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
            known = {(r"\boxed{1}", "2"): there, (r"\boxed{2}", "1"): back}
            return [RewardResult(RewardStatus(known[item])) for item in items]

    monkeypatch.setitem(base._GRADERS, "math_answer", lambda config: Told())
    assert MATH([(_problem(0, "q", "1"), _problem(1, "q", "2"))]) == [same]


def test_golds_that_only_ones_own_reward_can_compare_make_different_problems() -> None:
    repeats = find_repeats(_problems(("q", "three lines"), ("q", "two lines"), ("q", "three lines")), None)
    assert (_ids(repeats.problems), repeats.repeated) == (["d-0", "d-1", "d-2"], {"d-2"})
    assert repeats.contradictory == []


def test_earlier_turns_are_a_part_of_the_question() -> None:
    other = Message("system", "Count from zero.")
    problems = [_problem(0, "q", "1"), _problem(1, "q", "2", other), _problem(2, "q", "2", other)]
    repeats = find_repeats(problems, MATH)
    assert (repeats.repeated, repeats.contradictory) == ({"d-2"}, [])


def test_queries_are_compared_by_what_they_return(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with closing(sqlite3.connect(tmp_path / f"{name}.sqlite")) as connection:
            connection.executescript("CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 2), (3, 4);")
    rows = [
        ("one", "Which?", "SELECT a FROM t", ""),
        ("two", "Which?", "SELECT b FROM t", ""),
        ("one", "Which?", "SELECT t.a FROM t WHERE b > 0", ""),
        ("one", "Which?", "SELECT b FROM t", "b is meant"),
        ("one", "How many?", "SELECT count(*) FROM t", ""),
        ("one", "How many?", "SELECT count(*) + 1 FROM t", ""),
    ]
    lines = [
        json.dumps({"db": db, "question": question, "gold_sql": gold, "evidence": evidence})
        for db, question, gold, evidence in rows
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "a.jsonl")
    problems = load_problems(DatasetConfig(name="d", kind="text_to_sql", path=path, databases=str(tmp_path)), seed=0)
    assert len({identity(problem) for problem in problems}) == 4
    repeats = find_repeats(problems, partial(same_golds, reward=RewardConfig(name="sql_execution")))
    assert repeats.repeated == {"d-2"}
    assert [str(bad) for bad in repeats.contradictory] == [
        f"{path}:5: 'SELECT count(*) FROM t': the same question has the gold 'SELECT count(*) + 1 FROM t' at {path}:6",
        f"{path}:6: 'SELECT count(*) + 1 FROM t': the same question has the gold 'SELECT count(*) FROM t' at {path}:5",
    ]


def test_prompts_of_an_evaluation_that_are_trained_on_are_counted() -> None:
    def prompts(*texts: str) -> list[Prompt]:
        return [Prompt(f"d-{row}", text, (1,), "7", "d") for row, text in enumerate(texts)]

    assert num_shared(prompts("a b", "c"), prompts("a\n b", "d", "c", "C")) == 2
    assert num_shared(prompts("a b"), prompts("c")) == 0
