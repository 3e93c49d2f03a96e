"""The attention kernels: what each needs, when rows may be packed, and when padded rows need no mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.config.loading import InputError
from dphrl.config.model import GPU_KERNELS, ModelConfig
from dphrl.learner.batching import MicroBatch, collate
from dphrl.types import RowKind, TrainRow

# Attention that looks at earlier positions only, by the names that transformers gives to the kinds of layers.
CAUSAL_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

_SUPPORT_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


def use_packing(packing: str, attention: str) -> bool:
    """Whether rows are packed: `auto` packs only where a variable-length kernel makes this cheaper than padding."""
    return packing == "packed" or (packing == "auto" and attention in GPU_KERNELS)


def needs_padding_mask(lm: nn.Module) -> bool:
    """Whether rows padded on the right need an attention mask, by what transformers says of the model.

    Where every layer is causal attention, no token sees what comes behind it, and padding comes last: hidden states are
    those that a mask gives, at less cost. Anything else keeps its mask: bidirectional and prefix attention, recurrent
    layers, and models that do not say.
    """
    config = cast(Any, lm).config.get_text_config()
    causal = [module.is_causal for module in lm.modules() if hasattr(module, "is_causal")]
    return (
        not causal
        or not all(causal)
        or not getattr(config, "is_causal", True)
        or bool(getattr(lm, "_is_stateful", False))
        or not CAUSAL_LAYERS.issuperset(getattr(config, "layer_types", None) or ())
    )


def window_kinds(lm: nn.Module) -> set[str]:
    """The kinds of the model's layers that do not see all of what comes before, by transformers' names."""
    config = cast(Any, lm).config.get_text_config()
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    windows = set(kinds or ()) - {"full_attention"}
    # Mistral's family names no kinds: every layer has the window.
    if not kinds and window and window < getattr(config, "max_position_embeddings", window + 1):
        windows.add("sliding_attention")
    return windows


def check_kernel(config: ModelConfig, model_config: Any) -> None:
    """Raises InputError when the model has no such kernel, or when a package that it needs is missing here.

    model_config: what transformers' AutoConfig reads from the model.
    """
    from transformers import AutoModelForCausalLM

    attention = config.attention
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise InputError(
            "model.attention: flash_attention_2 needs the package flash-attn, which is not installed; "
            "pip install --no-build-isolation 'dphrl[flash]' (it needs CUDA), or set model.attention to flex_attention "
            "or sdpa"
        )
    # Code that comes with a model is not in this table; loading it says what it supports.
    model_class = AutoModelForCausalLM._model_mapping.get(type(model_config), None)
    flag = _SUPPORT_FLAGS.get(attention)
    if flag and model_class is not None and not getattr(model_class, flag, False):
        raise InputError(
            f"model.attention: transformers has no {attention} for {model_class.__name__}; set model.attention: "
            f"{'eager' if attention == 'sdpa' else 'sdpa'}"
        )


def check_kernel_device(attention: str, dtype: str) -> None:
    """Raises InputError when the kernel does not run in this process, or not with weights of `dtype`.

    Call it in the process that holds the model: the process that started the run may have no GPU.
    """
    if attention in GPU_KERNELS and not torch.cuda.is_available():
        raise InputError(
            f"model.attention: {attention} needs a GPU here ({GPU_KERNELS[attention]}); set model.attention: sdpa"
        )
    if attention == "flash_attention_2" and dtype == "float32":
        raise InputError(
            "model.attention: flash_attention_2 has no float32 kernel; set model.dtype: bfloat16 (not in inline mode, "
            "which is float32), or model.attention: flex_attention or sdpa"
        )


def check_rows_apart(forward: Callable[[MicroBatch], tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Raises InputError when a packed row sees the row before it.

    Many of transformers' models do not tell rows apart by their position ids, and none says so. So this runs four tiny
    forward passes: how far does another row in front move a row's log-probs, compared with how far it would as its
    context? Under ZeRO-3 that is a collective.
    """
    # Few tokens, which every vocabulary has.
    first, other, second = (
        tuple(start + i % 7 for i in range(length)) for start, length in ((1, 32), (8, 32), (4, 16))
    )

    def logprobs(*sequences: Sequence[int]) -> Tensor:
        rows = [TrainRow(RowKind.REFERENCE, tuple(ids), 1, (0.0,) * (len(ids) - 1), 1.0) for ids in sequences]
        with torch.no_grad():
            return forward(collate(rows, packed=True).to(device))[0][-len(second) + 1 :]

    moved = (logprobs(first, second) - logprobs(other, second)).abs().max()
    as_context = (logprobs(first + second) - logprobs(other + second)).abs().max()
    if bool(moved > as_context / 10):
        raise InputError(
            f"learner.packing: in this model packed rows see each other (by {float(moved):.2g} nats a token); set "
            "learner.packing: padded"
        )
