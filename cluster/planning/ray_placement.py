"""Puts a placement plan on a real Ray cluster: reads its nodes, and makes one placement group that follows the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.planning.placement import (
    ACCELERATOR_PREFIX,
    Bundle,
    Node,
    PlacementError,
    plan_bundles,
    plan_placement,
    sum_of,
)
from cluster.planning.queue import Claim, claims_in, describe_wait, group_name, missing, own_name
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.tracking.console import Console

# Ray gives every node this label by itself.
NODE_ID_LABEL = "ray.io/node-id"
ACCELERATOR_LABEL = "ray.io/accelerator-type"
# A node whose GPUs Ray does not know is none of those that were asked for by their type.
UNKNOWN_ACCELERATOR = "unknown"
POLL_INTERVAL_S = 2.0


def cluster_nodes(*, free: bool = False) -> list[Node]:
    """The living nodes by node id, with all their resources, or with those that nobody has taken."""
    # Ray has no public function that gives these figures for each node.
    from ray._private.state import available_resources_per_node

    unclaimed = available_resources_per_node() if free else {}
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = unclaimed.get(node["NodeID"], {}) if free else node["Resources"]
            cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
            nodes.append(Node(node["NodeID"], cpus, gpus, accelerator_of(node)))
    return nodes


def accelerator_of(node: Mapping[str, Any]) -> str:
    """The type of the GPUs of one of `ray.nodes()`: by its label, or by the resource that Ray gives it beside GPUs."""
    label = node.get("Labels", {}).get(ACCELERATOR_LABEL)
    names = [name for name in node["Resources"] if name.startswith(ACCELERATOR_PREFIX)]
    return str(label or (names[0].removeprefix(ACCELERATOR_PREFIX) if names else UNKNOWN_ACCELERATOR))


def place_on_cluster(config: Config, say: Callable[[str], None] | None = None) -> tuple[list[Bundle], Any]:
    """The bundles, each with its node, and the ready placement group that reserves them in that order.

    say: gets a line about what is waited for, whenever it changes; None prints it.

    Raises InputError, before anything is reserved, when the cluster can never hold them (with cluster.autoscaling:
    when it has not grown enough within cluster.placement_timeout_s). Raises RuntimeError when other runs hold what is
    needed for longer than cluster.queue_timeout_s, or other programs for longer than cluster.placement_timeout_s.
    """
    say = say or Console().info
    deadline = time.monotonic() + config.cluster.placement_timeout_s
    try:
        bundles = _plan_on_present_nodes(config)
    except PlacementError as error:
        if config.cluster.autoscaling == "none":
            raise InputError(f"this run {error}; lower the counts or shares, or join a larger cluster") from None
        return _grow(config, deadline, say)
    return _reserve(bundles, config, deadline, say)


def _plan_on_present_nodes(config: Config) -> list[Bundle]:
    """A plan on the free resources if it fits there; else on all resources, and then it waits for what others hold.

    Raises PlacementError when it does not fit even on all of them.
    """
    everything = cluster_nodes()
    if config.cluster.autoscaling == "gpu" and not any(node.num_gpus for node in everything):
        raise PlacementError("needs GPUs; the cluster has none")
    return _plan_on_free_nodes(config, everything) or plan_placement(config, everything)


def _grow(config: Config, deadline: float, say: Callable[[str], None]) -> tuple[list[Bundle], Any]:
    """Ask Ray's autoscaler for the actors' resources, wait until the nodes are there, and reserve them."""
    try:
        wanted = plan_bundles(config, with_gpus=config.cluster.autoscaling == "gpu")
    except PlacementError as error:
        raise InputError(f"this run {error}, and cluster.autoscaling: cpu asks for none; set it to gpu") from None
    request_resources(bundles=[bundle.wish() for bundle in wanted])
    try:
        return _reserve(_wait_for_nodes(config, deadline), config, deadline, say)
    finally:
        # The reservation keeps the nodes now. The request must go, because it would keep them after the run's end too.
        request_resources(bundles=[])


def _wait_for_nodes(config: Config, deadline: float) -> list[Bundle]:
    while True:
        try:
            return _plan_on_present_nodes(config)
        except PlacementError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"this run {error}, and the autoscaler brought no more within cluster.placement_timeout_s="
                    f"{config.cluster.placement_timeout_s:g}; raise its maximum, that time, or lower the counts"
                ) from None
        time.sleep(POLL_INTERVAL_S)


class Places:
    """The reserved places of a run's actors.

    options: by role and index, what an actor is started with to be in its place; `find_room` changes them there.
    group: of the places with which the run began.
    """

    def __init__(self, bundles: Sequence[Bundle], group: Any) -> None:
        """group: the placement group of the bundles, in their order."""
        self.group = group
        self._bundles, self._groups = list(bundles), [group]
        self.options: dict[str, list[dict[str, Any]]] = {}
        for place, bundle in enumerate(bundles):
            own = {"num_cpus": bundle.num_cpus, "num_gpus": bundle.num_gpus, **_in(group, place)}
            self.options.setdefault(bundle.role, []).append(own)

    def find_room(self, role: str, config: Config, say: Callable[[str], None]) -> None:
        """Other places for the actors of this role whose nodes are gone; Ray finds none, because each had its own node.

        say: gets a line about what is waited for. Raises RuntimeError when there is no room within
        cluster.placement_timeout_s, and with cluster.colocate, which ties engines to the GPUs of the lost ranks.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost = [bundle for bundle in self._bundles if bundle.role == role and bundle.node not in alive]
        if not lost:
            return
        nodes = ", ".join(sorted({bundle.node[:8] for bundle in lost}))
        if config.cluster.colocate and any(bundle.num_gpus for bundle in lost):
            raise RuntimeError(f"node {nodes} is gone, and cluster.colocate ties engines to the learner's GPUs there")
        limit = config.cluster.placement_timeout_s
        waits = f"waiting up to {limit:g} s (cluster.placement_timeout_s) for {_sizes(lost)} elsewhere"
        say(f"node {nodes} is gone: {waits}")
        where = [{ACCELERATOR_LABEL: bundle.accelerator} if bundle.accelerator else {} for bundle in lost]
        group = _reserve_where(lost, where, config, time.monotonic() + limit)
        self._groups.append(group)
        found = ray.util.placement_group_table(group)["bundles_to_node_id"]
        for place, bundle in enumerate(lost):
            self.options[role][bundle.index] |= _in(group, place)
            self._bundles[self._bundles.index(bundle)] = replace(bundle, node=found[place])

    def release(self) -> None:
        """Give everything back."""
        for group in self._groups:
            remove_placement_group(group)


def _in(group: Any, place: int) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)}


def _sizes(bundles: Sequence[Bundle]) -> str:
    cpus = f"{sum_of(bundles, 'CPU')} CPUs"
    return cpus + (f" and {sum_of(bundles, 'GPU')} GPUs" if any(b.num_gpus for b in bundles) else "")


def _reserve(
    bundles: Sequence[Bundle], config: Config, deadline: float, say: Callable[[str], None]
) -> tuple[list[Bundle], Any]:
    """The bundles, and a ready placement group that holds each on its node.

    While others hold what they need, places that come free elsewhere are taken as well. Raises RuntimeError that says
    what is missing: at the deadline, which is put off as long as other runs hold it, up to cluster.queue_timeout_s.
    """
    began, since_ns, said = time.monotonic(), time.time_ns(), ""
    settings = config.cluster
    group = _group_of(bundles, _on_their_nodes(bundles), config, since_ns)
    try:
        # One interval at least, so that nodes that came at the last moment can still be reserved.
        while not group.wait(POLL_INTERVAL_S):
            now, claims = time.monotonic(), claims_in(ray.util.placement_group_table())
            mine = Claim(own_name(config), since_ns, True, {})
            if any(claim.who != mine.who and not claim.is_waiting for claim in claims):
                deadline = max(deadline, now + settings.placement_timeout_s)
            if now > min(deadline, began + settings.queue_timeout_s):
                raise RuntimeError(_waited_in_vain(bundles, config, now - began))
            elsewhere = _plan_on_free_nodes(config, cluster_nodes())
            # The same places are free, too, while Ray is slow to give them.
            if elsewhere is not None and elsewhere != list(bundles):
                remove_placement_group(group)
                since_ns += 1  # another name, and the same place in the queue
                bundles = elsewhere
                group = _group_of(bundles, _on_their_nodes(bundles), config, since_ns)
                continue
            line = describe_wait(bundles, missing(bundles, cluster_nodes(free=True)), claims, mine)
            if line != said:
                say(line)
                said = line
    except BaseException:
        remove_placement_group(group)
        raise
    if said:
        say(f"found its places after {time.monotonic() - began:.0f} s")
    return list(bundles), group


def _on_their_nodes(bundles: Sequence[Bundle]) -> list[dict[str, str]]:
    return [{NODE_ID_LABEL: bundle.node} for bundle in bundles]


def _plan_on_free_nodes(config: Config, everything: Sequence[Node]) -> list[Bundle] | None:
    """A plan on what nobody holds; None when it does not fit there, and where only the GPUs are all taken: a plan for
    CPUs alone is another one."""
    unclaimed = cluster_nodes(free=True)
    if any(node.num_gpus for node in everything) != any(node.num_gpus for node in unclaimed):
        return None
    try:
        return plan_placement(config, unclaimed)
    except PlacementError:
        return None


def _reserve_where(bundles: Sequence[Bundle], where: list[dict[str, str]], config: Config, deadline: float) -> Any:
    """A ready placement group of the bundles on nodes with these labels.

    Raises RuntimeError that says what is missing, when others hold the resources until the deadline.
    """
    group = _group_of(bundles, where, config, time.time_ns())
    if not group.wait(max(deadline - time.monotonic(), POLL_INTERVAL_S)):
        remove_placement_group(group)
        raise RuntimeError(_waited_in_vain(bundles, config))
    return group


def _group_of(bundles: Sequence[Bundle], where: list[dict[str, str]], config: Config, since_ns: int) -> Any:
    return placement_group(
        [bundle.resources() for bundle in bundles],
        strategy="PACK",
        name=group_name(config, since_ns),
        bundle_label_selector=where,
    )


def _waited_in_vain(bundles: Sequence[Bundle], config: Config, waited_s: float = 0.0) -> str:
    setting = "queue_timeout_s" if waited_s > config.cluster.queue_timeout_s else "placement_timeout_s"
    free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
    return (
        f"waited cluster.{setting}={getattr(config.cluster, setting):g} for {_sizes(bundles)}; free now: "
        f"{free['CPU']:g} CPUs, {free['GPU']:g} GPUs. Others hold the rest"
    )
