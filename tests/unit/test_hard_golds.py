"""Golds that no answer can be compared with: too long, nested, too large. They cost little, and give no score."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dphrl.config.data import RewardConfig
from dphrl.data.golds import check_golds
from dphrl.data.problems import Problem
from dphrl.rewards.math_answer import UNUSABLE_GOLD, MathAnswerGrader
from dphrl.rewards.sql_execution import SqlExecutionGrader
from dphrl.types import RewardResult, RewardStatus

LONG = {
    "a sum": "1+" * 500_000 + "1",
    "brackets": "(" * 500_000 + "1" + ")" * 500_000,
    "fractions": r"\frac{1}{" * 100_000 + "2" + "}" * 100_000,
    "digits": "9" * 1_000_000,
    "texts": r"\text{" * 100_000 + "}" * 100_000,
    "halves": "½" * 500_000,
    "words": "a " * 500_000,
    "backslashes": "\\" * 1_000_000,
}
TOWER = "9^{9^{9^{9}}}"
BOX = r"\boxed{2}"


@pytest.fixture(scope="module")
def grader() -> Iterator[MathAnswerGrader]:
    grader = MathAnswerGrader(timeout_s=2.0)
    yield grader
    grader.close()


@pytest.mark.parametrize("gold", LONG.values(), ids=LONG)
def test_a_gold_of_a_million_characters_gives_no_score_and_takes_no_time(grader: MathAnswerGrader, gold: str) -> None:
    started = time.process_time()
    bad, good = grader.grade([(BOX, gold), (BOX, "2")])
    assert time.process_time() - started < 1
    assert (bad.status, bad.score) == (RewardStatus.INFRASTRUCTURE_ERROR, None)
    assert bad.detail == f"{UNUSABLE_GOLD}: it has {len(gold)} characters, more than 2000"
    assert good.status is RewardStatus.CORRECT


def test_a_gold_that_is_too_large_is_not_the_completion_s_fault(grader: MathAnswerGrader) -> None:
    by_gold, by_answer, by_both = grader.grade(
        [(BOX, TOWER), (rf"\boxed{{{TOWER}}}", "2"), (r"\boxed{9^{9^9}}", TOWER)]
    )
    assert by_gold.status is by_both.status is RewardStatus.INFRASTRUCTURE_ERROR
    assert by_gold.detail.startswith(f"{UNUSABLE_GOLD}: a power of more than")
    assert by_answer.status is RewardStatus.REFUSED


def test_who_takes_too_long_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"s"}

    def decided(pairs: list[tuple[str, str]]) -> list[RewardResult]:
        late, fine = RewardResult(RewardStatus.TIMEOUT, "no result after 2 s"), RewardResult(RewardStatus.WRONG, "")
        return [late if slow & set(pair) else fine for pair in pairs]

    grader = MathAnswerGrader()
    monkeypatch.setattr("dphrl.rewards.math_answer.compare_cheaply", lambda answer, gold: None)
    monkeypatch.setattr(grader, "_decided_by_child", decided)
    by_gold, by_answer = grader.grade([(BOX, "s"), (r"\boxed{s}", "2")])
    assert by_gold.status is RewardStatus.INFRASTRUCTURE_ERROR
    assert by_gold.detail == f"{UNUSABLE_GOLD}: no result after 2 s (box)"
    assert by_answer.status is RewardStatus.TIMEOUT


def test_before_a_run_such_golds_are_told_by_their_row() -> None:
    golds = [*LONG.values(), TOWER, "2"]
    problems = [
        Problem(problem_id=str(i), text="?", answer=gold, dataset="a", location=f"a.jsonl:{i}")
        for i, gold in enumerate(golds, start=1)
    ]
    started = time.process_time()
    checked = check_golds(problems, "math", RewardConfig(name="math_answer", timeout_s=2.0))
    assert time.process_time() - started < 2
    assert [problem.answer for problem in checked.problems] == ["2"]
    assert [bad.location for bad in checked.bad] == [f"a.jsonl:{i}" for i in range(1, len(golds))]
    assert str(checked.bad[3]).endswith("...': 1,000,000 characters, more than any answer may have")


def test_a_query_s_gold_has_a_length_and_a_deadline(tmp_path_factory: pytest.TempPathFactory) -> None:
    import json
    import sqlite3

    path = tmp_path_factory.mktemp("db") / "a.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (x)")
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    grader = SqlExecutionGrader(timeout_s=0.5)
    try:
        results = grader.grade(
            [
                ("```sql\nSELECT 1\n```", json.dumps({"db": str(path), "gold_sql": gold, "convention": "bird"}))
                for gold in ("SELECT " + "1+" * 500_000 + "1", "SELECT " + "(" * 500_000, endless)
            ]
        )
    finally:
        grader.close()
    assert [result.status for result in results] == [RewardStatus.INFRASTRUCTURE_ERROR] * 3
    assert all("the gold query failed" in result.detail for result in results)
