"""The learner's state on disk, in pieces that any learner can read: on other ranks, at another ZeRO stage, inline.

A piece is a stretch of one trained parameter, flattened: its float32 master and the two moments of AdamW. Each rank
writes the pieces that it holds to one safetensors file, so nothing is gathered, and a piece knows its parameter's name
and where in it it begins. A learner that shards otherwise takes the stretches that it needs from wherever they lie.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dphrl.config.loading import InputError
from dphrl.direct_file import DirectFile
from dphrl.learner.lora import trained_by_name

STATE_FOLDER = "state"
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A stretch of a trained parameter.

    start: its first element in the flattened parameter, which has num_elements in all. num_updates: optimizer steps
    behind it; 0 has no moments. tensors: by kind ("master", "exp_avg", "exp_avg_sq"), float32, flat, of one length.
    """

    name: str
    start: int
    num_elements: int
    num_updates: int
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def copied(self) -> Piece:
        """The same in host memory of its own, which later updates do not touch."""
        return replace(self, tensors={k: t.detach().to("cpu", copy=True) for k, t in self.tensors.items()})


def write_pieces(path: Path, pieces: Iterable[Piece]) -> str:
    """Write pieces, of host memory, to a new safetensors file, which is on the disk then. Returns its SHA-256."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, tuple[int, int]] = {}
    for piece in pieces:
        facts[piece.name] = piece.num_elements, piece.num_updates
        for kind, tensor in piece.tensors.items():
            tensors[f"{kind}/{piece.start}/{piece.name}"] = tensor.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with DirectFile(path) as file:
        file.write(memoryview(_header(tensors, {"parameters": json.dumps(facts)})))
        for tensor in (tensor for tensor in tensors.values() if len(tensor)):
            file.write(tensor.numpy().data.cast("B"))
    return file.sha256


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the length of a JSON text, and the text, padded to 8 bytes."""
    told: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        told[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class StoredState:
    """The pieces of all ranks in a folder, as whole parameters. Use it as a context manager: it keeps files open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        # Of each (kind, name): first element, behind the last, file, the tensor's name there.
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self._facts: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        from safetensors import safe_open

        for path in sorted(self.folder.glob("*.safetensors")):
            file = self._files.enter_context(safe_open(path, framework="pt"))
            for name, (num_elements, num_updates) in json.loads(file.metadata()["parameters"]).items():
                before = self._facts.get(name, (num_elements, 0))[1]
                self._facts[name] = num_elements, max(num_updates, before)
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                kind, start, name = key.split("/", 2)
                length = file.get_slice(key).get_shape()[0]
                self._places[kind, name].append((int(start), int(start) + length, file, key))
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises InputError unless it holds exactly these parameters, of so many elements."""
        if self._facts.keys() != sizes.keys():
            odd = sorted(self._facts.keys() ^ sizes.keys())
            raise InputError(
                f"{self.folder} holds other parameters than are trained now ({odd[0]} and {len(odd) - 1} more are only "
                "on one side); resume with the model.path and model.lora of before"
            )
        for name, size in sizes.items():
            if self._facts[name][0] != size:
                raise InputError(
                    f"{self.folder}: {name} has {self._facts[name][0]} elements there and {size} in this model; resume "
                    "with the model.path and model.lora of before"
                )

    def num_updates(self, name: str) -> int:
        """Optimizer steps behind a parameter."""
        return self._facts[name][1]

    def read(self, kind: str, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Elements start .. end - 1 of a parameter, flat; all without `end`. Raises InputError when some are in no
        file."""
        end = self._facts[name][0] if end is None else end
        parts: list[Tensor] = []
        at = start
        for first, behind, file, key in self._places[kind, name]:
            if first <= at < behind and at < end:
                until = min(behind, end)
                parts.append(file.get_slice(key)[at - first : until - first])
                at = until
        if at < end:
            raise InputError(f"{self.folder}: elements {at} to {end - 1} of {name} are in no file; a rank's is missing")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def restore_weights(policy: Any, stored: StoredState) -> None:
    """Set what a whole policy trains to the stored masters. Raises InputError when they are another model's."""
    trained = trained_by_name(policy)
    stored.check({name: parameter.numel() for name, parameter in trained})
    with torch.no_grad():
        for name, parameter in trained:
            parameter.copy_(stored.read(MASTER, name).view_as(parameter))
