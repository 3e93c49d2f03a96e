"""Long work on prompts is kept on disk in chunks, so that it can go on after its process was killed.

Every chunk of prompts is one parquet file, with its checksum beside it. `identity.json` says which model, data and
settings the chunks were made with. The reference stage and evaluations store their work this way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import InputError
from dphrl.durable import file_damage, whole_sealed_file, write_whole
from dphrl.fingerprint import Fingerprint, changed_parts
from dphrl.types import Prompt


class ChunkFolder:
    """The chunks of one piece of work. Only `claim`, which makes the folder this work's own, and `write_rows` write.

    One process may write at a time. A chunk is stored as a whole or not at all, so a kill at any moment costs one
    chunk. A chunk whose bits have changed since is not used, and is made again. schema: the columns of the files, which
    have one row per prompt.
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
        if not stored and any(self._path(start).exists() for start in self._chunks):
            return ["identity.json (damaged)"]
        return changed_parts(stored, self._identity) if stored else []

    def done(self) -> frozenset[int]:
        """Indices of the first prompts of complete chunks that may be continued."""
        if not self._stored_identity() or self.changed():
            return frozenset()
        return frozenset(start for start, chunk in self.chunks() if self._damage(start, len(chunk)) is None)

    def damaged(self) -> list[str]:
        """What is wrong with each chunk that is there but not `done`, because it is not as it was written."""
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
        """Keep the folder if any chunk is `done`, else empty it for this work; returns `done`."""
        done = self.done()
        if not done:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_whole(self.folder / "identity.json", json.dumps({"fingerprint": self._identity}, indent=2) + "\n")
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
        try:
            return dict(json.loads((self.folder / "identity.json").read_text())["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
