"""A side of `rollout_overhead` and `tail`: a whole system on Ray that collects graded groups each time it is asked.

Run by path in a process of its own, with a checkout first on PYTHONPATH. It must run with older revisions too, so of
pool and engines it uses only what both have: the pool's constructor, `generate`, and the names of the engines' actors.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.launch import open_system, quiet_libraries
from dphrl.collect import collect_groups
from dphrl.config.schema import Config
from dphrl.fingerprint import fingerprint
from dphrl.prepare import Prepared, prepare
from dphrl.protocols import Parts, RewardPool, RolloutPool, System
from dphrl.reference.stage import fill_reference
from dphrl.tracking.console import Console
from dphrl.types import Prompt, RolloutGroup


def pool_of_each(config: Config) -> list[RolloutPool]:
    """Each engine as a pool of its own."""
    from actors.rollout_pool import RayRolloutPool

    names = [f"{config.run_name}-rollout-{i}" for i in range(config.rollout.num_engines)]
    return [RayRolloutPool([ray.get_actor(name)], config) for name in names]


async def collect(
    config: Config, prompts: Sequence[Prompt], pools: Sequence[RolloutPool], rewards: RewardPool, seed: int
) -> dict[str, Any]:
    """Seconds until all groups are graded. Each pool gets as many of the prompts as the others, all at once."""
    num_samples, began = config.rollout.num_samples, time.perf_counter()
    shares = await asyncio.gather(
        *[
            collect_groups(pool, rewards, prompts[i :: len(pools)], num_samples, seed=seed)
            for i, pool in enumerate(pools)
        ]
    )
    seconds = time.perf_counter() - began
    groups = [group for share in shares for group in share.groups]
    return {"seconds": seconds, "num_tokens": sum(share.num_tokens for share in shares), "digest": digest(groups)}


def digest(groups: Sequence[RolloutGroup]) -> str:
    """Of every sampled token, whatever the order of prompts."""
    answers = {g.prompt.prompt_id: [c.token_ids for c in g.completions] for g in groups}
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()[:12]


async def reference(config: Config, prepared: Prepared, parts: Parts) -> dict[str, Any]:
    """Seconds of the whole reference stage on all prompts."""
    identity = fingerprint(config, prepared.model_dir, prepared.prompts, parts.learner.dtype)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        buffer = await fill_reference(
            config,
            prepared.prompts,
            parts.rollouts,
            parts.rewards,
            parts.learner,
            identity,
            Path(folder, "reference"),
        )
        seconds = time.perf_counter() - began
    return {"seconds": seconds, **{name: buffer.counts()[f"num_{name}"] for name in ("graded", "stored_samples")}}


async def serve(config: Config, prepared: Prepared, system: System) -> None:
    parts = await system.start(lambda line: print(line, file=sys.stderr))
    await parts.rollouts.refit(parts.learner)
    together, each = [parts.rollouts], pool_of_each(config)
    print("answer {}", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        if order.get("stage") == "reference":
            done = await reference(config, prepared, parts)
        else:
            prompts = prepared.prompts[order["first"] : order["first"] + order["count"]]
            pools = each if order.get("split") else together
            done = await collect(config, prompts, pools, parts.rewards, order["seed"])
        print("answer " + json.dumps(done), flush=True)


def main() -> None:
    import actors

    checkout, settings = sys.argv[1], json.loads(sys.argv[2])
    assert str(actors.__file__).startswith(checkout), actors.__file__
    config = Config.model_validate(settings)
    quiet_libraries()
    prepared = prepare(config, Console(sys.stderr))
    with open_system(config, prepared, inline=False) as system:
        asyncio.run(serve(config, prepared, system))


if __name__ == "__main__":
    main()
