"""One hash of weights or of an optimizer, to tell whether two of them are equal to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def digest_of(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes in the given order, as hexadecimal digits. Any device and dtype."""
    total = hashlib.sha256()
    for name, tensor in named_tensors:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def optimizer_tensors(states: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of a torch optimizer's states, in the order of its parameters: moments and counts of steps."""
    for index, state in enumerate(states):
        for name, value in sorted(state.items()):
            if isinstance(value, Tensor):
                yield f"{index} {name}", value
