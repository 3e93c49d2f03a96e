"""Unpacks the archives of text-to-SQL benchmarks into the folders where the presets look.

The only names taken from an archive are plain names of databases, so no member can be written outside the folder.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZipFile, ZipInfo

from dphrl.types import JsonDict

_PLAIN_NAME = re.compile(r"\w[\w.-]*")
_SQLITE_MAGIC = b"SQLite format 3\0"
_MAX_LISTED = 10


@dataclass(frozen=True)
class Part:
    """A part of a benchmark.

    folder: below the data folder. questions: files of questions; the first must be there. databases: the folder that
    holds <db>/<db>.sqlite, with the same name in the archive and below `folder`; in the archive it may also be an
    inner archive of that name with .zip.
    """

    folder: str
    questions: tuple[str, ...]
    databases: str


BIRD = (Part("bird/train", ("train.json",), "train_databases"), Part("bird/dev", ("dev.json",), "dev_databases"))
SPIDER = (Part("spider", ("dev.json", "train_spider.json", "train_others.json"), "database"),)


def unpack_benchmark(parts: Sequence[Part], archives: Sequence[Path], to: Path) -> list[str]:
    """Unpack the parts that the archives hold. Returns one line for each part: what was done, or what is missing.

    Databases that are there already are not unpacked again. Raises ValueError, one line, for archives that hold no
    part, or an incomplete one.
    """
    names = ", ".join(str(path) for path in archives)
    if not archives:
        wanted = " and ".join(part.questions[0] for part in parts)
        raise ValueError(f"--from: give the archives you downloaded, which hold {wanted}")
    lines = {part: f"{part.folder}: not there, no {part.questions[0]} in {names}" for part in parts}
    found = False
    for path in archives:
        try:
            with ZipFile(path) as archive:
                for part in parts:
                    if _member(archive, part.questions[0]):
                        lines[part] = _unpack_part(archive, part, to / part.folder)
                        found = True
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read as a zip archive ({error}); download it again") from error
    if not found:
        raise ValueError(f"no {' or '.join(part.questions[0] for part in parts)} in {names}; name the right archives")
    return list(lines.values())


def _unpack_part(archive: ZipFile, part: Part, target: Path) -> str:
    questions = {name: member for name in part.questions if (member := _member(archive, name))}
    rows = {name: _read_questions(archive, member) for name, member in questions.items()}
    wanted = sorted({str(row.get("db_id")) for of_file in rows.values() for row in of_file})
    target.mkdir(parents=True, exist_ok=True)
    with _databases(archive, part, target) as (holder, members):
        if missing := [name for name in wanted if name not in members]:
            listed = ", ".join(missing[:_MAX_LISTED]) + (", ..." if len(missing) > _MAX_LISTED else "")
            raise ValueError(
                f"{archive.filename}: {len(missing)} of the {len(wanted)} databases that questions name are not in "
                f"{part.databases}: {listed}; download the archive again"
            )
        targets = {name: target / part.databases / name / f"{name}.sqlite" for name in wanted}
        new = [name for name, file in targets.items() if not _is_whole(file, members[name])]
        _check_space(sum(members[name].file_size for name in new), target)
        for name in new:
            _extract(holder, members[name], targets[name])
    # The questions come last: a file of questions is the sign that its databases are complete.
    for name, member in questions.items():
        _extract(archive, member, target / name)
    counts = ", ".join(f"{name} {len(of_file)} questions" for name, of_file in rows.items())
    return f"{part.folder}: {counts}; {len(wanted)} databases, {len(new)} of them newly unpacked"


@contextmanager
def _databases(archive: ZipFile, part: Part, scratch: Path) -> Iterator[tuple[ZipFile, dict[str, ZipInfo]]]:
    """The archive that holds the databases, and each one's member by name."""
    if members := _database_members(archive, part.databases):
        yield archive, members
        return
    inner = _member(archive, f"{part.databases}.zip")
    if inner is None:
        raise ValueError(
            f"{archive.filename}: holds {part.questions[0]}, but neither {part.databases}/<db>/<db>.sqlite nor "
            f"{part.databases}.zip; download the archive with the databases"
        )
    _check_space(inner.file_size, scratch)
    # The inner archive is copied first: reading it in place would unpack it again for every database.
    with tempfile.TemporaryFile(dir=scratch) as copy:
        with archive.open(inner) as source:
            shutil.copyfileobj(source, copy)
        with ZipFile(copy) as holder:
            yield holder, _database_members(holder, part.databases)


def _database_members(archive: ZipFile, folder: str) -> dict[str, ZipInfo]:
    found: dict[str, ZipInfo] = {}
    for info in archive.infolist():
        match _parts(info):
            case (*_, parent, name, file) if parent == folder and file == f"{name}.sqlite":
                if _PLAIN_NAME.fullmatch(name):
                    found.setdefault(name, info)
    return found


def _member(archive: ZipFile, name: str) -> ZipInfo | None:
    """The file of that name; if there are several, the one nearest to the top."""
    found = [info for info in archive.infolist() if _parts(info)[-1:] == (name,) and not info.is_dir()]
    return min(found, key=lambda info: len(_parts(info)), default=None)


def _parts(info: ZipInfo) -> tuple[str, ...]:
    """The parts of the member's path; none for files that macOS adds to an archive."""
    parts = PurePosixPath(info.filename).parts
    return () if "__MACOSX" in parts else parts


def _read_questions(archive: ZipFile, member: ZipInfo) -> list[JsonDict]:
    where = f"{archive.filename}: {member.filename}"
    try:
        rows = json.loads(archive.read(member).decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); download the archive again") from error
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) and row.get("db_id") for row in rows)):
        raise ValueError(f"{where}: not a list of questions with a db_id each; name the benchmark's own archive")
    return rows


def _check_space(num_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"{folder}: {num_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; give another --to")


def _is_whole(file: Path, member: ZipInfo) -> bool:
    # A file gets its name only when it is complete, so the size only has to tell one release from another.
    return file.is_file() and file.stat().st_size == member.file_size


def _extract(archive: ZipFile, member: ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with archive.open(member) as source, partial.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    if target.suffix == ".sqlite":
        with partial.open("rb") as file:
            start = file.read(len(_SQLITE_MAGIC))
        # An empty file is an empty database.
        if start not in (b"", _SQLITE_MAGIC):
            partial.unlink()
            raise ValueError(f"{member.filename} in the archive is no SQLite database; download the archive again")
    partial.replace(target)
