"""Room for one more engine, beside what runs already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.planning.placement import EPSILON, Bundle, Node, PlacementError, plan_bundles
from dphrl.config.schema import Config


def plan_engine(config: Config, index: int, free: Sequence[Node], *, with_gpus: bool) -> Bundle:
    """The bundle of one more engine, on a node that has room for it.

    free: what nobody has taken of each node. One with GPUs fills a node that is in use, so that whole nodes stay free;
    one on CPUs goes where the most are free. Raises PlacementError, with the arithmetic, when no node has room.
    """
    (engine, *_) = [bundle for bundle in plan_bundles(config, with_gpus=with_gpus) if bundle.role == "rollout"]
    fitting = [node for node in free if _fits(engine, node)]
    if not fitting:
        raise PlacementError(f"one more engine needs {_size(engine)} on one node; free are {_rest(free, engine)}")
    node = min(fitting, key=lambda node: (node.num_gpus, node.num_cpus) if engine.num_gpus else (-node.num_cpus,))
    return replace(engine, index=index, node=node.name)


def _fits(engine: Bundle, node: Node) -> bool:
    of_type = not engine.accelerator or node.accelerator in (None, engine.accelerator)
    has_room = node.num_cpus + EPSILON >= engine.num_cpus and node.num_gpus + EPSILON >= engine.num_gpus
    return of_type and has_room


def _size(engine: Bundle) -> str:
    of_type = f" of type {engine.accelerator}" if engine.accelerator else ""
    gpus = f"{engine.num_gpus:g} GPUs{of_type} and " if engine.num_gpus else ""
    return f"{gpus}{engine.num_cpus:g} CPUs"


def _rest(free: Sequence[Node], engine: Bundle) -> str:
    rest = [
        f"{node.num_gpus:g} GPUs and {node.num_cpus:g} CPUs" if engine.num_gpus else f"{node.num_cpus:g} CPUs"
        for node in free
    ]
    return "; ".join(rest) or "none"
