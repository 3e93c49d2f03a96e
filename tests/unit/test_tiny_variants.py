"""The variants of the factorisation task: FACTOR as it always was, strategies of equal worth, and readable fit."""

from __future__ import annotations

import hashlib
from importlib.resources import files

import pytest

from dphrl.config.data import DatasetConfig, RewardConfig
from dphrl.data.loading import load_problems
from dphrl.rewards.base import build_grader
from dphrl.tiny.recipe import FACTOR_RECIPE, SQL_RECIPE
from dphrl.tiny.task import CUE, FACTOR, FACTOR_EVEN, FACTOR_TASKS, SPLITS, FactorTask, grade, is_held_out

NEW = pytest.mark.parametrize("task", [FACTOR_EVEN, CUE], ids=["even", "cue"])


def number_of(question: str) -> int:
    """The integer in a question, read from its last five words before the question mark."""
    return int("".join(question.split()[-6:-1]))


def answer_to(task: FactorTask, question: str) -> str:
    words = question.split()
    asked = "factor[7,8,9]" if task is CUE else "factor"
    return f"{asked if words[0] == 'FACTOR' else f'divide:{words[1]}'}:{number_of(question):05d}"


# --- what was there before ---


def test_the_first_task_is_what_it_was() -> None:
    # Written down before there were variants. The results of passk-math are of these problems and weights.
    text = repr([(p.question, p.answer, p.problem_id) for s in SPLITS for p in FACTOR.make_problems(s, 300, seed=5)])
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "f5847ee7b871"
    assert hashlib.sha256(repr(FACTOR.make_demonstrations(300, seed=5)).encode()).hexdigest()[:12] == "a1891e920afb"
    assert (FACTOR_RECIPE.fingerprint(), SQL_RECIPE.fingerprint()) == ("067012c2fbdb", "15d2f2673c00")
    weights = files("dphrl.tiny").joinpath("weights/factor.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest()[:12] == "efd912c6c090"


def test_tasks_that_differ_have_models_of_their_own() -> None:
    bound = FactorTask(FACTOR_EVEN.inclusion, free_cofactor=False)
    parts = [repr(task.fingerprint_parts()) for task in (*FACTOR_TASKS.values(), bound)]
    assert len(set(parts)) == 4


# --- the problems ---


@NEW
@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_solvable_distinct_and_say_what_they_ask(task: FactorTask, split: str) -> None:
    problems = task.make_problems(split, 400, seed=3)
    assert len({problem.problem_id for problem in problems}) == len({problem.question for problem in problems}) == 400
    for problem in problems:
        number = number_of(problem.question)
        assert 10 < number < 100_000
        assert problem.answer == answer_to(task, problem.question)
        named = [int(problem.question.split()[1])] if split == "out_of_domain" else task.divisors
        assert any(number % p == 0 for p in named)


@NEW
def test_no_evaluation_number_is_ever_trained_on(task: FactorTask) -> None:
    trained = {number_of(problem.question) for seed in (0, 1) for problem in task.make_problems("train", 2000, seed)}
    trained |= {number_of(question) for question, _ in task.make_demonstrations(3000, seed=0)}
    for split in ("held_out", "out_of_domain"):
        evaluated = {number_of(problem.question) for problem in task.make_problems(split, 1000, seed=0)}
        assert not trained & evaluated
        assert all(map(is_held_out, evaluated))
    assert not any(map(is_held_out, trained))


@NEW
def test_problems_depend_on_the_seed_alone(task: FactorTask) -> None:
    problems = task.make_problems("train", 50, seed=7)
    assert task.make_problems("train", 50, seed=7) == problems
    assert task.make_problems("train", 20, seed=7) == problems[:20]
    assert task.make_problems("train", 50, seed=8) != problems
    assert task.make_demonstrations(20, seed=7) == task.make_demonstrations(20, seed=7)


@NEW
def test_every_strategy_is_worth_the_same(task: FactorTask) -> None:
    drawn = [task.make_problems("train", 2000, seed) for seed in range(4)]
    numbers = [number_of(problem.question) for problems in drawn for problem in problems]
    shares = [sum(number % p == 0 for number in numbers) / len(numbers) for p in task.divisors]
    assert max(shares) - min(shares) < 0.02
    assert all(0.53 < share < 0.59 for share in shares)
    # Rehearsal can keep every strategy on prompts on which every one works.
    assert sum(len(task.fitting(number)) == 3 for number in numbers) / len(numbers) > 0.06


def test_the_first_task_s_strategies_are_not_worth_the_same() -> None:
    numbers = [number_of(problem.question) for problem in FACTOR.make_problems("train", 2000, seed=0)]
    shares = [sum(number % p == 0 for number in numbers) / len(numbers) for p in FACTOR.divisors]
    assert shares[0] < 0.47 < 0.5 < min(shares[1:])


def test_only_a_free_cofactor_contains_a_divisor() -> None:
    def squares(task: FactorTask) -> int:
        numbers = [number_of(problem.question) for problem in task.make_problems("train", 1000, seed=0)]
        return sum(any(number % (p * p) == 0 for p in task.divisors) for number in numbers)

    assert squares(FACTOR) == 0
    assert squares(FACTOR_EVEN) > 100
    assert squares(CUE) > 100


def test_two_of_three_cues_can_be_read_from_the_digits() -> None:
    for problem in CUE.make_problems("train", 500, seed=0):
        digits = problem.question.split()[1:-1]
        fitting = CUE.fitting(number_of(problem.question))
        assert (8 in fitting) == (int("".join(digits[2:])) % 8 == 0)
        assert (9 in fitting) == (sum(map(int, digits)) % 9 == 0)


# --- the demonstrations ---


@NEW
def test_a_fifth_of_the_demonstrations_slip_and_the_rest_are_correct(task: FactorTask) -> None:
    demonstrations = task.make_demonstrations(4000, seed=1)
    statuses = [grade(completion, answer_to(task, question))[0] for question, completion in demonstrations]
    assert set(statuses) == {"correct", "wrong"}
    assert 0.17 < statuses.count("wrong") / len(statuses) < 0.23
    assert 0.22 < sum(question.startswith("DIVIDE") for question, _ in demonstrations) / len(demonstrations) < 0.28


@NEW
def test_demonstrations_choose_evenly_among_the_divisors_that_work(task: FactorTask) -> None:
    demonstrations = task.make_demonstrations(20_000, seed=2, out_of_domain_share=0.0)
    chosen = [
        int(completion.split()[0])
        for question, completion in demonstrations
        if len(task.fitting(number_of(question))) == 3
    ]
    assert len(chosen) > 1000
    for divisor in task.divisors:
        assert 0.28 < chosen.count(divisor) / len(chosen) < 0.39


@NEW
def test_a_completion_fits_what_the_suites_let_a_policy_write(task: FactorTask) -> None:
    # demo-math: max_tokens 24 with the end token, max_prompt_tokens 16 with <bos> and <assistant>.
    for question, completion in task.make_demonstrations(300, seed=3):
        assert len(completion.split()) + 1 <= 24
        assert len(question.split()) + 2 <= 16


# --- the grader ---


@pytest.mark.parametrize(
    ("completion", "answer", "status"),
    [
        # 4536 = 7 * 648 = 8 * 567 = 9 * 504 = 3 * 1512
        (r"7 : 4 3 0 0 0 \boxed{ 7 * 0 0 6 4 8 }", "factor[7,8,9]:04536", "correct"),
        (r"\boxed{8*567}", "factor[7,8,9]:04536", "correct"),
        (r"\boxed{9*00504}", "factor[7,8,9]:04536", "correct"),
        (r"\boxed{9*00505}", "factor[7,8,9]:04536", "wrong"),
        (r"\boxed{3*1512}", "factor[7,8,9]:04536", "wrong"),
        (r"\boxed{3*1512}", "factor:04536", "correct"),
        (r"\boxed{8*567}", "factor:04536", "wrong"),
        (r"\boxed{8*567}", "divide:8:04536", "correct"),
        (r"\boxed{7*648}", "divide:8:04536", "wrong"),
        (r"\boxed{}", "factor[7,8,9]:04536", "unparsable"),
    ],
)
def test_only_the_named_divisors_count(completion: str, answer: str, status: str) -> None:
    assert grade(completion, answer)[0] == status


@pytest.mark.parametrize(
    "answer", ["factor[]:04536", "factor[7,]:04536", "factor[7 8]:04536", "factor[777]:04536", "divide[7]:04536"]
)
def test_a_malformed_list_of_divisors_is_no_answer(answer: str) -> None:
    with pytest.raises(ValueError, match="not of this task"):
        grade(r"\boxed{7*648}", answer)


# --- as data ---


@pytest.mark.parametrize(("kind", "task"), zip(("tiny", "tiny_even", "tiny_cue"), FACTOR_TASKS.values(), strict=True))
def test_each_kind_of_data_is_its_variant(kind: str, task: FactorTask) -> None:
    dataset = DatasetConfig.model_validate({"name": "f", "kind": kind, "split": "held_out", "limit": 20})
    problems = load_problems(dataset, 4)
    assert [problem.text for problem in problems] == [p.question for p in task.make_problems("held_out", 20, seed=4)]
    assert {problem.kind for problem in problems} == {kind}
    grader = build_grader(RewardConfig().for_kind(kind))
    answers = []
    for problem in problems:
        number = number_of(problem.text)
        largest = max(task.fitting(number))
        answers.append((rf"\boxed{{{largest}*{number // largest}}}", problem.answer))
    assert {str(verdict.status) for verdict in grader.grade(answers)} == {"correct"}
