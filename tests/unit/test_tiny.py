"""The embedded factorisation task: its problems, demonstrations and grader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dphrl.tiny import (
    DIVISORS,
    SPLITS,
    grade,
    is_held_out,
    make_demonstrations,
    make_problems,
)


def number_of(text: str) -> int:
    """The integer in a question or an answer."""
    if text.startswith(("FACTOR", "DIVIDE")):
        return int("".join(text.removesuffix(" ?").split()[-5:]))
    return int(text.rsplit(":", 1)[1])


def answer_to(question: str) -> str:
    words = question.split()
    kind = "factor" if words[0] == "FACTOR" else f"divide:{words[1]}"
    return f"{kind}:{number_of(question):05d}"


# --- the problems ---


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_solvable_distinct_and_say_what_they_ask(split: str) -> None:
    problems = make_problems(split, 400, seed=3)
    assert len({problem.problem_id for problem in problems}) == len({problem.question for problem in problems}) == 400
    for problem in problems:
        number = number_of(problem.question)
        assert 10 < number < 100_000
        assert problem.answer == answer_to(problem.question)
        named = [int(problem.question.split()[1])] if split == "out_of_domain" else DIVISORS
        assert any(number % p == 0 for p in named)


def test_no_evaluation_number_is_ever_trained_on() -> None:
    trained = {number_of(problem.question) for seed in (0, 1) for problem in make_problems("train", 2000, seed)}
    trained |= {number_of(question) for question, _ in make_demonstrations(3000, seed=0)}
    for split in ("held_out", "out_of_domain"):
        evaluated = {number_of(problem.question) for problem in make_problems(split, 1000, seed=0)}
        assert not trained & evaluated
        assert all(map(is_held_out, evaluated))
    assert not any(map(is_held_out, trained))


def test_one_integer_in_five_is_held_out() -> None:
    assert 0.19 < sum(map(is_held_out, range(20_000))) / 20_000 < 0.21


def test_problems_depend_on_the_seed_alone() -> None:
    problems = make_problems("train", 50, seed=7)
    assert make_problems("train", 50, seed=7) == problems
    assert make_problems("train", 20, seed=7) == problems[:20]
    assert make_problems("train", 50, seed=8) != problems
    assert make_demonstrations(20, seed=7) == make_demonstrations(20, seed=7)
    # A fixed example: two machines, or two releases, must mean the same problems by the same seed.
    assert make_problems("held_out", 1, seed=1)[0].question == "FACTOR 4 6 5 9 6 ?"


def test_every_strategy_is_worth_about_the_same_and_none_is_enough() -> None:
    numbers = [number_of(problem.question) for problem in make_problems("train", 1000, seed=0)]
    for divisor in DIVISORS:
        assert 0.35 < sum(number % divisor == 0 for number in numbers) / 1000 < 0.65


@pytest.mark.parametrize(("split", "num_problems"), [("test", 1), ("train", -1), ("held_out", 1_000_000)])
def test_impossible_requests_name_the_value(split: str, num_problems: int) -> None:
    with pytest.raises(ValueError, match="test" if split == "test" else str(num_problems)):
        make_problems(split, num_problems, seed=0)


# --- the demonstrations ---


def test_a_fifth_of_the_demonstrations_slip_and_the_rest_are_correct() -> None:
    demonstrations = make_demonstrations(4000, seed=1)
    statuses = [grade(completion, answer_to(question))[0] for question, completion in demonstrations]
    assert set(statuses) == {"correct", "wrong"}
    assert 0.17 < statuses.count("wrong") / len(statuses) < 0.23
    assert 0.22 < sum(question.startswith("DIVIDE") for question, _ in demonstrations) / len(demonstrations) < 0.28
    exact = make_demonstrations(500, seed=1, slip_rate=0.0)
    assert {grade(completion, answer_to(question))[0] for question, completion in exact} == {"correct"}


def test_demonstrations_choose_evenly_among_the_divisors_that_work() -> None:
    chosen = [
        int(completion.split()[0])
        for question, completion in make_demonstrations(30_000, seed=2, out_of_domain_share=0.0)
        if number_of(question) % 231 == 0
    ]
    assert len(chosen) > 1000
    for divisor in DIVISORS:
        assert 0.28 < chosen.count(divisor) / len(chosen) < 0.39


def test_a_slip_spoils_one_remainder_and_the_rest_follows_from_it() -> None:
    for question, completion in make_demonstrations(300, seed=4, slip_rate=1.0):
        words = completion.split()
        divisor, remainders = int(words[0]), list(map(int, words[2:7]))
        digits = list(map(int, f"{number_of(question):05d}"))
        before = [0, *remainders[:-1]]
        expected = [(10 * r + d) % divisor for r, d in zip(before, digits, strict=True)]
        assert sum(r != e for r, e in zip(remainders, expected, strict=True)) == 1
        assert all(0 <= r < divisor for r in remainders)
        quotient = [(10 * r + d) // divisor for r, d in zip(before, digits, strict=True)]
        assert list(map(int, words[10:15])) == quotient


# --- the grader ---


@pytest.mark.parametrize(
    ("completion", "answer", "status"),
    [
        (r"3 : 0 1 2 0 0 \boxed{3*01386}", "factor:04158", "correct"),
        (r"7 : 0 4 6 2 0 \boxed{ 7 * 0 0 5 9 4 }", "factor:04158", "correct"),
        ("\\boxed {\t11\n* 378 }", "factor:04158", "correct"),
        (r"\boxed{11*00378}", "divide:11:04158", "correct"),
        (r"\boxed{03*1386}", "factor:04158", "correct"),
        (r"\boxed{7*00594} <eos> and so on", "factor:04158", "correct"),
        # The last box counts, and only the last.
        (r"\boxed{3*01387} no: \boxed{3*01386}", "factor:04158", "correct"),
        (r"\boxed{3*01386} no: \boxed{3*01387}", "factor:04158", "wrong"),
        (r"\boxed{3*01386} or \boxed{", "factor:04158", "unparsable"),
        (r"\boxed{3*01386} or \boxed{7}", "factor:04158", "unparsable"),
        # Wrong products and divisors.
        (r"\boxed{3*01385}", "factor:04158", "wrong"),
        (r"\boxed{3*41580}", "factor:04158", "wrong"),
        (r"\boxed{1*04158}", "factor:04158", "wrong"),
        (r"\boxed{2*02079}", "factor:04158", "wrong"),
        (r"\boxed{21*00198}", "factor:04158", "wrong"),
        (r"\boxed{0*00000}", "factor:04158", "wrong"),
        (r"\boxed{01386*3}", "factor:04158", "wrong"),
        (r"\boxed{3*01386}", "divide:7:04158", "wrong"),
        # No readable answer.
        ("", "factor:04158", "unparsable"),
        ("3 * 1386", "factor:04158", "unparsable"),
        (r"\boxed{}", "factor:04158", "unparsable"),
        (r"\boxed{3*01386", "factor:04158", "unparsable"),
        (r"boxed{3*01386}", "factor:04158", "unparsable"),
        (r"\boxed{3*-1386}", "factor:04158", "unparsable"),
        (r"\boxed{-3*-1386}", "factor:04158", "unparsable"),
        (r"\boxed{3*1386.0}", "factor:04158", "unparsable"),
        (r"\boxed{3*1_386}", "factor:04158", "unparsable"),
        (r"\boxed{3**1386}", "factor:04158", "unparsable"),
        (r"\boxed{3*2*693}", "factor:04158", "unparsable"),
        (r"\boxed{{3*01386}}", "factor:04158", "unparsable"),
        (r"\boxed{3*001386}", "factor:04158", "unparsable"),
        (r"\boxed{3*٠١٣٨٦}", "factor:04158", "unparsable"),  # digits to int(), not to us
        (r"\boxed{³*1386}", "factor:04158", "unparsable"),
    ],
)
def test_grader(completion: str, answer: str, status: str) -> None:
    assert grade(completion, answer)[0] == status


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{3*" + "9" * 100_000 + "}",
        "\\boxed" * 50_000,
        "\\boxed{" * 50_000,
        "\\boxed" + " " * 100_000 + "3*1386}",
        "\\boxed{\x00\ud800*\udfff}",
        "}\\boxed",
        "\u202e\\boxed{3*1386",
    ],
    ids=["huge-number", "no-braces", "all-open", "long-gap", "surrogates", "reversed", "right-to-left"],
)
def test_hostile_text_is_unparsable_and_the_detail_can_be_written(text: str) -> None:
    status, detail = grade(text, "factor:04158")
    assert status == "unparsable"
    assert len(detail.encode()) < 200


@pytest.mark.parametrize("answer", ["", "04158", "factor:4158", "divide:04158", "divide:7:04158 ", "factor:٠٤١٥٨"])
def test_an_answer_of_another_task_is_an_error_not_a_wrong_completion(answer: str) -> None:
    with pytest.raises(ValueError, match="not of this task"):
        grade(r"\boxed{3*01386}", answer)


def test_importing_the_task_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "tokenizers"}
    code = f"import sys, dphrl.tiny; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
