"""A SQLite database as a text-to-SQL prompt shows it: tables, columns, keys, a few rows."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

# Words that SQLite does not accept as unquoted names, and words that a join would read as its own keywords.
_RESERVED_WORDS = """
    add all alter and as autoincrement between case cast check collate commit constraint create cross
    current_date current_time current_timestamp default deferrable delete distinct drop else escape except
    exists foreign from full group having if in index inner insert intersect into is isnull join left limit
    natural not nothing notnull null on or order outer primary raise references returning right select set
    table then to transaction union unique update using values when where
"""
_RESERVED = frozenset(_RESERVED_WORDS.split())
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Longer text in a sample row is abbreviated: a row shows what values look like, not what they say.
_MAX_CELL_CHARS = 40
_VISIBLE_COLUMNS = (0, 2, 3)  # of table_xinfo's "hidden": ordinary, generated virtual, generated stored


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """columns: of the table that has the key. parent: the table that it points to, by `parent_columns`."""

    columns: tuple[str, ...]
    parent: str
    parent_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """columns: name to declared type ("" for none), in order. sample_rows: SQL literals, one per column.

    To a query, a view is a table without keys. It has no sample rows, because reading them may mean a scan of the
    tables behind it.
    """

    name: str
    columns: dict[str, str]
    primary_key: tuple[str, ...]
    foreign_keys: tuple[ForeignKey, ...]
    sample_rows: tuple[tuple[str, ...], ...]
    is_view: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Schema:
    """tables: in the order in which they were created."""

    path: Path
    tables: tuple[Table, ...]


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing, not even a lock or a journal file. Bytes that are not UTF-8 are replaced.

    Raises ValueError for a database whose write-ahead log is pending: this connection would not see its last changes.
    """
    wal = path.with_name(path.name + "-wal")
    if wal.is_file() and wal.stat().st_size:
        raise ValueError(f"{wal} holds changes that are not in {path.name} yet; close it with PRAGMA wal_checkpoint")
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda value: value.decode("utf-8", errors="replace")
    return connection


def read_schema(path: Path, num_sample_rows: int) -> Schema:
    """The schema of an SQLite file, with up to `num_sample_rows` rows of each table.

    Raises ValueError, with the reason, for a file that is missing, is no database, or has no tables.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with closing(open_read_only(path)) as connection:
            tables = _read_tables(connection, num_sample_rows)
    except sqlite3.Error as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not tables:
        raise ValueError(f"{path} holds no tables")
    return Schema(path, tables)


def _read_tables(connection: sqlite3.Connection, num_sample_rows: int) -> tuple[Table, ...]:
    listed = connection.execute(
        "SELECT name, type = 'view' FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite^_%' "
        "ESCAPE '^' ORDER BY rowid"
    ).fetchall()
    columns: dict[str, dict[str, str]] = {}
    primary_keys: dict[str, tuple[str, ...]] = {}
    for name, is_view in listed:
        try:
            infos = connection.execute(f"PRAGMA table_xinfo({quote_name(name)})").fetchall()
        except sqlite3.OperationalError:
            if is_view:  # its table is gone, so no query can use the view either
                continue
            raise
        columns[name] = {info[1]: " ".join(info[2].upper().split()) for info in infos if info[6] in _VISIBLE_COLUMNS}
        keyed = sorted((info[5], info[1]) for info in infos if info[5])
        primary_keys[name] = tuple(column for _, column in keyed)
    tables = []
    for name, is_view in listed:
        if name not in columns:
            continue
        rows = () if is_view else _sample_rows(connection, name, list(columns[name]), num_sample_rows)
        foreign_keys = tuple(_foreign_keys(connection, name, columns, primary_keys))
        tables.append(Table(name, columns[name], primary_keys[name], foreign_keys, rows, bool(is_view)))
    return tuple(tables)


def _foreign_keys(
    connection: sqlite3.Connection,
    table: str,
    columns: dict[str, dict[str, str]],
    primary_keys: dict[str, tuple[str, ...]],
) -> Iterator[ForeignKey]:
    """The keys of a table in the order of declaration. A key to a table or column that does not exist is left out,
    because nothing can be joined by it."""
    parts: dict[int, list[tuple[str, str | None]]] = {}
    parents: dict[int, str] = {}
    for key, _, parent, column, parent_column, *_ in connection.execute(
        f"PRAGMA foreign_key_list({quote_name(table)})"
    ).fetchall():
        parts.setdefault(key, []).append((column, parent_column))
        parents[key] = parent
    # SQLite numbers the keys from the last declared to the first.
    for key in sorted(parts, reverse=True):
        parent_table = _same_name(parents[key], columns)
        if parent_table is None:
            continue
        implied = primary_keys[parent_table]
        named = [column for _, column in parts[key] if column is not None] or list(implied)
        own = [_same_name(column, columns[table]) for column, _ in parts[key]]
        theirs = [_same_name(column, columns[parent_table]) for column in named]
        if len(own) == len(theirs) and None not in own and None not in theirs:
            yield ForeignKey(tuple(filter(None, own)), parent_table, tuple(filter(None, theirs)))


def _same_name(name: str, names: Collection[str]) -> str | None:
    """The spelling of a name in `names`, None if it is not there: SQL ignores case, and keys rely on it."""
    if name in names:
        return name
    return next((other for other in names if other.lower() == name.lower()), None)


def _sample_rows(
    connection: sqlite3.Connection, table: str, columns: Sequence[str], num_rows: int
) -> tuple[tuple[str, ...], ...]:
    if num_rows == 0 or not columns:
        return ()
    listed = ", ".join(map(quote_name, columns))
    rows = connection.execute(f"SELECT {listed} FROM {quote_name(table)} LIMIT ?", (num_rows,))
    return tuple(tuple(map(_literal, row)) for row in rows)


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if not isinstance(value, str):
        return str(value)
    # A sample row is shown as a comment, so it must stay on one line whatever the text holds.
    text = "".join(c if c.isprintable() else " " for c in value)
    if len(text) > _MAX_CELL_CHARS:
        text = text[: _MAX_CELL_CHARS - 3] + "..."
    return "'" + text.replace("'", "''") + "'"


def quote_name(name: str) -> str:
    """A name as SQL accepts it, quoted only where it must be.

    The quotes are backticks: SQLite takes a misspelt name in double quotes for a string, and then the query gives a
    wrong result instead of an error.
    """
    if _PLAIN_NAME.fullmatch(name) and name.lower() not in _RESERVED:
        return name
    return "`" + name.replace("`", "``") + "`"


@dataclass(frozen=True, slots=True)
class TableView:
    """The part of a table that is shown: these columns, and this many sample rows."""

    table: Table
    columns: frozenset[str]
    num_rows: int = 0

    @classmethod
    def whole(cls, table: Table, num_rows: int = 0) -> TableView:
        """All columns of a table, with up to `num_rows` sample rows."""
        return cls(table, frozenset(table.columns), min(num_rows, len(table.sample_rows)))

    @property
    def is_whole(self) -> bool:
        """Whether all columns are shown."""
        return len(self.columns) == len(self.table.columns)


def render_lines(view: TableView, shown: Collection[str] | None = None) -> list[str]:
    """The lines of a CREATE TABLE statement, with the sample rows as comments below.

    shown: names of the tables that a foreign key may point to; None allows all.
    """
    table = view.table
    items = [_column_line(table, name) for name in table.columns if name in view.columns]
    if len(table.primary_key) > 1 and view.columns.issuperset(table.primary_key):
        items.append(f"PRIMARY KEY ({_names(table.primary_key)})")
    for key in table.foreign_keys:
        if view.columns.issuperset(key.columns) and (shown is None or key.parent in shown):
            items.append(
                f"FOREIGN KEY ({_names(key.columns)}) REFERENCES {quote_name(key.parent)}({_names(key.parent_columns)})"
            )
    lines = [f"CREATE TABLE {quote_name(table.name)} ("]
    lines += [f"  {item}{',' if i < len(items) else ''}" for i, item in enumerate(items, start=1)]
    lines.append(");")
    if view.num_rows and view.is_whole:
        lines.append("-- Example rows:")
        lines += [f"-- ({', '.join(row)})" for row in table.sample_rows[: view.num_rows]]
    return lines


def render_schema(views: Sequence[TableView]) -> str:
    """The tables with an empty line between them; foreign keys to tables that are not shown are left out."""
    shown = {view.table.name for view in views}
    return "\n\n".join("\n".join(render_lines(view, shown)) for view in views)


def _column_line(table: Table, name: str) -> str:
    words = [quote_name(name), table.columns[name]]
    if table.primary_key == (name,):
        words.append("PRIMARY KEY")
    return " ".join(filter(None, words))


def _names(columns: Sequence[str]) -> str:
    return ", ".join(map(quote_name, columns))
