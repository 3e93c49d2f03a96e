"""The places of a run's actors on a cluster that loses nodes, with a stand-in for Ray's side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.planning import ray_placement
from cluster.planning.placement import Bundle
from cluster.planning.ray_placement import Places


class FakeCluster:
    """Ray's nodes and placement groups. room: whether a new group gets its places."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *alive: str, room: bool = True) -> None:
        self.alive, self.room = set(alive), room
        self.groups: list[Any] = []
        self.removed: list[Any] = []
        self.waited: list[float] = []
        for name, stand_in in (
            ("placement_group", self._group),
            ("remove_placement_group", self.removed.append),
            (
                "PlacementGroupSchedulingStrategy",
                lambda group, placement_group_bundle_index: (group, placement_group_bundle_index),
            ),
        ):
            monkeypatch.setattr(ray_placement, name, stand_in)
        monkeypatch.setattr(ray_placement.ray, "nodes", lambda: [{"NodeID": n, "Alive": True} for n in self.alive])
        monkeypatch.setattr(ray_placement.ray, "available_resources", lambda: {"CPU": 1.0})
        monkeypatch.setattr(ray_placement.ray.util, "placement_group_table", self._table)

    def _group(self, resources: Any, strategy: str, name: str, bundle_label_selector: Any) -> Any:
        group = SimpleNamespace(resources=resources, where=bundle_label_selector, wait=self._wait)
        self.groups.append(group)
        return group

    def _wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return self.room

    def _table(self, group: Any) -> Any:
        return {"bundles_to_node_id": dict.fromkeys(range(len(group.resources)), "c" * 16)}


BUNDLES = [
    Bundle("learner", 0, 1.0, 1.0, "a" * 16),
    Bundle("learner", 1, 1.0, 1.0, "b" * 16, accelerator="H100"),
    Bundle("rollout", 0, 2.0, 0.0, "b" * 16),
]


def test_an_actor_whose_node_is_gone_gets_another_place(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, said = FakeCluster(monkeypatch, "a" * 16, "c" * 16), list[str]()
    places = Places(BUNDLES, "first")
    learner = places.options["learner"]  # the list that the system holds
    config = make_config(cluster={"placement_timeout_s": 30})
    places.find_room("learner", config, said.append)
    (group,) = cluster.groups
    assert [options["scheduling_strategy"] for options in learner] == [("first", 0), (group, 0)]
    assert group.resources == [{"CPU": 1.0, "GPU": 1.0}], "only what was lost, and only of this role"
    assert group.where == [{"ray.io/accelerator-type": "H100"}]
    assert places.options["rollout"][0]["scheduling_strategy"] == ("first", 2)
    sizes = "1 learner x 1 CPUs and 1 learner x 1 GPUs"
    assert said == [f"node bbbbbbbb is gone: waiting up to 30 s (cluster.placement_timeout_s) for {sizes} elsewhere"]
    places.find_room("learner", config, said.append)
    assert len(cluster.groups) == 1, "its new node lives"
    places.release()
    assert cluster.removed == ["first", group]


def test_all_nodes_alive_is_no_reason_to_move(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, "a" * 16, "b" * 16)
    Places(BUNDLES, "first").find_room("learner", make_config(), pytest.fail)
    assert cluster.groups == []


def test_without_room_it_is_told_what_was_waited_for(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, "a" * 16, room=False)
    config = make_config(cluster={"placement_timeout_s": 30})
    told = r"^waited cluster.placement_timeout_s=30 for 1 learner x 1 CPUs and 1 learner x 1 GPUs; free now: 1 CPUs"
    with pytest.raises(RuntimeError, match=told):
        Places(BUNDLES, "first").find_room("learner", config, print)
    assert cluster.waited == [pytest.approx(30, abs=1)]
    assert cluster.removed == cluster.groups, "nothing is asked for any more"


def test_ranks_that_share_gpus_with_engines_do_not_move(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, "a" * 16)
    with pytest.raises(RuntimeError, match=r"^node bbbbbbbb is gone, and cluster.colocate ties"):
        Places(BUNDLES, "first").find_room("learner", make_config(cluster={"colocate": True}), print)
