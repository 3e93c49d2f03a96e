"""All engines as the one that vLLM's trainer side talks to, with a deadline on every answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.waiting import Actor
from actors.weight_transfer.failures import EngineFailure, SyncFailedError
from actors.weight_transfer.ledger import EngineRecord

# What engines may still say after one of them failed. One that loses its connection to a dead engine may be the first.
LINGER_S = 1.0


class EngineFleet:
    """vLLM's `VLLMWeightSyncClient` over independent engines, each an actor with `width` workers.

    In a group of processes the learner is rank 0, and the workers of engine i begin at rank 1 + i * width. (vLLM's own
    client for Ray tells every engine the same rank.) Whatever thread of vLLM makes a call, `failed` is set as soon as
    one engine fails in it, and `failures` and `cut` say more.
    """

    def __init__(self, engines: Sequence[Actor], width: int, limit_s: float) -> None:
        """limit_s: of each call, for all engines together."""
        self.engines, self.width, self.limit_s = list(engines), width, limit_s
        self.policy_version = 0
        self.failed = threading.Event()
        self.failures: list[EngineFailure] = []
        self.cut: set[int] = set()
        self.records: dict[int, EngineRecord] = {}
        self._in_session: set[int] = set()
        self._num_calls = 0  # that are being waited for now
        self._last_answer = time.monotonic()

    @property
    def world_size(self) -> int:
        """Processes of a group of rank 0 of the learner and all workers."""
        return 1 + len(self.engines) * self.width

    def begin(self, policy_version: int) -> None:
        """A new session; the version is what engines serve as after it."""
        self.policy_version, self.records = policy_version, {}
        self._last_answer = time.monotonic()

    def idle_s(self) -> float:
        """Seconds for which no engine has been asked for anything."""
        return 0.0 if self._num_calls else time.monotonic() - self._last_answer

    def find_dead(self, limit_s: float) -> bool:
        """Whether some engine does not answer within limit_s; `failures` names each.

        A learner whose connection to an engine breaks may know of it long before Ray does.
        """
        waiting = {engine.ready.remote(): index for index, engine in enumerate(self.engines)}
        began = time.monotonic()
        answered, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=limit_s)
        failures = [EngineFailure(waiting[reply], "answer", limit_s, "hung", limit_s=limit_s) for reply in late]
        for reply in answered:
            try:
                ray.get(reply)
            except RayError as error:
                took = time.monotonic() - began
                failures.append(EngineFailure.of(waiting[reply], "take weights", took, error, limit_s))
        if failures:
            with suppress(SyncFailedError):
                self._fail(failures, set())
        return bool(failures)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def join(index: int, engine: Actor) -> Any:
            offset = {"rank_offset": 1 + index * self.width} if "rank_offset" in init_info else {}
            return engine.init_weight_transfer_engine.remote(init_info | offset)

        self._ask("join the learner's group", join)

    def start_weight_update(self) -> None:
        self._in_session = set(range(len(self.engines)))
        self._ask("start a weight update", lambda _, engine: engine.start_weight_update.remote())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._ask("take weights", lambda _, engine: engine.receive_weights.remote(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.policy_version
        self.records = self._ask(
            "finish its weight update", lambda _, e: e.finish_weight_update.remote(version), last=True
        )

    def _ask(self, doing: str, call: Callable[[int, Actor], Any], *, last: bool = False) -> dict[int, Any]:
        """Every engine's answer, by index. Raises SyncFailedError soon after the first that fails, or at the deadline.

        last: whether an engine that answers has ended its session.
        """
        began = time.monotonic()
        deadline = began + self.limit_s
        waiting = {call(index, engine): index for index, engine in enumerate(self.engines)}
        answers: dict[int, Any] = {}
        failures: list[EngineFailure] = []
        self._num_calls += 1
        try:
            while waiting:
                left = max(0.0, deadline - time.monotonic())
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
                took = time.monotonic() - began
                if not done:
                    break
                index = waiting.pop(done[0])
                try:
                    answers[index] = ray.get(done[0])
                except RayError as error:
                    failures.append(EngineFailure.of(index, doing, took, error, self.limit_s))
                    deadline = min(deadline, time.monotonic() + LINGER_S)
                else:
                    if last:
                        self._in_session.discard(index)
            if waiting and not failures:
                took = time.monotonic() - began
                failures = [EngineFailure(i, doing, took, "hung", limit_s=self.limit_s) for i in waiting.values()]
            if failures:
                self._fail(failures, set(waiting.values()))
        finally:
            self._num_calls -= 1
            self._last_answer = time.monotonic()
        return answers

    def _fail(self, failures: list[EngineFailure], unanswered: set[int]) -> None:
        # Where one died, others fail because it did.
        causes = [failure for failure in failures if failure.how == "died"] or failures
        unanswered |= {failure.index for failure in failures}
        self.failures += causes
        # An engine that has not answered may wait for the failed one without end, and vLLM does not begin a session
        # before it has ended the last.
        self.cut |= (unanswered | self._in_session) - {failure.index for failure in causes}
        self.failed.set()
        raise SyncFailedError(causes, self.cut)
