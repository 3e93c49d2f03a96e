"""How weights go from the learner to the engines: packed as raw bytes, in chunks for the object store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

# Small enough that a learner rank never holds a second copy of the model, large enough to keep calls few.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as raw bytes: Ray maps NumPy arrays without a copy, but NumPy has no bfloat16.

    data: uint8, one-dimensional. dtype: the tensor's, such as float32.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def pack_tensor(name: str, tensor: torch.Tensor) -> PackedTensor:
    """`tensor` (any device and dtype) as host bytes under its Hugging Face name."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return PackedTensor(
        name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy()
    )


def unpack_tensor(packed: PackedTensor) -> torch.Tensor:
    """The tensor that was packed. It shares the memory of `packed`, so it must not be written to."""
    with warnings.catch_warnings():
        # Object store memory is read-only. torch warns about writes, but nobody writes to this tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(packed.data)
    return flat.view(getattr(torch, packed.dtype)).reshape(packed.shape)


def packed_chunks(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[PackedTensor]]:
    """Lists of packed tensors, each of CHUNK_BYTES or more except the last. A tensor is never split."""
    chunk: list[PackedTensor] = []
    num_bytes = 0
    for name, tensor in named_tensors:
        chunk.append(pack_tensor(name, tensor))
        num_bytes += chunk[-1].data.nbytes
        if num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk
