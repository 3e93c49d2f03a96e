"""From the configuration to a grader, and the grader of the embedded task."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from dphrl.config.data import REWARD_OF_KIND, RewardConfig
from dphrl.rewards.base import _GRADERS, build_grader, graded_pair
from dphrl.rewards.factorization import FactorizationGrader
from dphrl.types import Completion, Prompt, RewardStatus


@pytest.mark.parametrize(("extraction", "text"), [("boxed", r"\boxed{4}"), ("auto", "#### 4")])
def test_math_grader_reads_where_the_configuration_says(extraction: str, text: str) -> None:
    grader = build_grader(RewardConfig.model_validate({"name": "math_answer", "extraction": extraction}))
    assert [result.score for result in grader.grade([(text, "4"), ("4 or so I believe", "5")])] == [1.0, 0.0]
    grader.close()


@pytest.mark.parametrize("name", ["math_answer", "sql_execution"])
def test_graders_cut_thoughts_by_the_configured_marks(name: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "empty.sqlite")) as connection:
        connection.execute("CREATE TABLE t (a)")
    answers = {
        "math_answer": "2",
        "sql_execution": json.dumps(
            {"db": str(tmp_path / "empty.sqlite"), "gold_sql": "SELECT 2", "convention": "bird"}
        ),
    }
    texts = {"math_answer": r"\boxed{2}", "sql_execution": "```sql\nSELECT 2\n```"}
    grader = build_grader(RewardConfig(name=name, thinking_marks=(("<plan>", "</plan>"),)))
    right, cut = grader.grade(
        [(f"<plan>or</plan>{texts[name]}", answers[name]), (f"<plan>{texts[name]}", answers[name])]
    )
    grader.close()
    assert right.score == 1.0
    assert cut.status is RewardStatus.UNPARSABLE
    assert cut.detail == "the thinking never ends, so there is no answer"


@pytest.mark.parametrize(
    ("name", "prompt", "text"),
    [
        ("math_answer", "Why? <think>\n", "<think>so"),
        ("sql_execution", "Why? <think>", "<think>so"),
        ("math_answer", "Why? <think>\n\n</think>\n\n", "so"),
        ("my_rewards:brevity", "Why? <think>\n", "so"),
    ],
)
def test_a_thought_that_the_prompt_opened_is_seen(name: str, prompt: str, text: str) -> None:
    pair = Prompt("p", prompt, (1,), "4", "d"), Completion("p", 0, (1,), "so", (0.0,), "stop", 0)
    assert graded_pair(*pair, RewardConfig(name=name)) == (text, "4")


@pytest.mark.parametrize("marks", [[["<a>", ""]], [["<a>", "<A>"]], [["<a>"]]])
def test_marks_that_mark_nothing_are_refused(marks: list[list[str]]) -> None:
    with pytest.raises(ValidationError, match="thinking_marks"):
        RewardConfig.model_validate({"thinking_marks": marks})


def test_every_reward_of_ours_is_known_by_its_name() -> None:
    assert set(_GRADERS) == set(REWARD_OF_KIND.values())
    with pytest.raises(ValueError, match=r"reward.name='maths' is unknown; choose one of factorization, sql_exec"):
        build_grader(RewardConfig(name="maths"))


def test_factorization_grader() -> None:
    grader = build_grader(RewardConfig(name="factorization"))
    assert isinstance(grader, FactorizationGrader)
    right, wrong, empty, misplaced = grader.grade(
        [
            (r"7 : 0 4 6 2 0 \boxed{ 7 * 0 0 5 9 4 }", "factor:04158"),
            (r"\boxed{ 7 * 0 0 5 9 5 }", "factor:04158"),
            ("", "factor:04158"),
            # A gold answer of another task makes no completion wrong.
            (r"\boxed{1*1}", "42"),
        ]
    )
    assert right.score == 1.0
    assert wrong.status is RewardStatus.WRONG
    assert empty.status is RewardStatus.UNPARSABLE
    assert misplaced.status is RewardStatus.INFRASTRUCTURE_ERROR
