"""What every worker of an engine adds to vLLM's own: it keeps a record of the weights that each sync brought.

vLLM mixes `RecordingWorker` into its worker class by name (`worker_extension_cls`), in the engine's process or in those
of a tensor-parallel engine. The record is taken where every backend must pass, at the model's `load_weights`, so it
holds for ours and vLLM's alike.

vLLM itself lets an incomplete sync pass: its layerwise reload only warns about a layer that got nothing, and puts the
old tensors back; a layer that got a part is processed with whatever memory holds in the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actors.weight_transfer.ledger import Ledger, WorkerRecord

# Of a head so many values are compared with what it multiplies by, in whole columns: all of a small head, and enough of
# a large one. An update at lr 1e-6 changed one value in 170 of a small embedding in bfloat16, and all in float32.
NUM_HEAD_VALUES = 2**18
MIN_HEAD_COLUMNS = 4


class RecordingWorker:
    """Methods for `LLM.collective_rpc`. Call `watch_weight_updates` once, as soon as the engine is up."""

    def watch_weight_updates(self) -> None:
        """Keep a record of every weight update from now on."""
        self._weight_watch = WeightWatch(self.weight_transfer_engine)  # type: ignore[attr-defined]

    def weight_update_record(self) -> WorkerRecord:
        """What the last finished update brought to this worker. Raises RuntimeError when none was watched."""
        watch: WeightWatch | None = getattr(self, "_weight_watch", None)
        if watch is None or watch.record is None:
            raise RuntimeError("no weight update was watched to its end; call watch_weight_updates before the first")
        return watch.record


class WeightWatch:
    """Stands around a worker's weight-transfer engine and its model, and notes what passes.

    engine: vLLM's `WeightTransferEngine` of any backend; its start, its finish and its model's `load_weights` are
    replaced on the instance by ones that note and then do the same.
    """

    def __init__(self, engine: Any) -> None:
        self.model: nn.Module = engine.model
        self.record: WorkerRecord | None = None
        # While vLLM reloads, a tied parameter is two, so the names are taken before.
        self._names = [name for name, _ in self.model.named_parameters()]
        every_name = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._aliases = every_name.difference(self._names)
        self._ledger, self._loaded, self._names_known = Ledger(), set[str](), True
        self._start, self._finish, self._load = (
            engine.start_weight_update,
            engine.finish_weight_update,
            self.model.load_weights,
        )
        engine.start_weight_update, engine.finish_weight_update = self._start_noting, self._finish_noting
        self.model.load_weights = self._load_noting

    def _start_noting(self) -> None:
        self.record = None
        self._ledger, self._loaded, self._names_known = Ledger(), set(), True
        self._start()

    def _load_noting(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **options: Any) -> set[str] | None:
        loaded = self._load(self._ledger.record(weights), *args, **options)
        # Most models tell what they loaded; of the others the layers tell how much of them is missing.
        self._loaded |= loaded or set()
        self._names_known &= loaded is not None
        return loaded

    def _finish_noting(self) -> None:
        # Finishing forgets what the layers still wait for.
        unloaded = unloaded_parameters(self.model, self._aliases)
        if self._names_known:
            unloaded += [name for name in self._names if name not in self._loaded]
        self._finish()
        self.record = WorkerRecord(self._ledger.summary, tuple(dict.fromkeys(unloaded)), tuple(stale_heads(self.model)))


def unloaded_parameters(model: nn.Module, aliases: Collection[str]) -> list[str]:
    """Names of the parameters in layers that still wait for elements, in the midst of a layerwise reload.

    A layer that got all is done and waits no more. What no checkpoint brings is left out: buffers, the scales of
    attention layers, the padding of a vocabulary, and `aliases`, the further names of tied parameters.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    names: list[str] = []
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer):
            continue
        sizes = {f"{prefix}.{name}" if prefix else name: size for name, size in _loadable(layer)}
        needed = {name: size for name, size in sizes.items() if name not in aliases}
        if info.load_numel < sum(needed.values()):
            names += needed
    return names


def _loadable(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and number of elements that a checkpoint brings, of each parameter of this layer alone."""
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    shard = getattr(layer, "shard_indices", None)
    for name, parameter in layer.named_parameters(recurse=False):
        if name in SKIP_LOAD_TENSORS:
            continue
        size = get_tensor_load_numel(parameter)
        if shard is not None and getattr(parameter, "output_dim", None) == 0:
            # An embedding's rows beyond the vocabulary are padding, and a worker may have nothing else.
            size = size // parameter.shape[0] * shard.num_org_elements
        yield name, size


def stale_heads(model: nn.Module) -> list[str]:
    """Names of the weights of heads that multiply by other values than those they hold.

    vLLM's CPU kernels multiply by a packed copy. A layerwise reload processes a tied weight with its embedding only, so
    the head would keep its old copy. Multiplying a vector that is 1 in one place and 0 elsewhere gives a column of the
    copy to the bit in every type.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    names = []
    for prefix, head in model.named_modules():
        weight = getattr(head, "weight", None)
        if not isinstance(head, ParallelLMHead) or not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            continue
        if isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dim() == 2:
            num_columns = min(weight.shape[1], max(MIN_HEAD_COLUMNS, NUM_HEAD_VALUES // weight.shape[0]))
            places = torch.arange(num_columns) * weight.shape[1] // num_columns
            units = torch.zeros(num_columns, weight.shape[1], dtype=weight.dtype)
            units[torch.arange(num_columns), places] = 1
            with torch.no_grad():
                used = head.quant_method.apply(head, units)
            if not torch.equal(used, weight[:, places].T):
                names.append(f"{prefix}.weight")
    return names
