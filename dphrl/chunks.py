"""Long work on prompts is kept on disk in chunks, so that it can go on after its process was killed.

Every chunk of prompts is one parquet file. `identity.json` beside them says which model, data and settings the chunks
were made with. The reference stage and evaluations store their work this way.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import InputError
from dphrl.fingerprint import Fingerprint, changed_parts
from dphrl.types import Prompt


class ChunkFolder:
    """The chunks of one piece of work. Only `claim`, which makes the folder this work's own, and `write_rows` write.

    One process may write at a time. A chunk is stored as a whole or not at all, so a kill at any moment costs one
    chunk. schema: the columns of the files, which have one row per prompt.
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
        return frozenset(start for start, chunk in self.chunks() if self._is_whole(start, len(chunk)))

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
            path = self.folder / "identity.json"
            aside = path.with_suffix(".aside")
            aside.write_text(json.dumps({"fingerprint": self._identity}, indent=2) + "\n")
            os.replace(aside, path)
        return done

    def write_rows(self, start: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store the chunk that begins at prompt `start`: a row for each of its prompts, in order."""
        # The name is this process's own: an actor may live seconds longer than its killed driver and still write.
        aside = self._path(start).with_suffix(f".{os.getpid()}.aside")
        pq.write_table(pa.Table.from_pylist(rows, self._schema), aside, write_page_checksum=True)
        os.replace(aside, self._path(start))

    def read_rows(self, start: int) -> list[dict[str, Any]]:
        """The rows that `write_rows` stored for the chunk that begins at prompt `start`.

        Raises InputError when bits of the file have changed, which the test for a whole file does not see.
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

    def _is_whole(self, start: int, num_prompts: int) -> bool:
        # A rename survives a killed process, but not always a loss of power, so the file itself is read too.
        try:
            return bool(pq.read_metadata(self._path(start)).num_rows == num_prompts)
        except (OSError, ValueError):
            return False

    def _stored_identity(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / "identity.json").read_text())["fingerprint"])
        except (OSError, ValueError):
            return {}
