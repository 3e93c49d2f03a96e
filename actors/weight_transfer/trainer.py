"""The learner's end of vLLM's own weight transfer: its source of weights, and its trainer for each backend."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from typing import cast

import ray
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES
from vllm.plugins import load_general_plugins

from actors.weight_transfer.client import EngineFleet
from actors.weight_transfer.ledger import Ledger, WeightSummary
from actors.weight_transfer.sender import SessionSender, Trainer
from actors.weight_transfer.source import LearnerWeights


class LearnerSource(WeightSource):
    """`LearnerWeights` as vLLM's trainer side wants them. Under ZeRO-3 a pass is a collective, which all ranks end.

    records: whether passes are noted, for `summary`.
    """

    def __init__(self, weights: LearnerWeights, *, records: bool) -> None:
        self._weights, self._records = weights, records
        self._pass: Iterator[tuple[str, Tensor]] | None = None
        self._left = False
        self._ledger = Ledger()  # of the last pass that came to its end

    @property
    def summary(self) -> WeightSummary:
        """Of the last whole pass. Ask when the transfer has ended: sums of it run on the streams that it used."""
        return self._ledger.summary

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*described) for described in self._weights.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._left = False
        self._pass = self._whole_pass()
        return self._until_left(self._pass)

    def leave(self) -> None:
        """See `sender.Source`."""
        self._left = True

    def complete(self) -> None:
        """See `sender.Source`."""
        for _ in self._whole_pass() if self._pass is None else self._pass:
            pass

    def forget(self) -> None:
        """See `sender.Source`."""
        self._pass = None

    def _whole_pass(self) -> Iterator[tuple[str, Tensor]]:
        ledger = Ledger()
        for name, tensor in ledger.record(self._weights) if self._records else self._weights:
            # vLLM packs a bucket when it has collected it; a gathered tensor is gone by then.
            yield name, tensor.detach().clone() if self._weights.gathers else tensor.detach()
        self._ledger = ledger

    def _until_left(self, whole: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for named in whole:
            yield named
            if self._left:
                raise RuntimeError("the transfer was broken off")


def open_sender(source: LearnerSource, backend: str, rank: int, num_ranks: int) -> SessionSender:
    """This rank's part in sessions of the trainer side of `backend`, nccl or ipc."""
    load_general_plugins()  # those of other distributions may register in vLLM's factories

    def meet(fleet: EngineFleet) -> Trainer:
        info = _init_info(backend, rank, fleet.world_size, source.metadata())
        return cast(Trainer, WeightTransferTrainerFactory.trainer_init(info, client=fleet, source=source))

    # With ipc, ranks meet at every bucket, and rank 0 cannot pretend to send the rest.
    return SessionSender(source, meet, rank, others_can_leave=backend != "ipc" or num_ranks == 1)


def _init_info(backend: str, rank: int, world_size: int, weights: Sequence[ParamMeta]) -> TrainerInitInfo:
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # A tensor must fit the one buffer, and vLLM refuses when the session is under way.
        largest = max(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights)
        buffer_bytes = max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES)
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer_bytes)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    # Rank 0 opens the meeting place itself, when its engines come to it.
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(ray.util.get_node_ip_address(), port, world_size, packed=True, rank=rank)
