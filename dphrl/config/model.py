"""The model's part of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dphrl.config.section import PositiveFloat, PositiveInt, Section

# Kernels that tell packed rows apart without a mask of all pairs, and what each needs a GPU for.
GPU_KERNELS = {
    "flash_attention_2": "the package flash-attn is CUDA code",
    "flex_attention": "on a CPU PyTorch has no backward pass for it",
}

# Kernels that cannot give every pair of positions its say, and why.
NO_PAIR_MASK = {
    "eager": "it would add the mask to the scores as a number",
    "flash_attention_2": "it takes no mask of pairs",
}


class LoraConfig(Section):
    rank: PositiveInt = 16
    """Columns of each adapter: how much it can learn, and what it costs. A layer of IN x OUT weights gets
    rank x (IN + OUT) trained ones. It may not exceed the smaller of IN and OUT."""
    alpha: PositiveFloat = 32.0
    """The adapter's weight: its product is scaled by alpha / rank. At twice the rank it takes twice the alpha to learn
    at the same speed."""
    target: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names of the linear layers that get an adapter, as the model has them: q_proj is that layer of every block,
    layers.0.self_attn.q_proj that of the first. Empty means every linear layer but the output head. The head and the
    embedding take no adapter, because models tie the two."""

    @property
    def layout(self) -> str:
        """What adapters must have in common for one to be loaded into the other."""
        return f"LoRA of rank {self.rank} on {', '.join(self.target) or 'every linear layer'}"


class ModelConfig(Section):
    path: str = "tiny-factor"
    """The model to train: an embedded model's name (tiny-factor, tiny-factor-even, tiny-cue, tiny-sql,
    smollm2-135m-instruct), a Hugging Face directory, or a hub name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The number type of weights and activations, in engines and learner. auto is bfloat16 on a GPU and float32 on a
    CPU, where bfloat16 is emulated and several times slower. float32 doubles the memory and narrows the gap between
    the log-probs of engine and learner."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """The learner's attention kernel. flash_attention_2 and flex_attention let rows be packed without padding and need
    a GPU; the first also needs its package (the extra dphrl[flash]) and bfloat16, the second comes with PyTorch, which
    compiles it at the first step. eager is the slowest. It is part of the reference fingerprint, because another kernel
    rounds differently: a change samples the reference buffer anew."""
    lora: LoraConfig | None = None
    """Adapters of low rank that are trained instead of the model's own weights: it needs `pip install 'dphrl[lora]'`.
    null trains all weights. The learner keeps gradients and optimizer state of the adapters alone. Engines and exports
    get plain weights with the adapters' part in them. A new adapter changes nothing, so that a reference buffer serves
    runs with and without adapters. Adapters want a higher learner.lr than whole weights, 10 times or more."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run. It runs with your rights, so leave it off unless you
    vouch for the model."""
