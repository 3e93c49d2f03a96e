r"""Which of a task's strategies a completion takes, and whether that strategy can be right on its prompt.

A completion is wrong for one of two reasons: it chose a strategy that does not fit the prompt, or it chose one that
fits and carried it out badly. Pass@1 mixes the two; strategies tell them apart. Two rewards have any:

- `factorization`: the divisor that the completion names first.
- `sql_execution`: the shape of the query, that is how it combines tables: a set operation, a subquery, a join, one
  table. Which shapes fit is known for the embedded questions only.

The tasks say what their strategies are (`strategies_of` in `dphrl.tiny.task` and `dphrl.tiny.sql_task`).
"""

from __future__ import annotations

import re

from dphrl.tiny import sql_task, task
from dphrl.types import RewardResult

# What a completion takes that takes none of the task's strategies, such as one that is no answer at all.
OTHER = "other"
_NUMBER = re.compile(r"[0-9]{1,9}")
# Text in quotes may hold any word; it is no part of a query's shape.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]")
_SET_OPERATION = re.compile(r"\b(?:EXCEPT|INTERSECT|UNION)\b", re.I)
_SELECT = re.compile(r"\bSELECT\b", re.I)
_JOIN = re.compile(r"\bJOIN\b|\bFROM\b(?:(?!\b(?:WHERE|GROUP|ORDER|HAVING|LIMIT)\b)[^,])*,", re.I | re.S)


def strategies_that_fit(reward: str, answer: str) -> dict[str, bool] | None:
    """Every strategy of the prompt with this gold `answer`, and whether it can be right there; None where no one knows.

    reward: the name of the run's reward.
    """
    if reward == "factorization":
        try:
            return task.strategies_of(answer)
        except ValueError:
            return None
    return sql_task.strategies_of(answer) if reward == "sql_execution" else None


def strategy_of(reward: str, text: str, result: RewardResult, known: dict[str, bool] | None) -> str | None:
    """The name of the strategy that a completion takes; None if the reward's task has no strategies.

    known: what `strategies_that_fit` says of the prompt. A factorization's strategy is one of these, or else `OTHER`.
    """
    if reward == "factorization":
        named = _NUMBER.search(text)
        divisor = str(int(named[0])) if named else OTHER
        return divisor if known is None or divisor in known else OTHER
    return shape_of(result.solution) if reward == "sql_execution" else None


def shape_of(sql: str) -> str:
    """How a query combines tables: set_operation, subquery, join or one_table; of several the first of these.

    `OTHER` for what is no query. The names of the first three are those of the embedded task's shapes.
    """
    bare = _QUOTED.sub(" '' ", sql)
    num_selects = len(_SELECT.findall(bare))
    if not num_selects:
        return OTHER
    if _SET_OPERATION.search(bare):
        return "set_operation"
    if num_selects > 1:
        return "subquery"
    return "join" if _JOIN.search(bare) else "one_table"
