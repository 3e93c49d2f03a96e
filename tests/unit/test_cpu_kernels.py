"""Packing for vLLM's CPU kernels, with its real methods and kernels and small layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

kernels = pytest.importorskip("actors.weight_transfer.cpu_kernels", reason="vLLM is not installed")


def linear(*, bias: bool = False, packed: bool = True, seed: int = 0) -> Any:
    """A layer as vLLM makes one, 64 to 32; packed: as it is after its first load."""
    layer = nn.Module()
    generator = torch.Generator().manual_seed(seed)
    layer.register_parameter("weight", nn.Parameter(torch.randn(32, 64, generator=generator), requires_grad=False))
    layer.register_parameter("bias", nn.Parameter(torch.zeros(32), requires_grad=False) if bias else None)
    layer.quant_method = kernels.UnquantizedLinearMethod()
    if packed:
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def reload(layer: Any, seed: int) -> torch.Tensor:
    """What the reload does with a layer; returns its new weight."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)
    return weight


def product(layer: Any, vectors: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, vectors, layer.bias)


def test_layers_that_a_thread_packs_multiply_by_their_new_weights() -> None:
    layers, packer = [linear(seed=i) for i in range(20)], kernels.Packer()
    packer.take_over(layers)
    vectors = torch.randn(5, 64, generator=torch.Generator().manual_seed(99))
    for number in (100, 200):
        weights = [reload(layer, number + i) for i, layer in enumerate(layers)]
        assert all(layer.weight.numel() == 0 for layer in layers), "the reload copies what is kept, which is nothing"
        packer.wait()
        for layer, weight in zip(layers, weights, strict=True):
            torch.testing.assert_close(product(layer, vectors), vectors @ weight.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["with a bias", "not packed", "with another method", "without a method"])
def test_other_layers_are_left_to_vllm(kind: str) -> None:
    layer = linear(bias=kind == "with a bias", packed=kind != "not packed")
    if kind == "with another method":
        layer.quant_method = type("Other", (kernels.UnquantizedLinearMethod,), {})()
    if kind == "without a method":
        del layer.quant_method
    before = getattr(layer, "quant_method", None)
    kernels.Packer().take_over([layer])
    assert getattr(layer, "quant_method", None) is before


def test_what_fails_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, packer = linear(), kernels.Packer()
    packer.take_over([layer])

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory for the packed weight")

    monkeypatch.setattr(kernels.UnquantizedLinearMethod, "process_weights_after_loading", fail)
    reload(layer, 1)
    with pytest.raises(RuntimeError, match="no memory for the packed weight"):
        packer.wait()
    packer.wait()  # nothing is left of it


def embedding(weight: nn.Parameter) -> Any:
    module = nn.Module()
    module.register_parameter("weight", weight)
    module.quant_method = kernels.UnquantizedEmbeddingMethod()
    module.quant_method.process_weights_after_loading(module)
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_found_with_its_embedding(tied: bool) -> None:
    model = nn.Module()
    weight = nn.Parameter(torch.randn(16, 8), requires_grad=False)
    model.embed_tokens = embedding(weight)
    model.lm_head = embedding(weight if tied else nn.Parameter(weight.clone(), requires_grad=False))
    found = kernels.tied_head(model)
    assert found == ((model.lm_head, model.embed_tokens) if tied else (None, None))
    assert kernels.tied_head(nn.Linear(2, 2)) == (None, None)


def test_an_embedding_that_is_looked_up_only_has_no_packed_copy() -> None:
    module = embedding(nn.Parameter(torch.randn(16, 8), requires_grad=False))
    assert "cpu_linear" in module.__dict__, "vLLM packs every embedding"
    kernels.look_up_only(module)
    module.quant_method.process_weights_after_loading(module)
    assert "cpu_linear" not in module.__dict__
    ids = torch.tensor([3, 0])
    assert torch.equal(module.quant_method.embedding(module, ids), module.weight[ids])
