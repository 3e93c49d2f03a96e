"""ZeRO-3 before DeepSpeed's engine: a model becomes one shard a rank, one parameter at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shard_model(model: nn.Module, dtype: torch.dtype, settings: Mapping[str, Any]) -> None:
    """Leave each rank its part of every parameter of `model`, in `dtype`, on the rank's device.

    A collective: rank 0's values count. Of weights that are mapped from a file no more than one is in memory as a whole
    at any time. settings: DeepSpeed's configuration, as the engine will get it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    # DeepSpeed moves a model to the device, unless it is sharded already.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    deepspeed.zero.Init(module=_OneByOne(model, dtype, device), config_dict_or_path=dict(settings))


class _OneByOne(nn.Module):
    """A model whose parameters come into memory when they are asked for."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._asked = (model.parameters, dtype, device)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Each parameter in memory of its own: a broadcast into a mapped one would copy its pages, and keep them until
        the whole file is let go."""
        parameters, dtype, device = self._asked
        is_first = torch.distributed.get_rank() == 0
        for parameter in parameters(recurse):
            whole = _passing(parameter.shape, dtype if parameter.is_floating_point() else parameter.dtype, device)
            # The others get it from rank 0, and need not read it.
            if is_first:
                whole.copy_(parameter.data)
            parameter.data = whole
            del whole
            yield parameter


def _passing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a tensor that lives for a moment.

    The C library would keep the room of those that went, in pieces between the shards that stay: a third of the model.
    """
    if device.type != "cpu" or not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    room = mmap.mmap(-1, shape.numel() * dtype.itemsize)
    return torch.frombuffer(room, dtype=dtype).view(shape)
