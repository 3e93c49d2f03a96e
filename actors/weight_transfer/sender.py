"""One learner rank's part in a session that the learner runs itself, never without end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from actors.waiting import Actor
from actors.weight_transfer.client import EngineFleet
from actors.weight_transfer.failures import SendOutcome, SyncFailedError

# What a transfer that is broken off gets to come back, and Ray to tell that an engine died.
GRACE_S = 4.0
# In which an engine must say that it is there, before a session that broke is the learner's own fault.
ANSWER_S = 10.0
POLL_S = 0.05


class Trainer(Protocol):
    """A group with the engines, of vLLM's `TrainerWeightTransferEngine`."""

    def send_weights(self) -> None:
        """One session. Every rank calls it; only rank 0 asks the engines."""
        ...

    def shutdown(self) -> None:
        """Leave the group, and break off what waits in it."""
        ...


class Source(Protocol):
    """The weights that a trainer sends; one pass over them is a collective of the learner's ranks."""

    def forget(self) -> None:
        """The next pass is a new one."""
        ...

    def leave(self) -> None:
        """Have whoever sends the present pass stop at the next tensor: a group that was left sends nothing, but would
        go on gathering."""
        ...

    def complete(self) -> None:
        """End the pass that was begun, or make one, since the other ranks are in it and cannot leave it before."""
        ...


class SessionSender:
    """One learner rank's part in sessions with all engines. Calls are collective: every rank makes them, in step.

    Rank 0 asks the engines and sends; the others take part in gathering, and for ipc in handing over. The group with
    the engines is kept until one of them changes or a session fails.
    """

    def __init__(
        self, source: Source, meet: Callable[[EngineFleet], Trainer], rank: int, *, others_can_leave: bool
    ) -> None:
        """meet: forms the group; it returns when all engines are in it. others_can_leave: whether the other ranks come
        to the end of a session that broke off, once `source` completes its pass."""
        self._source, self._meet, self._rank, self._others_can_leave = source, meet, rank, others_can_leave
        self._fleet = EngineFleet((), 1, 0.0)
        self._trainer: Trainer | None = None

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
            self._fleet = fleet = EngineFleet(engines, width, limit_s)
            meeting = _Job(lambda: self._meet(fleet))
            if not self._comes_to_a_good_end(meeting):
                # Who still waits in `meeting` waits for engines that failed, in a thread that nothing else needs.
                return self._after_failure(meeting, can_be_left=True)
            self._trainer = meeting.result
        assert self._trainer is not None
        self._fleet.begin(policy_version)
        sending = _Job(self._trainer.send_weights)
        if self._comes_to_a_good_end(sending):
            return SendOutcome(tuple(self._fleet.records[i] for i in range(len(engines))))
        self._source.leave()
        self._leave()
        sending.ended.wait(GRACE_S)
        return self._after_failure(sending, can_be_left=False)

    def _leave(self) -> None:
        """Give up the group, which within seconds breaks off what the learner waits for in it."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.shutdown()

    def _comes_to_a_good_end(self, job: _Job) -> bool:
        """Waits; False as soon as an engine failed, or when nothing has happened for as long as a step may take."""
        while not job.ended.wait(POLL_S):
            if self._fleet.failed.is_set() or self._fleet.idle_s() > self._fleet.limit_s:
                return False
        return job.error is None and not self._fleet.failed.is_set()

    def _after_failure(self, job: _Job, *, can_be_left: bool) -> SendOutcome:
        fleet = self._fleet
        # What fails first may be the learner's own end of a connection, before Ray tells that the other end died.
        if not fleet.failed.wait(GRACE_S if job.ended.is_set() else 0.0) and not fleet.find_dead(ANSWER_S):
            if job.error is not None:
                raise RuntimeError(f"the learner failed to send its weights: {job.error}") from job.error
            raise RuntimeError(
                f"the learner was still at sending its weights {fleet.limit_s:g} s (sync.timeout_s) after all engines "
                "had answered"
            )
        stuck = ""
        if not (can_be_left or job.ended.is_set()):
            stuck = "the learner is stuck in that transfer"
        elif not self._others_can_leave:
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
            self.error = error  # whatever it is, the thread that waits must learn of it
        finally:
            self.ended.set()
