"""From the configuration to a grader, and the grader of the embedded task."""

from __future__ import annotations

import pytest

from dphrl.config.data import REWARD_OF_KIND, RewardConfig
from dphrl.rewards.base import _GRADERS, build_grader
from dphrl.rewards.factorization import FactorizationGrader
from dphrl.types import RewardStatus


@pytest.mark.parametrize(("extraction", "text"), [("boxed", r"\boxed{4}"), ("auto", "#### 4")])
def test_math_grader_reads_where_the_configuration_says(extraction: str, text: str) -> None:
    grader = build_grader(RewardConfig.model_validate({"name": "math_answer", "extraction": extraction}))
    assert [result.score for result in grader.grade([(text, "4"), ("4 or so I believe", "5")])] == [1.0, 0.0]
    grader.close()


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
