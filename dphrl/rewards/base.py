"""The interface of a reward: it gets the text of a completion and a gold answer, and returns a typed verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dphrl.config.data import RewardConfig
from dphrl.rewards.thinking import opened_by
from dphrl.types import Completion, Prompt, RewardResult


class Grader(Protocol):
    """Grades completions with any text; it holds what it needs for that (a child process, caches)."""

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """One verdict per (completion text, answer), in order; never raises because of what the texts hold."""
        ...

    def close(self) -> None:
        """End what the grader started; it is not usable afterwards."""
        ...


def graded_pair(prompt: Prompt, completion: Completion, config: RewardConfig) -> tuple[str, str]:
    """(text, answer) of a completion for a `Grader`.

    Where the prompt ends with the mark that opens a thought, as chat templates of thinking models do, the mark goes in
    front of the text: otherwise a completion that is cut off in its thoughts would look like one without thoughts. A
    user's own reward gets the completion as it is.
    """
    opening = "" if config.is_custom else opened_by(prompt.text, config.thinking_marks)
    return opening + completion.text, prompt.answer


GraderFactory = Callable[[RewardConfig], Grader]


def _math_answer(config: RewardConfig) -> Grader:
    # Imported here, not at the top: a run needs only one of these modules.
    from dphrl.rewards.math_answer import MathAnswerGrader

    return MathAnswerGrader(config.extraction, config.timeout_s, config.thinking_marks)


def _sql_execution(config: RewardConfig) -> Grader:
    from dphrl.rewards.sql_execution import SqlExecutionGrader

    shaping = None if config.shaping == "none" else config.shaping
    return SqlExecutionGrader(config.timeout_s, shaping, config.thinking_marks)


def _factorization(config: RewardConfig) -> Grader:
    from dphrl.rewards.factorization import FactorizationGrader

    return FactorizationGrader()


_GRADERS: dict[str, GraderFactory] = {
    "math_answer": _math_answer,
    "sql_execution": _sql_execution,
    "factorization": _factorization,
}


def build_grader(config: RewardConfig) -> Grader:
    """The grader that `config.name` names. Raises ValueError for one that does not exist or cannot be loaded."""
    if config.is_custom:
        from dphrl.rewards.custom import CustomGrader

        return CustomGrader(config.name, config.params, config.timeout_s)
    config.check_name()
    return _GRADERS[config.name](config)


def check_reward(config: RewardConfig) -> None:
    """Raises InputError, which is a ValueError, when `build_grader` would refuse the name; starts nothing.

    It loads a user's reward, and makes the object when that is a class.
    """
    if config.is_custom:
        from dphrl.config.loading import InputError
        from dphrl.rewards.custom import load_reward

        try:
            load_reward(config.name, config.params)
        except ValueError as error:
            raise InputError(str(error)) from error
    else:
        config.check_name()
