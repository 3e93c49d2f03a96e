"""What our backend relies on in vLLM's layerwise reload, with the real one and a layer of two parameters."""

from __future__ import annotations

import numpy as np
import torch


def test_what_layers_wait_with_is_copied_out_of_the_chunk() -> None:
    """The real layerwise reload holds q until k and v have come; by then the segment has the next chunk."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        get_layerwise_info,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    from actors.weight_transfer.object_store import keep_waiting_weights

    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    layer = model[0]
    layer.register_parameter("other", torch.nn.Parameter(torch.zeros(4)))

    def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        param.data.copy_(loaded_weight)

    for parameter in layer.parameters():
        parameter.weight_loader = load
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    memory = np.ones(6, np.float32)
    layer.weight.weight_loader(layer.weight, torch.from_numpy(memory).reshape(2, 3))
    assert len(get_layerwise_info(layer).loaded_weights) == 1
    keep_waiting_weights(model.modules())
    memory[:] = 9  # the next chunk
    layer.other.weight_loader(layer.other, torch.full((4,), 5.0))
    assert torch.equal(layer.weight, torch.ones(2, 3))
    assert torch.equal(layer.other, torch.full((4,), 5.0))
