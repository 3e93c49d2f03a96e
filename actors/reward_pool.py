"""The loop's `RewardPool` over Ray actors."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import ray

from actors.last_words import keep, last_words
from actors.waiting import Actor, limited, within
from actors.watched import log_stack
from dphrl.config.schema import Config
from dphrl.rewards.base import graded_pair
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

log = logging.getLogger(__name__)

# Time for a reward worker to start again, or to notice by itself that an item is over time.
WORKER_GRACE_S = 60.0
# How often a worker that is down is asked whether it is back: within that time, and after it.
ASK_S, ASK_LATER_S = 0.2, 5.0
# Items per call: enough to make the overhead small, and few enough that all workers get a part of a large batch.
MAX_BATCH = 32
Pair = tuple[str, str]


class WorkerStarter(Protocol):
    """Whoever makes the actors of reward workers."""

    async def start_worker(self) -> Actor:
        """Returns another one once it is up, in a place of its own. Raises whatever its start raises."""
        ...

    async def end_worker(self, worker: Actor) -> None:
        """End it, dead or alive, and free what it held."""
        ...


class RayRewardPool:
    """`protocols.RewardPool` over reward workers.

    Lifecycle: workers live as long as their placement group. Ray restarts a worker that dies, and the pool kills a
    worker that gives no verdict in time. One that stays away, as when its node is gone, is replaced. Capacity: each
    worker has one batch at a time. Batches wait here, so that a deadline covers the work and not the queue. An item
    with an infrastructure error is graded again alone, on another worker if there is one. A worker that is down gets
    work again once it answers, whenever that is.
    """

    def __init__(self, workers: Sequence[Actor], config: Config, starter: WorkerStarter | None = None) -> None:
        """starter: None where nobody can start workers; then one that stays away is only waited for."""
        self._starter = starter
        self.workers, self.config = dict(enumerate(workers)), config.reward
        self.num_retries, self.timeout_s = config.reward.num_retries, config.reward.timeout_s
        self._num_ever = len(workers)
        self._idle = set(self.workers)
        self._down: dict[int, float] = {}  # since when
        self._returning: dict[int, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        self._latencies_s: list[float] = []
        self._num_retried = self._num_restarts = 0
        self._num_waiting = 0  # completions for which no worker was free yet

    async def grade(self, items: Sequence[tuple[Prompt, Completion]]) -> list[RewardResult]:
        pairs = [graded_pair(prompt, completion, self.config) for prompt, completion in items]
        handed_over = time.perf_counter()
        size = max(1, min(MAX_BATCH, math.ceil(len(pairs) / len(self.workers))))
        batches = [range(start, min(start + size, len(pairs))) for start in range(0, len(pairs), size)]
        graded = await asyncio.gather(*[self._grade_batch([pairs[i] for i in batch]) for batch in batches])
        self._latencies_s += [time.perf_counter() - handed_over] * len(pairs)
        return [result for results in graded for result in results]

    def drain_metrics(self) -> Mapping[str, float]:
        latencies_s, self._latencies_s = self._latencies_s, []
        if not latencies_s:
            return {}
        metrics = {
            "reward/latency_mean_s": sum(latencies_s) / len(latencies_s),
            "reward/latency_max_s": max(latencies_s),
            "reward/num_retried": float(self._num_retried),
            "reward/num_restarts": float(self._num_restarts),
        }
        self._num_retried = self._num_restarts = 0
        return metrics

    def live_metrics(self) -> Mapping[str, float]:
        """Queue depths at this moment. Any thread may call it."""
        num_busy = len(self.workers) - len(self._idle)
        return {"queue/completions_waiting": self._num_waiting, "queue/reward_workers_busy": num_busy}

    async def add(self, worker: Actor) -> None:
        """One more worker, which is up."""
        async with self._changed:
            self._take_in(worker)
            self._changed.notify_all()

    def _take_in(self, worker: Actor) -> None:
        self.workers[self._num_ever] = worker
        self._idle.add(self._num_ever)
        self._num_ever += 1

    async def remove(self, worker: Actor) -> None:
        """Returns once the worker has given its verdicts and gets no more work. Others must be left."""
        (index,) = [index for index, other in self.workers.items() if other is worker]
        async with self._borrowed(None, 0, index):
            self.workers.pop(index, None)
            self._down.pop(index, None)

    async def _grade_batch(self, pairs: Sequence[Pair]) -> list[RewardResult]:
        worker, results = await self._grade_once(pairs, avoid=None)
        failed = [i for i, result in enumerate(results) if result.status is RewardStatus.INFRASTRUCTURE_ERROR]
        for i in failed:
            last = worker
            for _ in range(self.num_retries):
                if all(map(self._stays_away, self.workers)):
                    break  # nobody would grade it either
                # The item is graded alone: it may be the one that kills a worker, and others should not suffer from it.
                self._num_retried += 1
                last, (results[i],) = await self._grade_once([pairs[i]], avoid=last)
                if results[i].status is not RewardStatus.INFRASTRUCTURE_ERROR:
                    break
        return results

    async def _grade_once(self, pairs: Sequence[Pair], avoid: int | None) -> tuple[int, list[RewardResult]]:
        # The factor of 2: a SQL completion takes its own time and, the first time, also that of its gold query.
        limit = 2 * self.timeout_s * len(pairs) + WORKER_GRACE_S
        async with self._borrowed(avoid, len(pairs)) as index:
            worker, who = self.workers[index], f"reward worker {index}"
            try:
                await self._until_up(index, who)
                grading = worker.grade.remote(pairs)
                return index, await within(grading, limit, "reward.timeout_s", f"{len(pairs)} gradings")
            except (ray.exceptions.RayError, TimeoutError) as error:
                if index not in self._down and not isinstance(error, ray.exceptions.RayTaskError):
                    self._lose(index, who, error)
                detail = last_words(who, error)
                return index, [RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, detail)] * len(pairs)

    @asynccontextmanager
    async def _borrowed(self, avoid: int | None, num_completions: int, only: int | None = None) -> AsyncIterator[int]:
        """Wait for an idle worker, and yield its index: `only`, which may be gone by then, or one of `_suitable`."""

        def idle() -> set[int]:
            if only is not None:
                return {only} if only in self._idle or only not in self.workers else set()
            return self._idle & self._suitable(avoid)

        self._num_waiting += num_completions
        try:
            async with self._changed:
                await self._changed.wait_for(idle)
                index = min(idle())
                self._idle.discard(index)
        finally:
            self._num_waiting -= num_completions
        try:
            yield index
        finally:
            # This lock is never held for long, so a cancelled grading still gives its worker back.
            async with self._changed:
                if index in self.workers:
                    self._idle.add(index)
                self._changed.notify_all()

    def _suitable(self, avoid: int | None) -> set[int]:
        """Workers for a batch: not `avoid`, and none that is down, unless there is no other."""
        others = {i for i in self.workers if i != avoid} or set(self.workers)
        return others - self._down.keys() or others

    def _stays_away(self, index: int) -> bool:
        """Whether the worker has been down for longer than a start takes."""
        return index in self._down and time.monotonic() - self._down[index] >= WORKER_GRACE_S

    async def _until_up(self, index: int, who: str) -> None:
        """Raises TimeoutError when the worker is down, and WORKER_GRACE_S after its loss still is."""

        async def up() -> None:
            async with self._changed:
                await self._changed.wait_for(lambda: index not in self._down)

        if index not in self._down:
            return
        left_s = self._down[index] + WORKER_GRACE_S - time.monotonic()
        try:
            await limited(up(), max(0.0, left_s))
        except TimeoutError:
            raise TimeoutError(f"{who} did not start again within {WORKER_GRACE_S:g} s") from None

    def _lose(self, index: int, who: str, error: Exception) -> None:
        """The worker died, or gave no verdict in time: say so once, and see that it starts again."""
        self._down[index] = time.monotonic()
        self._num_restarts += 1
        keep(who, error)
        told = last_words(who, error)
        log.warning(
            "%s; Ray starts it again, and what it was at is graded anew",
            told,
            extra={"event": "reward_worker_restarted", "facts": {"worker": index, "reason": told}},
        )
        hangs = isinstance(error, TimeoutError)
        self._returning[index] = asyncio.create_task(self._bring_back(index, who, hangs=hangs))

    async def _bring_back(self, index: int, who: str, *, hangs: bool) -> None:
        """Ask a worker that is down until it answers or another is there in its place."""
        worker: Actor = self.workers[index]
        told = set[str]()
        if hangs:
            # It may hang forever, so it is killed, and Ray starts it again.
            await log_stack(worker, who)
            ray.kill(worker, no_restart=False)
        while index in self.workers:
            # Calls to an actor that Ray is restarting fail at once.
            with suppress(ray.exceptions.RayError, TimeoutError):
                await limited(worker.ready.remote(), WORKER_GRACE_S)
                break
            if self._stays_away(index):
                if (problem := await self._replace(index, worker, who)) is None:
                    return
                if problem not in told:
                    log.warning("%s did not start again within %g s%s", who, WORKER_GRACE_S, problem)
                told.add(problem)
            await asyncio.sleep(ASK_LATER_S if told else ASK_S)
        async with self._changed:
            self._down.pop(index, None)
            self._changed.notify_all()

    async def _replace(self, index: int, worker: Actor, who: str) -> str | None:
        """None when another worker does its work now, or else why none does, as the end of a sentence."""
        if self._starter is None:
            return "; others do its work until it does"
        try:
            other = await self._starter.start_worker()
        except Exception as error:
            return f"; others do its work until it does, because no other starts in its place: {error}"
        async with self._borrowed(None, 0, index):
            is_wanted = index in self.workers
            if is_wanted:
                del self.workers[index], self._down[index]
                self._take_in(other)
                log.warning(
                    "%s did not start again within %g s; reward worker %d is there in its place",
                    *(who, WORKER_GRACE_S, self._num_ever - 1),
                    extra={"event": "reward_worker_replaced", "facts": {"worker": index, "by": self._num_ever - 1}},
                )
        await self._starter.end_worker(worker if is_wanted else other)
        return None
