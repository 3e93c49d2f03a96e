"""How weights go from the learner to the engines: packed as raw bytes, in chunks for the object store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

# Small, so that the first chunk is soon there, the store holds little, and its pages are used again while they are
# warm; large enough that calls do not count. `python -m tests.benchmarks weight_sync --chunk-mib` measures others.
CHUNK_BYTES = 64 * 2**20


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
    """`tensor` (any device and dtype) as host bytes under its Hugging Face name.

    The bytes of a contiguous tensor on the CPU are the tensor's own, so that putting them into the store is the only
    copy; they keep its memory alive.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return PackedTensor(
        name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy()
    )


def unpack_tensors(chunk: Iterable[PackedTensor]) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors as they were packed. They share the chunk's memory, so they must not be written to."""
    with warnings.catch_warnings():
        # Object store memory is read-only. torch warns about writes, but nobody writes to these tensors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return [
            (packed.name, torch.from_numpy(packed.data).view(getattr(torch, packed.dtype)).reshape(packed.shape))
            for packed in chunk
        ]


def packed_chunks(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[PackedTensor]]:
    """Lists of packed tensors, each of at most CHUNK_BYTES, or of one larger tensor.

    A tensor is never split, because an engine loads it whole. So the largest one, often the embedding, bounds from
    below what the store must hold.
    """
    chunk: list[PackedTensor] = []
    num_bytes = 0
    for name, tensor in named_tensors:
        if chunk and num_bytes + tensor.nbytes > CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(pack_tensor(name, tensor))
        num_bytes += tensor.nbytes
    if chunk:
        yield chunk
