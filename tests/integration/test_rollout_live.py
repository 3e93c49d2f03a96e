"""A real engine that takes work and weights while it decodes: nothing lost or doubled, every token of one version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.test_rollout import LocalLearner, perturbed_policy

pytestmark = pytest.mark.integration

NUM_SAMPLES = 6


def config_of(make_config: Any, on_update: str) -> Any:
    # Fewer than are asked for, so that some wait while others decode.
    rollout = {"max_staleness": 2, "on_update": on_update, "max_concurrent_sequences": 16, "max_tokens": 48}
    return make_config(rollout=rollout, data={"max_prompt_tokens": 32})


@pytest.fixture(scope="module", params=["recompute", "keep", "finish"])
def engine(ray_cluster: None, make_config: Any, tiny_dir: str, request: Any) -> Iterator[Any]:
    import ray

    from actors.rollout_engine import RolloutEngine

    config = config_of(make_config, request.param)
    actor = RolloutEngine.options(num_cpus=0.5).remote(config, tiny_dir, 0)  # type: ignore[attr-defined]
    ray.get(actor.ready.remote(), timeout=120)
    yield request.param, actor, config
    ray.kill(actor)


def test_weights_change_in_the_midst_of_completions(engine: Any, tiny_dir: str, prompts: list[Any]) -> None:
    from actors.rollout_pool import RayRolloutPool

    on_update, actor, config = engine
    pool = RayRolloutPool([actor], config, prompts[:4])
    policies = {version: perturbed_policy(tiny_dir, config, 0.02 * version) for version in (1, 2, 3)}
    learners = {version: LocalLearner(policy, config, version) for version, policy in policies.items()}

    async def run() -> list[Any]:
        await pool.refit(learners[1])  # type: ignore[arg-type]
        found: list[Any] = []

        async def collect(part: list[Any]) -> None:
            async for completions in pool.generate(part, NUM_SAMPLES, seed=5):
                found.extend(completions)

        async with asyncio.TaskGroup() as group:
            # Two calls at a time, which share the engine.
            group.create_task(collect(prompts[:10]))
            group.create_task(collect(prompts[10:20]))
            for version in (2, 3):
                wanted = len(found) + 8
                while len(found) < wanted:
                    await asyncio.sleep(0.001)
                await pool.refit(learners[version])  # type: ignore[arg-type]
        return found

    found = asyncio.run(run())
    assert sorted((c.prompt_id, c.sample_index) for c in found) == sorted(
        (p.prompt_id, i) for p in prompts[:20] for i in range(NUM_SAMPLES)
    )
    assert {c.policy_version for c in found} == {1, 2, 3}
    mixed = [c for c in found if c.version_spans]
    assert bool(mixed) == (on_update != "finish"), "the weights came while completions were in the making"
    by_id = {p.prompt_id: p for p in prompts}
    gaps: dict[str, list[float]] = {"own": [], "mixed": []}
    for completion in found:
        spans = completion.version_spans or ((completion.policy_version, len(completion.token_ids)),)
        assert sum(num_tokens for _, num_tokens in spans) == len(completion.token_ids)
        assert completion.policy_version == spans[0][0]
        prompt = by_id[completion.prompt_id]
        scored = {}
        for version, _ in spans:
            sequence = ((*prompt.token_ids, *completion.token_ids), len(prompt.token_ids))
            (scored[version],) = asyncio.run(learners[version].score([sequence]))
        place = 0
        for version, num_tokens in spans:
            for i in range(place, place + num_tokens):
                kind = "mixed" if place else "own"
                gaps[kind].append(abs(scored[version][i] - completion.logprobs[i]))
            place += num_tokens
    assert max(gaps["own"]) <= 1e-4
    if on_update == "recompute":
        assert max(gaps["mixed"]) <= 1e-4, "every token has the log-prob of the version that made it"
    if on_update == "keep":
        assert max(gaps["mixed"]) > 1e-3, "keys and values of the old weights are not those of the new"
