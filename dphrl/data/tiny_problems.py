"""The embedded procedural tasks as data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dphrl.config.data import DatasetConfig
from dphrl.data.problems import Problem

# Which variant of the factorisation task a kind of data is.
_FACTOR_TASK_OF_KIND = {"tiny": "factor", "tiny_even": "factor-even", "tiny_cue": "cue"}


def load_tiny(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """`limit` factorisations of a split, or all it has. Raises ValueError for an unknown split or too high a limit."""
    from dphrl.tiny.task import FACTOR_TASKS, MAX_PROBLEMS, SPLITS

    task = FACTOR_TASKS[_FACTOR_TASK_OF_KIND[dataset.kind]]
    num_problems = _num_problems(dataset, SPLITS, MAX_PROBLEMS)
    return [
        Problem(f"{dataset.name}-{row}", problem.question, problem.answer, dataset.name, dataset.kind)
        for row, problem in enumerate(task.make_problems(dataset.split, num_problems, seed))
    ]


def load_tiny_sql(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """`limit` questions about the embedded databases, or all that a split has. The databases are built if they are not
    there yet. Raises ValueError for an unknown split or too high a limit."""
    from dphrl.tiny import ensure_databases
    from dphrl.tiny.sql_task import MAX_PROBLEMS, SPLITS, make_problems

    num_problems = _num_problems(dataset, SPLITS, MAX_PROBLEMS)
    files = ensure_databases()
    return [
        Problem(f"{dataset.name}-{row}", problem.question, problem.answer(files), dataset.name, "tiny_sql")
        for row, problem in enumerate(make_problems(dataset.split, num_problems, seed))
    ]


def load_arithmetic(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """`limit` sums for a chat model, or all that a split has. Raises ValueError as `load_tiny` does."""
    from dphrl.tiny.arithmetic import MAX_PROBLEMS, SPLITS, make_problems

    num_problems = _num_problems(dataset, SPLITS, MAX_PROBLEMS)
    return [
        Problem(f"{dataset.name}-{row}", problem.question, problem.answer, dataset.name)
        for row, problem in enumerate(make_problems(dataset.split, num_problems, seed))
    ]


def _num_problems(dataset: DatasetConfig, splits: Sequence[str], most: Mapping[str, int]) -> int:
    if dataset.split not in splits:
        raise ValueError(
            f"data set {dataset.name}: split {dataset.split!r} is unknown to the embedded task; set split to "
            f"{', '.join(splits)}"
        )
    if dataset.limit is not None and dataset.limit > most[dataset.split]:
        raise ValueError(
            f"data set {dataset.name}: the embedded task has no more than {most[dataset.split]} problems of split "
            f"{dataset.split}; set its limit"
        )
    return dataset.limit or most[dataset.split]
