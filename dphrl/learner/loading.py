"""The policy from a model's files, with everything that must hold of it before training.

A whole run has one way to read weights: transformers' own, which knows old names, merged experts, sharded indexes and
every file format. Where the files are safetensors and nothing is converted, it maps them instead of copying them, so
that a weight costs memory of its own only once somebody changes it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from dphrl.config.loading import InputError
from dphrl.config.model import ModelConfig
from dphrl.config.schema import Config
from dphrl.learner.attention import check_kernel_device
from dphrl.learner.policy import PolicyModel, dtype_name
from dphrl.model_files import model_folder, tensor_names, tensor_sizes

logger = logging.getLogger(__name__)

# What safetensors calls the number types that transformers maps without a copy when it is asked for them.
_MAPPED_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_policy(
    path: str,
    config: ModelConfig,
    *,
    temperature: float,
    gradient_checkpointing: bool = False,
    keep_stored_dtype: bool = False,
) -> PolicyModel:
    """The policy from an HF directory or hub name, with gradients on; in training mode for gradient checkpointing only.

    keep_stored_dtype: leave the weights in the files' number type, where they are mapped and not copied; whoever asks
    for it converts them to the configuration's. Raises InputError when the attention kernel does not run here, when
    weights are missing, when engines would load another output head, when the head is not linear, when the model scales
    its logits after the head, which the log-probs here would miss, or when gradient checkpointing would switch on
    dropout.
    """
    check_kernel_device(config.attention, dtype_name(config.dtype))
    dtype = getattr(torch, dtype_name(config.dtype))
    lm = _mapped_lm(path, config, dtype) if keep_stored_dtype else _read_lm(path, config, dtype)
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


def load_reference(path: str, config: Config, *, keep_stored_dtype: bool = False) -> PolicyModel | None:
    """A frozen copy of the initial policy; None when the config's estimator needs none. It raises what `load_policy`
    does."""
    if not config.uses_reference_model:
        return None
    reference = load_policy(
        path, config.model, temperature=config.rollout.temperature, keep_stored_dtype=keep_stored_dtype
    )
    return reference.requires_grad_(False)


def _read_lm(path: str, config: ModelConfig, dtype: torch.dtype) -> Any:
    """The model in `dtype`. Raises InputError when weights are missing."""
    from transformers import AutoModelForCausalLM

    lm, loading = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    _check_weights(lm, path, sorted(loading["missing_keys"]))
    return lm


def _mapped_lm(path: str, config: ModelConfig, dtype: torch.dtype) -> Any:
    """The model with weights of the files' number type, and everything else as it would be in `dtype`, where it can.

    Says in the log why, where the weights are copied after all.
    """
    stored, why_copied = _stored_dtype(path)
    lm = _read_lm(path, config, stored or dtype)
    if stored not in (None, dtype):
        if getattr(lm, "_keep_in_fp32_modules_strict", None):
            # No conversion to `dtype` may reach some of its weights, and only transformers knows which.
            why_copied = "the model keeps some weights in float32"
            lm = _read_lm(path, config, dtype)
        else:
            _settle_rest(lm, config, dtype)
    merged = [type(one).__name__ for one in getattr(lm, "_weight_conversions", ()) if hasattr(one, "operations")]
    if merged:
        why_copied = "its weights are put together from other tensors"
    if why_copied:
        logger.warning("%s: every rank holds a whole copy in host memory while it loads: %s", path, why_copied)
    return lm


def _stored_dtype(path: str) -> tuple[torch.dtype | None, str]:
    """The number type of most of a model's bytes; None, and why, where transformers could not map them."""
    sizes = tensor_sizes(model_folder(path))
    if not sizes:
        return None, "it has no .safetensors files"
    name = max(sizes, key=lambda one: sizes[one])
    if name not in _MAPPED_TYPES:
        return None, f"its weights are of type {name}"
    return _MAPPED_TYPES[name], ""


def _settle_rest(lm: Any, config: ModelConfig, dtype: torch.dtype) -> None:
    """Give buffers and configuration the number types that they have in a model of `dtype`.

    Some buffers follow the model, others (the angles of rotary embeddings) are float32 always.
    """
    from transformers import AutoModelForCausalLM

    # It writes `dtype` into the configuration that it is given.
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(
            lm.config, dtype=dtype, attn_implementation=config.attention, trust_remote_code=config.trust_remote_code
        )
    wanted = {name: buffer.dtype for name, buffer in twin.named_buffers()}
    for name, buffer in lm.named_buffers():
        buffer.data = buffer.data.to(wanted.get(name, buffer.dtype))


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
