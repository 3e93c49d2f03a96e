"""Loads the problems of a data set, with one loader for each kind."""

from __future__ import annotations

from collections.abc import Callable

from dphrl.config.data import DatasetConfig
from dphrl.data.math_problems import load_math
from dphrl.data.problems import Problem
from dphrl.data.text_to_sql import load_text_to_sql
from dphrl.data.tiny_problems import load_arithmetic, load_tiny, load_tiny_sql

# The int is a seed: an embedded task draws its problems with it. Loaders of files do not use it.
_LOADERS: dict[str, Callable[[DatasetConfig, int], list[Problem]]] = {
    "tiny": load_tiny,
    "tiny_even": load_tiny,
    "tiny_cue": load_tiny,
    "tiny_sql": load_tiny_sql,
    "arithmetic": load_arithmetic,
    "math": load_math,
    "text_to_sql": load_text_to_sql,
}


def load_problems(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """All problems of a data set, in file order.

    Raises ValueError, with file and line, for a row that has no question. Golds are looked at by
    `dphrl.data.golds.check_golds`, which also gathers what the loaders found wrong with them.
    """
    return _LOADERS[dataset.kind](dataset, seed)
