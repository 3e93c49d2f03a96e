"""Shortens a schema to a budget of tokens: it drops sample rows first, then whole tables, then columns, and never
cuts a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dphrl.data.schema_relevance import Relevance, SchemaIndex
from dphrl.data.sql_schema import Schema, Table, TableView, render_lines, render_schema

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class FittedSchema:
    """lost_rows: sample rows are missing. lost_names: tables or columns are missing."""

    text: str
    lost_rows: bool = False
    lost_names: bool = False


class SchemaFitter:
    """Renders schemas, whole or fitted to a budget.

    It keeps the token count of every line and the rendering of every whole schema, so thousands of questions on the
    same databases need no tokenizing beyond their own text. The sum over lines is close to the token count of the
    whole text, but not equal to it: the caller measures the prompt that it makes, and asks again with a smaller budget.
    """

    def __init__(self, count_tokens: CountTokens) -> None:
        """count_tokens: returns for each text its number of tokens, without special tokens."""
        self._count_tokens = count_tokens
        self._line_tokens: dict[str, int] = {}
        self._whole: dict[tuple[Schema, int], tuple[str, int]] = {}
        self._indices: dict[Schema, SchemaIndex] = {}

    def whole(self, schema: Schema) -> FittedSchema:
        """The schema with all its tables, columns and sample rows."""
        return FittedSchema(self._render_whole(schema, _most_rows(schema))[0])

    def fit(self, schema: Schema, text: str, max_tokens: int) -> FittedSchema:
        """The schema in at most `max_tokens`; tables are chosen by their relevance to `text` (question and evidence).

        One table with one column is always shown, however small the budget is.
        """
        most_rows = _most_rows(schema)
        for num_rows in range(most_rows, -1, -1):
            rendered, num_tokens = self._render_whole(schema, num_rows)
            if num_tokens <= max_tokens:
                return FittedSchema(rendered, lost_rows=num_rows < most_rows)
        if schema not in self._indices:
            self._indices[schema] = SchemaIndex(schema)
        views = self._choose(schema.tables, self._indices[schema].relevance(text), max_tokens)
        return FittedSchema(render_schema(views), lost_rows=most_rows > 0, lost_names=True)

    def _render_whole(self, schema: Schema, num_rows: int) -> tuple[str, int]:
        key = (schema, num_rows)
        if key not in self._whole:
            views = [TableView.whole(table, num_rows) for table in schema.tables]
            self._whole[key] = render_schema(views), sum(map(self._cost, views))
        return self._whole[key]

    def _choose(self, tables: Sequence[Table], relevance: Relevance, max_tokens: int) -> list[TableView]:
        """Whole tables in order of relevance while they fit; from the first table that does not fit, as many columns
        as there is room for; then further whole tables that are small enough."""
        chosen: dict[int, TableView] = {}
        left = max_tokens
        narrowed = False
        for index in relevance.order:
            view = TableView.whole(tables[index])
            if self._cost(view) > left and not narrowed:
                view = self._narrowed(tables[index], relevance.columns[index], left)
                narrowed = True
            if not chosen or self._cost(view) <= left:
                chosen[index] = view
                left -= self._cost(view)
        return [chosen[index] for index in sorted(chosen)]

    def _narrowed(self, table: Table, matching: frozenset[str], max_tokens: int) -> TableView:
        """As many columns as fit, in this order: columns that the text names, keys, all others."""
        keys = {*table.primary_key, *(column for key in table.foreign_keys for column in key.columns)}
        ordered = sorted(table.columns, key=lambda name: (name not in matching, name not in keys))
        view = TableView(table, frozenset(ordered[:1]))
        for name in ordered[1:]:
            wider = TableView(table, view.columns | {name})
            if self._cost(wider) <= max_tokens:
                view = wider
        return view

    def _cost(self, view: TableView) -> int:
        # One token more for the empty line between tables.
        lines = render_lines(view)
        new = [line for line in dict.fromkeys(lines) if line not in self._line_tokens]
        if new:
            counts = self._count_tokens([line + "\n" for line in new])
            self._line_tokens |= zip(new, counts, strict=True)
        return 1 + sum(self._line_tokens[line] for line in lines)


def _most_rows(schema: Schema) -> int:
    return max((len(table.sample_rows) for table in schema.tables), default=0)
