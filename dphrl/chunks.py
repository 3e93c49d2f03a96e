"""Long work on prompts is kept on disk in chunks, so that it can go on after its process was killed.

Every chunk of prompts is one parquet file. `identity.json` says which model, data and settings the chunks were made
with. Each has its checksum beside it. The reference stage and evaluations store their work this way.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import InputError
from dphrl.durable import file_damage, whole_sealed_file
from dphrl.fingerprint import Fingerprint, changed_parts
from dphrl.types import Prompt

IDENTITY = "identity.json"

log = logging.getLogger(__name__)


class ChunkFolder:
    """The chunks of one piece of work. Only `claim`, which makes the folder this work's own, and `write_rows` write.

    One process may write at a time. A chunk is stored as a whole or not at all, so a kill at any moment costs one
    chunk. A chunk whose bits have changed since is not used, and is made again. Where identity.json is damaged, nobody
    can tell what its chunks are of, and the folder is renamed. schema: the columns of the files, which have one row
    per prompt.
    """

    def __init__(
        self, folder: Path, prompts: Sequence[Prompt], identity: Fingerprint, prompts_per_chunk: int, schema: pa.Schema
    ) -> None:
        self.folder = folder
        self._schema = schema
        self._chunks = {
            start: prompts[start : start + prompts_per_chunk] for start in range(0, len(prompts), prompts_per_chunk)
        }
        # The chunk size decides which prompts a file holds, so chunks of two sizes never mix. The identity of the
        # finished work leaves it out: finished work may be used again whatever the size was.
        self._identity = {**identity, "prompts per chunk": str(prompts_per_chunk)}

    def chunks(self) -> Iterator[tuple[int, Sequence[Prompt]]]:
        """(index of the first prompt, prompts) of every chunk, in order."""
        yield from self._chunks.items()

    def changed(self) -> list[str]:
        """Names of what has changed since the stored chunks were made; empty if nothing has, or if none are stored."""
        stored = self._stored_identity()
        return changed_parts(stored, self._identity) if stored else []

    def done(self) -> frozenset[int]:
        """Indices of the first prompts of complete chunks that may be continued."""
        if not self._stored_identity() or self.changed():
            return frozenset()
        return frozenset(start for start, chunk in self.chunks() if self._damage(start, len(chunk)) is None)

    def damaged(self) -> list[str]:
        """What is wrong with each chunk that is there but not `done`, because it is not as it was written. It is one
        line when that is identity.json, which all of them need."""
        if (damage := self._identity_damage()) is not None:
            return [damage]
        if not self._stored_identity() or self.changed():
            return []
        found = [self._damage(start, len(chunk)) for start, chunk in self.chunks() if self._path(start).exists()]
        return [damage for damage in found if damage is not None]

    def num_done(self) -> int:
        """The number of prompts in the chunks of `done`."""
        return self.num_prompts(self.done())

    def num_prompts(self, starts: frozenset[int]) -> int:
        """The number of prompts in the chunks that begin at these."""
        return sum(len(self._chunks[start]) for start in starts)

    def claim(self) -> frozenset[int]:
        """Keep the folder if any chunk is `done`, else empty it for this work; returns `done`.

        A folder with chunks and a damaged identity.json is kept too, as NAME.damaged, in the place of an older one.
        """
        done = self.done()
        if not done:
            if (damage := self._identity_damage()) is not None:
                self._set_aside(damage)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with whole_sealed_file(self.folder / IDENTITY) as aside:
                aside.write_text(json.dumps({"fingerprint": self._identity}, indent=2) + "\n", encoding="utf-8")
        return done

    def write_rows(self, start: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store the chunk that begins at prompt `start`: a row for each of its prompts, in order."""
        table = pa.Table.from_pylist(rows, self._schema)
        with whole_sealed_file(self._path(start)) as aside:
            pq.write_table(table, aside, write_page_checksum=True)

    def read_rows(self, start: int) -> list[dict[str, Any]]:
        """The rows that `write_rows` stored for the chunk that begins at prompt `start`.

        Raises InputError when the file cannot be read as what it was; `done` leaves such chunks out.
        """
        path = self._path(start)
        try:
            table = pq.read_table(path, schema=self._schema, page_checksum_verification=True)
            rows: list[dict[str, Any]] = table.to_pylist()
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: the file is damaged ({' '.join(str(error).split()):.200}); delete it, and the same command "
                "continues from there"
            ) from error
        return rows

    def _path(self, start: int) -> Path:
        return self.folder / f"chunk_{start:08d}.parquet"

    def _damage(self, start: int, num_prompts: int) -> str | None:
        path = self._path(start)
        if (damage := file_damage(path)) is not None:
            return damage
        # Chunks of an older version have no checksum beside them.
        try:
            num_rows = pq.read_metadata(path).num_rows
        except (OSError, ValueError):
            return f"{path.name} is no parquet file"
        return None if num_rows == num_prompts else f"{path.name} has {num_rows} rows for {num_prompts} prompts"

    def _stored_identity(self) -> dict[str, str]:
        """Empty when there is none that is as it was written. One of an older version has no checksum beside it."""
        path = self.folder / IDENTITY
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return stored if file_damage(path) is None else {}

    def _identity_damage(self) -> str | None:
        """What is wrong with identity.json; None when nothing is, or when there are no chunks that need it."""
        if self._stored_identity() or not any(self.folder.glob("chunk_*.parquet")):
            return None
        return file_damage(self.folder / IDENTITY) or f"{IDENTITY} cannot be read"

    def _set_aside(self, damage: str) -> None:
        renamed = self.folder.with_name(f"{self.folder.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        self.folder.rename(renamed)
        facts = {"folder": str(self.folder), "damage": damage, "renamed": str(renamed)}
        log.warning(
            "%s: %s, so that nobody knows what its chunks are of; the folder is now %s; delete it when nobody needs it",
            *facts.values(),
            extra={"event": "chunks_set_aside", "facts": facts},
        )
