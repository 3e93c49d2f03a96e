"""The sizes of a model that memory and disk depend on: known by name, or read from the model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dphrl.config.model import LoraConfig


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like model. `num_parameters` counts tied embeddings once."""

    num_parameters: float
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_size: int
    num_heads: int
    intermediate_size: int

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def linear_layers(self) -> Mapping[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block, by name."""
        hidden, heads, kv = self.hidden_size, self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        mlp = self.intermediate_size
        return {
            **{"q_proj": (hidden, heads), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (heads, hidden)},
            **{"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)},
        }

    def num_trained(self, lora: LoraConfig | None) -> float:
        """Parameters that an optimizer has: all, or those of the adapters, two thin matrices for each linear layer."""
        if lora is None:
            return self.num_parameters
        # A target may name the layers of one block alone; then this counts too many.
        targets = {target.rpartition(".")[2] for target in lora.target}
        chosen = [size for name, size in self.linear_layers().items() if not targets or name in targets]
        return float(self.num_layers * lora.rank * sum(inputs + outputs for inputs, outputs in chosen))


# The models of the paper's presets are gated or large: planning should not need their files.
KNOWN_SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": ModelShape(8.03e9, 32, 4096, 8, 128, 32, 14336),
    "Qwen/Qwen2.5-Math-7B": ModelShape(7.62e9, 28, 3584, 4, 128, 28, 18944),
    "tiny-factor": ModelShape(0.38e6, 2, 128, 4, 32, 4, 320),
    "tiny-factor-even": ModelShape(0.38e6, 2, 128, 4, 32, 4, 320),
    "tiny-cue": ModelShape(0.38e6, 2, 128, 4, 32, 4, 320),
    "tiny-sql": ModelShape(0.4e6, 2, 128, 4, 32, 4, 320),
    "smollm2-135m-instruct": ModelShape(0.1345e9, 30, 576, 3, 64, 9, 1536),
}


def model_shape(path: str, *, trust_remote_code: bool = False) -> ModelShape | None:
    """From the models known here, else from the model's own configuration if it is on this machine and like Llama's,
    else None."""
    if path in KNOWN_SHAPES:
        return KNOWN_SHAPES[path]
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        return shape_of(found.get_text_config())
    except (OSError, ValueError):
        return None
    except (AttributeError, TypeError):
        return None  # a configuration with other names, such as GPT-2's


def shape_of(text: Any) -> ModelShape:
    """The shape of a Llama-like `PretrainedConfig`: gated MLP, grouped queries; norms are left out of the count."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention = text.hidden_size * head_size * (2 * heads + 2 * kv_heads)
    mlp = 3 * text.hidden_size * text.intermediate_size
    embeddings = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    count = text.num_hidden_layers * (attention + mlp) + embeddings
    sizes = (text.num_hidden_layers, text.hidden_size, kv_heads, head_size, heads, text.intermediate_size)
    return ModelShape(float(count), *sizes)
