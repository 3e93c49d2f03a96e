"""Ranks that share each row: every rank runs its stretch of the positions, and only attention sees the whole row.

The exchange inside attention is not here: whoever makes the ranks installs it (DeepSpeed's Ulysses).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from dphrl.config.loading import InputError
from dphrl.learner.attention import needs_padding_mask, window_kinds
from dphrl.learner.batching import MicroBatch


@dataclass(frozen=True)
class SequenceShare:
    """This rank's part of every row: stretch `index` of `size` equal ones. group: the ranks that share rows."""

    index: int
    size: int
    group: Any

    def cut(self, batch: MicroBatch) -> LocalPart:
        """This rank's stretch of a micro-batch of one sequence, and the tokens that are predicted from it."""
        num_positions = batch.input_ids_BT.shape[1]
        num_local = -(-num_positions // self.size)
        num_missing = num_local * self.size - num_positions
        # The last stretches are filled up with positions that go on counting, behind all that is real.
        more = batch.position_ids_BT[:, -1:] + torch.arange(1, num_missing + 1, device=batch.position_ids_BT.device)
        input_ids = nn.functional.pad(batch.input_ids_BT, (0, num_missing))
        position_ids = torch.cat([batch.position_ids_BT, more], dim=1)
        stretch = slice(self.index * num_local, (self.index + 1) * num_local)
        local_N = batch.predictor_index_N - stretch.start
        token_index_K = ((local_N >= 0) & (local_N < num_local)).nonzero().squeeze(-1)
        return LocalPart(input_ids[:, stretch], position_ids[:, stretch], local_N[token_index_K], token_index_K)

    def join(self, values_K: Tensor, token_index_K: Tensor, num_tokens: int) -> Tensor:
        """Values of all the micro-batch's tokens, on every rank, from those that each rank has. Differentiable, where
        every rank computes the same loss from the result: each takes the gradient of its own tokens."""
        own_N = values_K.new_zeros(num_tokens).index_put((token_index_K,), values_K)
        return cast(Tensor, _SumOverRanks.apply(own_N, self.group))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class LocalPart:
    """input_ids_BT, position_ids_BT: this rank's stretch. predictor_index_K: the positions in it that predict a token.
    token_index_K: which of the micro-batch's tokens these are."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    predictor_index_K: Tensor
    token_index_K: Tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_N: Tensor, group: Any) -> Tensor:
        total_N = own_N.clone()
        distributed.all_reduce(total_N, group=group)
        return total_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def check_shareable(lm: nn.Module, attention: str) -> None:
    """Raises InputError for a model whose rows cannot be shared: the exchange hands no mask to attention."""
    if needs_padding_mask(lm):
        raise InputError(
            "learner.sequence_parallel: this model is not causal attention alone, so its rows cannot be shared; set "
            "learner.sequence_parallel: 1"
        )
    windows = window_kinds(lm)
    if attention == "sdpa" and windows:
        raise InputError(
            f"learner.sequence_parallel: this model has layers of {', '.join(sorted(windows))}, which only "
            "model.attention: flash_attention_2 keeps in rows that are shared; set learner.sequence_parallel: 1"
        )
