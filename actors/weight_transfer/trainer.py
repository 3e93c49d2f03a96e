"""The learner's end of vLLM's own weight transfer: one rank's part in each session, never without end."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.plugins import load_general_plugins

from actors.waiting import Actor
from actors.weight_transfer.client import EngineFleet
from actors.weight_transfer.failures import SendOutcome, SyncFailedError
from actors.weight_transfer.ledger import Ledger, WeightSummary
from actors.weight_transfer.source import LearnerWeights

log = logging.getLogger(__name__)

# What a transfer that is broken off gets to come back, and an engine that broke it to be told apart.
GRACE_S = 4.0
POLL_S = 0.05


class LearnerSource(WeightSource):
    """`LearnerWeights` as vLLM's trainer side wants them. Under ZeRO-3 a pass is a collective, which all ranks end.

    records: whether passes are noted in `summary`, which is that of the last pass.
    """

    def __init__(self, weights: LearnerWeights, *, records: bool) -> None:
        self._weights, self._records = weights, records
        self._pass: Iterator[tuple[str, Tensor]] | None = None
        self.summary = WeightSummary()

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*described) for described in self._weights.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._whole_pass()
        return self._pass

    def complete(self) -> None:
        """End the pass that was begun, or make one, since the other ranks are in it and cannot leave it before."""
        for _ in iter(self) if self._pass is None else self._pass:
            pass
        self._pass = None

    def forget(self) -> None:
        """The next pass is a new one."""
        self._pass = None

    def _whole_pass(self) -> Iterator[tuple[str, Tensor]]:
        ledger = Ledger()
        for name, tensor in ledger.record(self._weights) if self._records else self._weights:
            # vLLM packs a bucket when it has collected it; a gathered tensor is gone by then.
            yield name, tensor.detach().clone() if self._weights.gathers else tensor.detach()
        self.summary = ledger.summary


class TrainerSide:
    """One learner rank's part in sessions with all engines. Calls are collective: every rank makes them, in step.

    Rank 0 asks the engines and sends; the others take part in gathering, and for ipc in handing over. Rank 0 keeps the
    group with the engines until one of them changes or a session fails.
    """

    def __init__(self, weights: LearnerWeights, backend: str, rank: int, num_ranks: int) -> None:
        load_general_plugins()  # other backends, and this program's own, register themselves there
        self._backend, self._rank, self._num_ranks = backend, rank, num_ranks
        self._source = LearnerSource(weights, records=rank == 0)
        self._fleet = EngineFleet((), 1, 0.0)
        self._trainer: Any = None

    @property
    def sent(self) -> WeightSummary:
        """What the last session sent, on rank 0."""
        return self._source.summary

    def send(self, engines: Sequence[Actor], width: int, policy_version: int, limit_s: float) -> SendOutcome:
        """One session with all engines. width: workers of each. limit_s: of each of its steps.

        Returns the engines' records, or the failures of engines after which the learner can go on; other ranks than 0
        return nothing. Raises RuntimeError when the learner itself failed or cannot go on.
        """
        self._source.forget()
        if self._rank != 0:
            if self._trainer is None:
                self._trainer = self._meet(EngineFleet(engines, width, limit_s))
            self._trainer.send_weights()
            return SendOutcome()
        if self._trainer is None or self._fleet.engines != list(engines):
            self._leave()
            self._fleet = EngineFleet(engines, width, limit_s)
            meeting = _Job(lambda: self._meet(self._fleet))
            if not self._wait_for(meeting):
                # The group is not there yet, so nothing can be broken off. Whoever still waits in `meeting` waits for
                # processes that will be ended, in a thread that nothing else needs.
                return self._after_failure(meeting)
            self._trainer = meeting.result
        self._fleet.begin(policy_version)
        sending = _Job(self._trainer.send_weights)
        if self._wait_for(sending):
            return SendOutcome(tuple(self._fleet.records[i] for i in range(len(engines))))
        self._leave()
        sending.ended.wait(GRACE_S)
        return self._after_failure(sending, sent=True)

    def _meet(self, fleet: EngineFleet) -> Any:
        return WeightTransferTrainerFactory.trainer_init(
            self._init_info(fleet.world_size), client=fleet, source=self._source
        )

    def _init_info(self, world_size: int) -> TrainerInitInfo:
        if self._backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=self._rank, packed=True)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return NCCLTrainerInitInfo(ray.util.get_node_ip_address(), port, world_size, packed=True, rank=self._rank)

    def _leave(self) -> None:
        """Give up the group. For nccl this breaks off what the learner waits for in it, within seconds."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.shutdown()

    def _wait_for(self, job: _Job) -> bool:
        """Whether `job` came to a good end; False as soon as an engine failed, or when nothing happens any more."""
        while not job.ended.wait(POLL_S):
            if self._fleet.failed.is_set() or self._fleet.idle_s() > self._fleet.limit_s:
                return False
        return job.error is None and not self._fleet.failed.is_set()

    def _after_failure(self, job: _Job, *, sent: bool = False) -> SendOutcome:
        fleet = self._fleet
        # What fails first may be the learner's own end of a connection, before Ray tells that the other end died.
        if not fleet.failed.wait(GRACE_S if job.ended.is_set() else 0.0):
            if job.error is not None:
                raise RuntimeError(f"the learner failed to send its weights: {job.error}") from job.error
            raise RuntimeError(f"the learner was still sending its weights after {fleet.limit_s:g} s (sync.timeout_s)")
        stuck = ""
        if sent and not job.ended.is_set():
            stuck = "the learner is stuck in that transfer"
        elif self._backend == "ipc" and self._num_ranks > 1:
            stuck = "the learner's other ranks wait in the middle of that transfer"
        if stuck:
            told = SyncFailedError(fleet.failures)
            raise RuntimeError(f"{told}; {stuck}, so the run stops. --resume goes on from the last checkpoint")
        self._source.complete()
        return SendOutcome(failures=tuple(fleet.failures), cut=tuple(sorted(fleet.cut)))


class _Job:
    """Work in a thread of its own, which is left behind when it does not end."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.ended = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        # A thread begins on the first GPU whatever this one is on.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        threading.Thread(target=self._run, name="weight-transfer", daemon=True).start()

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self.result = self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()
