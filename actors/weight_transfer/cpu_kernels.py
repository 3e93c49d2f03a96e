"""What vLLM keeps of an unquantized model on a CPU, beside or instead of the weights: copies packed for its kernels.

A layerwise reload makes each layer anew: its weight is allocated, loaded, packed, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class Packer:
    """Packs linear layers in a thread, while the next ones are loaded."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "weight-packer")
        self._waiting: list[tuple[Any, SimpleNamespace, Future[None]]] = []
        self._method = _PackedByThread(self)

    def take_over(self, layers: Iterable[Any]) -> None:
        """Pack these layers from now on, those of them that keep nothing but the packed copy."""
        for layer in layers:
            if type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod and _keeps_only_packed(layer):
                layer.quant_method = self._method

    def pack(self, layer: Any) -> None:
        """Take the layer's weight from it; `wait` brings the packed one."""
        stand_in = SimpleNamespace(weight=layer.weight)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        self._waiting.append((layer, stand_in, self._thread.submit(self._method.pack_now, stand_in)))

    def wait(self) -> None:
        """Return when all layers have their packed copies. Raises what packing raised."""
        waiting, self._waiting = self._waiting, []
        for layer, stand_in, packed in waiting:
            packed.result()
            layer.cpu_linear = stand_in.cpu_linear


class _PackedByThread(UnquantizedLinearMethod):
    """vLLM's method of a layer, but for where it packs. Its choice of a kernel is vLLM's."""

    def __init__(self, packer: Packer) -> None:
        super().__init__()
        self._packer = packer

    def process_weights_after_loading(self, layer: Any) -> None:
        self._packer.pack(layer)

    @torch.no_grad()
    def pack_now(self, stand_in: SimpleNamespace) -> None:
        super().process_weights_after_loading(stand_in)


def _keeps_only_packed(layer: Any) -> bool:
    # Some kernels change the bias too, which the reload copies as soon as the layer is processed.
    return getattr(layer, "bias", None) is None and layer.weight.numel() == 0 and hasattr(layer, "cpu_linear")


def tied_head(model: nn.Module) -> tuple[Any, Any]:
    """The LM head that shares the weight of another module, and that module, the embedding; or twice None.

    The configuration does not tell: vLLM sets tie_word_embeddings to False for a checkpoint that stores a head, and
    leaves it so when the stored head equals the embedding and is tied to it after all.
    """
    head = getattr(model, "lm_head", None)
    for module in model.modules():
        if head is not None and module is not head and getattr(module, "weight", None) is head.weight:
            return head, module
    return None, None


def look_up_only(embedding: Any) -> None:
    """Have vLLM keep no packed copy of an embedding's weight for a product that its head does.

    vLLM packs every embedding, at the start and in each reload. `embedding` must not be a head itself.
    """
    if type(embedding.quant_method) is UnquantizedEmbeddingMethod:
        embedding.quant_method = _LookUpOnly()
        embedding.__dict__.pop("cpu_linear", None)


class _LookUpOnly(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass
