"""The trainable policy: a Hugging Face causal LM that returns completion log-probs instead of logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.learner.attention import needs_padding_mask
from dphrl.learner.batching import MicroBatch
from dphrl.learner.head import LogprobHead, install_logprob_head


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

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        lm = cast(Any, self.lm)
        hidden_BTD = lm.base_model(
            input_ids=batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            attention_mask=batch.attention_mask_BT if self.needs_padding_mask else None,
            # With a cache, transformers would also not notice that position_ids mark packed sequences.
            use_cache=False,
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.predictor_index_N]
        head = cast(LogprobHead, lm.get_output_embeddings())
        return head.logprobs(hidden_ND, batch.target_ids_N, self.temperature)


def dtype_name(dtype: str) -> str:
    """`auto` means bfloat16 on a GPU that has it, else float32, because a CPU emulates bfloat16 several times slower.

    Call it in the process that holds the model: the process that started the run may have no GPU.
    """
    if dtype == "auto":
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return dtype
