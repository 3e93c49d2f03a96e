"""Reads the rows of a data set, and finds and reads their fields."""

from __future__ import annotations

import ast
import contextlib
import math
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from dphrl.config.data import DatasetConfig
from dphrl.config.layouts import resembles
from dphrl.data.files import find_files
from dphrl.data.readers import parse_json, read_file
from dphrl.types import JsonDict

_DATA_VARIABLE = "DPHRL_DATA"
_DEFAULT_DATA = "../shared/data"
_MAX_LISTED = 6
# What no field can hold.
_MISSING = object()
_PRINTED_STRUCT = re.compile(r"\s*\[?\s*\{\s*['\"]")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Row:
    """One record and its place in the source, so that a message about a bad field can name the place.

    location: "file:line" (from 1), or "file[index]" (from 0) in a .json array.
    """

    location: str
    fields: JsonDict


def load_rows(dataset: DatasetConfig, known: Iterable[str] | None = None) -> list[Row]:
    """The rows of `dataset.path`: of a file, a pattern of files, a folder, or a hub data set.

    Only rows that pass `where` and `exclude_where`: the first `limit` of them, or `limit` drawn at random if
    `shuffle_seed` is set. known: the fields that may be asked for besides those that `dataset` names; to save memory,
    other fields keep their names and lose their values. None keeps everything. Raises ValueError, one line that names
    file and line, for a missing file, a malformed line, a filter on a field that no row has, or no rows at all.
    """
    path = expand_path(dataset.path)
    kept = None if known is None else _top_names([*known, *_named_fields(dataset)])
    return _select(_read(path, kept, dataset), path, dataset)


def find_field(rows: Sequence[Row], dataset: DatasetConfig, setting: str, known: Sequence[str]) -> str:
    """The name of the field: the one that the data set's `setting` gives, else the first of `known` in the first row.

    Raises ValueError, which names file, line and the fields there are, for a row that lacks this field.
    """
    field: str | None = getattr(dataset, setting)
    if field is None:
        first = {name: find_value(rows[0].fields, name) for name in known if has_field(rows[0].fields, name)}
        # A field that holds text or a number is meant before others: Spider's field "sql" holds a parse tree. One that
        # holds null or something else may be the field all the same; then whoever reads it says what is wrong.
        wanted = [name for name, value in first.items() if isinstance(value, str | int | float | Decimal | list)]
        found = [*wanted, *(name for name, value in first.items() if value is None), *first]
        if not found:
            raise ValueError(_lacks(rows[0], " or ".join(map(repr, known)), dataset, setting))
        field = found[0]
    for row in rows:
        if not has_field(row.fields, field):
            raise ValueError(_lacks(row, repr(field), dataset, setting))
    return field


def read_text(row: Row, field: str, dataset: DatasetConfig, setting: str, *, structs: bool = False) -> str:
    """The row's field as text. setting: the name of the setting that could name another field. structs: whether a
    struct that is stored as text may be this text.

    Raises ValueError, with file, line and remedy, for what is neither text nor a number.
    """
    value = find_value(row.fields, field)
    # A struct that was printed into a text is not what a prompt should be either.
    if not structs and isinstance(inside := opened(value), Mapping):
        value = inside
    try:
        return as_text(value)
    except ValueError as error:
        raise ValueError(f"{row.location}: {field!r} {error}; {_other_field(value, field, dataset, setting)}") from None


def find_value(fields: JsonDict, path: str) -> Any:
    """The value of a field; a dotted path leads into structs and lists: "reward_model.truth", "prompt.0.content".

    A field whose own name has dots is found by that name. Structs that are stored as text are opened: as JSON, or as
    Python prints them, which is what pandas writes into a .csv. A part of a struct that is null is null. Returns a mark
    of its own if there is no such field.
    """
    if path in fields:
        return fields[path]
    value: Any = fields
    for part in path.split("."):
        value = opened(value)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            # An empty cell of a .csv is null too.
            return None if value is None or value == "" else _MISSING
    return value


def has_field(fields: JsonDict, path: str) -> bool:
    return find_value(fields, path) is not _MISSING


def opened(value: object) -> object:
    """The struct or list that a text holds, as JSON or as Python prints structs, else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError):
        pass
    # Only what begins as printed structs do: a set of numbers or an interval is an answer.
    if _PRINTED_STRUCT.match(value):
        # A backslash of TeX in what is no Python after all is nothing to warn of.
        with warnings.catch_warnings(), contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            warnings.simplefilter("ignore")
            return ast.literal_eval(value.strip())
    return value


def as_text(value: object) -> str:
    """A field as text, without blanks at its ends; "" for null. A list of one value is that value.

    Raises ValueError, a clause that says what it is, for what is neither text nor a number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        # JSON can spell half of a character, which no tokenizer takes.
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("holds a lone surrogate, which is no character")
        return value.strip()
    if isinstance(value, list) and len(value) == 1:
        return as_text(value[0])
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"is {_described(value)}, neither text nor a number")
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"is {value}, not a number")
    # People write 0.00001, not 1e-05. And JSON has one number type: a data set that writes the answer 145 as 145.0
    # means the integer.
    text = format(Decimal(str(value)), "f")
    return text.rstrip("0").rstrip(".") if isinstance(value, float) and "." in text else text


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


def _read(path: str, kept: frozenset[str] | None, dataset: DatasetConfig) -> Iterator[Row]:
    for file in find_files(path, dataset):
        for location, fields in read_file(file.path, file.shown, kept):
            if kept is not None:
                fields = {name: value if name in kept else None for name, value in fields.items()}
            yield Row(location, fields)


def _named_fields(dataset: DatasetConfig) -> list[str]:
    settings = (dataset.prompt_field, dataset.answer_field, dataset.database_field, dataset.evidence_field)
    # The answer of whatever layout the file may turn out to have.
    return [*filter(None, settings), *dataset.where, *dataset.exclude_where, "answer"]


def _top_names(paths: Iterable[str]) -> frozenset[str]:
    return frozenset(name for path in paths for name in (path, path.partition(".")[0]))


def _select(rows: Iterable[Row], path: str, dataset: DatasetConfig) -> list[Row]:
    taken: list[Row] = []
    num_seen = 0
    # What the filters compare with, as the first row that has it spells it.
    met: dict[str, object] = {}
    # A misspelt field in a filter would let all rows through, or none. So reading goes on until every field of the
    # filters has been seen.
    unseen = {*dataset.where, *dataset.exclude_where}
    # A random part can only be drawn from all rows.
    enough = dataset.limit if dataset.shuffle_seed is None else None
    for row in rows:
        num_seen += 1
        met |= {field: find_value(row.fields, field) for field in unseen if has_field(row.fields, field)}
        unseen -= met.keys()
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
        values = ", ".join(f"{field}: {value!r:.60}" for field, value in sorted(met.items()))
        raise ValueError(
            f"data set {dataset.name}: where and exclude_where leave none of the {num_seen} rows of {path}, whose "
            f"first has {values}; correct them"
        )
    return taken


def _passes(row: Row, dataset: DatasetConfig) -> bool:
    def matches(field: str, wanted: object) -> bool:
        value = find_value(row.fields, field)
        return any(_same(value, one) for one in (wanted if isinstance(wanted, tuple) else (wanted,)))

    if any(matches(field, unwanted) for field, unwanted in dataset.exclude_where.items()):
        return False
    return all(matches(field, wanted) for field, wanted in dataset.where.items())


def _same(value: object, wanted: object) -> bool:
    # All that a .csv holds is text, and a filter that says 5 means it.
    if isinstance(value, str) and isinstance(wanted, bool | int | float):
        return value.casefold() == str(wanted).casefold()
    if isinstance(value, Decimal):
        return float(value) == wanted
    return value == wanted


def _lacks(row: Row, field: str, dataset: DatasetConfig, setting: str) -> str:
    fields = ", ".join(map(str, row.fields)) or "none"
    return (
        f"{row.location}: no field {field}; it has {fields}; "
        f"{_layout_hint(row, dataset)}set {setting} of data set {dataset.name}"
    )


def _layout_hint(row: Row, dataset: DatasetConfig) -> str:
    layout = resembles(row.fields)
    if layout is None or layout == dataset.layout:
        return ""
    return f"it looks like {layout}: set layout: {layout}, or "


def _other_field(value: object, field: str, dataset: DatasetConfig, setting: str) -> str:
    inner = [*value] if isinstance(value, Mapping) else range(len(value)) if isinstance(value, list) else ()
    if not inner:
        return f"mend or remove the row, or set {setting} of data set {dataset.name} to another field"
    names = ", ".join(f"{field}.{name}" for name in inner[:_MAX_LISTED])
    return f"set {setting} of data set {dataset.name} to a part of it ({names}), or to another field"


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a struct of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"a list of {len(value)} values" if value else "an empty list"
    return {"bool": "true or false", "bytes": "bytes"}.get(type(value).__name__, f"a {type(value).__name__}")
