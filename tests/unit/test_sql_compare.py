"""Equality of query results: against brute force, and on the cases that conventions disagree about."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dphrl.rewards.sql_compare import ComparisonTooLargeError, column_overlap, same_by_bird, same_by_spider

Rows = list[tuple[Any, ...]]

# Few values, so that equal columns, equal bags and near misses come up often; 1 and 1.0 are one value.
CELLS = st.sampled_from([0, 1, 1.0, None, "a", b"a", "1"])


def brute_force(gold: Rows, prediction: Rows, ordered: bool) -> bool:
    if not gold and not prediction:
        return True
    if len(gold) != len(prediction) or len(gold[0]) != len(prediction[0]):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        permuted = [tuple(row[column] for column in order) for row in prediction]
        if permuted == gold if ordered else Counter(permuted) == Counter(gold):
            return True
    return False


@st.composite
def tables(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Two results; the second is often the first with columns and rows moved and a few cells changed."""
    num_columns = draw(st.integers(1, 5))
    row = st.tuples(*[CELLS] * num_columns)
    gold = draw(st.lists(row, max_size=7))
    if draw(st.booleans()):
        order = draw(st.permutations(range(num_columns)))
        prediction = [tuple(cells[column] for column in order) for cells in gold]
        if draw(st.booleans()):
            prediction = draw(st.permutations(prediction))
        if prediction and draw(st.booleans()):
            changed = draw(st.integers(0, len(prediction) - 1))
            prediction = [draw(row) if index == changed else cells for index, cells in enumerate(prediction)]
        return gold, list(prediction)
    return gold, draw(st.lists(st.tuples(*[CELLS] * draw(st.integers(1, 5))), max_size=7))


@given(tables(), st.booleans())
@settings(max_examples=600, deadline=None)
def test_spider_agrees_with_brute_force(pair: tuple[Rows, Rows], ordered: bool) -> None:
    gold, prediction = pair
    assert same_by_spider(gold, prediction, ordered) == brute_force(gold, prediction, ordered)


@given(tables(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_comparisons_are_symmetric_and_reflexive(pair: tuple[Rows, Rows], ordered: bool) -> None:
    gold, prediction = pair
    assert same_by_spider(gold, prediction, ordered) == same_by_spider(prediction, gold, ordered)
    assert same_by_bird(gold, prediction) == same_by_bird(prediction, gold)
    assert same_by_spider(gold, gold, ordered)
    assert same_by_bird(gold, gold)


@given(tables())
@settings(max_examples=300, deadline=None)
def test_sameness_by_spider_gives_the_full_overlap(pair: tuple[Rows, Rows]) -> None:
    gold, prediction = pair
    if not gold or not prediction:
        return
    overlap = column_overlap(gold, prediction, len(gold[0]), len(prediction[0]))
    assert 0 <= overlap <= 1
    if same_by_spider(gold, prediction, ordered=False):
        assert overlap == 1


@pytest.mark.parametrize(
    ("gold", "prediction", "bird", "spider", "spider_ordered"),
    [
        ([], [], True, True, True),
        ([], [(None,)], False, False, False),
        ([(1,)], [(1.0,)], True, True, True),
        ([(1,)], [("1",)], False, False, False),
        ([("a",)], [(b"a",)], False, False, False),
        ([(None,)], [(0,)], False, False, False),
        ([(None,)], [("",)], False, False, False),
        ([(1,), (1,)], [(1,)], True, False, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], True, False, False),
        ([(1,), (2,)], [(2,), (1,)], True, True, False),
        ([(1, 2)], [(2, 1)], False, True, True),
        ([(1, 2), (3, 4)], [(4, 3), (2, 1)], False, True, False),
        ([(1, 2), (3, 4)], [(2, 1), (4, 3)], False, True, True),
        # Each row is the same bag of cells, yet no order of columns fits all rows.
        ([("a", 1), ("b", 2)], [("a", 1), (2, "b")], False, False, False),
        # Each column is the same bag of values, paired otherwise.
        ([(1, 1), (2, 2)], [(1, 2), (2, 1)], False, False, False),
        ([(1, 1)], [(1,)], False, False, False),
        ([("x", "x")], [("x", "y")], False, False, False),
        ([(float("inf"),)], [(float("inf"),)], True, True, True),
        ([(2**53,)], [(2**53 + 1,)], False, False, False),
        ([(0.1 + 0.2,)], [(0.3,)], False, False, False),
        ([("é",)], [("e\u0301",)], False, False, False),
        ([("a ",)], [("a",)], False, False, False),
    ],
)
def test_conventions(gold: Rows, prediction: Rows, bird: bool, spider: bool, spider_ordered: bool) -> None:
    assert same_by_bird(gold, prediction) is bird
    assert same_by_spider(gold, prediction, ordered=False) is spider
    assert same_by_spider(gold, prediction, ordered=True) is spider_ordered


@pytest.mark.parametrize(("num_rows", "num_columns"), [(10_507, 12), (300, 40), (30_000, 3)])
def test_large_results_of_many_like_columns_are_matched_quickly(num_rows: int, num_columns: int) -> None:
    source = random.Random(0)
    gold = [tuple(source.choice((0, 1)) for _ in range(num_columns)) for _ in range(num_rows)]
    order = source.sample(range(num_columns), num_columns)
    prediction = [tuple(row[column] for column in order) for row in gold]
    source.shuffle(prediction)
    started = time.monotonic()
    assert same_by_spider(gold, prediction, ordered=False)
    other = [*prediction[:-1], tuple(1 - cell for cell in prediction[-1])]
    assert not same_by_spider(gold, other, ordered=False)
    assert time.monotonic() - started < 5


def test_columns_that_refinement_cannot_tell_apart_are_searched() -> None:
    # A cycle of six and two cycles of three, as rows of an incidence matrix: regular, and not the same.
    def incidence(edges: list[tuple[int, int]]) -> Rows:
        return [tuple(int(node in edge) for node in range(6)) for edge in edges]

    hexagon = incidence([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)])
    shuffled = incidence([(3, 0), (0, 5), (5, 1), (1, 4), (4, 2), (2, 3)])
    triangles = incidence([(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)])
    assert same_by_spider(hexagon, shuffled, ordered=False)
    assert not same_by_spider(hexagon, triangles, ordered=False)


def test_a_search_over_its_budget_is_given_up() -> None:
    identity = [tuple(int(row == column) for column in range(30)) for row in range(30)]
    assert same_by_spider(identity, identity[::-1], ordered=False)
    shifted = [(*row[1:], row[0]) for row in identity]
    with pytest.raises(ComparisonTooLargeError):
        same_by_spider([*identity, (2,) * 30], [(2,) * 30, *shifted[:-1], (3,) + (0,) * 29], False, max_cell_visits=100)


@pytest.mark.parametrize(
    ("gold", "prediction", "num_gold", "num_columns", "overlap"),
    [
        ([(1, "a")], [(1,)], 2, 1, 0.5),
        ([(1, "a")], [("a", 1, 5)], 2, 3, 2 / 3),
        ([(1,)], [(1, 1)], 1, 2, 0.5),
        ([(1, 1)], [(1, 2)], 2, 2, 0.5),
        ([(1, 1), (2, 2)], [(1, 2), (2, 1)], 2, 2, 1.0),
        ([(1,)], [], 1, 1, 0.0),
        ([], [(1,)], 1, 1, 0.0),
    ],
)
def test_column_overlap(gold: Rows, prediction: Rows, num_gold: int, num_columns: int, overlap: float) -> None:
    assert column_overlap(gold, prediction, num_gold, num_columns) == pytest.approx(overlap)
