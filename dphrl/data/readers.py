"""Reads rows out of files of every known kind. A text stays the text that the file holds: no type is guessed."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import IO, Any

from dphrl.types import JsonDict

# Rows as they are read: where each is ("file:line" from 1, or "file[index]" from 0 in a JSON array), and its fields.
Rows = Iterator[tuple[str, JsonDict]]

_COMPRESSED = (".gz", ".zst")
# What a clone of a repository holds in place of a large file, unless Git LFS fetched it.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Decimal digits that every float keeps.
_FLOAT_DIGITS = 15
# Arrow holds a batch of rows as columns and as Python objects at the same time.
_BATCH_ROWS = 1024


def can_read(path: str) -> bool:
    """Whether the file's name ends with a known suffix."""
    return file_kind(path) is not None


def file_kind(path: str) -> str | None:
    """The suffix that decides how a file of this name is read, without that of a compression; None if it is unknown."""
    name = path.lower()
    for suffix in _COMPRESSED:
        if name.endswith(suffix):
            inner = name.removesuffix(suffix)
            return next((known for known in _TEXT_READERS if inner.endswith(known)), None)
    return next((known for known in _READERS if name.endswith(known)), None)


def known_suffixes() -> str:
    return f"{', '.join(_READERS)}; all but .parquet and .arrow also with {' or '.join(_COMPRESSED)}"


def read_file(path: str, shown: str, columns: Collection[str] | None = None) -> Rows:
    """The rows of a file that `can_read` accepts.

    shown: the file's name in locations and messages. columns: a file that stores its columns apart reads only these,
    and the others are null in its rows; None reads all. Raises ValueError, one line that names file and line, when the
    file is broken.
    """
    reader = _READERS[file_kind(path) or ""]
    try:
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"{shown} is a pointer of Git LFS, not the data; run `git lfs pull` in its repository")
        yield from reader(path, shown, columns)
    # A compressed stream that ends too soon or holds a wrong byte, and what Arrow cannot make sense of.
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not _is_from_arrow(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{shown} cannot be read: {reason}; replace it by a whole copy") from error


def _is_from_arrow(error: Exception) -> bool:
    # Imported here: reading plain text needs no Arrow, and takes no time for it.
    import pyarrow

    return isinstance(error, pyarrow.ArrowException)


def _open(path: str) -> IO[bytes]:
    if not path.lower().endswith(_COMPRESSED):
        return open(path, "rb")
    import pyarrow

    # It refuses a stream that ends too soon, and takes one of several parts.
    codec = "gzip" if path.lower().endswith(".gz") else "zstd"
    return io.BufferedReader(pyarrow.input_stream(path, compression=codec), 1 << 20)


# ------------------------------------------------------------ text


def _decoded(file: Iterable[bytes], shown: str) -> Iterator[str]:
    # Decoded line by line, so that a broken byte is reported with its line and not as an offset in a buffer.
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{shown}:{number}: not UTF-8: {error}; save the file as UTF-8") from error


def _read_json(path: str, shown: str, columns: Collection[str] | None) -> Rows:
    """One object a line or one array of objects: the first character tells, because suffixes are mixed up."""
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(_decoded(file, shown), start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        number, line = first
        if line.lstrip().startswith("["):
            yield from _json_array("".join([line, *(rest for _, rest in lines)]), shown)
            return
        if line.strip() == "{":
            yield _lone_object("".join([line, *(rest for _, rest in lines)]), f"{shown}:{number}")
            return
        for number, line in itertools.chain([first], lines):
            location = f"{shown}:{number}"
            yield location, _object(_loads(line, f"{location}: not a line of JSON"), location)


def _lone_object(text: str, location: str) -> tuple[str, JsonDict]:
    """A file of one object on several lines, as MATH keeps each of its problems."""
    try:
        return location, _object(parse_json(text), location)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{location}: a JSON object over several lines, and not the only one of its file; write one object a line, "
            "or an array"
        ) from error


def _json_array(text: str, shown: str) -> Rows:
    for index, fields in enumerate(_loads(text, f"{shown}: not a JSON array")):
        location = f"{shown}[{index}]"
        yield location, _object(fields, location)


def _loads(text: str, complaint: str) -> Any:
    try:
        return parse_json(text)
    # Also for a number of too many digits, and for too many brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{complaint}: {error}; mend it") from error


def parse_json(text: str) -> Any:
    """As json.loads, except that a number of more digits than a float keeps is a Decimal.

    Raises ValueError or RecursionError for what is no JSON.
    """
    return json.loads(text, parse_float=_number)


def _number(text: str) -> float | Decimal:
    number = float(text)
    # As a Decimal, a number too large or too small for a float could take gigabytes to write out.
    return Decimal(text) if len(text) > _FLOAT_DIGITS and number and math.isfinite(number) else number


def _object(fields: object, location: str) -> JsonDict:
    if not isinstance(fields, dict):
        raise ValueError(f"{location}: a JSON {type(fields).__name__}, not an object with named fields; mend it")
    return fields


def _read_table(path: str, shown: str, columns: Collection[str] | None) -> Rows:
    """Every cell is text. The location is the line on which the record begins."""
    delimiter = "\t" if (file_kind(path) == ".tsv") else ","
    # The default, 128 KiB, is less than a long solution.
    csv.field_size_limit(sys.maxsize)
    with _open(path) as file:
        # Strict: a quote that is never closed would take the rest of the file into one cell.
        records = csv.reader(_decoded(file, shown), delimiter=delimiter, strict=True)
        names: list[str] = []
        while True:
            location = f"{shown}:{records.line_num + 1}"
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                remedy = "save the file with line feeds" if "new-line" in str(error) else "mend its quotes"
                raise ValueError(f"{location}: not a record: {error}; {remedy}") from error
            if not cells:
                continue
            if not names:
                names = _header(cells, location)
            elif len(cells) != len(names):
                raise ValueError(
                    f"{location}: {len(cells)} cells, but the header has {len(names)}; quote cells that hold a "
                    f"{'tab' if delimiter != ',' else 'comma'}"
                )
            else:
                yield location, dict(zip(names, cells, strict=True))


def _header(cells: list[str], location: str) -> list[str]:
    if len(cells) == 1 and any(mark in cells[0] for mark in ",;\t|"):
        raise ValueError(
            f"{location}: the header {cells[0]!r} is one column; separate columns by commas (.csv) or tabs (.tsv)"
        )
    # Columns without a name, which nobody can ask for, are what spreadsheets write beside the table.
    if repeated := [name for name in cells if name and cells.count(name) > 1]:
        raise ValueError(f"{location}: the column {repeated[0]!r} is there twice; rename one")
    return cells


# ------------------------------------------------------------ Arrow


def _read_parquet(path: str, shown: str, columns: Collection[str] | None) -> Rows:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in names if name in columns]
        # Without any column the number of rows would be lost.
        batches = file.iter_batches(_BATCH_ROWS, columns=wanted or names[:1])
        yield from _arrow_rows(batches, names, shown)


def _read_arrow(path: str, shown: str, columns: Collection[str] | None) -> Rows:
    """A file in either of Arrow's two forms; `datasets` writes streams."""
    import pyarrow

    with pyarrow.memory_map(path) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        names = reader.schema.names
        wanted = names if columns is None else [name for name in names if name in columns]
        parts = (part.select(wanted or names[:1]) for batch in batches for part in _parts(batch))
        yield from _arrow_rows(parts, names, shown)


def _parts(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(start, _BATCH_ROWS)


def _arrow_rows(batches: Iterable[Any], names: Sequence[str], shown: str) -> Rows:
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{shown}: the column {repeated[0]!r} is there twice; rename one")
    unread = dict.fromkeys(names)
    number = 0
    for batch in batches:
        converters = {field.name: convert for field in batch.schema if (convert := _converter(field.type))}
        for fields in batch.to_pylist():
            number += 1
            converted = {name: convert(fields[name]) for name, convert in converters.items()}
            yield f"{shown}:{number}", unread | fields | converted


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """What makes of a value of this Arrow type the value that was meant; None where Python's own is right.

    A float32 that stands for 0.1 is 0.1, not 0.10000000149. JSON, the type in which `datasets` stores columns of mixed
    types, is read, but text and numbers in it stay the text that the source had: "007" is not 7.
    """
    import numpy
    import pyarrow

    if kind in (pyarrow.float16(), pyarrow.float32()):
        narrow = numpy.float16 if kind == pyarrow.float16() else numpy.float32
        return lambda value: None if value is None else float(str(narrow(value)))
    if isinstance(kind, pyarrow.JsonType):
        return _stored_json
    if pyarrow.types.is_struct(kind):
        inner = {field.name: convert for field in kind if (convert := _converter(field.type))}
        if inner:
            return lambda value: (
                None if value is None else value | {name: convert(value[name]) for name, convert in inner.items()}
            )
        return None
    if pyarrow.types.is_map(kind):
        return lambda pairs: None if pairs is None else dict(pairs)
    is_list = pyarrow.types.is_nested(kind) and kind.num_fields == 1
    if is_list and (convert := _converter(kind.field(0).type)):
        return lambda value: None if value is None else [convert(item) for item in value]
    return None


def _stored_json(text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str | dict | list) else text


# ------------------------------------------------------------ kinds of files

_Reader = Callable[[str, str, Collection[str] | None], Rows]
_TEXT_READERS: dict[str, _Reader] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}
_READERS = _TEXT_READERS | {".parquet": _read_parquet, ".arrow": _read_arrow}
