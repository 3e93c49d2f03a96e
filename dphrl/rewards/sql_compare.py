"""Whether two query results are the same, by the two conventions of text-to-SQL. Pure: rows in, verdict out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

Row = tuple[Any, ...]
Rows = Sequence[Row]

# Cells that the search for a column order may look at; so many take some seconds.
MAX_CELL_VISITS = 10_000_000


class ComparisonTooLargeError(Exception):
    """The search for a column order was given up."""


def same_by_bird(gold: Rows, prediction: Rows) -> bool:
    """BIRD: the same set of rows. The order of columns counts; repetitions and the order of rows do not.

    Cells are compared as Python values: 1 equals 1.0, text does not equal a blob, NULL equals NULL.
    """
    return set(gold) == set(prediction)


def same_by_spider(gold: Rows, prediction: Rows, ordered: bool, max_cell_visits: int = MAX_CELL_VISITS) -> bool:
    """Spider's test suite: some order of the prediction's columns gives the same bag of rows, or with `ordered` the
    same sequence of rows. Two results without rows are the same, whatever their columns are.

    Raises ComparisonTooLargeError when the search would need more than `max_cell_visits`.
    """
    if not gold and not prediction:
        return True
    if len(gold) != len(prediction) or len(gold[0]) != len(prediction[0]):
        return False
    if ordered or len(gold) == 1:
        # The order of rows is fixed, so columns match when their sequences of values are equal: no search is needed.
        return Counter(zip(*gold, strict=True)) == Counter(zip(*prediction, strict=True))
    if len(gold[0]) == 1 or Counter(gold) == Counter(prediction):
        return Counter(gold) == Counter(prediction)
    return _Matching(gold, prediction, max_cell_visits).exists()


def column_overlap(gold: Rows, prediction: Rows, num_gold_columns: int, num_columns: int) -> float:
    """From 0 to 1: the number of gold columns whose bag of values equals that of a prediction column (each used once),
    divided by the larger number of columns."""
    found = _column_bags(gold, num_gold_columns)
    used = _column_bags(prediction, num_columns)
    return sum((found & used).values()) / max(num_gold_columns, num_columns)


def _column_bags(rows: Rows, num_columns: int) -> Counter[Hashable]:
    columns = zip(*rows, strict=True) if rows else [()] * num_columns
    return Counter(frozenset(Counter(column).items()) for column in columns)


class _Matching:
    """Search for a one-to-one map of gold columns to prediction columns under which the bags of rows are equal.

    Columns are first told apart by what no map can change: the bag of their values, then which rows those values
    are in (colour refinement of rows and columns in turn). Columns that are still alike are tried one by one: a partial
    map survives only while the rows, cut to its columns, are equal bags.
    """

    def __init__(self, gold: Rows, prediction: Rows, max_cell_visits: int) -> None:
        self._gold = list(zip(*gold, strict=True))
        self._prediction = list(zip(*prediction, strict=True))
        self._num_rows = len(gold)
        self._visits_left = max_cell_visits

    def exists(self) -> bool:
        colours = self._refine()
        if colours is None:
            return False
        gold_colours, colours_of_prediction = colours
        candidates = defaultdict(list)
        for column, colour in enumerate(colours_of_prediction):
            candidates[colour].append(column)
        # Columns with only one possible partner come first: they separate the rows without a choice that may be wrong.
        order = sorted(range(len(self._gold)), key=lambda column: (len(candidates[gold_colours[column]]), column))
        options = [candidates[gold_colours[column]] for column in order]
        start = [0] * self._num_rows
        return self._extend(order, options, 0, set(), start, start)

    def _extend(
        self,
        order: list[int],
        options: list[list[int]],
        depth: int,
        taken: set[int],
        gold_rows: list[int],
        prediction_rows: list[int],
    ) -> bool:
        """Whether the map of the first `depth` columns can be completed. `gold_rows` and `prediction_rows`: for every
        row the number of its cut to those columns, the same number on both sides for equal cuts."""
        if depth == len(order):
            return True
        numbers: dict[tuple[int, Any], int] = {}
        gold_next = self._cut(gold_rows, self._gold[order[depth]], numbers)
        gold_bag = Counter(gold_next)
        tried = set()
        for column in options[depth]:
            # Equal columns are interchangeable.
            if column in taken or self._prediction[column] in tried:
                continue
            tried.add(self._prediction[column])
            prediction_next = self._cut(prediction_rows, self._prediction[column], numbers)
            if Counter(prediction_next) == gold_bag and self._extend(
                order, options, depth + 1, taken | {column}, gold_next, prediction_next
            ):
                return True
        return False

    def _cut(self, rows: list[int], column: Row, numbers: dict[tuple[int, Any], int]) -> list[int]:
        self._spend(self._num_rows)
        return [numbers.setdefault(key, len(numbers)) for key in zip(rows, column, strict=True)]

    def _refine(self) -> tuple[list[int], list[int]] | None:
        """The colours of the gold's columns and of the prediction's columns; None when no map exists."""
        sides = (self._gold, self._prediction)
        rows = [[0] * self._num_rows, [0] * self._num_rows]
        columns = [[0] * len(self._gold), [0] * len(self._gold)]
        num_colours = 0
        while True:
            self._spend(4 * self._num_rows * len(self._gold))
            numbers: dict[Hashable, int] = {}
            columns = [
                [
                    _number(numbers, (colour, frozenset(Counter(zip(row_colours, column, strict=True)).items())))
                    for colour, column in zip(colours, side, strict=True)
                ]
                for side, row_colours, colours in zip(sides, rows, columns, strict=True)
            ]
            if Counter(columns[0]) != Counter(columns[1]):
                return None
            # Done when every column has one partner, or when no further columns were told apart.
            if len(numbers) == len(self._gold) or len(numbers) == num_colours:
                return columns[0], columns[1]
            num_colours = len(numbers)
            numbers = {}
            rows = [
                [
                    _number(numbers, (colour, frozenset(Counter(zip(colours, row, strict=True)).items())))
                    for colour, row in zip(row_colours, zip(*side, strict=True), strict=True)
                ]
                for side, row_colours, colours in zip(sides, rows, columns, strict=True)
            ]
            if Counter(rows[0]) != Counter(rows[1]):
                return None

    def _spend(self, num_visits: int) -> None:
        self._visits_left -= num_visits
        if self._visits_left < 0:
            raise ComparisonTooLargeError(f"no column order found within {MAX_CELL_VISITS:,} cells looked at")


def _number(numbers: dict[Hashable, int], key: Hashable) -> int:
    return numbers.setdefault(key, len(numbers))
