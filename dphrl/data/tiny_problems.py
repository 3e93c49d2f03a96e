"""The embedded procedural task as a data set."""

from __future__ import annotations

from dphrl.config_data import DatasetConfig
from dphrl.data.problems import Problem


def load_tiny(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """`limit` problems of a split, or all it has. Raises ValueError for an unknown split or too high a limit."""
    from dphrl.tiny.task import MAX_PROBLEMS, SPLITS, make_problems

    if dataset.split not in SPLITS:
        raise ValueError(
            f"data set {dataset.name}: split {dataset.split!r} is unknown to the tiny task; set split to "
            f"{', '.join(SPLITS)}"
        )
    count = MAX_PROBLEMS[dataset.split] if dataset.limit is None else dataset.limit
    try:
        problems = make_problems(dataset.split, count, seed)
    except ValueError as error:
        raise ValueError(f"data set {dataset.name}: {error}; set its limit") from error
    return [
        Problem(f"{dataset.name}-{row}", problem.question, problem.answer, dataset.name, "tiny")
        for row, problem in enumerate(problems)
    ]
