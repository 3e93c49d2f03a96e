"""Model FLOP/s utilization: the arithmetic that an update needs, over what its GPUs could do in that time.

An update's floating-point operations are counted as 6 a token and weight (2 forward, 2 for the gradient of the inputs,
2 for that of the weights; a frozen weight lacks the last), and 12 x layers x heads x head size for each token and each
token of its row, for attention (PaLM, arXiv 2204.02311, appendix B). Every row counts whole, prompt included, and all
of attention, although a causal mask needs half. What the learner does besides, such as activations that are computed a
second time, pi_old of later mini-batches or a resident reference model, does not count: it only takes time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dphrl.types import TrainBatch

TERA = 1e12
# Dense TFLOP/s of one GPU by NVIDIA's data sheets: by tensor cores in bfloat16, and in float32 as torch multiplies it
# unless it is told otherwise, without TF32. A name that is longer stands first; its words are all in the device's name.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250.0, "float32": 75.0}),
    ("GH200", {"bfloat16": 989.4, "float32": 66.9}),
    ("H200 NVL", {"bfloat16": 835.5, "float32": 60.0}),
    ("H200", {"bfloat16": 989.4, "float32": 66.9}),
    ("H100 NVL", {"bfloat16": 835.5, "float32": 60.0}),
    ("H100 PCIe", {"bfloat16": 756.0, "float32": 51.2}),
    ("H100", {"bfloat16": 989.4, "float32": 66.9}),
    ("H20", {"bfloat16": 148.0, "float32": 44.0}),
    ("A100", {"bfloat16": 312.0, "float32": 19.5}),
    ("A800", {"bfloat16": 312.0, "float32": 19.5}),
    ("A40", {"bfloat16": 149.7, "float32": 37.4}),
    ("A30", {"bfloat16": 165.0, "float32": 10.3}),
    ("A10", {"bfloat16": 125.0, "float32": 31.2}),
    ("RTX A6000", {"bfloat16": 154.8, "float32": 38.7}),
    ("L40S", {"bfloat16": 362.0, "float32": 91.6}),
    ("L40", {"bfloat16": 181.0, "float32": 90.5}),
    ("L4", {"bfloat16": 121.0, "float32": 30.3}),
    ("RTX 4090", {"bfloat16": 165.2, "float32": 82.6}),
)
# A device with such a word in its name is a part of the GPU that the name says besides, or a slower kind of it.
LESSER = {"MIG", "LAPTOP", "D"}
# Of a model with experts a token uses a part of the weights, which its configuration does not tell in one way.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Compute:
    """flops_per_token: of all weights. flops_per_pair: of attention, for each token and each token of its row.
    peak_flops: a second, of all the learner's GPUs."""

    flops_per_token: float
    flops_per_pair: float
    peak_flops: float

    def flops(self, lengths: list[int]) -> float:
        """Floating-point operations of an update on rows of these numbers of tokens."""
        return self.flops_per_token * sum(lengths) + self.flops_per_pair * sum(length**2 for length in lengths)


def utilization(compute: Compute | None, batch: TrainBatch, seconds: float) -> dict[str, float]:
    """`learner/mfu` of an update that took so long; empty where `compute` is not known."""
    if compute is None or not seconds > 0:
        return {}
    lengths = [len(row.token_ids) for minibatch in batch.minibatches for row in minibatch]
    return {"learner/mfu": compute.flops(lengths) / (seconds * compute.peak_flops)}


def compute_of(lm: nn.Module, device_name: str, dtype: str, num_devices: int) -> Compute | None:
    """None for an unknown device or type of numbers, and for a model whose operations this cannot count.

    lm: ZeRO may have sharded it. device_name: as CUDA tells it; "" without a GPU.
    """
    peak, config = peak_flops(device_name, dtype), text_config(lm)
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if peak is None or not layers or not heads or any(getattr(config, name, None) for name in EXPERTS):
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    trained = sum(full_size(p) for p in lm.parameters() if p.requires_grad)
    frozen = sum(full_size(p) for p in lm.parameters() if not p.requires_grad)
    per_token = 6.0 * trained + 4.0 * frozen - _looked_up(lm)
    return Compute(per_token, 12.0 * layers * heads * head_size, peak * num_devices)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense FLOP/s of one such GPU; None where the table does not say."""
    words = set(re.findall(r"\w+", device_name.upper()))
    if words & LESSER:
        return None
    found = next((peaks for name, peaks in PEAKS if set(name.upper().split()) <= words), {})
    return found[dtype] * TERA if dtype in found else None


def device_name() -> str:
    """This process's GPU, as CUDA tells it; "" without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def text_config(lm: Any) -> Any:
    """The part of the model's configuration that is about text."""
    config: Any = getattr(lm, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _looked_up(lm: Any) -> float:
    """Operations that were counted for an embedding that is no output head too: it multiplies nothing."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return 0.0
    return (6.0 if embedding.weight.requires_grad else 4.0) * full_size(embedding.weight)


def full_size(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, also in one that ZeRO-3 has sharded."""
    return int(getattr(parameter, "ds_numel", None) or math.prod(parameter.shape))
