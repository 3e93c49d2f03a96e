"""vLLM's nccl backend with gloo in the place of NCCL, so that sessions can be run, and broken, without a GPU.

It stands in both of vLLM's registries under the name `nccl`. So everything but the wire is the real thing: vLLM's own
`send_weights` with its threads, the infos with rank offset and world size, our client, our learner, our engines. vLLM
loads it in each of its processes, and the learner's ranks load it too, as a plugin that `install` puts on their path.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

NAME = "gloo_transfer"
# So that even a tiny model takes several; a real one is 1 GiB.
BUCKET_BYTES = 2**19
# A tensor arrives in one message, so this is how often an abort is looked for.
POLL_S = 0.002
# Of what is left in a group that was broken off. Until then the end of its object would wait for it, so it is kept.
TIMEOUT = timedelta(seconds=10)
_broken_off: list[Any] = []


def install(folder: Path) -> Path:
    """Make a distribution of this module in `folder`, with vLLM's entry point; it works where that is on the path."""
    (folder / f"{NAME}.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    about = folder / f"{NAME}-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{NAME} = {NAME}:register\n", encoding="utf-8")
    return folder


def wait_for_the_rest() -> None:
    """Until all that was broken off in this process has ended; an interpreter that ends before that is aborted."""
    for thread in threading.enumerate():
        if thread.name in {"weight-transfer", "engine"}:
            thread.join(2 * TIMEOUT.total_seconds())
    _broken_off.clear()


def register() -> None:
    """Take the place of `nccl` in this process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory

    for factory, make in ((WeightTransferEngineFactory, engine_class), (WeightTransferTrainerFactory, trainer_class)):
        factory._registry["nccl"] = make


class GlooGroup:
    """What vLLM's nccl backend uses of `PyNcclCommunicator`: broadcast, and destroy, which also breaks off."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        store = torch.distributed.TCPStore(
            host, port, world_size, is_master=rank == 0, timeout=TIMEOUT, wait_for_workers=False
        )
        self._group = torch.distributed.ProcessGroupGloo(store, rank, world_size, TIMEOUT)
        self._store = store
        self._broken_off = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = src
        work = self._group.broadcast([tensor], options)
        while not work.is_completed():
            if self._broken_off.is_set():
                raise RuntimeError("the group was destroyed during a broadcast")
            time.sleep(POLL_S)
        work.wait()

    def destroy(self) -> None:
        _broken_off.append(self._group)
        self._broken_off.set()


def engine_class() -> type:
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    from actors.weight_transfer.object_store import ObjectStoreWeightTransferEngine

    class GlooWeightTransferEngine(ObjectStoreWeightTransferEngine):
        """Receives like the nccl backend; starts and finishes like ours, because a CPU packs its weights."""

        init_info_cls = NCCLWeightTransferInitInfo
        update_info_cls = NCCLWeightTransferUpdateInfo
        group: GlooGroup | None = None

        def init_transfer_engine(self, init_info: Any) -> None:
            rank = self.parallel_config.rank + init_info.rank_offset
            self.group = GlooGroup(init_info.master_address, init_info.master_port, rank, init_info.world_size)

        def receive_weights(self, update_info: Any) -> None:
            described = [
                (name, getattr(torch, dtype), shape)
                for name, dtype, shape in zip(
                    update_info.names, update_info.dtype_names, update_info.shapes, strict=True
                )
            ]
            assert self.group is not None
            for bucket in buckets(described):
                tensors = [torch.empty(shape, dtype=dtype) for _, dtype, shape in bucket]
                packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
                self.group.broadcast(packed, src=0)
                parts = packed.split([tensor.nbytes for tensor in tensors])
                self.model.load_weights(
                    (name, part.view(dtype).view(shape))
                    for (name, dtype, shape), part in zip(bucket, parts, strict=True)
                )

        def shutdown(self) -> None:
            if self.group is not None:
                self.group.destroy()
                self.group = None

    return GlooWeightTransferEngine


def trainer_class() -> type:
    from unittest.mock import patch

    from vllm.distributed.weight_transfer import nccl_engine

    def open_endpoint(init_info: Any, rank: int = 0) -> GlooGroup:
        return GlooGroup(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    class GlooTrainerWeightTransferEngine(nccl_engine.NCCLTrainerWeightTransferEngine):
        """vLLM's own trainer side; only the group and the packing, which needs CUDA's streams, are others."""

        @classmethod
        def trainer_init(cls, *args: Any, **options: Any) -> Any:
            with patch.object(nccl_engine, "open_trainer_endpoint", open_endpoint):
                return super().trainer_init(*args, **options)

        def _broadcast(self, source: Any, meta: Any) -> None:
            if not self.is_sender:
                for _ in source:
                    pass
                return
            pairs = self._checked_iter(source, meta)
            # Like vLLM's packing, it reads a bucket's tensors only when all of them are there.
            for bucket in buckets([(m.name, m.dtype, m.shape) for m in meta]):
                tensors = [next(pairs)[1] for _ in bucket]
                packed = torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])
                self.model_update_group.broadcast(packed, src=0)
            assert next(pairs, None) is None

    return GlooTrainerWeightTransferEngine


def buckets(described: list[tuple[str, torch.dtype, Any]]) -> Iterator[list[tuple[str, torch.dtype, Any]]]:
    """The same on both sides: tensors in order, each bucket ended by the one that fills it."""
    bucket, num_bytes = [], 0
    for name, dtype, shape in described:
        bucket.append((name, dtype, shape))
        num_bytes += dtype.itemsize * int(torch.Size(shape).numel())
        if num_bytes > BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
    if bucket:
        yield bucket


def break_once(worker: Any, method: str, how: str, seconds: float) -> int:
    """Have the next call of that method of a worker's transfer engine raise, or wait first, on the last worker alone.

    `collective_rpc` runs it; the pid is that of the worker.
    """
    import os

    engine = worker.weight_transfer_engine
    if worker.rank == worker.parallel_config.world_size - 1:
        original = getattr(engine, method)

        def broken(*args: Any, **options: Any) -> Any:
            setattr(engine, method, original)
            if how == "raises":
                raise ValueError("a fault made for the test")
            if how == "dies":
                os._exit(9)
            time.sleep(seconds)
            return original(*args, **options)

        setattr(engine, method, broken)
    return os.getpid()
