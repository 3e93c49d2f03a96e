"""The parts of the script: what each needs, how long it may take, and which function it is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

Figures = dict[str, float | str]


@dataclass(frozen=True)
class Part:
    """place: `module:function`. The function gets True for tiny sizes, raises AssertionError when something is wrong,
    and returns the figures to print. needs: packages beside torch and transformers. num_gpus: without --small."""

    name: str
    place: str
    needs: tuple[str, ...] = ()
    num_gpus: int = 1
    limit_s: float = 60.0

    def run(self, small: bool) -> Figures:
        module, _, function = self.place.partition(":")
        run: Callable[[bool], Figures] = getattr(importlib.import_module(module), function)
        return run(small)


_TORCH, _SYSTEM = "tests.gpu.torch_parts", "tests.gpu.system_parts"
# What the learner's modules need beside torch and transformers, and the whole system.
_LEARNER = ("pydantic",)
_ALL = ("pydantic", "ray", "vllm", "deepspeed")

PARTS = {
    part.name: part
    for part in [
        Part("head", f"{_TORCH}:head"),
        Part("checksum", f"{_TORCH}:checksum"),
        Part("fused-adamw", f"{_TORCH}:fused_adamw"),
        Part("mask", f"{_TORCH}:mask", _LEARNER),
        Part("update", f"{_TORCH}:update", _LEARNER),
        Part("deterministic", f"{_TORCH}:deterministic", _LEARNER),
        Part("colocated", f"{_SYSTEM}:colocated", _ALL, limit_s=120),
        Part("ipc", f"{_SYSTEM}:colocated_ipc", _ALL, limit_s=120),
        Part("float32", f"{_SYSTEM}:colocated_float32", _ALL, limit_s=120),
        Part("lora", f"{_SYSTEM}:lora", (*_ALL, "peft"), limit_s=120),
        Part("offload", f"{_SYSTEM}:offload", _ALL, limit_s=120),
        Part("seeds", f"{_SYSTEM}:seeds", _ALL, limit_s=180),
        Part("nccl", f"{_SYSTEM}:nccl", _ALL, num_gpus=2, limit_s=120),
        Part("nccl-wide", f"{_SYSTEM}:nccl_wide", _ALL, num_gpus=4, limit_s=180),
    ]
}


def missing(part: Part, *, small: bool) -> str:
    """Why this machine cannot run the part; empty when it can."""
    import torch

    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    count = torch.cuda.device_count()
    on_cpu = small and part.place.startswith(_TORCH)
    return "" if on_cpu or count >= part.num_gpus else f"needs {part.num_gpus} GPUs, has {count}"
