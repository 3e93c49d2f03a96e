"""What was sent and what was received in one sync: a record on each side, to compare afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightSummary:
    """num_tensors and num_bytes: of all full tensors. checksum: of their names, types, shapes and bytes, in any
    order."""

    num_tensors: int = 0
    num_bytes: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class EngineRecord:
    """What one engine says after a sync: the version that it serves now, and what each of its workers received.

    unloaded: names of the engine's parameters that the sync did not load.
    """

    policy_version: int
    received: tuple[WeightSummary, ...] = ()
    unloaded: tuple[str, ...] = ()


class Ledger:
    """Adds up the tensors that pass, on either side."""

    def __init__(self) -> None:
        self.summary = WeightSummary()

    def record(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same pairs, each noted as it passes."""
        for name, tensor in named_tensors:
            self.note(name, tensor)
            yield name, tensor

    def note(self, name: str, tensor: Tensor) -> None:
        """Count one full tensor under its checkpoint name."""
        before = self.summary
        self.summary = WeightSummary(
            before.num_tensors + 1,
            before.num_bytes + tensor.nbytes,
            (before.checksum + tensor_checksum(name, tensor)) % 2**64,
        )


def tensor_checksum(name: str, tensor: Tensor) -> int:
    """A number that another name, type, shape or any other bytes would change; the same on every device."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = int(data.sum(dtype=torch.int64))
    seed = int.from_bytes(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()[-8:], "little")
    return (total * 0x9E3779B97F4A7C15 + seed) % 2**64
