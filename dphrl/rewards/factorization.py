"""The reward of the embedded factorisation task."""

from __future__ import annotations

from collections.abc import Sequence

from dphrl.tiny.task import grade
from dphrl.types import RewardResult, RewardStatus


class FactorizationGrader:
    """Adapts the task's own grader."""

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """One verdict per (completion text, answer), in order; an answer of another task is an infrastructure error."""
        return [self._grade_one(text, answer) for text, answer in items]

    def close(self) -> None:
        """Nothing to end."""
        pass

    def _grade_one(self, completion_text: str, answer: str) -> RewardResult:
        try:
            status, detail = grade(completion_text, answer)
        except ValueError as error:
            # The gold answer is not of this task: no completion could be right, so none is called wrong.
            return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, str(error))
        # The detail names the factors, which show the strategy, so it also tells distinct solutions apart.
        solution = "" if status == RewardStatus.UNPARSABLE else detail
        return RewardResult(RewardStatus(status), detail, solution)
