"""Which tables and columns of a database a question is about, as far as its words tell.

Only schemas that do not fit the prompt need this. The question and its evidence are compared with names, and with
values in the tables, but never with the gold query: that would give the answer away.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from dphrl.data.sql_schema import Schema, Table, open_read_only, quote_name

_WORD = re.compile(r"[^\W_]+")
_NAME_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+|\d+")
# Endings, and how many of their letters are removed; the first ending that fits counts.
_ENDINGS = (("sses", 2), ("xes", 2), ("ches", 2), ("shes", 2), ("ing", 3), ("ed", 2))
_MIN_STEM_CHARS = 3
_UNTELLING = """
    a all an and any are as at be been but by can did do does each every find first for from get give had has
    have her his how if in into is it its last list many me more most much no not number of on one only or
    other our out over return show than that the their them then there these they this to under was were what
    when where which while who whom whose will with you
"""
_STOP_WORDS = frozenset(_UNTELLING.split())
# How much a match counts: with the name of a table, with the name of a column, with a value in a column.
_TABLE_WEIGHT, _COLUMN_WEIGHT, _VALUE_WEIGHT = 3.0, 1.0, 1.5
# How much a partial match counts: "dep" in a name matches "department" in the question, and both "airport" and "code"
# match "airportcode".
_PARTIAL_MATCH = 0.5
_MIN_PARTIAL_CHARS = 3
# The share of its relevance that a table gives to its neighbours (tables that a foreign key joins to it): a neighbour
# ranks above an unrelated table and below a table that the question names.
_NEIGHBOUR_SHARE = 0.2
# At most this many rows of each table are searched for values, and a value has at most this many words.
_MAX_VALUE_ROWS = 1000
_MAX_VALUE_WORDS = 4
_MIN_VALUE_CHARS, _MAX_VALUE_CHARS = 3, 60


@dataclass(frozen=True, slots=True)
class Relevance:
    """order: indices of all tables, the most relevant first. columns: per table, those that match the text."""

    order: tuple[int, ...]
    columns: tuple[frozenset[str], ...]


class SchemaIndex:
    """Words and values of one schema, prepared for many questions.

    It reads the values when it is made. Raises ValueError when the database cannot be read.
    """

    def __init__(self, schema: Schema) -> None:
        self._tables = schema.tables
        # For each stem the names that hold it: (index of the table, column; "" for the table's own name).
        self._places: dict[str, set[tuple[int, str]]] = defaultdict(set)
        for index, table in enumerate(schema.tables):
            for name in ("", *table.columns):
                for part in name_stems(name or table.name):
                    self._places[part].add((index, name))
        self._values = _read_values(schema)
        self._neighbours = _neighbours(schema.tables)
        self._matches: dict[str, Mapping[tuple[int, str], float]] = {}

    def relevance(self, text: str) -> Relevance:
        """How relevant each table is to `text`, and which columns match it."""
        scores = [0.0] * len(self._tables)
        columns: list[set[str]] = [set() for _ in self._tables]
        for matches in self._text_matches(text):
            tables = {table for table, _ in matches}
            # A word that occurs in many tables does not tell them apart, so it counts less.
            rarity = math.log(1 + len(self._tables) / len(tables))
            for table in tables:
                scores[table] += rarity * max(weight for place, weight in matches.items() if place[0] == table)
            for table, column in matches:
                if column:
                    columns[table].add(column)
        return Relevance(self._order(scores), tuple(map(frozenset, columns)))

    def _text_matches(self, text: str) -> list[Mapping[tuple[int, str], float]]:
        """For each stem and each value in the text: the places that it matches, and how much each match counts."""
        words = [match[0].lower() for match in _WORD.finditer(text)]
        stems = dict.fromkeys(stem(word) for word in words if word not in _STOP_WORDS)
        found = [self._stem_matches(word) for word in stems]
        phrases = {
            " ".join(words[start : start + length])
            for start in range(len(words))
            for length in range(1, min(_MAX_VALUE_WORDS, len(words) - start) + 1)
        }
        found += [dict.fromkeys(self._values[p], _VALUE_WEIGHT) for p in sorted(phrases) if p in self._values]
        return [matches for matches in found if matches]

    def _stem_matches(self, word: str) -> Mapping[tuple[int, str], float]:
        if word not in self._matches:
            found: dict[tuple[int, str], float] = {}
            for part, places in self._places.items():
                if strength := _likeness(word, part):
                    for place in places:
                        weight = strength * (_COLUMN_WEIGHT if place[1] else _TABLE_WEIGHT)
                        found[place] = max(found.get(place, 0.0), weight)
            self._matches[word] = found
        return self._matches[word]

    def _order(self, scores: Sequence[float]) -> tuple[int, ...]:
        """Greedy: every chosen table raises its neighbours, so that a table that joins two named tables comes before a
        table that only has words like the question's. Ties are broken by the schema's order."""
        lifted = list(scores)
        left = list(range(len(scores)))
        order: list[int] = []
        while left:
            best = max(left, key=lambda table: (lifted[table], -table))
            left.remove(best)
            order.append(best)
            for neighbour in self._neighbours[best]:
                lifted[neighbour] += _NEIGHBOUR_SHARE * lifted[best]
        return tuple(order)


def stem(word: str) -> str:
    """A word without the most common English endings. The rule is crude, but it is the same for names and questions."""
    word = word.lower()
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    for ending, num_removed in _ENDINGS:
        if word.endswith(ending) and len(word) - num_removed >= _MIN_STEM_CHARS:
            word = word[:-num_removed]
            break
    else:
        if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
            word = word[:-1]
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def name_stems(name: str) -> list[str]:
    """The stems of a name's parts; they are the same for Student_ID, studentId and "Student ID"."""
    return [stem(part) for part in _NAME_PART.findall(name)]


def _likeness(word: str, part: str) -> float:
    if word == part:
        return 1.0
    shorter = min(word, part, key=len)
    if len(shorter) < _MIN_PARTIAL_CHARS or shorter.isdigit():
        return 0.0
    compound = len(word) > _MIN_PARTIAL_CHARS and part.endswith(word)
    return _PARTIAL_MATCH if compound or word.startswith(part) or part.startswith(word) else 0.0


def _read_values(schema: Schema) -> dict[str, set[tuple[int, str]]]:
    values: dict[str, set[tuple[int, str]]] = defaultdict(set)
    try:
        with closing(open_read_only(schema.path)) as connection:
            for index, table in enumerate(schema.tables):
                for column, text in _short_texts(connection, table):
                    words = _WORD.findall(text.lower())
                    value = " ".join(words)
                    if len(words) <= _MAX_VALUE_WORDS and len(value) >= _MIN_VALUE_CHARS and value not in _STOP_WORDS:
                        values[value].add((index, column))
    except sqlite3.Error as error:
        raise ValueError(f"{schema.path} cannot be read: {error}; replace it") from error
    return dict(values)


def _short_texts(connection: sqlite3.Connection, table: Table) -> Iterator[tuple[str, str]]:
    if table.is_view or not table.columns:
        return
    listed = ", ".join(map(quote_name, table.columns))
    rows = connection.execute(f"SELECT {listed} FROM {quote_name(table.name)} LIMIT {_MAX_VALUE_ROWS}")
    for row in rows:
        for column, value in zip(table.columns, row, strict=True):
            if isinstance(value, str) and len(value) <= _MAX_VALUE_CHARS and not value.isdigit():
                yield column, value


def _neighbours(tables: Sequence[Table]) -> list[set[int]]:
    index_of = {table.name: index for index, table in enumerate(tables)}
    neighbours: list[set[int]] = [set() for _ in tables]
    for index, table in enumerate(tables):
        for key in table.foreign_keys:
            parent = index_of[key.parent]
            if parent != index:
                neighbours[index].add(parent)
                neighbours[parent].add(index)
    return neighbours
