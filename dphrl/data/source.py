"""Rows out of files and hub data sets, and the order in which training walks through them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dphrl.config_data import DatasetConfig
from dphrl.types import JsonDict

_DATA_VARIABLE = "DPHRL_DATA"
_DEFAULT_DATA = "../shared/data"
_FILE_SUFFIXES = (".jsonl", ".parquet")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands, "file:line", so that whoever reads its fields can say where they are bad."""

    location: str
    fields: JsonDict


def load_rows(dataset: DatasetConfig) -> list[Row]:
    """The first `dataset.limit` rows of a .jsonl file, a .parquet file or a hub data set ("org/name[:subset]").

    Every row has `prompt_field` and `answer_field`. Raises ValueError, one line that names file and line, for a
    missing file, a malformed line, a missing field, or no rows at all.
    """
    path = expand_path(dataset.path)
    if path.endswith(_FILE_SUFFIXES):
        if not Path(path).is_file():
            raise ValueError(f"data set {dataset.name}: file {path} does not exist; correct its path")
        rows = _read_jsonl(path) if path.endswith(".jsonl") else _read_parquet(path, dataset.name)
    elif not path or Path(path).exists():
        raise ValueError(
            f"data set {dataset.name}: path {path!r} is neither a {' or '.join(_FILE_SUFFIXES)} file nor a hub "
            "data set's name; correct its path"
        )
    else:
        rows = _read_hub(path, dataset)
    taken = list(islice(rows, dataset.limit))
    if not taken:
        raise ValueError(f"data set {dataset.name}: {path} holds no rows")
    for row in taken:
        _require_fields(row, dataset)
    return taken


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


def _read_parquet(path: str, name: str) -> Iterator[Row]:
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
        raise ValueError(f"data set {name}: {path} cannot be read as parquet: {reason}") from error


def _read_hub(path: str, dataset: DatasetConfig) -> Iterator[Row]:
    import datasets

    name, _, subset = path.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=dataset.split)
    # The hub client has no common base for its errors: connection, offline mode, unknown name, unknown split.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data set {dataset.name}: {path!r} (split {dataset.split!r}) could not be loaded from the hub: "
            f"{type(error).__name__}: {reason}; check the name and the connection, or give a .jsonl or .parquet file"
        ) from error
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{path}:{number}", dict(fields))


def _require_fields(row: Row, dataset: DatasetConfig) -> None:
    for setting in ("prompt_field", "answer_field"):
        field = getattr(dataset, setting)
        if field not in row.fields:
            raise ValueError(
                f"{row.location}: no field {field!r}; it has {', '.join(map(str, row.fields)) or 'none'}; set "
                f"{setting} of data set {dataset.name}"
            )
