"""A backend for vLLM's weight-transfer registry that takes weights from the Ray object store.

It needs no GPU and no process group between learner and engine, so it works on a laptop, across nodes, and for any
number of engines: every node fetches each chunk once, and its engines map the same memory. The actor resolves the
references. The engine here gets host bytes: views of the store in the actor's own process, or of a segment of shared
memory in vLLM's worker processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer import WeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.weight_transfer.cpu_kernels import Packer, look_up_only, tied_head
from actors.weight_transfer.packing import PackedTensor, unpack_tensors
from actors.weight_transfer.segment import PlacedChunk, SegmentReader
from dphrl.processors import usable_cpus

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
        self._layers = list(self.model.modules())
        self._packer = Packer()
        self._tied_head: Any = None

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        # To be found now: a reload has the head and the embedding hold their weights apart.
        if self.device.type == "cpu":
            self._tied_head, embedding = tied_head(self.model)
            if embedding is not None:
                look_up_only(embedding)
            # Where this worker has a second core, which a thread can pack on.
            if usable_cpus() > self.parallel_config.world_size:
                self._packer.take_over(self._layers)
        # Layers drop their weights after packing them for the CPU kernels, so they must be rebuilt, not copied into.
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class's method would synchronize an accelerator, which a CPU machine does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        tensors = update_info.tensors if update_info.placed is None else self._segment.read(update_info.placed)
        # From host memory, on a GPU too, as a checkpoint's files are loaded.
        self.model.load_weights(unpack_tensors(tensors))
        keep_waiting_weights(self._layers)
        self._packer.wait()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._packer.wait()
        self._repack_tied_head()

    def shutdown(self) -> None:
        pass

    def _repack_tied_head(self) -> None:
        """Pack a tied LM head again from the embedding it shares.

        Layerwise reload processes the shared weight as the embedding's only. The CPU head would then keep multiplying
        by its *old* packed copy, which gives no error, only wrong log-probs.
        """
        if self._tied_head is not None:
            self._tied_head.quant_method.process_weights_after_loading(self._tied_head)


def keep_waiting_weights(layers: Iterable[nn.Module]) -> None:
    """Copy what these layers were handed and have not used yet, in the midst of a layerwise reload.

    A layer waits until it has all of its weights, such as q, k and v of one projection, and holds those that came,
    whose memory the next chunk takes over.
    """
    for layer in layers:
        for _, call in get_layerwise_info(layer).loaded_weights:
            for name, value in call.arguments.items():
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    call.arguments[name] = value.clone()
