"""The trainable policy: a Hugging Face causal LM that returns completion log-probs instead of logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.algo.logprobs import token_logprobs
from dphrl.learner.batching import MicroBatch


class PolicyModel(nn.Module):
    """Wraps the LM so that its forward pass yields (logprobs_N, entropy_N) of a micro-batch.

    The log-probs are computed inside forward, not by the caller, so that wrappers that hook forward (ZeRO-3 gathers,
    checkpointing) see every use of a parameter. The model has no active dropout, which would make u != 1 at step 0.
    """

    def __init__(self, lm: nn.Module, temperature: float) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        lm = cast(Any, self.lm)
        hidden_BTD = lm.base_model(
            input_ids=batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            attention_mask=batch.attention_mask_BT,
            # With a cache, transformers would also not notice that position_ids mark packed sequences.
            use_cache=False,
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.predictor_index_N]
        return token_logprobs(
            hidden_ND,
            lm.get_output_embeddings(),
            batch.target_ids_N,
            vocab_size=lm.config.get_text_config().vocab_size,
            max_targets=batch.max_targets,
            temperature=self.temperature,
        )


def dtype_name(dtype: str) -> str:
    """`auto` means bfloat16 on a GPU that has it, else float32, because a CPU emulates bfloat16 several times slower.

    Call it in the process that holds the model: the process that started the run may have no GPU.
    """
    if dtype == "auto":
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return dtype


def use_packing(packing: str, attention: str) -> bool:
    """Whether rows are packed: `auto` packs only where a variable-length kernel makes this cheaper than padding."""
    return packing == "packed" or (packing == "auto" and attention == "flash_attention_2")
