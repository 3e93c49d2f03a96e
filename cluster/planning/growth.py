"""Room for more engines and reward workers, beside what runs already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.planning.placement import EPSILON, Bundle, Node, PlacementError, plan_bundles, sum_of
from dphrl.config.schema import Config

NAMES = {"rollout": "engine", "reward": "reward worker"}


def plan_more(
    config: Config, role: str, indices: Sequence[int], free: Sequence[Node], *, with_gpus: bool
) -> list[Bundle]:
    """Bundles of more actors of a role, each on a node that has room for it.

    free: what nobody has taken of each node. One with GPUs fills a node that is in use, so that whole nodes stay free;
    one on CPUs goes where the most are free. Raises PlacementError, with the arithmetic, when they do not fit.
    """
    one = next(bundle for bundle in plan_bundles(config, with_gpus=with_gpus) if bundle.role == role)
    wanted = [replace(one, index=index) for index in indices]
    left = {node.name: node for node in free}
    placed: list[Bundle] = []
    for bundle in wanted:
        fitting = [node for node in left.values() if _fits(bundle, node)]
        if not fitting:
            raise PlacementError(_why_not(wanted, free))
        node = min(fitting, key=lambda node: (node.num_gpus, node.num_cpus) if one.num_gpus else (-node.num_cpus,))
        left[node.name] = replace(
            node, num_cpus=node.num_cpus - bundle.num_cpus, num_gpus=node.num_gpus - bundle.num_gpus
        )
        placed.append(replace(bundle, node=node.name))
    return placed


def _fits(bundle: Bundle, node: Node) -> bool:
    of_type = not bundle.accelerator or node.accelerator in (None, bundle.accelerator)
    has_room = node.num_cpus + EPSILON >= bundle.num_cpus and node.num_gpus + EPSILON >= bundle.num_gpus
    return of_type and has_room


def _why_not(wanted: Sequence[Bundle], free: Sequence[Node]) -> str:
    one, count = wanted[0], len(wanted)
    of_type = f" of type {one.accelerator}" if one.accelerator else ""
    needs = f"{sum_of(wanted, 'CPU')} = {count * one.num_cpus:g} CPUs"
    if one.num_gpus:
        needs = f"{sum_of(wanted, 'GPU')} = {count * one.num_gpus:g} GPUs{of_type} and {needs}"
    gpus = [f"{node.num_gpus:g} GPUs, " if one.num_gpus else "" for node in free]
    rest = " + ".join(f"({of_node}{node.num_cpus:g} CPUs)" for of_node, node in zip(gpus, free, strict=True))
    many = f"{count} more {NAMES[one.role]}{'s' if count > 1 else ''}"
    return f"{many}: {needs}, each within one node; free on the nodes: {rest or 'nothing'}"
