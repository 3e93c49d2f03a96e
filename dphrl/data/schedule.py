"""Which items a step sees: a pure function of (seed, step), so that a resumed run needs no saved iterator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def derive_seed(*parts: object) -> int:
    """A 63-bit seed for one use of randomness: uses that differ in any part never share a stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def completion_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """The seed of one completion of a collection that is sampled with `seed`: whatever else is sampled with it, in
    whatever order and by whichever engine."""
    return derive_seed(seed, prompt_id, sample_index)


def step_indices(num_items: int, step: int, count: int, seed: int) -> list[int]:
    """`count` distinct indices below `num_items` for `step` (from 0); all indices when there are fewer than `count`.

    Every epoch is a fresh permutation cut into whole steps. The rest that does not fill a step is not used in that
    epoch, so no step ever holds an item twice.
    """
    if num_items == 0 or count == 0:
        return []
    count = min(count, num_items)
    epoch, place = divmod(step, num_items // count)
    order = np.random.default_rng([seed, epoch]).permutation(num_items)
    return [int(i) for i in order[place * count : (place + 1) * count]]


def spread(items: Sequence[T], others: Sequence[T]) -> list[T]:
    """Both in one list, each in its own order and evenly spread, so that any stretch has about its share of each."""
    placed = [((i + 0.5) / len(part), item) for part in (items, others) for i, item in enumerate(part)]
    return [item for _, item in sorted(placed, key=lambda one: one[0])]


def replacement_indices(num_items: int, step: int, taken: Sequence[int], seed: int) -> list[int]:
    """All indices below `num_items` but for those that the step has `taken`, in the order in which `step` (from 0) may
    take them in the place of others."""
    order = np.random.default_rng([seed, step, 1]).permutation(num_items)
    own = set(taken)
    return [int(i) for i in order if int(i) not in own]
