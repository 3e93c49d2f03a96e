"""What one process gives to a checkpoint, copied to host memory, so that the training goes on while it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dphrl.learner.export import export_model
from dphrl.learner.lora import save_adapter
from dphrl.learner.state import STATE_FOLDER, Piece, write_pieces


class Snapshot:
    """Pieces of the learner's state and, in one process of the learner, the model to export. All are copies.

    weights: full tensors by their checkpoint names; empty where another process exports. adapters: likewise, of a
    policy that has them.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        weights: Mapping[str, Tensor] = {},
        adapters: Mapping[str, Tensor] = {},
    ) -> None:
        self._pieces, self._weights, self._adapters = list(pieces), weights, adapters

    @property
    def num_bytes(self) -> int:
        """What it takes on disk."""
        exported = (*self._weights.values(), *self._adapters.values())
        return sum(piece.num_bytes for piece in self._pieces) + sum(tensor.nbytes for tensor in exported)

    def write_state(self, folder: Path, rank: int = 0) -> dict[str, str]:
        """Write the pieces below `folder`, and let go of them. Returns the SHA-256 of the file by its path there."""
        name = f"{STATE_FOLDER}/rank_{rank:05}.safetensors"
        digest = write_pieces(folder / name, self._pieces)
        self._pieces = []
        return {name: digest}

    def write_export(self, folder: Path, lm: Any, source: Path | str) -> None:
        """Write a Hugging Face directory, `folder/hf`, and what peft reads of adapters, `folder/adapter`; let go of
        them. lm: the model whose weights they are. source: what it was loaded from."""
        export_model(lm, source, folder / "hf", self._weights)
        if self._adapters:
            save_adapter(lm, source, folder / "adapter", self._adapters)
        self._weights, self._adapters = {}, {}
