"""More or fewer engines and reward workers while a training runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import ray

from actors.reward_pool import RayRewardPool, WorkerStarter
from actors.rollout_pool import RayRolloutPool
from cluster.engines import EngineActors
from cluster.orders import POLL_S, Order, Orders
from cluster.planning.placement import PlacementError
from dphrl.config.schema import Config

log = logging.getLogger(__name__)

NODES_POLL_S = 5.0


class Scaler:
    """Carries out the orders that come through a run's folder, and with rollout.max_engines also uses nodes that join.

    New engines are stale until the next sync, and do not serve before. An engine that leaves has others asked for what
    it was at.
    """

    def __init__(self, folder: Path, config: Config, engines: EngineActors, workers: WorkerStarter) -> None:
        self._orders, self._config, self._actors, self._workers = Orders(folder), config, engines, workers
        self._rollouts: RayRolloutPool
        self._rewards: RayRewardPool
        self._is_up = asyncio.Event()
        self._nodes = _nodes()
        self._told = set[str]()

    def up(self, rollouts: RayRolloutPool, rewards: RayRewardPool) -> None:
        """The run's parts are there."""
        self._rollouts, self._rewards = rollouts, rewards
        self._is_up.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Orders are carried out in this block, once the parts are there."""
        self._orders.open()
        serving = [asyncio.create_task(self._serve())]
        if self._config.rollout.max_engines is not None and self._actors.can_replace:
            serving.append(asyncio.create_task(self._watch_nodes()))
        try:
            yield
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            self._orders.close()

    async def _serve(self) -> None:
        while True:
            with self._going_on("orders to scale are not taken"):
                if (order := self._orders.next()) is not None:
                    try:
                        await self._carry_out(order)
                    except Exception as error:  # the training goes on without it
                        log.warning("an order to scale was not carried out: %s", error, exc_info=True)
                        self._orders.answer(order, "failed", f"{type(error).__name__}: {error}")
            await asyncio.sleep(POLL_S)

    @contextmanager
    def _going_on(self, told: str) -> Iterator[None]:
        """An error in this block is told, the same one once, and the loop around it goes on."""
        try:
            yield
        except Exception as error:
            message = f"{told}: {type(error).__name__}: {error}"
            if message not in self._told:
                log.warning("%s; the run tries again", message, exc_info=True)
            self._told.add(message)

    async def _carry_out(self, order: Order) -> None:
        if not self._is_up.is_set():
            self._orders.answer(order, "working", "the run is still starting")
            await self._is_up.wait()
        numbers, num_workers = self._rollouts.numbers, len(self._rewards.workers)
        wanted = len(numbers) if order.rollout is None else order.rollout
        wanted_workers = num_workers if order.reward is None else order.reward
        new, leaving = numbers_to_change(numbers, set(self._rollouts.engines), wanted)
        if (new or leaving) and not self._actors.can_replace:
            why = "engines that share the learner's GPUs (cluster.colocate) stay as they are"
            self._orders.answer(order, "refused", why)
            return
        try:
            self._actors.check_room(new, max(0, wanted_workers - num_workers))
        except PlacementError as error:
            self._orders.answer(order, "refused", str(error))
            return
        told = f"{len(numbers)} -> {wanted} engines, {num_workers} -> {wanted_workers} reward workers"
        facts = {"rollout": wanted, "reward": wanted_workers}
        log.warning("scaling: %s", told, extra={"event": "scaled", "facts": facts})
        self._orders.answer(order, "working", f"{told}: begun")
        for index in new:
            self._rollouts.add(index)
        for index in leaving:
            await self._rollouts.remove(index)
        await self._scale_workers(wanted_workers)
        await self._until_joined(new, lambda message: self._orders.answer(order, "working", f"{told}: {message}"))
        missing = [index for index in new if index not in self._rollouts.numbers]
        if missing:
            names = ", ".join(map(str, missing))
            self._orders.answer(order, "failed", f"{told}: rollout engine {names} did not start; run.log says why")
        else:
            self._orders.answer(order, "done", f"{told}: done")

    async def _scale_workers(self, wanted: int) -> None:
        while len(self._rewards.workers) < wanted:
            await self._rewards.add(await self._workers.start_worker())
        while len(self._rewards.workers) > wanted:
            last = self._rewards.workers[max(self._rewards.workers)]
            await self._rewards.remove(last)
            await self._workers.end_worker(last)

    async def _until_joined(self, new: Sequence[int], say: Callable[[str], None]) -> None:
        while coming := [i for i in new if i in self._rollouts.numbers and i not in self._rollouts.engines]:
            up = [i for i in coming if self._rollouts.is_up(i)]
            starting = len(coming) - len(up)
            say(f"{starting} engine(s) start" if starting else f"{len(up)} engine(s) join at the next sync")
            await asyncio.sleep(POLL_S)

    async def _watch_nodes(self) -> None:
        await self._is_up.wait()
        while True:
            await asyncio.sleep(NODES_POLL_S)
            with self._going_on("nodes that join are not used"):
                present = await asyncio.to_thread(_nodes)
                if joined := present - self._nodes:
                    self._use(joined)
                self._nodes = present

    def _use(self, joined: frozenset[str]) -> None:
        numbers, most = self._rollouts.numbers, self._config.rollout.max_engines or 0
        new, _ = numbers_to_change(numbers, set(), max(most, len(numbers)))
        new = new[: self._actors.fitting_on(joined, new)]
        if new:
            log.warning(
                "%d node(s) joined: %d more engine(s) start there",
                *(len(joined), len(new)),
                extra={"event": "scaled", "facts": {"rollout": len(numbers) + len(new), "nodes": sorted(joined)}},
            )
        for index in new:
            self._rollouts.add(index)


def numbers_to_change(present: frozenset[int], serving: set[int], wanted: int) -> tuple[list[int], list[int]]:
    """Of the engines that are to come, the lowest numbers that none has; of those that are to leave, those that do not
    serve first, then the highest."""
    free = (index for index in range(len(present) + wanted) if index not in present)
    new = [next(free) for _ in range(wanted - len(present))]
    leaving = sorted(present, key=lambda index: (index in serving, -index))[: max(0, len(present) - wanted)]
    return new, leaving


def _nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
