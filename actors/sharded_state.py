"""What a DeepSpeed rank holds of the learner's state, as pieces for a checkpoint, and taken from one.

DeepSpeed lays the trained parameters end to end in flat float32 tensors, of which each rank has a part, with AdamW's
moments beside it. Which stretch of a parameter lies where is known to each of its optimizer classes in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dphrl.learner.lora import trained_by_name
from dphrl.learner.state import MASTER, MOMENTS, Piece, StoredState, restore_weights


@dataclass(frozen=True)
class _Stretch:
    """A part of a parameter on this rank: its first element there, its length, and where it lies in a flat tensor."""

    name: str
    parameter: Any
    start: int
    length: int
    flat: Tensor
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """This stretch of a tensor like `flat`."""
        return whole.detach().narrow(0, self.offset, self.length)


def held_pieces(module: Any, policy: Any) -> Iterator[Piece]:
    """The state on this rank, sharing its memory. module: the DeepSpeed engine of `policy`."""
    inner = module.optimizer.optimizer
    for stretch in _stretches(module, policy):
        state = inner.state.get(stretch.flat, {})
        tensors = {MASTER: stretch.flat, **{kind: state[kind] for kind in MOMENTS if state}}
        cut = {kind: stretch.of(tensor) for kind, tensor in tensors.items()}
        yield Piece(stretch.name, stretch.start, _size(stretch.parameter), int(state["step"]) if state else 0, cut)


def restore_pieces(module: Any, policy: Any, stored: StoredState, *, weights_only: bool) -> None:
    """Take this rank's part of a stored state, or of its weights alone with a new optimizer.

    Every rank does it by itself; nothing is sent between them. Raises InputError when the state is another model's.
    """
    stored.check({name: _size(parameter) for name, parameter in trained_by_name(policy)})
    inner = module.optimizer.optimizer
    stretches = list(_stretches(module, policy))
    inner.state.clear()
    for stretch in stretches:
        span = stretch.name, stretch.start, stretch.start + stretch.length
        stretch.of(stretch.flat).copy_(stored.read(MASTER, *span))
        num_updates = 0 if weights_only else stored.num_updates(stretch.name)
        if num_updates:
            state = inner.state[stretch.flat]
            for kind in MOMENTS:
                moment = state.setdefault(kind, torch.zeros_like(stretch.flat))
                stretch.of(moment).copy_(stored.read(kind, *span))
            # AdamW's fused kernel counts in a scalar on the device of what it updates.
            state["step"] = torch.tensor(float(num_updates), device=stretch.flat.device)
    if module.zero_optimization_stage() < 3:
        restore_weights(policy, stored)
    else:
        _restore_shards(stretches, stored)


def _restore_shards(stretches: list[_Stretch], stored: StoredState) -> None:
    """The weights that are computed with, at stage 3: each rank's shard, and small ones that every rank keeps whole."""
    for stretch in stretches:
        shard = stretch.parameter.ds_tensor.detach()
        shard.flatten().narrow(0, 0, stretch.length).copy_(stretch.of(stretch.flat))
        if stretch.parameter.numel() == _size(stretch.parameter):
            stretch.parameter.detach().copy_(stored.read(MASTER, stretch.name).view_as(stretch.parameter))


def _stretches(module: Any, policy: Any) -> Iterator[_Stretch]:
    optimizer, at_stage_3 = module.optimizer, module.zero_optimization_stage() == 3
    parameter: Any  # DeepSpeed puts attributes of its own on it
    for name, parameter in trained_by_name(policy):
        if at_stage_3:
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = padded * torch.distributed.get_rank(parameter.ds_process_group)
            length = max(0, min(padded, _size(parameter) - start))  # the last shards may be padding, in whole or part
            yield _Stretch(name, parameter, start, length, optimizer.fp32_partitioned_groups_flat[group], offset)
        elif (place := parameter._hp_mapping) is not None:  # None: it lies on other ranks altogether
            inside, here = place.lp_fragment_address, place.hp_fragment_address
            flat = optimizer.optimizer.param_groups[place.param_group_index]["params"][0]
            yield _Stretch(name, parameter, inside.start, inside.numel, flat, here.start)


def _size(parameter: Any) -> int:
    """Elements of the whole parameter, of which stage 3 leaves none in it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
