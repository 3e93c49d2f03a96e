"""Strategies of completions, and Pass@1 taken apart by them: worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dphrl.config.data import DatasetConfig
from dphrl.data.loading import load_problems
from dphrl.evaluation.strategies import ALL, count_strategies, split_pass_at_1
from dphrl.rewards.strategies import OTHER, shape_of, strategies_that_fit, strategy_of
from dphrl.tiny import sql_task
from dphrl.tiny.task import DIVISORS, strategies_of
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup
from tests.unit.test_evaluation_core import evaluate

RIGHT, WRONG, FAILED = RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.INFRASTRUCTURE_ERROR


def group(answer: str, *samples: tuple[str, RewardStatus], prompt_id: str = "p") -> RolloutGroup:
    completions = [Completion(prompt_id, i, (1,), text, (-1.0,), "stop", 0) for i, (text, _) in enumerate(samples)]
    results = [RewardResult(status, solution=text) for text, status in samples]
    return RolloutGroup(Prompt(prompt_id, "?", (1,), answer, "d"), tuple(completions), tuple(results))


# -------------------------------------------------------------------------------------------- what a strategy is


def test_the_divisors_that_fit_are_those_that_divide_and_were_asked_for() -> None:
    # 4158 = 2 * 3^3 * 7 * 11, and 4159 is a prime.
    assert strategies_of("factor:04158") == {"3": True, "7": True, "11": True}
    assert strategies_of("factor:04159") == {"3": False, "7": False, "11": False}
    assert strategies_of("divide:7:04158") == {"7": True}
    divided = group("divide:7:04158", ("7 :", WRONG), ("3 :", WRONG))
    assert count_strategies([divided], "factorization") == [
        {"strategies": {"7": [1, 1, 0], OTHER: [1, 0, 0]}, "fitting": ["7"]}
    ]
    assert strategies_that_fit("factorization", "no answer of this task") is None
    assert strategies_that_fit("math_answer", "4") is None
    held_out = DatasetConfig(name="factor", kind="tiny", split="held_out", limit=50)
    for problem in load_problems(held_out, 0):
        assert list(strategies_of(problem.answer)) == [str(p) for p in DIVISORS]
        assert any(strategies_of(problem.answer).values()), "each problem can be solved"


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("7 : 0 4 6 2 0 \\boxed{ 7 * 0 0 5 9 4 }", "7"),
        ("11 : 0 \\boxed{ 7 * 5 }", "11"),  # the divisor that is named first, whatever the box says
        ("007 : 0", "7"),
        ("5 : 0 0", OTHER),
        (": \\boxed{", OTHER),
        ("", OTHER),
    ],
)
def test_a_factorization_s_strategy_is_the_divisor_named_first(text: str, strategy: str) -> None:
    known = strategies_of("factor:04158")
    assert strategy_of("factorization", text, RewardResult(RIGHT), known) == strategy
    assert strategy_of("math_answer", text, RewardResult(RIGHT), None) is None


@pytest.mark.parametrize(
    ("sql", "shape"),
    [
        ("SELECT a FROM t WHERE k NOT IN (SELECT k FROM u)", "subquery"),
        ("SELECT a FROM t EXCEPT SELECT a FROM t JOIN u USING (k)", "set_operation"),
        ("select a from t natural join u group by k", "join"),
        ("SELECT a FROM t, u WHERE t.k = u.k", "join"),
        ("SELECT a, b FROM t WHERE c IN (1, 2) ORDER BY a, b", "one_table"),
        ("SELECT a FROM t WHERE b = 'join, except select' AND \"union\" = 1", "one_table"),
        ("SELECT 'it''s' FROM t WHERE b = 'JOIN'", "one_table"),
        ("WITH w AS (SELECT 1) SELECT * FROM w", "subquery"),
        ("VALUES (1)", OTHER),
        ("", OTHER),
    ],
)
def test_a_query_s_strategy_is_how_it_combines_tables(sql: str, shape: str) -> None:
    assert shape_of(sql) == shape
    assert strategy_of("sql_execution", "ignored", RewardResult(WRONG, solution=sql), None) == shape


@pytest.mark.parametrize("split", ["held_out", "out_of_domain"])
def test_the_embedded_questions_say_which_shapes_fit(split: str) -> None:
    files: Any = {"league": "/there/league.sqlite", "company": "/there/company.sqlite"}
    seen = set()
    for problem in sql_task.make_problems(split, 30, seed=1):
        fits = strategies_that_fit("sql_execution", problem.answer(files))
        assert fits is not None
        assert list(fits) == list(sql_task.SHAPES)
        question = sql_task._question_of(problem.database, problem.gold_sql)
        assert question is not None
        assert question.problem_id == problem.problem_id
        gold = question.rows(problem.gold_sql)
        for shape, does_fit in fits.items():
            assert shape_of(question.query(shape)) == shape
            assert (question.rows(question.query(shape)) == gold) is does_fit
        seen.add(tuple(fits.values()))
    assert len(seen) > 3, "different shapes fit different questions"


@pytest.mark.parametrize(
    "answer",
    [
        "no json",
        "[]",
        json.dumps({"db": "/there/league.sqlite"}),
        json.dumps({"db": "/there/other.sqlite", "gold_sql": "SELECT 1"}),
        json.dumps(
            {"db": "/there/league.sqlite", "gold_sql": "SELECT name FROM t WHERE a = 'b' AND c FROM goal WHERE"}
        ),
        json.dumps({"db": 3, "gold_sql": "SELECT 1"}),
    ],
)
def test_of_other_questions_no_one_knows_what_fits(answer: str) -> None:
    assert strategies_that_fit("sql_execution", answer) is None


def test_a_query_that_only_resembles_a_gold_one_is_of_no_embedded_question() -> None:
    problem = sql_task.make_problems("held_out", 1, seed=1)[0]
    for gold_sql, is_known in ((problem.gold_sql, True), (f"{problem.gold_sql} LIMIT 1", False)):
        answer = json.dumps({"db": "/there/league.sqlite", "gold_sql": gold_sql})
        assert (strategies_that_fit("sql_execution", answer) is not None) is is_known


# -------------------------------------------------------------------------------------------- counts


def test_counts_of_a_prompt_by_hand() -> None:
    # 21 = 3 * 7: 3 and 7 fit, 11 does not. The grader failed on the last sample, which is in no count.
    of_21 = group("factor:00021", ("3 :", RIGHT), ("3 :", WRONG), ("11 :", WRONG), ("x", WRONG), ("7 :", FAILED))
    # 11 does not fit 9, but a sample that names it and is right all the same does, by definition.
    of_9 = group("factor:00009", ("11 :", RIGHT), ("11 :", WRONG))
    assert count_strategies([of_21, of_9], "factorization") == [
        {"strategies": {"11": [1, 0, 0], "3": [2, 2, 1], OTHER: [1, 0, 0]}, "fitting": ["3", "7"]},
        {"strategies": {"11": [2, 1, 1]}, "fitting": ["3"]},
    ]
    assert count_strategies([of_21], "math_answer") is None
    unknown = group("{}", ("SELECT a FROM t", RIGHT), ("SELECT a FROM t", WRONG))
    assert count_strategies([unknown], "sql_execution") == [{"strategies": {"one_table": [2, None, 1]}}]


def test_evaluations_keep_counts_by_strategy(make_config: Any) -> None:
    (summary,), _ = evaluate(make_config, {"d": ["rwwr", "rxwx"]})
    # The scripted completions name no divisor, and their answers are of no factorization.
    assert [row["strategies"] for row in summary["per_prompt"]] == [{OTHER: [3, None, 1]}, {OTHER: [2, None, 1]}]
    assert "fitting" not in summary["per_prompt"][0]


# -------------------------------------------------------------------------------------------- the split


def test_pass_at_1_is_share_times_selection_times_precision_by_hand() -> None:
    # Two prompts of four samples. Strategy 3 takes 3 + 1 of 8; it fits 3 of these 4, and 2 of the 3 are right.
    # Strategy 7 takes 1 + 3 of 8; it fits 3 of these 4 (on the second prompt), and 3 of the 3 are right.
    prompts = [{"3": (3, 3, 2), "7": (1, 0, 0)}, {"3": (1, 0, 0), "7": (3, 3, 3)}]
    split = split_pass_at_1(prompts)
    assert list(split) == ["3", "7", ALL]
    three, seven, both = split.values()
    assert (three.share, three.selection, three.precision, three.right) == pytest.approx((1 / 2, 3 / 4, 2 / 3, 1 / 4))
    assert (seven.share, seven.selection, seven.precision, seven.right) == pytest.approx((1 / 2, 3 / 4, 1, 3 / 8))
    # Pass@1 is the mean of 2/4 and 3/4; 6 of 8 samples fit, and 5 of the 6 are right.
    assert (both.share, both.selection, both.precision, both.right) == pytest.approx((1, 6 / 8, 5 / 6, 5 / 8))


def test_each_prompt_counts_the_same_whatever_the_grader_failed_on() -> None:
    # Of the second prompt one sample of two has a verdict, so it counts twice as much as one of the first.
    split = split_pass_at_1([{"3": (1, 1, 1), "7": (1, 1, 0)}, {"7": (1, 0, 0)}, {}])
    assert split["3"].share == pytest.approx(1 / 4)
    assert split["7"].share == pytest.approx(3 / 4)
    # Of strategy 7 a quarter fits (1/2 of 1/2), out of three quarters.
    assert (split["7"].selection, split["7"].precision) == (pytest.approx(1 / 3), 0.0)
    assert split[ALL].right == pytest.approx((1 / 2 + 0) / 2), "Pass@1 of the prompts that have a verdict"


def test_numbers_come_before_words_and_by_value() -> None:
    names = ["other", "11", "7", "join", "3"]
    assert list(split_pass_at_1([dict.fromkeys(names, (1, 1, 1))])) == ["3", "7", "11", "join", "other", ALL]


def test_what_is_unknown_stays_unknown() -> None:
    split = split_pass_at_1([{"join": (2, None, 1), "subquery": (2, 0, 0)}])
    assert (split["join"].selection, split["join"].precision) == (None, None)
    assert (split["join"].share, split["join"].right) == (0.5, 0.25)
    assert (split["subquery"].selection, split["subquery"].precision) == (0.0, None), "nothing that fits, no precision"
    assert (split[ALL].selection, split[ALL].right) == (None, 0.25)
    assert split_pass_at_1([]) == {}
    assert split_pass_at_1([{}, {"3": (0, 0, 0)}]) == {}
