"""Which actor runs on which node: a pure plan from the config and the nodes' resources."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dphrl.config.model import GPU_KERNELS
from dphrl.config.schema import Config

# Shares are decimal fractions, and sums of them have rounding errors.
EPSILON = 1e-6
# Ray gives a node with GPUs a resource of this name, for example accelerator_type:H100.
ACCELERATOR_PREFIX = "accelerator_type:"


@dataclass(frozen=True)
class Node:
    """One machine, or one Kubernetes pod. `name` is Ray's node id where the node exists.

    accelerator: the type of its GPUs in Ray's words, such as H100; None for a planned node's, which may be of any type.
    host_gib: its memory besides GPUs, where known.
    """

    name: str
    num_cpus: float
    num_gpus: float = 0.0
    accelerator: str | None = None
    host_gib: float | None = None


@dataclass(frozen=True)
class Bundle:
    """What one actor reserves, and where; `role` and `index` say whose it is.

    shares_gpus_of: the learner ranks on whose GPUs a colocated engine runs; it reserves none of its own. accelerator:
    the type that its GPUs must have, if not any.
    """

    role: str
    index: int
    num_cpus: float
    num_gpus: float
    node: str = ""
    shares_gpus_of: tuple[int, ...] = ()
    accelerator: str | None = None

    def resources(self) -> dict[str, float]:
        """What the bundle reserves, by Ray's names."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})

    def wish(self) -> dict[str, float]:
        """What to ask an autoscaler for: it brings a node of the type of which a little is asked for."""
        of_type = {f"{ACCELERATOR_PREFIX}{self.accelerator}": 0.001} if self.accelerator else {}
        return self.resources() | of_type


class PlacementError(ValueError):
    """The nodes cannot hold the run. The message has the arithmetic."""


def plan_bundles(config: Config, *, with_gpus: bool) -> list[Bundle]:
    """One bundle per actor, not yet on any node: learner ranks, then engines, then reward workers.

    Raises PlacementError for a run without GPUs that asks for some.
    """
    rollout, learner, reward = config.rollout, config.learner, config.reward
    if not with_gpus and (asked := _asked_of_gpus(config)):
        raise PlacementError(f"needs GPUs ({asked}); the cluster has none")
    colocated = with_gpus and config.cluster.colocate
    width = rollout.tensor_parallel
    gpus_per_engine = float(width) if with_gpus and not colocated else 0.0

    def shared(engine: int) -> tuple[int, ...]:
        return tuple(range(engine * width, (engine + 1) * width)) if colocated else ()

    of_learner = learner.accelerator or (rollout.accelerator if colocated else None)
    of_engines = None if colocated else rollout.accelerator
    return [
        *(
            Bundle("learner", i, learner.cpus_per_rank, float(with_gpus), accelerator=of_learner)
            for i in range(learner.num_ranks)
        ),
        *(
            Bundle("rollout", i, rollout.cpus_per_engine, gpus_per_engine, "", shared(i), of_engines)
            for i in range(rollout.num_engines)
        ),
        *(
            Bundle("reward", i, reward.cpus_per_worker, _gpu_share(reward.gpus_per_worker))
            for i in range(reward.num_workers)
        ),
    ]


def _asked_of_gpus(config: Config) -> str:
    """The settings that make sense on GPUs only, with their values; empty when there are none."""
    asked = {
        "learner.accelerator": config.learner.accelerator,
        "rollout.accelerator": config.rollout.accelerator,
        "reward.gpus_per_worker": config.reward.gpus_per_worker,
    }
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in asked.items() if value
    )


def _gpu_share(gpus: float) -> float:
    """A part of a GPU that leaves no rest of it: 0.4 is a half, as a GPU holds two of them. Ray counts 0.0001ths."""
    return math.floor(1e4 / math.floor(1 / gpus + EPSILON)) / 1e4 if 0 < gpus < 1 else gpus


def plan_placement(config: Config, nodes: Sequence[Node]) -> list[Bundle]:
    """The bundles of `plan_bundles`, in its order, each on a node.

    Learner ranks sit on as few nodes as they can, next to their NVLink peers. Every engine lies within one node:
    engines with GPUs fill the nodes that the run is on already, so that whole nodes stay free for others; engines on
    CPUs spread out, since they compete for the cores. Reward workers go where most CPUs are spare, among the nodes of
    the run and those without GPUs. GPUs are used if any node has one.

    Raises PlacementError when the nodes cannot hold the plan.
    """
    with_gpus = any(node.num_gpus for node in nodes)
    if not with_gpus and (why := GPU_KERNELS.get(config.model.attention)):
        kernel = f"model.attention: {config.model.attention}"
        raise PlacementError(f"needs a GPU for {kernel} ({why}; sdpa needs none), and no node has one")
    bundles = plan_bundles(config, with_gpus=with_gpus)
    if reason := shortfall(bundles, nodes):
        raise PlacementError(reason)
    for layout in _learner_layouts(bundles, nodes):
        if placed := _place(bundles, nodes, layout):
            return placed
    raise PlacementError(_why_it_does_not_fit(bundles, nodes))


def num_nodes_needed(config: Config, shape: Node) -> int:
    """The smallest number of nodes like `shape` that hold the plan. Raises PlacementError when no number does."""
    bundles = plan_bundles(config, with_gpus=shape.num_gpus > 0)
    cpus, gpus = (sum(bundle.resources().get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU"))
    if shape.num_cpus <= 0:
        raise PlacementError("needs CPUs; the nodes have none")
    count = max(1, math.ceil(cpus / shape.num_cpus - EPSILON), math.ceil(gpus / shape.num_gpus) if gpus else 0)
    # The search begins at the number that the totals need. Actors that do not fit side by side need a few nodes more.
    while True:
        try:
            plan_placement(config, _copies(shape, count))
        except PlacementError:
            if count >= len(bundles):  # a node for every actor
                raise
            count += 1
        else:
            return count


def _copies(shape: Node, count: int) -> list[Node]:
    return [replace(shape, name=f"{shape.name}-{i}") for i in range(count)]


def shortfall(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> str | None:
    """Why the nodes' totals can never hold the bundles, with the arithmetic; None when they suffice."""
    where = "" if len(nodes) == 1 else f" on {len(nodes)} nodes"
    for kind in dict.fromkeys(bundle.accelerator for bundle in bundles if bundle.accelerator):
        mine = [bundle for bundle in bundles if bundle.accelerator == kind]
        if (needed := sum(bundle.num_gpus for bundle in mine)) > _gpus_of(kind, nodes) + EPSILON:
            has = _gpus_by_type(kind, nodes)
            return f"needs {sum_of(mine, 'GPU')} = {needed:g} GPUs of type {kind}; the cluster has {has}"
    for name, unit in (("GPU", "GPUs"), ("CPU", "CPUs")):
        needed = sum(bundle.resources().get(name, 0.0) for bundle in bundles)
        available = sum(node.num_gpus if name == "GPU" else node.num_cpus for node in nodes)
        if needed > available + EPSILON:
            return f"needs {sum_of(bundles, name)} = {needed:g} {unit}; the cluster has {available:g}{where}"
    return None


def _is_of(kind: str | None, node: Node) -> bool:
    return not kind or node.accelerator in (None, kind)


def _gpus_of(kind: str, nodes: Sequence[Node]) -> float:
    return sum(node.num_gpus for node in nodes if _is_of(kind, node))


def _gpus_by_type(kind: str, nodes: Sequence[Node]) -> str:
    """`4 (2 nodes x 2), and 8 of type L4`."""
    sizes = Counter(node.num_gpus for node in nodes if node.num_gpus and _is_of(kind, node))
    terms = [f"{count} node{'s' if count > 1 else ''} x {gpus:g}" for gpus, count in sizes.items()]
    others = Counter[str]()
    for node in nodes:
        if node.num_gpus and not _is_of(kind, node):
            others[str(node.accelerator)] += int(node.num_gpus)
    told = [f"{_gpus_of(kind, nodes):g}" + (f" ({' + '.join(terms)})" if terms else "")]
    return ", and ".join([*told, *(f"{count} of type {name}" for name, count in others.items())])


def sum_of(bundles: Sequence[Bundle], resource: str) -> str:
    """The terms of a total, as in `8 learner x 1 + 4 rollout x 2`."""
    terms = []
    for role in dict.fromkeys(bundle.role for bundle in bundles):
        mine = [bundle.resources().get(resource, 0.0) for bundle in bundles if bundle.role == role]
        if any(mine):
            terms.append(f"{len(mine)} {role} x {mine[0]:g}")
    return " + ".join(terms)


# ------------------------------------------------------------------------------------------ placing
class _Nodes:
    """What is left of the nodes, and what is on them, while a plan is made."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.cpus = {node.name: node.num_cpus for node in nodes}
        self.gpus = {node.name: node.num_gpus for node in nodes}
        self.nodes = {node.name: node for node in nodes}
        self.without_gpus = {node.name for node in nodes if not node.num_gpus}
        self.actors = {node.name: Counter[str]() for node in nodes}

    def room(self, node: str, bundle: Bundle) -> int:
        """How many bundles of this size and type the node still holds."""
        if not _is_of(bundle.accelerator, self.nodes[node]):
            return 0
        by_cpus = int((self.cpus[node] + EPSILON) // bundle.num_cpus)
        return min(by_cpus, int((self.gpus[node] + EPSILON) // bundle.num_gpus)) if bundle.num_gpus else by_cpus

    def fitting(self, bundle: Bundle) -> list[str]:
        return [node for node in self.cpus if self.room(node, bundle)]

    def take(self, node: str, bundle: Bundle) -> Bundle:
        self.cpus[node] -= bundle.num_cpus
        self.gpus[node] -= bundle.num_gpus
        self.actors[node][bundle.role] += 1
        return replace(bundle, node=node)


# How many learner ranks at most a node takes, in the order in which nodes are filled.
_Layout = Sequence[tuple[str, int]]


def _learner_layouts(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> Iterator[_Layout]:
    """Ways to fill nodes with learner ranks, the preferred ones first.

    With engines of equal width these few are enough: the last one uses GPUs that no engine could use before it breaks
    up room for an engine. So if the last one fails for lack of GPUs, every other layout would fail.
    """
    ranks = [bundle for bundle in bundles if bundle.role == "learner"]
    left, count = _Nodes(nodes), len(ranks)
    room = {node.name: left.room(node.name, _with_its_part_of_an_engine(ranks[0], bundles)) for node in nodes}
    largest_first = sorted(room, key=lambda name: -room[name])
    # The smallest node that holds all ranks leaves larger nodes to the engines.
    if enough := [name for name in room if room[name] >= count]:
        yield [(min(enough, key=room.__getitem__), count)]
    yield [(name, room[name]) for name in largest_first]
    yield [(name, room[name]) for name in reversed(largest_first)]
    engine = next((bundle for bundle in bundles if bundle.role == "rollout" and bundle.num_gpus), None)
    if engine:
        unused = [
            int(node.num_gpus) % int(engine.num_gpus) if _is_of(engine.accelerator, node) else room[node.name]
            for node in nodes
        ]
        spare = [(node.name, min(room[node.name], count)) for node, count in zip(nodes, unused, strict=True)]
        yield [*spare, *((name, room[name]) for name in largest_first)]


def _with_its_part_of_an_engine(rank: Bundle, bundles: Sequence[Bundle]) -> Bundle:
    """What a node must have for a rank, also its part of the CPUs of a colocated engine, which must follow it."""
    engine = next((bundle for bundle in bundles if bundle.shares_gpus_of), None)
    if engine is None:
        return rank
    return replace(rank, num_cpus=rank.num_cpus + engine.num_cpus / len(engine.shares_gpus_of))


def _place(bundles: Sequence[Bundle], nodes: Sequence[Node], layout: _Layout) -> list[Bundle] | None:
    """All bundles on nodes, with the learner ranks placed by `layout`; None when a bundle finds no room."""
    left = _Nodes(nodes)
    of_role = {role: [bundle for bundle in bundles if bundle.role == role] for role in ("learner", "rollout", "reward")}
    placed = _place_learner(of_role["learner"], of_role["rollout"], left, layout)
    if placed is None:
        return None
    for engine in of_role["rollout"]:
        if not (node := _node_for_engine(engine, placed, left)):
            return None
        placed.append(left.take(node, engine))
    for worker in of_role["reward"]:
        if not (node := _node_for_worker(worker, left)):
            return None
        placed.append(left.take(node, worker))
    return placed


def _place_learner(
    ranks: Sequence[Bundle], engines: Sequence[Bundle], left: _Nodes, layout: _Layout
) -> list[Bundle] | None:
    """Put the ranks on nodes. The ranks that share one colocated engine stay together."""
    block = max((len(engine.shares_gpus_of) for engine in engines), default=0) or 1
    placed: list[Bundle] = []
    for node, at_most in layout:
        count = min(at_most, left.room(node, ranks[0]), len(ranks) - len(placed))
        if len(placed) + count < len(ranks):
            count -= count % block
        placed += [left.take(node, rank) for rank in ranks[len(placed) : len(placed) + count]]
    return placed if len(placed) == len(ranks) else None


def _node_for_engine(engine: Bundle, learner: Sequence[Bundle], left: _Nodes) -> str | None:
    """The node of an engine, None if none has room. An engine that shares GPUs goes beside its learner ranks. One with
    GPUs of its own goes on the fullest node that holds it. One on CPUs goes away from the learner, then where the
    fewest engines are, then where the most room is."""
    fitting = left.fitting(engine)
    if engine.shares_gpus_of:
        home = learner[engine.shares_gpus_of[0]].node
        return home if home in fitting else None

    def preference(node: str) -> tuple[float, ...]:
        actors, room = left.actors[node], left.room(node, engine)
        return (not actors, room) if engine.num_gpus else (actors["learner"] > 0, actors["rollout"], -room)

    return min(fitting, key=preference) if fitting else None


def _node_for_worker(worker: Bundle, left: _Nodes) -> str | None:
    """The node of a reward worker, None if none has room. One with a GPU goes on the fullest node that holds it."""
    fitting = left.fitting(worker)
    if worker.num_gpus:
        return min(fitting, key=lambda node: (not left.actors[node], left.gpus[node]), default=None)
    near = [node for node in fitting if node in left.without_gpus or left.actors[node]]
    return max(near or fitting, key=left.cpus.__getitem__, default=None)


def _why_it_does_not_fit(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> str:
    """The reason when the totals suffice: something does not fit on one node, or not side by side."""
    shapes = Counter((node.num_gpus, _type_of(node), node.num_cpus) for node in nodes)
    have = ", ".join(f"{count} x ({gpus:g} {kind}, {cpus:g} CPUs)" for (gpus, kind, cpus), count in shapes.items())
    for bundle in bundles:
        if not _Nodes(nodes).fitting(bundle):
            of_type = f" of type {bundle.accelerator}" if bundle.accelerator else ""
            needs = f"{bundle.num_gpus:g} GPUs{of_type} and {bundle.num_cpus:g} CPUs" if bundle.num_gpus else ""
            needs = needs or f"{bundle.num_cpus:g} CPUs"
            return f"needs {needs} on one node for each {bundle.role} actor; the nodes are {have}"
    roles = Counter(bundle.role for bundle in bundles)
    sizes = {bundle.role: bundle.resources() for bundle in bundles}
    needs = ", ".join(f"{count} {role} x {_size(sizes[role])}" for role, count in roles.items())
    return f"needs {needs}, each within one node; that does not fit side by side on the nodes {have}"


def _type_of(node: Node) -> str:
    return f"{node.accelerator} GPUs" if node.accelerator and node.num_gpus else "GPUs"


def _size(resources: Mapping[str, float]) -> str:
    gpus, cpus = resources.get("GPU", 0.0), resources["CPU"]
    return f"({gpus:g} GPUs, {cpus:g} CPUs)" if gpus else f"{cpus:g} CPUs"
