"""The rollout engines' actors: where each runs, how it starts and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine_repair import CannotPlaceError
from actors.rollout_engine import RolloutEngine
from actors.vllm_settings import process_variables
from actors.waiting import Actor, within
from actors.watched import settled
from cluster.planning.growth import plan_more
from cluster.planning.placement import Bundle, Node, PlacementError
from cluster.planning.queue import group_name
from cluster.planning.ray_placement import NODE_ID_LABEL, cluster_nodes
from dphrl.config.schema import Config

NAME_POLL_INTERVAL_S = 0.2
LEARNER_SETTING, PLACEMENT_SETTING = "learner.timeout_s", "cluster.placement_timeout_s"


# At the end of a run. What is left then is removed when another run starts an engine there.
CLEANING_TIMEOUT_S = 2.0


class EngineActors:
    """`actors.engine_repair.EngineStarter` over Ray.

    An engine starts in its bundle of the run's placement group. One whose node is gone, or that came later, has a group
    of its own, since a group neither moves nor grows. engines: the actors that were started and not ended, by number.
    """

    def __init__(
        self,
        config: Config,
        model_dir: str,
        group: Any,
        bundles: Mapping[int, Bundle],
        devices: Mapping[int, Sequence[str] | None],
    ) -> None:
        """bundles: of the engines, by their places in the group. devices: of each engine, the GPUs that it shares with
        the learner; None for one that has its own."""
        self._config, self._model_dir, self._devices = config, model_dir, devices
        self._with_gpus = any(bundle.num_gpus or bundle.shares_gpus_of for bundle in bundles.values())
        self._bundles = {bundle.index: bundle for bundle in bundles.values()}
        self._places = {bundle.index: (group, place) for place, bundle in bundles.items()}
        self._own_groups: dict[int, Any] = {}
        self.engines: dict[int, Actor] = {index: self._spawn(index) for index in self._bundles}

    @property
    def can_replace(self) -> bool:
        return not any(self._devices.values())

    async def start(self, index: int) -> Actor:
        """See `EngineStarter`. Raises TimeoutError after learner.timeout_s, and CannotPlaceError."""
        limit, what = self._config.learner.timeout_s, f"rollout engine {index} to start"
        if (before := self.engines.pop(index, None)) is not None:
            await settled(before)  # its node may be gone, and Ray hears late of that
            ray.kill(before)
        if self._needs_room(index):
            await self._reserve(index)
        engine = await within(self._spawn_when_free(index), limit, LEARNER_SETTING, what)
        self.engines[index] = engine
        await within(engine.ready.remote(), limit, LEARNER_SETTING, what)
        return engine

    async def end(self, index: int) -> None:
        if (engine := self.engines.pop(index, None)) is not None:
            ray.kill(engine)
        if (group := self._own_groups.pop(index, None)) is not None:
            remove_placement_group(group)
            del self._bundles[index]

    def remove_temporary_files(self) -> None:
        """To be called when engines will do no more work: those that are killed cannot."""
        removing = [engine.remove_temporary_files.remote() for engine in self.engines.values()]
        ray.wait(removing, num_returns=len(removing), timeout=CLEANING_TIMEOUT_S)

    def check_room(self, new_engines: Sequence[int], num_new_workers: int) -> None:
        """Raises PlacementError, with the arithmetic, where the nodes have no room for so many more."""
        free = cluster_nodes(free=True)
        if homeless := [index for index in new_engines if self._needs_room(index)]:
            taken = plan_more(self._config, "rollout", homeless, free, with_gpus=self._with_gpus)
            free = [_without(node, taken) for node in free]
        if num_new_workers:
            plan_more(self._config, "reward", range(num_new_workers), free, with_gpus=self._with_gpus)

    def fitting_on(self, nodes: frozenset[str], indices: Sequence[int]) -> int:
        """How many of these engines fit on what is free of these nodes."""
        free = [node for node in cluster_nodes(free=True) if node.name in nodes]
        for count in range(len(indices), 0, -1):
            with suppress(PlacementError):
                plan_more(self._config, "rollout", indices[:count], free, with_gpus=self._with_gpus)
                return count
        return 0

    def _needs_room(self, index: int) -> bool:
        return index not in self._bundles or not _is_alive(self._bundles[index].node)

    async def _reserve(self, index: int) -> None:
        """Make a placement group for this engine alone, on a node that has room."""
        if (group := self._own_groups.pop(index, None)) is not None:
            remove_placement_group(group)
        bundle, group = await reserve_one(self._config, "rollout", index, with_gpus=self._with_gpus)
        self._own_groups[index], self._bundles[index], self._places[index] = group, bundle, (group, 0)

    async def _spawn_when_free(self, index: int) -> Actor:
        # The name stays taken, and the bundle in use, until Ray has seen the end of the old process.
        while True:
            try:
                return self._spawn(index)
            except ActorAlreadyExistsError:
                await asyncio.sleep(NAME_POLL_INTERVAL_S)

    def _spawn(self, index: int) -> Actor:
        bundle, (group, place) = self._bundles[index], self._places[index]
        actor_class: Any = RolloutEngine
        spawn = actor_class.options(
            name=f"{self._config.run_name}-rollout-{index}",
            num_cpus=bundle.num_cpus,
            num_gpus=bundle.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            runtime_env={"env_vars": process_variables(self._config)},
        )
        return spawn.remote(self._config, self._model_dir, index, self._devices.get(index))


async def reserve_one(config: Config, role: str, index: int, *, with_gpus: bool) -> tuple[Bundle, Any]:
    """A bundle for one more actor, and the ready placement group that reserves it.

    Raises CannotPlaceError when no node has room, and TimeoutError when others took it meanwhile.
    """
    try:
        (bundle,) = plan_more(config, role, [index], cluster_nodes(free=True), with_gpus=with_gpus)
    except PlacementError as error:
        raise CannotPlaceError(str(error)) from None
    where = [{NODE_ID_LABEL: bundle.node}]
    group = placement_group([bundle.resources()], strategy="PACK", name=group_name(config), bundle_label_selector=where)
    limit, what = config.cluster.placement_timeout_s, f"room for a {role} actor on node {bundle.node}"
    try:
        await within(group.ready(), limit, PLACEMENT_SETTING, what)
    except BaseException:
        remove_placement_group(group)
        raise
    return bundle, group


def _without(node: Node, taken: Sequence[Bundle]) -> Node:
    """What is left of a node's free resources."""
    mine = [bundle for bundle in taken if bundle.node == node.name]
    return replace(
        node,
        num_cpus=node.num_cpus - sum(bundle.num_cpus for bundle in mine),
        num_gpus=node.num_gpus - sum(bundle.num_gpus for bundle in mine),
    )


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
