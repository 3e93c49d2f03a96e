"""Adapters of low rank (LoRA, arXiv 2106.09685): two thin matrices beside each frozen weight, trained in its place.

A layer W with an adapter computes W x + (alpha / rank) B A x. B starts at zero, so a new adapter changes nothing. The
layers are those of peft, put into the transformers model itself: a `PeftModel` around it would hide its parts.

Whoever needs plain weights gets W + (alpha / rank) B A, made anew each time. W itself never changes: adding to it and
subtracting again drifts, in bfloat16 by 1e-3 a round.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dphrl.config.loading import InputError
from dphrl.config.model import LoraConfig, ModelConfig

# peft's name for the only adapter of a model; it is part of the names of the adapter's parameters.
ADAPTER = "default"
# What peft puts before the names of a model's own parts in the files of an adapter.
_FILE_PREFIX = "base_model.model."
_BASE = ".base_layer"


@dataclass(frozen=True)
class PlainWeight:
    """One weight of the model without adapters around it, by its checkpoint name, and the parameters it is made of."""

    name: str
    base: nn.Parameter
    # A [rank, in], B [out, rank] and alpha / rank; None where there is no adapter.
    adapter: tuple[nn.Parameter, nn.Parameter, float] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What must be whole (gathered, under ZeRO-3) when `value` is called."""
        return [self.base, *(self.adapter[:2] if self.adapter else ())]

    def value(self) -> Tensor:
        """The base itself where there is no adapter. Else a new tensor of the base's type, computed in float32."""
        if self.adapter is None:
            return self.base
        a, b, scale = self.adapter
        with torch.no_grad():
            wide = torch.promote_types(self.base.dtype, torch.float32)
            merged = torch.addmm(self.base.to(wide), b.to(wide), a.to(wide), alpha=scale)
            return merged.to(self.base.dtype)


def plain_weights(lm: nn.Module) -> Iterator[PlainWeight]:
    """Every weight of a transformers model, with adapters or without; tied ones once."""
    adapted = has_adapters(lm)
    for name, parameter in lm.named_parameters():
        if not adapted:
            yield PlainWeight(name, parameter)
        elif not _is_adapter(name):
            yield PlainWeight(name.replace(_BASE, ""), parameter, _adapter_of(lm, name))


def adapter_weights(lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' own parameters under the names that peft's files have; none without adapters."""
    if has_adapters(lm):
        for name, parameter in lm.named_parameters():
            if _is_adapter(name):
                yield _FILE_PREFIX + name.replace(f".{ADAPTER}.", "."), parameter


def has_adapters(lm: nn.Module) -> bool:
    return getattr(lm, "peft_config", None) is not None


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _adapter_of(lm: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter, float] | None:
    if not name.endswith(f"{_BASE}.weight"):
        return None
    layer: Any = lm.get_submodule(name.removesuffix(f"{_BASE}.weight"))
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


def trained_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets: the adapters alone, or all parameters of a model without."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def trained_by_name(policy: Any) -> list[tuple[str, nn.Parameter]]:
    """The same with their names in the transformers model, by which a checkpoint knows them."""
    return [(name, parameter) for name, parameter in policy.lm.named_parameters() if parameter.requires_grad]


@contextmanager
def adapters_off(policy: nn.Module) -> Iterator[None]:
    """Within it, the policy is the model without its adapters, to the bit: the initial policy.

    The adapters are still called, and their result is multiplied by zero: under ZeRO-3 DeepSpeed learns in which order
    the parameters are used, and would begin anew at every change.
    """
    layers: list[Any] = [module for module in policy.modules() if hasattr(module, "lora_A")]
    assert layers, "only a policy with adapters has something to leave out"
    scales = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def add_adapters(lm: Any, lora: LoraConfig | None, seed: int) -> None:
    """Freeze the model and give its layers adapters, in place. None leaves it as it is.

    The adapters' start is a function of the seed, and the model is what it was before. Raises InputError when peft is
    missing or the model has not the layers that the configuration names.
    """
    if lora is None:
        return
    names = target_layers(lm, lora)
    check_peft()
    import peft

    lm.requires_grad_(False)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    # peft draws from torch's global generator. The draw is made on the CPU, so that every rank and device has the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, lm)
    for name, parameter in lm.named_parameters():
        if _is_adapter(name):
            # peft keeps float32 beside bfloat16. Ranks keep float32 masters anyway, and DeepSpeed wants one type.
            parameter.data = parameter.data.to(lm.dtype)
            parameter.requires_grad_(True)
    lm.train(lm.training)  # new modules are in training mode


def check_peft() -> None:
    """Raises InputError without peft."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("model.lora: needs the package peft; pip install 'dphrl[lora]'")


def check_lora(config: ModelConfig, model_dir: str) -> None:
    """Raises InputError when the model cannot get the configured adapters. It is built without memory for weights."""
    if config.lora is None:
        return
    check_peft()
    from transformers import AutoConfig, AutoModelForCausalLM

    found = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
    target_layers(lm, config.lora)


def target_layers(lm: Any, lora: LoraConfig) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises InputError for a target that the model has not, for its embedding or its head, and for a rank above that of
    a layer.
    """
    ends = {id(lm.get_output_embeddings()): "output head", id(lm.get_input_embeddings()): "embedding"}
    end_names = {name: ends[id(module)] for name, module in lm.named_modules() if id(module) in ends}
    layers = {
        name: module for name, module in lm.named_modules() if isinstance(module, nn.Linear) and id(module) not in ends
    }
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    if not layers:
        raise InputError(f"model.lora: {type(lm).__name__} has no linear layer that could get an adapter; set it null")
    for target in lora.target:
        for name, what in end_names.items():
            if _matches(name, target):
                raise InputError(
                    f"model.lora.target: {target} is the model's {what}. Models tie the two, and a merged adapter of "
                    f"one would then change the other too; take of {known}"
                )
        if not any(_matches(name, target) for name in layers):
            raise InputError(f"model.lora.target: the model has no linear layer {target}; it has {known}")
    chosen = [name for name in layers if not lora.target or any(_matches(name, target) for target in lora.target)]
    for name in chosen:
        if lora.rank > (most := min(layers[name].in_features, layers[name].out_features)):
            raise InputError(
                f"model.lora.rank={lora.rank}: no matrix of the size of {name} has a rank above {most}; lower it"
            )
    return chosen


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def save_adapter(lm: Any, source: Path | str, target: Path, state: Mapping[str, Tensor]) -> None:
    """Write adapters to the folder `target` as peft reads them. state: whole tensors, by the names of
    `adapter_weights`. source: the model that they belong to, as resolved."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy(lm.peft_config[ADAPTER])
    settings.base_model_name_or_path = str(source)
    settings.target_modules = sorted(settings.target_modules)  # a set is written in another order each time
    settings.save_pretrained(target)
