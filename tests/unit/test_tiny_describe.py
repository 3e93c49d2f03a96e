"""The command that shows what a model does on an embedded task."""

from __future__ import annotations

import sqlite3

import pytest

from dphrl.tiny import sql_task
from dphrl.tiny.describe import Row, as_text, describe, main, make_cases
from dphrl.tiny.recipe import RECIPES

FITTING = [frozenset({"a", "b"}), frozenset({"a"})]
OUTCOMES = [
    [("a", True), ("b", True), ("b", False), (None, False)],
    [("a", True), ("a", False), ("a", False), ("b", False)],
]


def test_shares_are_counted_by_strategy() -> None:
    found = describe(["a", "b", "c"], FITTING, OUTCOMES, threshold=2)
    # a: on both prompts it fits, 4 of 8 samples chose it, all 4 where it fits, 2 of these right.
    assert found.rows["a"] == Row(fits=1.0, chosen=4 / 8, selection=4 / 4, precision=2 / 4, rehearsed=1 / 1)
    # b: fits the first prompt alone; 3 chose it, 2 of these there, 1 of these right.
    assert found.rows["b"] == Row(fits=1 / 2, chosen=3 / 8, selection=2 / 3, precision=1 / 2, rehearsed=1 / 1)
    assert found.rows["c"] == Row(fits=0.0, chosen=0.0, selection=None, precision=None, rehearsed=0.0)
    # 4 of a and 2 of b fit, of 8 samples. Blindly: 1 x 4/8 + 1/2 x 3/8 = 11/16.
    assert (found.selection, found.blind_selection) == (6 / 8, 11 / 16)
    # Three right of 8; two of them on the first prompt.
    assert (found.pass_at_1, found.num_prompts, found.num_near_perfect) == (3 / 8, 2, 1)


def test_near_perfect_prompts_have_at_least_the_threshold_right() -> None:
    assert describe(["a"], FITTING, OUTCOMES, threshold=1).num_near_perfect == 2
    none = describe(["a"], FITTING, OUTCOMES, threshold=3)
    assert (none.num_near_perfect, none.rows["a"].rehearsed) == (0, None)
    # b's one right answer is on the first prompt: it is rehearsed on one of the two.
    assert describe(["b"], FITTING, OUTCOMES, threshold=1).rows["b"].rehearsed == 1 / 2


def test_the_table_shows_what_was_counted() -> None:
    lines = as_text(describe(["a", "c"], FITTING, OUTCOMES, threshold=2)).splitlines()
    assert lines[1].split() == ["a", "1.000", "0.500", "1.000", "0.500", "1.000"]
    assert lines[2].split() == ["c", "0.000", "0.000", "-", "-", "0.000"]
    assert lines[3:] == [
        "selection 0.750 (0.500 without a look at the prompt)",
        "Pass@1 0.375",
        "near-perfect prompts: 1 of 2 (0.500)",
    ]


@pytest.mark.parametrize("task", RECIPES)
def test_every_task_s_strategies_are_told_apart_and_judged(task: str) -> None:
    strategies, cases = make_cases(task, 30, seed=1)
    assert len(strategies) == 3
    for case in cases:
        assert case.fitting <= set(strategies)
        assert case.fitting
        assert case.judge("nothing of the kind") == (None, False)


def test_a_factoring_completion_is_read_by_its_first_word() -> None:
    _, cases = make_cases("cue", 200, seed=0)
    for case in cases:
        number = int("".join(case.question.split()[1:-1]))
        assert case.fitting == {str(p) for p in (7, 8, 9) if number % p == 0}
        for p in (7, 8, 9):
            right = number % p == 0
            assert case.judge(rf"{p} : 0 \boxed{{ {p} * {number // p} }}") == (str(p), right)
    assert cases[0].judge(r"3 : \boxed{ 3 * 5 }") == (None, False)


def test_a_query_is_read_by_its_shape_and_judged_by_its_rows() -> None:
    problems = sql_task.make_problems("train", 60, seed=2)
    _, cases = make_cases("sql", 60, seed=2)
    for problem, case in zip(problems, cases, strict=True):
        question = sql_task.question_of(problem)
        assert (question.text, question.gold_sql) == (problem.question, problem.gold_sql)
        for shape in sql_task.SHAPES:
            assert case.judge(question.query(shape)) == (shape, shape in case.fitting)
        # What no shape is, what is no SQL, and rows that cannot be sorted.
        assert case.judge("SELECT 1") == (None, False)
        assert case.judge("SELECT FROM JOIN") == ("join", False)
        assert question.rows_or_none("SELECT 1 UNION ALL SELECT 'a'") is None
        with pytest.raises(sqlite3.Error):
            question.rows("SELECT FROM")


def table_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without what libraries print before it when they are loaded."""
    lines = capsys.readouterr().out.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("strategy")) :]


def test_the_command_samples_the_packaged_model_and_leaves_torch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    torch.manual_seed(5)
    state = torch.get_rng_state()
    arguments = ["factor", "--problems", "40", "--samples", "4", "--threshold", "3"]
    assert main(arguments) == 0
    assert torch.get_rng_state().equal(state)
    first = table_of(capsys)
    assert [line.split()[0] for line in first[1:4]] == ["3", "7", "11"]
    pass_at_1 = float(first[5].removeprefix("Pass@1 "))
    # The packaged model has .38; four standard deviations of 160 samples on 40 prompts.
    assert 0.2 < pass_at_1 < 0.6
    main(arguments)
    assert table_of(capsys) == first
    main([*arguments, "--seed", "1"])
    assert table_of(capsys) != first


@pytest.mark.parametrize("task", ["factor-even", "cue"])
def test_the_packaged_models_divide_equally_well_and_can_rehearse_every_strategy(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([task, "--problems", "400"]) == 0
    rows = [list(map(float, line.split()[1:])) for line in table_of(capsys)[1:4]]
    for _, chosen, selection, precision, rehearsed in rows:
        # Some 500 samples of 3200 are where a strategy was chosen and fits: .02 is one standard deviation of each.
        assert 0.74 < precision < 0.88
        assert 0.25 < chosen < 0.42
        assert rehearsed > 0.3
        assert selection > 0.45
    # Half of 8's cue is all that the demonstrations taught.
    of_first, of_second, of_third = (selection for _, _, selection, _, _ in rows)
    assert (0.62 < of_second < 0.8) == (task == "cue")
    assert max(of_first, of_third) < 0.64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["spql"], "invalid choice: 'spql'"),
        (["factor", "--samples", "0"], "must be 1 or more"),
        (["factor", "--problems", "20000"], "--problems: num_problems is 20000"),
        (["factor", "--model", "/no/such"], "/no/such holds no config.json"),
    ],
)
def test_bad_input_is_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
