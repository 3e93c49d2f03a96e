"""A run that waits for what others hold: what it says, how long it waits, and that it takes what comes free."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.planning import queue, ray_placement
from cluster.planning.placement import Bundle, Node
from cluster.planning.queue import Claim, claims_in, describe_wait, missing, own_name
from cluster.planning.ray_placement import place_on_cluster

RUN = [Bundle(role, i, 1.0, 1.0, node) for role, node in (("learner", "a"), ("rollout", "b")) for i in range(2)]
MINE = Claim("mine", 50, True, {"GPU": 4.0})


def claim(who: str, since_ns: int, *, waits: bool = False, gpus: float = 2.0) -> Claim:
    return Claim(who, since_ns, waits, {"GPU": gpus, "CPU": 1.0})


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ([claim("job-1", 1)], "waits for 2 of 4 GPUs; job-1 holds them; first in the queue"),
        (
            [claim("job-1", 1, gpus=1.0), claim("job-2", 2), claim("job-1", 3, gpus=1.0)],
            "waits for 2 of 4 GPUs; job-1 holds 2 GPUs, job-2 holds 2 GPUs; first in the queue",
        ),
        ([MINE], "waits for 2 of 4 GPUs; programs other than dphrl hold them; first in the queue"),
        (
            [claim("job-1", 1), claim("job-2", 2, waits=True), MINE, claim("job-3", 60, waits=True)],
            "waits for 2 of 4 GPUs; job-1 holds them; number 2 in the queue, after job-2",
        ),
        # Places of its own that it has already, such as those of engines that came later.
        ([claim("mine", 1), claim("job-1", 1)], "waits for 2 of 4 GPUs; job-1 holds them; first in the queue"),
        # Without GPUs, a run holds nothing of what is missing.
        (
            [claim("job-1", 1, gpus=0.0)],
            "waits for 2 of 4 GPUs; programs other than dphrl hold them; first in the queue",
        ),
    ],
)
def test_what_is_waited_for_is_told_with_who_holds_it(claims: list[Claim], said: str) -> None:
    assert describe_wait(RUN, {"GPU": 2.0}, claims, MINE) == said


def test_what_is_missing_is_counted_on_the_nodes_of_the_plan() -> None:
    free = [Node("a", 8.0, 1.0), Node("b", 0.5, 2.0), Node("c", 8.0, 8.0)]
    assert missing(RUN, free) == {"GPU": 1.0, "CPU": 1.5}, "what is free on node c does not help"
    assert missing(RUN, [Node("a", 2.0, 2.0), Node("b", 2.0, 2.0)]) == {}
    assert missing(RUN, []) == {"GPU": 4.0, "CPU": 4.0}
    assert describe_wait(RUN, {"GPU": 1.0, "CPU": 1.5}, [], MINE).startswith("waits for 1 of 4 GPUs and 1.5 of 4 CPUs;")
    assert describe_wait(RUN, {}, [], MINE).startswith("waits for its places;")


def test_the_groups_of_runs_are_told_by_their_names() -> None:
    def group(name: str, state: str, *bundles: dict[str, float]) -> dict[str, Any]:
        return {"name": name, "state": state, "bundles": dict(enumerate(bundles))}

    table = {
        "1": group("dphrl:200:job:2", "PENDING", {"GPU": 1.0, "CPU": 1.0}, {"CPU": 0.5}),
        "2": group("dphrl:100:job-1", "CREATED", {"CPU": 2.0}),
        "3": group("dphrl:1:ended", "REMOVED", {"CPU": 2.0}),
        "4": group("somebody's", "CREATED", {"CPU": 2.0}),
        "5": group("", "CREATED", {"CPU": 2.0}),
    }
    assert claims_in(table) == [
        Claim("job-1", 100, False, {"GPU": 0.0, "CPU": 2.0}),
        Claim("job:2", 200, True, {"GPU": 1.0, "CPU": 1.5}),
    ]


def test_a_job_is_known_by_its_id(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(run_name="run")
    monkeypatch.delenv(queue.JOB_CONFIG_ENVIRONMENT, raising=False)
    assert own_name(config) == "run"
    monkeypatch.setenv(queue.JOB_CONFIG_ENVIRONMENT, json.dumps({"metadata": {"job_submission_id": "run-2"}}))
    assert own_name(config) == "run-2"
    for other in ("{}", "no json", "[]"):
        monkeypatch.setenv(queue.JOB_CONFIG_ENVIRONMENT, other)
        assert own_name(config) == "run"


class BusyCluster:
    """Ray's nodes a and b with so many CPUs each, of which others hold some, by node.

    on_poll: what happens then. num_slow: how many polls Ray takes to give what is free.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: float, **held: float) -> None:
        self.cpus, self.held = cpus, held
        self.holders: dict[str, str] = {"other": "CREATED"}
        self.groups: list[Any] = []
        self.now = 0.0
        self.on_poll: dict[int, Any] = {}
        self.polls, self.num_slow = 0, 0
        monkeypatch.setattr(ray_placement, "placement_group", self._group)
        monkeypatch.setattr(ray_placement, "remove_placement_group", lambda group: self.groups.remove(group))
        monkeypatch.setattr(ray_placement, "cluster_nodes", self._nodes)
        monkeypatch.setattr(ray_placement.ray.util, "placement_group_table", self._table)
        monkeypatch.setattr(ray_placement.ray, "available_resources", lambda: {"CPU": 1.0})
        monkeypatch.setattr(ray_placement.time, "monotonic", lambda: self.now)

    def _nodes(self, *, free: bool = False) -> list[Node]:
        return [Node(name, self.cpus - (self.held.get(name, 0.0) if free else 0.0)) for name in ("a", "b")]

    def _group(self, bundles: Any, strategy: str, name: str, bundle_label_selector: Any) -> Any:
        group = SimpleNamespace(name=name, bundles=bundles, where=[*map(dict, bundle_label_selector)])
        group.wait = lambda seconds: self._wait(group, seconds)
        self.groups.append(group)
        return group

    def _wait(self, group: Any, seconds: float) -> bool:
        if happens := self.on_poll.get(self.polls):
            happens()
        self.polls += 1
        wanted: dict[str, float] = {}
        for bundle, where in zip(group.bundles, group.where, strict=True):
            wanted[where["ray.io/node-id"]] = wanted.get(where["ray.io/node-id"], 0.0) + bundle["CPU"]
        fits = all(amount <= self.cpus - self.held.get(node, 0.0) for node, amount in wanted.items())
        fits = fits and self.polls > self.num_slow
        self.now += 0.0 if fits else seconds
        return fits

    def _table(self) -> dict[str, Any]:
        groups: dict[str, Any] = {
            who: {"name": f"dphrl:{i}:{who}", "state": state, "bundles": {0: {"CPU": 1.0}}}
            for i, (who, state) in enumerate(self.holders.items())
        }
        for group in self.groups:
            groups[group.name] = {"name": group.name, "state": "PENDING", "bundles": dict(enumerate(group.bundles))}
        return groups


def test_a_run_waits_past_the_placement_timeout_while_others_hold_its_places(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, said = BusyCluster(monkeypatch, 1.0, a=1.0, b=1.0), list[str]()
    config = make_config(cluster={"placement_timeout_s": 10})
    cluster.on_poll = {
        100: lambda: cluster.holders.update(third="PENDING"),
        200: lambda: cluster.held.update(a=0.0, b=0.0),
    }
    bundles, group = place_on_cluster(config, said.append)
    assert [group] == cluster.groups
    assert [bundle.resources() for bundle in bundles] == group.bundles
    needs = sum(bundle.num_cpus for bundle in bundles)
    assert said == [
        f"waits for {needs:g} of {needs:g} CPUs; other holds them; first in the queue",
        f"waits for {needs:g} of {needs:g} CPUs; other holds them; number 2 in the queue, after third",
        "found its places after 400 s",
    ], "a line for every change, and none beside"


def test_a_run_that_need_not_wait_says_nothing(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = BusyCluster(monkeypatch, 2.0)
    _, group = place_on_cluster(make_config(), pytest.fail)
    assert [group] == cluster.groups
    assert cluster.now == 0.0


def test_places_are_asked_for_once_where_ray_is_slow_to_give_them(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = BusyCluster(monkeypatch, 4.0)
    cluster.num_slow = 3
    asked: list[Any] = []
    make_group = ray_placement.placement_group
    monkeypatch.setattr(ray_placement, "placement_group", lambda *a, **b: asked.append(b) or make_group(*a, **b))
    _, group = place_on_cluster(make_config(), list[str]().append)
    assert (cluster.groups, len(asked), cluster.polls) == ([group], 1, 4)


def test_places_that_come_free_elsewhere_are_taken(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = BusyCluster(monkeypatch, 4.0, a=4.0, b=4.0)
    nodes = {bundle.node for bundle in ray_placement.plan_placement(make_config(), cluster._nodes())}
    other = next(iter({"a", "b"} - {next(iter(nodes))}))
    cluster.on_poll = {3: lambda: cluster.held.update({other: 0.0})}
    bundles, group = place_on_cluster(make_config(), list[str]().append)
    assert {bundle.node for bundle in bundles} == {other}
    assert {where["ray.io/node-id"] for where in group.where} == {other}
    assert cluster.groups == [group], "nothing else is asked for any more"


@pytest.mark.parametrize(
    ("holder", "waited", "setting"),
    [("other", 100.0, "queue_timeout_s=100"), (None, 10.0, "placement_timeout_s=10")],
)
def test_a_run_gives_up_in_the_end(
    holder: str | None, waited: float, setting: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = BusyCluster(monkeypatch, 1.0, a=1.0, b=1.0)
    if holder is None:
        cluster.holders.clear()
    config = make_config(cluster={"placement_timeout_s": 10, "queue_timeout_s": 100})
    with pytest.raises(RuntimeError, match=rf"^waited cluster.{setting} for .*; free now: 1 CPUs.*Others hold"):
        place_on_cluster(config, list[str]().append)
    assert waited < cluster.now <= waited + 2 * ray_placement.POLL_INTERVAL_S
    assert cluster.groups == [], "nothing is asked for any more"


def test_after_the_others_have_ended_the_placement_timeout_counts(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = BusyCluster(monkeypatch, 1.0, a=1.0, b=1.0)
    cluster.on_poll = {20: cluster.holders.clear}
    with pytest.raises(RuntimeError, match=r"^waited cluster.placement_timeout_s=10 "):
        place_on_cluster(make_config(cluster={"placement_timeout_s": 10}), list[str]().append)
    assert 48 <= cluster.now <= 54


def test_a_run_that_is_stopped_while_it_waits_asks_for_nothing_any_more(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = BusyCluster(monkeypatch, 1.0, a=1.0, b=1.0)

    def stop() -> None:
        raise KeyboardInterrupt

    cluster.on_poll = {5: stop}
    with pytest.raises(KeyboardInterrupt):
        place_on_cluster(make_config(), list[str]().append)
    assert cluster.groups == []
