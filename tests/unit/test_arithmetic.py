"""The embedded sums: right answers, disjoint splits, through the grader that training uses."""

from __future__ import annotations

import re

import pytest

from dphrl.config.data import DatasetConfig, RewardConfig
from dphrl.data.loading import load_problems
from dphrl.rewards.base import build_grader
from dphrl.tiny.arithmetic import MAX_PROBLEMS, SPLITS, is_held_out, make_problems


def test_every_answer_is_right() -> None:
    for split in SPLITS:
        for problem in make_problems(split, MAX_PROBLEMS[split], seed=0):
            numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
            question = problem.question
            if "times" in question:
                expected = numbers[0] * numbers[1]
            elif " - " in question or "sold" in question:
                expected = numbers[0] - numbers[1]
            else:
                expected = sum(numbers)
            assert int(problem.answer) == expected > 0 or expected == 0 == int(problem.answer)


def test_no_number_pair_is_on_both_sides() -> None:
    seen: dict[str, set[tuple[int, ...]]] = {split: set() for split in SPLITS}
    for split in ("train", "held_out"):
        for problem in make_problems(split, MAX_PROBLEMS[split], seed=3):
            numbers = tuple(sorted(int(number) for number in re.findall(r"\d+", problem.question)))
            seen[split].add(numbers)
            assert is_held_out(*numbers) == (split == "held_out")
    assert not seen["train"] & seen["held_out"]


def test_problems_are_distinct_and_a_prefix_of_more() -> None:
    few, many = make_problems("train", 50, seed=1), make_problems("train", 80, seed=1)
    assert many[:50] == few
    assert len({problem.question for problem in many}) == 80
    assert make_problems("train", 50, seed=2) != few


@pytest.mark.parametrize(("split", "count"), [("test", 1), ("train", MAX_PROBLEMS["train"] + 1), ("train", -1)])
def test_nonsense_is_refused(split: str, count: int) -> None:
    with pytest.raises(ValueError, match="split"):
        make_problems(split, count, 0)


def test_they_load_as_data_and_the_reward_grades_them() -> None:
    dataset = DatasetConfig(name="sums", kind="arithmetic", split="held_out", limit=5)
    problems = load_problems(dataset, 0)
    reward = RewardConfig(extraction="auto").for_kind("arithmetic")
    verdicts = build_grader(reward).grade([(f"It is {problem.answer}.", problem.answer) for problem in problems])
    assert [str(verdict.status) for verdict in verdicts] == ["correct"] * 5
