"""The bundle plan is pure arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.placement import plan_bundles, shortfall


@pytest.mark.parametrize(
    ("changes", "with_gpus", "cluster", "reason"),
    [
        ({}, False, {"CPU": 2}, None),
        ({}, False, {"CPU": 1}, "1 learner x 0.75 + 1 rollout x 0.75 + 1 reward x 0.25 = 1.75 CPUs; the cluster has 1"),
        ({"learner": {"num_ranks": 2}}, False, {"CPU": 2}, "2 learner x 0.75 + 1 rollout x 0.75"),
        ({"learner": {"num_ranks": 2, "cpus_per_rank": 0.5}}, False, {"CPU": 2}, None),
        ({"rollout": {"num_engines": 4, "tensor_parallel": 2}}, True, {"CPU": 64, "GPU": 9}, None),
        (
            {"rollout": {"num_engines": 4, "tensor_parallel": 2}, "learner": {"num_ranks": 8}},
            True,
            {"CPU": 64, "GPU": 12},
            "needs 8 learner x 1 + 4 rollout x 2 = 16 GPUs; the cluster has 12",
        ),
        ({"reward": {"num_workers": 3, "cpus_per_worker": 0.5}}, False, {"CPU": 2.9}, "3 reward x 0.5 = 3 CPUs"),
    ],
)
def test_plan_fits_or_says_the_arithmetic(
    make_config: Any, changes: dict[str, Any], with_gpus: bool, cluster: dict[str, float], reason: str | None
) -> None:
    got = shortfall(plan_bundles(make_config(**changes), with_gpus=with_gpus), cluster)
    if reason is None:
        assert got is None
    else:
        assert got is not None
        assert reason in got


def test_one_bundle_per_actor_learner_first(make_config: Any) -> None:
    config = make_config(learner={"num_ranks": 2}, rollout={"num_engines": 2}, reward={"num_workers": 2})
    bundles = plan_bundles(config, with_gpus=True)
    roles = [(bundle.role, bundle.index) for bundle in bundles]
    assert roles == [("learner", 0), ("learner", 1), ("rollout", 0), ("rollout", 1), ("reward", 0), ("reward", 1)]
    assert [bundle.num_gpus for bundle in bundles] == [1, 1, 1, 1, 0, 0]
