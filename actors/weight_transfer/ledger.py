"""What was sent and what was received in one sync: a record on each side, to compare afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A GPU reads a tensor's bytes as rows of this many 64-bit words.
ROW_WORDS = 1024
# Odd constants of the mixer splitmix64, as signed 64-bit numbers.
_GAMMA, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class WeightSummary:
    """num_tensors and num_bytes: of all full tensors. checksum: of their names, types, shapes and bytes, in any order;
    those of two sides compare where both read host memory or both read a GPU's."""

    num_tensors: int = 0
    num_bytes: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class WorkerRecord:
    """What one worker of an engine says after a sync.

    received: the tensors that were handed to its model. unloaded: names of its parameters that took nothing, or not
    all of their elements. stale: names of parameters that hold the new weights but are used in a copy that does not.
    """

    received: WeightSummary = WeightSummary()
    unloaded: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineRecord:
    """What one engine says after a sync: the version that it serves now, and what each of its workers received.

    unloaded, stale: see WorkerRecord; of any worker.
    """

    policy_version: int
    received: tuple[WeightSummary, ...] = ()
    unloaded: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()

    @classmethod
    def of(cls, policy_version: int, workers: Sequence[WorkerRecord]) -> EngineRecord:
        """The record of an engine from those of its workers, which `collective_rpc("weight_update_record")` gives."""
        return cls(
            policy_version,
            tuple(worker.received for worker in workers),
            tuple(dict.fromkeys(name for worker in workers for name in worker.unloaded)),
            tuple(dict.fromkeys(name for worker in workers for name in worker.stale)),
        )


class Ledger:
    """Adds up the tensors that pass, on either side.

    A tensor is read where it is, in host memory or by its GPU. Nothing waits for a GPU until the summary is asked for:
    it reads in stream order.
    """

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}
        self._digests: dict[str, int | Tensor] = {}
        self._num_bytes = 0

    @property
    def summary(self) -> WeightSummary:
        """Of all tensors so far."""
        # One copy from the device, not one a tensor.
        there = {name: digest for name, digest in self._digests.items() if isinstance(digest, Tensor)}
        here = dict(zip(there, torch.stack([*there.values()]).tolist(), strict=True)) if there else {}
        digests = self._digests | here
        checksum = sum(_mark(label, int(digests[name])) for name, label in self._labels.items()) % 2**64
        return WeightSummary(len(digests), self._num_bytes, checksum)

    def record(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same pairs, each noted as it passes."""
        for name, tensor in named_tensors:
            self.note(name, tensor)
            yield name, tensor

    def note(self, name: str, tensor: Tensor) -> None:
        """Count one full tensor under its checkpoint name. Raises ValueError when the name came before."""
        if name in self._labels:
            raise ValueError(f"weight {name} came twice in one sync")
        self._labels[name] = _label(name, tensor)
        self._digests[name] = _digest(tensor)
        self._num_bytes += tensor.nbytes


def tensor_checksum(name: str, tensor: Tensor) -> int:
    """A number below 2**64 that another name, type, shape, or any other bytes would change."""
    return _mark(_label(name, tensor), int(_digest(tensor)))


def _label(name: str, tensor: Tensor) -> str:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}"


def _mark(label: str, digest: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{label} {digest}".encode(), digest_size=8).digest(), "little")


def _digest(tensor: Tensor) -> int | Tensor:
    """Of the bytes alone. That of a GPU's tensor is one of its own, 0-dimensional, which is not waited for."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return host_digest(data) if data.device.type == "cpu" else device_digest(data)


def host_digest(data: Tensor) -> int:
    """XXH3 of the bytes, uint8, in host memory: at the speed of reading them."""
    import xxhash  # here, because tests/gpu uses the other digest where torch alone is installed

    return xxhash.xxh3_64_intdigest(data.numpy().data)


def device_digest(data: Tensor) -> Tensor:
    """Of bytes, uint8, on any device, by torch alone: a 0-dimensional int64 tensor there.

    The bytes are a matrix of 64-bit words. Its column sums see what changes within a row, its row sums see rows that
    change places. Each sum is mixed with its place before all are added, so that no two places are alike and the top
    bit, whose even flips would cancel in a plain sum, counts like any other. Sums of 64-bit integers wrap, so they are
    exact in any order.
    """
    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    row_bytes = 8 * ROW_WORDS
    num_whole = data.numel() // row_bytes
    whole = data[: num_whole * row_bytes].view(torch.int64).view(num_whole, ROW_WORDS)
    rest = data[num_whole * row_bytes :]
    columns, rows = whole.sum(0), whole.sum(1)
    if rest.numel():
        # The last row is filled up with zeros; the label holds the size.
        last = torch.zeros(row_bytes, dtype=torch.uint8, device=data.device)
        last[: rest.numel()] = rest
        words = last.view(torch.int64)
        columns, rows = columns + words, torch.cat([rows, words.sum()[None]])
    return _mix(torch.cat([columns, rows])).sum()


def _mix(values: Tensor) -> Tensor:
    """splitmix64's mixer of each value and its place, counted from 1."""
    places = torch.arange(1, 1 + len(values), device=values.device)
    mixed = values + places * _GAMMA
    mixed = (mixed ^ (mixed >> 30)) * _FIRST
    mixed = (mixed ^ (mixed >> 27)) * _SECOND
    return mixed ^ (mixed >> 31)
