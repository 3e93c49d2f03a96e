"""`dphrl replay`: one step of a run's learner again, alone: without engines and graders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.learner_group import RayLearner
from actors.learner_rank import LearnerRank
from cluster.connection import connect
from cluster.planning.placement import plan_bundles
from cluster.planning.ray_placement import cluster_nodes
from cluster.ray_system import learner_layout, rank_variables
from cluster.start import Start
from dphrl.config.loading import InputError, load_config
from dphrl.config.schema import Config
from dphrl.inline import InlineLearner
from dphrl.models import resolve_model
from dphrl.protocols import Learner
from dphrl.replay import Replayed, find_route, read_step, replay
from dphrl.tracking.console import Console


def replay_step(run: Path, step: int) -> bool:
    """Take the step again as the run did, inline or on Ray, and print both; returns whether all is the same.

    Raises InputError when the folder holds no run, or the step cannot be replayed.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: holds no run (no config.yaml); name a run's folder, RUN_DIR/NAME")
    route, stored = find_route(run, step), read_step(run, step)
    # As it was then, but on the cluster of now.
    cluster = load_config(str(run / "config.yaml"), stored=True).cluster
    config = stored.config.model_copy(update={"cluster": cluster})
    console = Console()
    start = "the initial policy" if route.checkpoint is None else str(route.checkpoint)
    console.info(f"replay of step {step}: {len(route.steps)} step(s) from {start}")
    with _learner(config, stored.layout, console) as learner:
        done = asyncio.run(replay(learner, run, route))
    report(done, console)
    return done[-1].difference is None


def report(done: list[Replayed], console: Console) -> None:
    """The last step that was taken again: every metric, and whether it is the same."""
    last = done[-1]
    rows = [(name, repr(last.stored.get(name)), repr(value)) for name, value in sorted(last.replayed.items())]
    console.table(f"step {last.step}", ("metric", "stored", "replayed"), rows)
    console.info(f"identical: {len(done)} step(s)" if not last.difference else f"step {last.step}: {last.difference}")


@contextmanager
def _learner(config: Config, layout: str, console: Console) -> Iterator[Learner]:
    """A fresh learner as the step's. Raises InputError when this machine or version makes it of another layout."""
    model_dir = str(resolve_model(config.model.path))
    if layout.startswith("inline"):
        yield _of_layout(InlineLearner(config, model_dir), layout)
        return
    # A learner that sends nothing needs no group with engines.
    config = config.model_copy(update={"sync": config.sync.model_copy(update={"backend": "object_store"})})
    connect(config)
    try:
        yield _of_layout(_ray_learner(config, model_dir, console), layout)
    finally:
        ray.shutdown()


def _ray_learner(config: Config, model_dir: str, console: Console) -> RayLearner:
    with_gpus = any(node.num_gpus for node in cluster_nodes())
    bundles = [bundle for bundle in plan_bundles(config, with_gpus=with_gpus) if bundle.role == "learner"]
    ranks: list[Any] = []
    rank_class: Any = LearnerRank

    async def make_ranks() -> None:
        for rank in ranks:
            ray.kill(rank)
        ranks[:] = [
            rank_class.options(num_cpus=bundle.num_cpus, num_gpus=bundle.num_gpus, **rank_variables()).remote(
                config, bundle.index
            )
            for bundle in bundles
        ]

    async def start() -> dict[str, Any]:
        await make_ranks()
        limit = config.learner.timeout_s
        return await Start({}, None, ranks, [], make_ranks, model_dir, limit, None, console.info).run()

    facts = asyncio.run(start())
    return RayLearner(ranks, str(facts["dtype"]), learner_layout(config))


def _of_layout(learner: Learner, layout: str) -> Learner:
    if learner.layout != layout:
        raise InputError(f"the step was taken by a learner of the layout {layout!r}; this one is {learner.layout!r}")
    return learner
