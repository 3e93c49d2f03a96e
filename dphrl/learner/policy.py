"""The trainable policy: a Hugging Face causal LM that returns completion log-probs instead of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.config.loading import InputError
from dphrl.config.model import ModelConfig
from dphrl.config.schema import Config
from dphrl.learner.attention import check_kernel_device, needs_padding_mask
from dphrl.learner.batching import MicroBatch
from dphrl.learner.head import LogprobHead, install_logprob_head
from dphrl.learner.sequence_parallel import SequenceShare
from dphrl.model_files import model_folder, tensor_names


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
        hidden_PD = self._hidden_states(batch.input_ids_BT, batch.position_ids_BT, mask)
        return self._head.logprobs(hidden_PD[batch.predictor_index_N], batch.target_ids_N, self.temperature)

    def _shared_forward(self, batch: MicroBatch, share: SequenceShare) -> tuple[Tensor, Tensor]:
        part, num_tokens = share.cut(batch), len(batch.target_ids_N)
        hidden_PD = self._hidden_states(part.input_ids_BT, part.position_ids_BT, None)
        targets_K = batch.target_ids_N[part.token_index_K]
        own = self._head.logprobs(hidden_PD[part.predictor_index_K], targets_K, self.temperature)
        logprobs_N, entropy_N = (share.join(values_K, part.token_index_K, num_tokens) for values_K in own)
        return logprobs_N, entropy_N

    def _hidden_states(self, input_ids_BT: Tensor, position_ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The last hidden state of every position, [B * T, D]."""
        lm = cast(Any, self.lm)
        hidden_BTD = lm.base_model(
            input_ids=input_ids_BT,
            position_ids=position_ids_BT,
            attention_mask=mask_BT,
            # With a cache, transformers would also not notice that position_ids mark packed sequences.
            use_cache=False,
        ).last_hidden_state
        return cast(Tensor, hidden_BTD.flatten(0, 1))

    @property
    def _head(self) -> LogprobHead:
        return cast(LogprobHead, cast(Any, self.lm).get_output_embeddings())


def dtype_name(dtype: str) -> str:
    """`auto` means bfloat16 on a GPU that has it, else float32, because a CPU emulates bfloat16 several times slower.

    Call it in the process that holds the model: the process that started the run may have no GPU.
    """
    if dtype == "auto":
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return dtype


def load_policy(
    path: str, config: ModelConfig, *, temperature: float, gradient_checkpointing: bool = False
) -> PolicyModel:
    """The policy from an HF directory or hub name, with gradients on; in training mode for gradient checkpointing only.

    Raises InputError when the attention kernel does not run here, when weights are missing in it, when engines would
    load another output head, when the head is not linear, when the model scales its logits after the head, which the
    log-probs here would miss, or when gradient checkpointing would switch on dropout.
    """
    from transformers import AutoModelForCausalLM

    check_kernel_device(config.attention, dtype_name(config.dtype))
    lm, loading = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype_name(config.dtype)),
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    _check_weights(lm, path, sorted(loading["missing_keys"]))
    _settle_head(lm, path)
    text_config = lm.config.get_text_config()
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, field, None) not in (None, 1, 1.0):
            raise InputError(f"model.path: {path} scales its logits ({field}), which is not supported yet")
    if gradient_checkpointing:
        # transformers checkpoints only in training mode. Dropout must be off there: see PolicyModel.
        dropouts = [
            name
            for name, value in text_config.to_dict().items()
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0
        ]
        if dropouts:
            raise InputError(f"model.path: {path} has dropout; set {', '.join(dropouts)} to 0 in its config.json")
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lm.train(gradient_checkpointing)
    try:
        return PolicyModel(lm, temperature)
    except ValueError as error:
        raise InputError(f"model.path: {path} cannot be trained: {error}") from error


def _check_weights(lm: Any, path: str, missing: Sequence[str]) -> None:
    """Raises InputError when weights are `missing` (their names) in the model at `path`: transformers would fill them
    with random numbers."""
    if not missing:
        return
    hint = ""
    if any("lm_head" in name for name in missing):
        hint = "; if its output head is the embedding, set tie_word_embeddings to true in its config.json"
    raise InputError(
        f"model.path: {path} lacks {len(missing)} of the model's weights, such as {missing[0]}, which would start at "
        f"random{hint}"
    )


def _settle_head(lm: Any, path: str) -> None:
    """Make the configuration say whether the output head is tied, where the checkpoint contradicts it.

    transformers ties only if the tensors allow it, and vLLM decides by their names. Raises InputError for a checkpoint
    with which the two would end with different heads.
    """
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if not getattr(lm.config, "tie_word_embeddings", False) or head is None:
        return
    stored = tensor_names(model_folder(path))
    if head.weight is embedding.weight:
        name = next(name for name, parameter in lm.named_parameters() if parameter is embedding.weight)
        tail = ".".join(name.split(".")[-2:])
        if stored and not any(one.endswith(tail) for one in stored):
            raise InputError(
                f"model.path: {path} stores its tied embedding as the output head only, where engines would not find "
                f"it; rename the tensor to {name}"
            )
        return
    if not stored:
        raise InputError(
            f"model.path: {path} stores an output head that differs from its embedding, though its config.json ties "
            "them, and engines would not see it in .bin files; set tie_word_embeddings to false in its config.json"
        )
    # An export that says tied would be read without its head by programs that believe the configuration.
    for config in (lm.config, lm.config.get_text_config()):
        config.tie_word_embeddings = False


def load_reference(path: str, config: Config, device: str | torch.device) -> PolicyModel | None:
    """A frozen copy of the initial policy on `device`; None when the config's estimator needs none."""
    if not config.uses_reference_model:
        return None
    reference = load_policy(path, config.model, temperature=config.rollout.temperature)
    return reference.requires_grad_(False).to(device)
