"""Reads rows from files and from data sets on the hub, and finds their fields."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dphrl.config.data import DatasetConfig
from dphrl.types import JsonDict

_DATA_VARIABLE = "DPHRL_DATA"
_DEFAULT_DATA = "../shared/data"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Row:
    """One record and its place in the source, so that a message about a bad field can name the place.

    location: "file:line" (from 1), or "file[index]" (from 0) in a .json array.
    """

    location: str
    fields: JsonDict


def load_rows(dataset: DatasetConfig) -> list[Row]:
    """Rows of a .jsonl, .json (an array) or .parquet file or of a hub data set ("org/name[:subset]").

    Only rows that pass `where` and `exclude_where`: the first `limit` of them, or `limit` drawn at random if
    `shuffle_seed` is set. Raises ValueError, one line that names file and line, for a missing file, a malformed line,
    a filter on a field that no row has, or no rows at all.
    """
    path = expand_path(dataset.path)
    suffix = Path(path).suffix
    if suffix in _READERS:
        if not Path(path).is_file():
            raise ValueError(f"data set {dataset.name}: file {path} does not exist; correct its path")
        rows = _READERS[suffix](path)
    elif not path or Path(path).exists():
        raise ValueError(
            f"data set {dataset.name}: path {path!r} is neither a {', '.join(_READERS)} file nor a hub data set's "
            "name; correct its path"
        )
    else:
        rows = _read_hub(path, dataset)
    return _select(rows, path, dataset)


def find_field(rows: Sequence[Row], dataset: DatasetConfig, setting: str, known: Sequence[str]) -> str:
    """The name of the field: the one that the data set's `setting` gives, else the first of `known` in the first row.

    Raises ValueError, which names file, line and the fields there are, for a row that lacks this field.
    """
    field: str | None = getattr(dataset, setting)
    if field is None:
        # Only a field that holds text or a number can be meant: Spider's field "sql" holds a parse tree.
        found = [name for name in known if isinstance(rows[0].fields.get(name), str | int | float)]
        if not found:
            # The known name may be there with the value null. Then the row is wrong, and whoever reads it says so.
            found = [name for name in known if name in rows[0].fields and rows[0].fields[name] is None]
        if not found:
            raise ValueError(_lacks(rows[0], " or ".join(map(repr, known)), dataset, setting))
        field = found[0]
    for row in rows:
        if field not in row.fields:
            raise ValueError(_lacks(row, repr(field), dataset, setting))
    return field


def as_text(value: object) -> str:
    """A field as text, without blanks at its ends; "" for null."""
    if value is None:
        return ""
    # JSON has one number type: a data set that writes the answer 145 as 145.0 means the integer.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def expand_path(path: str) -> str:
    """Expand `~` and $VARIABLES. Raises ValueError, with the remedy, for a variable that is not set."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if value := os.environ.get(name):
            return value
        if name != _DATA_VARIABLE:
            raise ValueError(f"path {path!r}: the environment variable {name} is not set; set it")
        if Path(_DEFAULT_DATA).is_dir():
            return _DEFAULT_DATA
        raise ValueError(
            f"path {path!r}: the environment variable {_DATA_VARIABLE} is not set; it names the folder that holds "
            f"the data sets (math/*.jsonl, sql/): export {_DATA_VARIABLE}=/your/folder"
        )

    return os.path.expanduser(_VARIABLE.sub(value_of, path))


def _read_jsonl(path: str) -> Iterator[Row]:
    # Decoded line by line, so that a broken byte is reported with its line and not as an offset in a buffer.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{location}: not a line of JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{location}: a JSON {type(fields).__name__}, not an object with named fields")
            yield Row(location, fields)


def _read_json(path: str) -> Iterator[Row]:
    try:
        records = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}; a file of one object a line is named .jsonl") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: a JSON {type(records).__name__}, not an array of rows; make it one")
    for index, fields in enumerate(records):
        location = f"{path}[{index}]"
        if not isinstance(fields, dict):
            raise ValueError(f"{location}: a JSON {type(fields).__name__}, not an object with named fields")
        yield Row(location, fields)


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as parquet: {reason}; correct or replace it") from error


def _read_hub(path: str, dataset: DatasetConfig) -> Iterator[Row]:
    import datasets

    name, _, subset = path.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=dataset.split)
    # The hub client's errors have no common base class: connection, offline mode, unknown name, unknown split.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data set {dataset.name}: {path!r} (split {dataset.split!r}) could not be loaded from the hub: "
            f"{type(error).__name__}: {reason}; check the name and the connection, or give a file"
        ) from error
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{path}:{number}", dict(fields))


def _select(rows: Iterable[Row], path: str, dataset: DatasetConfig) -> list[Row]:
    taken: list[Row] = []
    num_seen = 0
    # A misspelt field in a filter would let all rows through, or none. So reading goes on until every field of the
    # filters has been seen.
    unseen = {*dataset.where, *dataset.exclude_where}
    # A random part can only be drawn from all rows.
    enough = dataset.limit if dataset.shuffle_seed is None else None
    for row in rows:
        num_seen += 1
        unseen -= row.fields.keys()
        if len(taken) != enough and _passes(row, dataset):
            taken.append(row)
        if len(taken) == enough and not unseen:
            break
    if dataset.shuffle_seed is not None:
        random.Random(dataset.shuffle_seed).shuffle(taken)
        taken = taken[: dataset.limit]
    if num_seen == 0:
        raise ValueError(f"data set {dataset.name}: {path} holds no rows")
    if unseen:
        raise ValueError(
            f"data set {dataset.name}: no row of {path} has a field {min(unseen)!r}; correct where or exclude_where"
        )
    if not taken:
        raise ValueError(
            f"data set {dataset.name}: where and exclude_where leave none of the {num_seen} rows of {path}"
        )
    return taken


def _passes(row: Row, dataset: DatasetConfig) -> bool:
    def matches(field: str, wanted: object) -> bool:
        if field not in row.fields:
            return False
        return row.fields[field] in wanted if isinstance(wanted, tuple) else row.fields[field] == wanted

    if any(matches(field, unwanted) for field, unwanted in dataset.exclude_where.items()):
        return False
    return all(matches(field, wanted) for field, wanted in dataset.where.items())


def _lacks(row: Row, field: str, dataset: DatasetConfig, setting: str) -> str:
    fields = ", ".join(map(str, row.fields)) or "none"
    return f"{row.location}: no field {field}; it has {fields}; set {setting} of data set {dataset.name}"


_READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
