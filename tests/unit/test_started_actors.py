"""Actors that start while a run is under way, with stand-ins for Ray: where they go, and what a failure leaves."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import engines, ray_system
from cluster.engines import EngineActors
from cluster.planning.placement import Bundle
from cluster.ray_system import RaySystem


class Actors:
    """Ray's nodes and actors. alive: the nodes that Ray takes to be alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *alive: str) -> None:
        self.alive, self.events = set(alive), list[Any]()
        for module in (engines, ray_system):
            monkeypatch.setattr(module.ray, "kill", lambda actor: self.events.append(f"kill {actor.name}"))
            monkeypatch.setattr(module.ray, "nodes", lambda: [{"NodeID": n, "Alive": True} for n in self.alive])
            monkeypatch.setattr(
                module, "PlacementGroupSchedulingStrategy", lambda group, placement_group_bundle_index: group
            )
            monkeypatch.setattr(module, "remove_placement_group", lambda group: self.events.append(f"free {group}"))
            monkeypatch.setattr(module, "reserve_one", self._reserve)
        monkeypatch.setattr(engines, "RolloutEngine", SimpleNamespace(options=self._options))
        monkeypatch.setattr(ray_system, "RewardWorker", SimpleNamespace(options=self._options))

    def _options(self, name: str, scheduling_strategy: str, **_: Any) -> Any:
        def spawn(*_: Any) -> Any:
            self.events.append(f"{name} in {scheduling_strategy}")
            return SimpleNamespace(name=name, ready=SimpleNamespace(remote=self.ready))

        return SimpleNamespace(remote=spawn)

    async def _reserve(self, config: Any, role: str, index: int, *, with_gpus: bool) -> Any:
        return Bundle(role, index, 1.0, 0.0, "other"), "its own group"

    async def ready(self) -> str:
        return "here"


def test_an_engine_whose_node_is_gone_starts_elsewhere_although_ray_hears_late_of_it(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Actors(monkeypatch, "lost", "other")
    actors = EngineActors(make_config(run_name="run"), "model", "the run's group", {0: _bundle("lost")}, {})

    async def settled(actor: Any) -> None:
        world.events.append(f"ask Ray of {actor.name}")
        world.alive.discard("lost")

    monkeypatch.setattr(engines, "settled", settled)
    world.events.clear()
    asyncio.run(actors.start(0))
    assert world.events == ["ask Ray of run-rollout-0", "kill run-rollout-0", "run-rollout-0 in its own group"]


def _bundle(node: str) -> Bundle:
    return Bundle("rollout", 0, 1.0, 0.0, node)


@pytest.mark.parametrize("error", [RuntimeError("its node died"), asyncio.CancelledError()])
def test_a_reward_worker_that_does_not_come_up_leaves_nothing(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    world = Actors(monkeypatch)

    async def fails() -> str:
        raise error

    monkeypatch.setattr(world, "ready", fails)
    system = object.__new__(RaySystem)
    system.config = make_config(run_name="run")
    system._with_gpus, system._without_gpu, system._num_workers = False, {}, 1
    system._workers, system._worker_groups = [], {}
    with pytest.raises(type(error)):
        asyncio.run(system.start_worker())
    assert world.events == ["run-reward-1 in its own group", "kill run-reward-1", "free its own group"]
    assert (system._workers, system._worker_groups) == ([], {})


def test_each_new_learner_has_ranks_where_nodes_live_and_ends_those_of_the_try_before(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Actors(monkeypatch)
    system = object.__new__(RaySystem)
    system.config, system._without_gpu = make_config(run_name="run"), {}
    system._learner_options = [{"scheduling_strategy": "lost"}, {"scheduling_strategy": "here"}]
    monkeypatch.setattr(ray_system, "LearnerRank", SimpleNamespace(options=world._options))

    async def settled(actor: Any) -> None:
        world.events.append(f"ask Ray of {actor.name}")

    def find_room(role: str, config: Any, say: Any) -> None:
        world.events.append("find room")
        system._learner_options[0]["scheduling_strategy"] = "other"

    monkeypatch.setattr(ray_system, "settled", settled)
    system._places = SimpleNamespace(find_room=find_room)  # type: ignore[assignment]
    system._ranks = [SimpleNamespace(name=f"old {i}") for i in range(2)]
    asyncio.run(system._move_ranks(lambda line: None))
    assert world.events == [
        *("ask Ray of old 0", "ask Ray of old 1", "kill old 0", "kill old 1", "find room", "kill old 0", "kill old 1"),
        *("run-learner-0 in other", "run-learner-1 in here"),
    ]
    assert [rank.name for rank in system._ranks] == ["run-learner-0", "run-learner-1"]

    # A start that ends in the midst leaves no rank that nobody ends.
    def fails(*_: Any) -> Any:
        raise RuntimeError("no connection to Ray")

    spawn = system._spawn_rank
    monkeypatch.setattr(system, "_spawn_rank", lambda i, options: spawn(i, options) if i == 0 else fails())
    ranks = list(system._ranks)
    with pytest.raises(RuntimeError):
        system._renew_ranks()
    assert system._ranks[0] is not ranks[0]
    assert system._ranks[1] is ranks[1]
