"""Which actor gets what: a pure plan from the config, and its thin application through a Ray placement group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dphrl.config import Config


@dataclass(frozen=True)
class Bundle:
    """Resources one actor reserves; `role` and `index` say whose they are."""

    role: str
    index: int
    num_cpus: float
    num_gpus: float

    def resources(self) -> dict[str, float]:
        """In Ray's names."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


def plan_bundles(config: Config, *, with_gpus: bool) -> list[Bundle]:
    """One bundle per actor: learner ranks first, so that packing puts them side by side."""
    rollout, learner, reward = config.rollout, config.learner, config.reward
    gpus_per_engine = float(rollout.tensor_parallel) if with_gpus else 0.0
    return [
        *(Bundle("learner", i, learner.cpus_per_rank, float(with_gpus)) for i in range(learner.num_ranks)),
        *(Bundle("rollout", i, rollout.cpus_per_engine, gpus_per_engine) for i in range(rollout.num_engines)),
        *(Bundle("reward", i, reward.cpus_per_worker, 0.0) for i in range(reward.num_workers)),
    ]


def shortfall(bundles: Sequence[Bundle], cluster: Mapping[str, float]) -> str | None:
    """Why the cluster can never hold the plan, with the arithmetic; None when its totals suffice."""
    for name, unit in (("GPU", "GPUs"), ("CPU", "CPUs")):
        needed = sum(bundle.resources().get(name, 0.0) for bundle in bundles)
        available = cluster.get(name, 0.0)
        if needed > available + 1e-6:
            return f"needs {_sum_of(bundles, name)} = {needed:g} {unit}; the cluster has {available:g}"
    return None


def _sum_of(bundles: Sequence[Bundle], name: str) -> str:
    terms = []
    for role in dict.fromkeys(bundle.role for bundle in bundles):
        mine = [bundle.resources().get(name, 0.0) for bundle in bundles if bundle.role == role]
        if any(mine):
            terms.append(f"{len(mine)} {role} x {mine[0]:g}")
    return " + ".join(terms)


def reserve(bundles: Sequence[Bundle], timeout_s: float) -> Any:
    """A ready Ray placement group of the bundles, in order.

    Raises RuntimeError that says what is missing, when others hold the resources for longer than timeout_s.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([bundle.resources() for bundle in bundles], strategy="PACK")
    if not group.wait(timeout_s):
        remove_placement_group(group)
        free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
        raise RuntimeError(
            f"waited cluster.placement_timeout_s={timeout_s:g} for {_sum_of(bundles, 'CPU')} CPUs"
            + (f" and {_sum_of(bundles, 'GPU')} GPUs" if any(b.num_gpus for b in bundles) else "")
            + f"; free now: {free['CPU']:g} CPUs, {free['GPU']:g} GPUs. Others hold the rest, or no node fits a bundle"
        )
    return group
