"""The trainable policy: a Hugging Face causal LM that returns completion log-probs instead of logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.learner.attention import needs_padding_mask
from dphrl.learner.batching import MicroBatch
from dphrl.learner.head import LogprobHead, install_logprob_head
from dphrl.learner.prefixes import shared_prefix_mask
from dphrl.learner.sequence_parallel import SequenceShare


class PolicyModel(nn.Module):
    """Wraps the LM so that its forward pass yields (logprobs_N, entropy_N) of a micro-batch.

    The log-probs are computed inside forward, not by the caller, so that wrappers that hook forward (ZeRO-3 gathers,
    checkpointing) see every use of a parameter. The model has no active dropout, which would make u != 1 at step 0.
    """

    def __init__(self, lm: nn.Module, temperature: float) -> None:
        """Puts a LogprobHead in the place of `lm`'s output head. Raises ValueError when that is not a linear layer."""
        super().__init__()
        install_logprob_head(lm)
        self.lm = lm
        self.temperature = temperature
        self.needs_padding_mask = needs_padding_mask(lm)
        # Set where ranks share rows. Then a micro-batch holds one sequence, and forward is a collective of these ranks.
        self.share: SequenceShare | None = None

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        if self.share is not None:
            return self._shared_forward(batch, self.share)
        mask = batch.attention_mask_BT if self.needs_padding_mask else None
        if batch.prompt_index_BT is not None:
            mask = shared_prefix_mask(batch, cast(Any, self.lm).config._attn_implementation)
        hidden_PD = self._hidden_states(batch.input_ids_BT, batch.position_ids_BT, mask)
        return self._head.logprobs(rows_at(hidden_PD, batch.predictor_index_N), batch.target_ids_N, self.temperature)

    def _shared_forward(self, batch: MicroBatch, share: SequenceShare) -> tuple[Tensor, Tensor]:
        part, num_tokens = share.cut(batch), len(batch.target_ids_N)
        hidden_PD = self._hidden_states(part.input_ids_BT, part.position_ids_BT, None)
        targets_K = batch.target_ids_N[part.token_index_K]
        own = self._head.logprobs(rows_at(hidden_PD, part.predictor_index_K), targets_K, self.temperature)
        logprobs_N, entropy_N = (share.join(values_K, part.token_index_K, num_tokens) for values_K in own)
        return logprobs_N, entropy_N

    def _hidden_states(self, input_ids_BT: Tensor, position_ids_BT: Tensor, mask: Any) -> Tensor:
        """The last hidden state of every position, [B * T, D]. mask: [B, T], or of pairs of positions, or None."""
        lm = cast(Any, self.lm)
        hidden_BTD = lm.base_model(
            input_ids=input_ids_BT,
            position_ids=position_ids_BT,
            attention_mask=mask,
            # With a cache, transformers would also not notice that position_ids mark packed sequences.
            use_cache=False,
        ).last_hidden_state
        return cast(Tensor, hidden_BTD.flatten(0, 1))

    @property
    def _head(self) -> LogprobHead:
        return cast(LogprobHead, cast(Any, self.lm).get_output_embeddings())


def rows_at(values_PD: Tensor, index_N: Tensor) -> Tensor:
    """values_PD[index_N], with a gradient that is the same each time: [N, D].

    Where completions share a prompt, several of them read its last position, and their gradients add up. Of the two
    ways to write it, one adds in whatever order threads come: indexing on a CPU, index_select on a GPU.
    """
    return values_PD.index_select(0, index_N) if values_PD.device.type == "cpu" else values_PD[index_N]


def dtype_name(dtype: str) -> str:
    """`auto` means bfloat16 on a GPU that has it, else float32, because a CPU emulates bfloat16 several times slower.

    Call it in the process that holds the model: the process that started the run may have no GPU.
    """
    if dtype == "auto":
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return dtype
