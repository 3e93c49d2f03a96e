"""Tables of answers and golds, by what they are about, as the tests of the mathematics grader hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Pair = tuple[str, str]


def both_ways(pairs: Mapping[str, Sequence[Pair]]) -> list[Pair]:
    """Every pair of the table, once as (answer, gold) and once with the two exchanged."""
    return [pair for kind in pairs.values() for a, b in kind for pair in ((a, b), (b, a))]
