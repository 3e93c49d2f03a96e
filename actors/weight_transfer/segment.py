"""A chunk's way from an engine's actor to the engine's worker processes: one copy in memory that all of them map.

vLLM sends what a call to its workers carries through a queue, a copy for each worker. Here a call carries only where
the bytes lie. The memory has no name in any file system, so nothing is left behind however a process ends: a worker,
which is a child of the actor, opens it through the actor's entry in /proc.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.weight_transfer.packing import PackedTensor

# Tensors start at multiples of this, as Ray's do.
ALIGN_BYTES = 64


@dataclass(frozen=True)
class PlacedTensor:
    """Where one tensor lies. offset, num_bytes: in the segment."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class PlacedChunk:
    """A chunk in a segment. path: what a process on the same machine opens. num_bytes: of the whole segment."""

    path: str
    num_bytes: int
    tensors: tuple[PlacedTensor, ...]


class Segment:
    """The actor's side: memory for one chunk at a time, as large as the largest so far.

    It is used again for every chunk of every sync, so that its pages are there already. Linux only.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("weights")
        self._path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._memory: mmap.mmap | None = None
        self._num_bytes = 0

    def place(self, tensors: Sequence[PackedTensor]) -> PlacedChunk:
        """Copy a chunk into the segment, over the one before, which must not be in use any more."""
        placed: list[PlacedTensor] = []
        end = 0
        for packed in tensors:
            size = packed.data.nbytes
            placed.append(PlacedTensor(packed.name, packed.dtype, packed.shape, end, size))
            end += -(-size // ALIGN_BYTES) * ALIGN_BYTES
        self._make_room(end)
        if end:
            assert self._memory is not None
            memory = np.frombuffer(self._memory, np.uint8)
            for place, packed in zip(placed, tensors, strict=True):
                memory[place.offset : place.offset + place.num_bytes] = packed.data
        return PlacedChunk(self._path, self._num_bytes, tuple(placed))

    def close(self) -> None:
        """Free the memory, as soon as no worker maps it any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._memory = -1, None

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes > self._num_bytes:
            os.ftruncate(self._file, num_bytes)
            self._memory = mmap.mmap(self._file, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._num_bytes = num_bytes


class SegmentReader:
    """A worker's side: keeps the segment mapped from one chunk to the next."""

    def __init__(self) -> None:
        self._path, self._memory = "", np.empty(0, np.uint8)

    def read(self, chunk: PlacedChunk) -> list[PackedTensor]:
        """The chunk's tensors, in the segment's own memory: they change when the next chunk is placed.

        Raises FileNotFoundError when the actor that placed them is gone.
        """
        if (chunk.path, chunk.num_bytes) != (self._path, len(self._memory)):
            self._map(chunk)
        return [
            PackedTensor(t.name, t.dtype, t.shape, self._memory[t.offset : t.offset + t.num_bytes])
            for t in chunk.tensors
        ]

    def _map(self, chunk: PlacedChunk) -> None:
        self._path, self._memory = chunk.path, np.empty(0, np.uint8)
        if chunk.num_bytes:
            file = os.open(chunk.path, os.O_RDONLY)
            try:
                # Populated at once, which costs less than a fault for every page while its bytes are read.
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                memory = mmap.mmap(file, chunk.num_bytes, flags=flags, prot=mmap.PROT_READ)
            finally:
                os.close(file)
            self._memory = np.frombuffer(memory, np.uint8)
