"""A backend for vLLM's weight-transfer registry that takes weights from the Ray object store.

It needs no GPU and no process group between learner and engine, so it works on a laptop, across nodes, and for any
number of engines: every node fetches each chunk once, and its engines map the same memory. The actor resolves the
references. The engine here gets host bytes: views of the store in the actor's own process, or of a segment of shared
memory in vLLM's worker processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.weight_transfer.packing import PackedTensor, unpack_tensor
from actors.weight_transfer.segment import PlacedChunk, SegmentReader

BACKEND = "object_store"


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Empty: learner and engine have nothing to agree on beforehand."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One chunk, of full tensors under their Hugging Face names: by value, or by its place in memory."""

    tensors: list[PackedTensor] = field(default_factory=list)
    placed: PlacedChunk | None = None


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """The worker side. A session is start_weight_update, any number of update_weights, finish_weight_update.

    When update_weights returns, nothing here refers to the chunk's memory any more.
    """

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._segment = SegmentReader()

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        # Layers drop their weights after packing them for the CPU kernels, so they must be rebuilt, not copied into.
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class's method would synchronize an accelerator, which a CPU machine does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        tensors = update_info.tensors if update_info.placed is None else self._segment.read(update_info.placed)
        self.model.load_weights((p.name, unpack_tensor(p).to(self.device)) for p in tensors)
        if self.device.type == "cpu":
            keep_waiting_weights(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def shutdown(self) -> None:
        pass

    def _repack_tied_head(self) -> None:
        """Pack a tied LM head again from the embedding it shares.

        Layerwise reload processes the shared module as an embedding only. The CPU head would then keep multiplying by
        its *old* packed copy, which gives no error, only wrong log-probs.
        """
        head = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and head is not None and self._shares_its_weight(head):
            head.quant_method.process_weights_after_loading(head)

    def _shares_its_weight(self, head: torch.nn.Module) -> bool:
        # The configuration does not tell: vLLM sets tie_word_embeddings to False for a checkpoint that stores a head,
        # and leaves it so when the stored head equals the embedding and is tied to it after all.
        others = (module for module in self.model.modules() if module is not head)
        return any(getattr(module, "weight", None) is head.weight for module in others)


def keep_waiting_weights(model: torch.nn.Module) -> None:
    """Copy what the model's layers were handed and have not used yet, in the midst of a layerwise reload.

    A layer waits until it has all of its weights, such as q, k and v of one projection, and holds those that came,
    whose memory the next chunk takes over.
    """
    for layer in model.modules():
        for _, call in get_layerwise_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    call.arguments[name] = value.clone()
