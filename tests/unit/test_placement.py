"""Placement is pure arithmetic: a table of configurations and clusters, and laws that hold for any of them."""
# ruff: noqa: E501  (a case is a line)

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planning.placement import (
    Bundle,
    Node,
    PlacementError,
    num_nodes_needed,
    plan_bundles,
    plan_placement,
    shortfall,
)
from cluster.planning.ray_placement import accelerator_of

# (learner ranks, engines, tensor parallel), then what differs from the defaults.
Setup = tuple[int, int, int]


def configured(make_config: Any, setup: Setup, **changes: Any) -> Any:
    ranks, engines, width = setup
    learner = {"num_ranks": ranks, **changes.pop("learner", {})}
    rollout = {"num_engines": engines, "tensor_parallel": width, **changes.pop("rollout", {})}
    return make_config(learner=learner, rollout=rollout, **changes)


# GPUs and CPUs, and the type of the GPUs where it matters.
Shape = tuple[float, float] | tuple[float, float, str]


def nodes_of(*shapes: Shape) -> list[Node]:
    return [Node(f"n{i}", shape[1], shape[0], *shape[2:]) for i, shape in enumerate(shapes)]


def layout(placed: list[Bundle]) -> dict[str, str]:
    """`n0: "4L 2E 1R"`."""
    letters = {"learner": "L", "rollout": "E", "reward": "R"}
    by_node: dict[str, Counter[str]] = {}
    for bundle in placed:
        by_node.setdefault(bundle.node, Counter())[bundle.role] += 1
    return {
        node: " ".join(f"{count}{letters[role]}" for role, count in roles.items())
        for node, roles in sorted(by_node.items())
    }


BIG = (8.0, 96.0)
H100, L4 = (8.0, 96.0, "H100"), (4.0, 48.0, "L4")


def of_types(learner: str | None, engines: str | None, **rollout: Any) -> dict[str, Any]:
    return {"learner": {"accelerator": learner}, "rollout": {"accelerator": engines, **rollout}}


FITS = [
    # GPU types
    ("learner and engines on their types", (4, 4, 1), of_types("H100", "L4"), [L4, H100], {"n0": "4E", "n1": "4L 1R"}),
    ("the other way round", (4, 4, 1), of_types("L4", "H100"), [L4, H100], {"n0": "4L", "n1": "4E 1R"}),
    ("one type asked for", (8, 4, 1), of_types("H100", None), [L4, H100], {"n0": "4E", "n1": "8L 1R"}),
    ("engines take no place that the learner needs", (4, 8, 1), of_types(None, "H100"), [L4, H100], {"n0": "4L", "n1": "8E 1R"}),
    ("a type that planned nodes do not tell", (4, 4, 1), of_types("H100", "H100"), [BIG], {"n0": "4L 4E 1R"}),
    ("colocated: the type of either", (4, 4, 1), {"cluster": {"colocate": True}, **of_types(None, "H100")}, [L4, H100], {"n1": "4L 4E 1R"}),
    ("the learner takes what engines cannot use", (9, 2, 4), of_types(None, "H100"), [(7, 84, "H100"), (6, 72, "L4"), (4, 48, "H100")], {"n0": "3L 1E 1R", "n1": "6L", "n2": "1E"}),
    # reward workers with GPUs
    ("a GPU for each reward worker", (4, 2, 1), {"reward": {"num_workers": 2, "gpus_per_worker": 1}}, [BIG], {"n0": "4L 2E 2R"}),
    ("half a GPU each", (4, 3, 1), {"reward": {"num_workers": 2, "gpus_per_worker": 0.5}}, [BIG], {"n0": "4L 3E 2R"}),
    ("rewards on what learner and engines leave", (6, 1, 2), {"reward": {"num_workers": 2, "gpus_per_worker": 1}}, [BIG, (2, 32)], {"n0": "6L 1E", "n1": "2R"}),
    ("two GPUs for one reward worker", (5, 1, 1), {"reward": {"gpus_per_worker": 2}}, [BIG], {"n0": "5L 1E 1R"}),
    # one machine
    ("laptop", (1, 1, 1), {}, [(0, 2)], {"n0": "1L 1E 1R"}),
    ("two engines need more CPUs or smaller shares", (1, 2, 1), {}, [(0, 4)], {"n0": "1L 2E 1R"}),
    ("one GPU each", (1, 1, 1), {}, [(2, 8)], {"n0": "1L 1E 1R"}),
    ("one node of 8", (4, 4, 1), {}, [BIG], {"n0": "4L 4E 1R"}),
    ("one node of 8, wide engine", (4, 1, 4), {}, [BIG], {"n0": "4L 1E 1R"}),
    # CPU nodes
    ("engines on CPUs spread, away from the learner", (1, 2, 1), {}, [(0, 2)] * 3, {"n0": "1L 1R", "n1": "1E", "n2": "1E"}),
    ("reward workers spread", (1, 1, 1), {"reward": {"num_workers": 4}}, [(0, 2)] * 3, {"n0": "1L 1R", "n1": "1E", "n2": "3R"}),
    ("fractions add up exactly", (1, 1, 1), {"learner": {"cpus_per_rank": 0.1}, "rollout": {"cpus_per_engine": 0.2}, "reward": {"num_workers": 7, "cpus_per_worker": 0.1}}, [(0, 1)], {"n0": "1L 1E 7R"}),
    ("ranks stay together on CPUs", (2, 1, 1), {}, [(0, 2)] * 3, {"n0": "2L", "n1": "1E", "n2": "1R"}),
    # 8 x 8
    ("learner takes whole nodes", (16, 16, 2), {}, [BIG] * 8, {"n0": "8L", "n1": "8L", "n2": "4E 1R", "n3": "4E", "n4": "4E", "n5": "4E"}),
    ("tensor parallel 8", (8, 7, 8), {}, [BIG] * 8, {"n0": "8L", "n1": "1E 1R", **{f"n{i}": "1E" for i in range(2, 8)}}),
    ("every GPU in use", (32, 32, 1), {}, [BIG] * 8, {"n0": "8L 1R", **{f"n{i}": "8L" for i in (1, 2, 3)}, **{f"n{i}": "8E" for i in (4, 5, 6, 7)}}),
    ("whole nodes stay free", (4, 4, 1), {}, [BIG] * 8, {"n0": "4L 4E 1R"}),
    ("rest of the learner's node is used first", (12, 4, 1), {}, [BIG] * 8, {"n0": "8L 1R", "n1": "4L 4E"}),
    ("reward workers near the run", (8, 8, 1), {"reward": {"num_workers": 4}}, [BIG] * 8, {"n0": "8L 2R", "n1": "8E 2R"}),
    # uneven nodes
    ("smallest node that holds the learner", (4, 1, 8), {}, [BIG, (4, 48)], {"n0": "1E 1R", "n1": "4L"}),
    ("learner on the larger node, engine on the smaller", (8, 1, 4), {}, [(4, 48), BIG], {"n0": "1E", "n1": "8L 1R"}),
    ("learner over uneven nodes", (10, 2, 1), {}, [(4, 48), BIG], {"n0": "2L 2E", "n1": "8L 1R"}),
    ("learner steps aside for wide engines", (4, 2, 4), {}, [(4, 48), (6, 64), (2, 32)], {"n0": "1E", "n1": "2L 1E 1R", "n2": "2L"}),
    ("leftovers first where engines need whole fours", (3, 3, 4), {}, [(5, 60), (5, 60), (5, 60)], {"n0": "1L 1E 1R", "n1": "1L 1E", "n2": "1L 1E"}),
    ("reward workers on nodes without GPUs", (8, 8, 1), {"reward": {"num_workers": 6}}, [BIG, BIG, (0, 256)], {"n0": "8L", "n1": "8E", "n2": "6R"}),
    ("few CPUs decide where ranks go", (4, 4, 1), {"learner": {"cpus_per_rank": 4}}, [(8, 10), (8, 16)], {"n0": "4E 1R", "n1": "4L"}),
    # colocated
    ("colocated pairs", (8, 8, 1), {"cluster": {"colocate": True}}, [BIG], {"n0": "8L 8E 1R"}),
    ("colocated over nodes", (16, 4, 4), {"cluster": {"colocate": True}}, [BIG] * 2, {"n0": "8L 2E 1R", "n1": "8L 2E"}),
    ("colocated engine within a node", (8, 2, 4), {"cluster": {"colocate": True}}, [(6, 60), (6, 60)], {"n0": "4L 1E 1R", "n1": "4L 1E"}),
    ("colocated, more ranks than engines", (8, 1, 4), {"cluster": {"colocate": True}}, [BIG], {"n0": "8L 1E 1R"}),
    ("colocation means nothing without GPUs", (1, 1, 1), {"cluster": {"colocate": True}}, [(0, 2)], {"n0": "1L 1E 1R"}),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "changes", "shapes", "expected"), [c[1:] for c in FITS], ids=[c[0] for c in FITS])
def test_where_actors_go(
    make_config: Any, setup: Setup, changes: dict[str, Any], shapes: list[Shape], expected: dict[str, str]
) -> None:
    config = configured(make_config, setup, **changes)
    nodes = nodes_of(*shapes)
    placed = plan_placement(config, nodes)
    check_laws(config, placed, nodes)
    assert layout(placed) == expected


REFUSED = [
    ("too few of a type", (8, 4, 1), of_types("H100", None), [(2, 32, "H100")] * 2 + [(8, 96, "L4")], "needs 8 learner x 1 = 8 GPUs of type H100; the cluster has 4 (2 nodes x 2), and 8 of type L4"),
    ("both of the same type", (8, 4, 1), of_types("H100", "H100"), [H100, L4], "needs 8 learner x 1 + 4 rollout x 1 = 12 GPUs of type H100; the cluster has 8 (1 node x 8), and 4 of type L4"),
    ("none of a type", (1, 1, 1), of_types(None, "A100"), [H100], "needs 1 rollout x 1 = 1 GPUs of type A100; the cluster has 0, and 8 of type H100"),
    ("a type that is not known", (1, 1, 1), of_types("H100", None), [(8, 96, "unknown")], "the cluster has 0, and 8 of type unknown"),
    ("wider than a node of its type", (4, 1, 8), of_types(None, "L4"), [(8, 96, "H100")] + [L4] * 2, "needs 8 GPUs of type L4 and 0.75 CPUs on one node for each rollout actor; the nodes are 1 x (8 H100 GPUs, 96 CPUs), 2 x (4 L4 GPUs, 48 CPUs)"),
    ("a type without any GPU", (1, 1, 1), of_types("H100", None), [(0, 8)], "needs GPUs (learner.accelerator=H100); the cluster has none"),
    ("reward GPUs without any GPU", (1, 1, 1), {"reward": {"gpus_per_worker": 0.5}}, [(0, 8)], "needs GPUs (reward.gpus_per_worker=0.5); the cluster has none"),
    ("reward GPUs are counted", (4, 4, 1), {"reward": {"num_workers": 2, "gpus_per_worker": 1}}, [BIG], "needs 4 learner x 1 + 4 rollout x 1 + 2 reward x 1 = 10 GPUs; the cluster has 8"),
    ("parts of GPUs cannot be put together", (4, 3, 1), {"reward": {"num_workers": 3, "gpus_per_worker": 0.4}}, [(8, 96)], "needs 4 learner x 1 + 3 rollout x 1 + 3 reward x 0.5 = 8.5 GPUs; the cluster has 8"),
    ("too few CPUs", (1, 1, 1), {}, [(0, 1)], "needs 1 learner x 0.75 + 1 rollout x 0.75 + 1 reward x 0.25 = 1.75 CPUs; the cluster has 1"),
    ("too few GPUs", (8, 4, 2), {}, [(4, 48)] * 3, "needs 8 learner x 1 + 4 rollout x 2 = 16 GPUs; the cluster has 12 on 3 nodes"),
    ("colocated too few", (16, 16, 1), {"cluster": {"colocate": True}}, [BIG], "needs 16 learner x 1 = 16 GPUs; the cluster has 8"),
    ("an engine wider than a node", (2, 1, 8), {}, [(6, 60)] * 2, "needs 8 GPUs and 0.75 CPUs on one node for each rollout actor; the nodes are 2 x (6 GPUs, 60 CPUs)"),
    ("wide engines on scraps", (2, 2, 4), {}, [(5, 60), (3, 60), (3, 60)], "2 rollout x (4 GPUs, 0.75 CPUs), 1 reward x 0.25 CPUs, each within one node"),
    ("a worker larger than a node", (1, 1, 1), {"reward": {"cpus_per_worker": 3}}, [(0, 2)] * 3, "needs 3 CPUs on one node for each reward actor; the nodes are 3 x (0 GPUs, 2 CPUs)"),
    ("CPUs of GPU nodes", (8, 8, 1), {"learner": {"cpus_per_rank": 24}}, [BIG, BIG], "needs 8 learner x 24 + 8 rollout x 0.75 + 1 reward x 0.25 = 198.25 CPUs; the cluster has 192 on 2 nodes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "changes", "shapes", "reason"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_cannot_be_is_refused_with_the_arithmetic(
    make_config: Any, setup: Setup, changes: dict[str, Any], shapes: list[Shape], reason: str
) -> None:
    config = configured(make_config, setup, **changes)
    with pytest.raises(PlacementError) as caught:
        plan_placement(config, nodes_of(*shapes))
    assert "\n" not in str(caught.value)
    assert reason in str(caught.value)


def check_laws(config: Any, placed: list[Bundle], nodes: list[Node]) -> None:
    """What any plan must keep: every actor once, no node overdrawn, shared GPUs on one node."""
    with_gpus = any(node.num_gpus for node in nodes)
    bare = [(b.role, b.index, b.num_cpus, b.num_gpus) for b in plan_bundles(config, with_gpus=with_gpus)]
    assert [(b.role, b.index, b.num_cpus, b.num_gpus) for b in placed] == bare
    for node in nodes:
        mine = [bundle for bundle in placed if bundle.node == node.name]
        assert sum(bundle.num_cpus for bundle in mine) <= node.num_cpus + 1e-6
        assert sum(bundle.num_gpus for bundle in mine) <= node.num_gpus + 1e-6
    type_of = {node.name: node.accelerator for node in nodes}
    for bundle in placed:
        assert bundle.accelerator is None or type_of[bundle.node] in (None, bundle.accelerator)
    learner = [bundle.node for bundle in placed if bundle.role == "learner"]
    for engine in placed:
        for rank in engine.shares_gpus_of:
            assert learner[rank] == engine.node
    claimed = Counter(rank for engine in placed for rank in engine.shares_gpus_of)
    assert all(count == 1 for count in claimed.values())


@settings(max_examples=100, deadline=None)
@given(
    nodes=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["H100", "L4"])), min_size=1, max_size=4),
    setup=st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4)),
    types=st.tuples(*[st.sampled_from([None, "H100", "L4"])] * 2),
)
def test_a_plan_of_types_is_found_wherever_one_exists(
    make_config: Any, nodes: list[tuple[int, str]], setup: Setup, types: tuple[str | None, str | None]
) -> None:
    (ranks, engines, width), (of_learner, of_engines) = setup, types
    possible = any(
        sum(spread) == ranks
        and all(not taken or of_learner in (None, kind) for taken, (_, kind) in zip(spread, nodes, strict=True))
        and sum(
            (have - taken) // width
            for taken, (have, kind) in zip(spread, nodes, strict=True)
            if of_engines in (None, kind)
        )
        >= engines
        for spread in itertools.product(*(range(have + 1) for have, _ in nodes))
    )
    if not any(have for have, _ in nodes):
        return
    config = configured(make_config, setup, **of_types(of_learner, of_engines))
    made = nodes_of(*((float(have), 1000.0, kind) for have, kind in nodes))
    try:
        placed = plan_placement(config, made)
    except PlacementError:
        assert not possible
    else:
        assert possible
        check_laws(config, placed, made)


@settings(max_examples=200, deadline=None)
@given(
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    setup=st.tuples(st.integers(1, 10), st.integers(1, 4), st.integers(1, 5)),
)
def test_a_plan_is_found_wherever_one_exists(make_config: Any, gpus: list[int], setup: Setup) -> None:
    """Against every way to spread the learner over the nodes, CPUs being plenty."""
    ranks, engines, width = setup
    spreads = itertools.product(*(range(count + 1) for count in gpus))
    possible = any(
        sum(spread) == ranks
        and sum((have - taken) // width for have, taken in zip(gpus, spread, strict=True)) >= engines
        for spread in spreads
    )
    config, nodes = configured(make_config, setup), nodes_of(*((float(count), 1000.0) for count in gpus))
    if not any(gpus):
        return
    try:
        placed = plan_placement(config, nodes)
    except PlacementError:
        assert not possible
    else:
        assert possible
        check_laws(config, placed, nodes)


@pytest.mark.parametrize(
    ("setup", "shape", "expected"),
    [
        ((4, 4, 1), BIG, 1),
        ((8, 8, 1), BIG, 2),
        ((8, 7, 8), BIG, 8),
        ((3, 3, 4), (5.0, 60.0), 3),
        ((512, 256, 2), BIG, 128),
        ((1, 1, 1), (0.0, 2.0), 1),
        ((1, 3, 1), (0.0, 2.0), 2),
    ],
)
def test_the_smallest_number_of_equal_nodes(
    make_config: Any, setup: Setup, shape: tuple[float, float], expected: int
) -> None:
    assert num_nodes_needed(configured(make_config, setup), Node("n", shape[1], shape[0])) == expected


@pytest.mark.parametrize("shape", [(4.0, 60.0), (8.0, 0.5), (8.0, 0.0)])
def test_nodes_of_which_no_number_is_enough(make_config: Any, shape: tuple[float, float]) -> None:
    with pytest.raises(PlacementError):
        num_nodes_needed(configured(make_config, (1, 1, 8)), Node("n", shape[1], shape[0]))


def test_one_bundle_per_actor_learner_first(make_config: Any) -> None:
    config = make_config(learner={"num_ranks": 2}, rollout={"num_engines": 2}, reward={"num_workers": 2})
    bundles = plan_bundles(config, with_gpus=True)
    roles = [(bundle.role, bundle.index) for bundle in bundles]
    assert roles == [("learner", 0), ("learner", 1), ("rollout", 0), ("rollout", 1), ("reward", 0), ("reward", 1)]
    assert [bundle.num_gpus for bundle in bundles] == [1, 1, 1, 1, 0, 0]


def test_totals_that_suffice_have_no_shortfall(make_config: Any) -> None:
    bundles = plan_bundles(make_config(rollout={"num_engines": 4, "tensor_parallel": 2}), with_gpus=True)
    assert shortfall(bundles, nodes_of((9, 64))) is None
    assert shortfall(bundles, nodes_of((3, 32), (6, 32))) is None
    assert "= 9 GPUs; the cluster has 8 on 2 nodes" in (shortfall(bundles, nodes_of((4, 32), (4, 32))) or "")


@pytest.mark.parametrize(
    ("asked", "share"),
    [(0.0, 0.0), (0.5, 0.5), (0.4, 0.5), (0.3, 0.3333), (0.1, 0.1), (0.6, 1.0), (1.0, 1.0), (2.0, 2.0)],
)
def test_a_part_of_a_gpu_leaves_no_rest(make_config: Any, asked: float, share: float) -> None:
    bundles = plan_bundles(make_config(reward={"gpus_per_worker": asked}), with_gpus=True)
    assert [bundle.num_gpus for bundle in bundles if bundle.role == "reward"] == [share]
    with pytest.raises(ValueError, match=r"gpus_per_worker=1\.5: above 1 Ray gives whole GPUs only; set it to 2"):
        make_config(reward={"gpus_per_worker": 1.5})


def test_an_autoscaler_is_asked_for_the_type(make_config: Any) -> None:
    bundles = plan_bundles(make_config(learner={"accelerator": "H100"}), with_gpus=True)
    assert [bundle.wish() for bundle in bundles] == [
        {"CPU": 0.75, "GPU": 1.0, "accelerator_type:H100": 0.001},
        {"CPU": 0.75, "GPU": 1.0},
        {"CPU": 0.25},
    ]


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        ({"Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0}, "Labels": {}}, "H100"),
        ({"Resources": {"GPU": 8.0}, "Labels": {"ray.io/accelerator-type": "L4"}}, "L4"),
        ({"Resources": {"GPU": 8.0}}, "unknown"),
    ],
)
def test_the_type_of_a_node_as_ray_tells_it(node: dict[str, Any], kind: str) -> None:
    assert accelerator_of(node) == kind


def test_more_colocated_engines_than_the_learner_has_gpus_are_a_configuration_error(make_config: Any) -> None:
    with pytest.raises(ValueError, match="4 engines x 2 GPUs do not fit on the learner's 6"):
        configured(make_config, (6, 4, 2), cluster={"colocate": True})
