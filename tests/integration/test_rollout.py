"""One real vLLM engine in a Ray actor: weights in, completions out, always of the version it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dphrl.protocols import LastUpdate

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def engine(ray_cluster: None, make_config: Any, tiny_dir: str) -> Iterator[Any]:
    import ray

    from actors.rollout_engine import RolloutEngine

    actor = RolloutEngine.options(num_cpus=0.5).remote(make_config(), tiny_dir, 0)
    ray.get(actor.ready.remote(), timeout=120)
    yield actor
    ray.kill(actor)


def perturbed_policy(tiny_dir: str, config: Any, scale: float) -> Any:
    from dphrl.learner.loading import load_policy

    policy = load_policy(tiny_dir, config.model, temperature=config.rollout.temperature)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


class LocalLearner:
    """A learner without optimizer or ranks: what `refit` needs, with the real forward pass."""

    last_update: LastUpdate | None = None

    def __init__(self, policy: Any, config: Any, version: int) -> None:
        from dphrl.learner.update import UpdateSettings

        self.policy_version = version
        self.policy, self.settings = policy, UpdateSettings.from_config(config)
        self.engine = SimpleNamespace(forward=policy, device=torch.device("cpu"))

    async def publish(self) -> AsyncIterator[Any]:
        import ray

        from actors.weight_transfer.ledger import Ledger
        from actors.weight_transfer.packing import packed_chunks

        ledger = Ledger()
        for chunk in packed_chunks(ledger.record(self.policy.lm.named_parameters())):
            yield ray.put(chunk)
        self.summary = ledger.summary

    async def sent(self) -> Any:
        return self.summary

    async def score(self, sequences: Any) -> list[Any]:
        from dphrl.learner.update import score_sequences

        scored = score_sequences(sequences, self.engine, self.settings)
        return [scored[i] for i in range(len(sequences))]


@pytest.fixture
def refit(engine: Any, make_config: Any, prompts: list[Any]) -> Any:
    from actors.rollout_pool import RayRolloutPool

    pool = RayRolloutPool([engine], make_config(), prompts[:8])

    def run(learner: LocalLearner) -> float:
        return asyncio.run(_call(pool, learner))

    async def _call(pool: Any, learner: Any) -> float:
        return (await pool.refit(learner))["sync/logprob_gap_max"]

    return SimpleNamespace(run=run, pool=pool)


def generate(pool: Any, prompts: list[Any], num_samples: int, **options: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [c async for batch in pool.generate(prompts, num_samples, **options) for c in batch]

    return asyncio.run(collect())


def test_serves_nothing_before_its_first_refit(engine: Any, prompts: list[Any]) -> None:
    import ray

    from actors.asks import Ask

    with pytest.raises(ray.exceptions.RayTaskError, match="refit it before generating"):
        ray.get(engine.submit.remote("pool", [Ask(0, prompts[0], (0,), 0)]))
    with pytest.raises(ray.exceptions.RayTaskError, match="refit it before generating"):
        ray.get(engine.probe.remote(prompts[:1], 0, 8))


@pytest.mark.parametrize("version", [1, 2])
def test_tied_model_after_a_sync_equals_transformers_token_for_token(
    refit: Any, make_config: Any, tiny_dir: str, prompts: list[Any], version: int
) -> None:
    config = make_config()
    policy = perturbed_policy(tiny_dir, config, 0.01 * version)
    assert policy.lm.config.tie_word_embeddings
    assert refit.run(LocalLearner(policy, config, version)) <= 1e-3

    completions = {c.prompt_id: c for c in generate(refit.pool, prompts[:8], 1, seed=0, greedy=True)}
    assert {c.policy_version for c in completions.values()} == {version}
    for prompt in prompts[:8]:
        output = policy.lm.generate(
            torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=config.rollout.max_tokens
        )
        assert completions[prompt.prompt_id].token_ids == tuple(output[0, len(prompt.token_ids) :].tolist())


def test_an_engine_with_other_weights_than_the_learner_stops_the_run(
    refit: Any, make_config: Any, tiny_dir: str
) -> None:
    config = make_config()
    learner = LocalLearner(perturbed_policy(tiny_dir, config, 0.02), config, 3)
    learner.engine.forward = perturbed_policy(tiny_dir, config, 0.04)
    with pytest.raises(RuntimeError, match=r"policy version 3.*max_mean_logprob_gap=5e-05"):
        refit.run(learner)


def test_completions_are_repeatable_by_seed_and_complete(
    refit: Any, make_config: Any, tiny_dir: str, prompts: list[Any]
) -> None:
    config = make_config()
    refit.run(LocalLearner(perturbed_policy(tiny_dir, config, 0.01), config, 4))
    first, again, other = (generate(refit.pool, prompts[:6], 5, seed=seed) for seed in (11, 11, 12))

    def content(completions: list[Any]) -> list[Any]:
        return sorted((c.prompt_id, c.sample_index, c.token_ids) for c in completions)

    assert [(p, i) for p, i, _ in content(first)] == sorted((p.prompt_id, i) for p in prompts[:6] for i in range(5))
    assert content(first) == content(again)
    assert content(first) != content(other)
    for completion in first:
        assert len(completion.logprobs) == len(completion.token_ids) <= config.rollout.max_tokens
        assert completion.truncated == (
            len(completion.token_ids) == config.rollout.max_tokens and completion.token_ids[-1] != 2
        )


def test_more_prompt_tokens_than_a_step_takes(refit: Any, make_config: Any, tiny_dir: str, prompts: list[Any]) -> None:
    """A vLLM step on a CPU takes 4096 tokens, and this is more: a prompt must not be cut where they end."""
    config = make_config()
    refit.run(LocalLearner(perturbed_policy(tiny_dir, config, 0.01), config, 5))
    generator = torch.Generator().manual_seed(0)
    length = config.max_sequence_tokens - 2
    long = [
        replace(prompts[0], prompt_id=f"long-{i}", token_ids=tuple(ids))
        for i, ids in enumerate(torch.randint(5, 30, (150, length), generator=generator).tolist())
    ]
    together = {c.prompt_id: c.token_ids for c in generate(refit.pool, long, 1, seed=3)}
    assert len(together) == len(long)
    alone = generate(refit.pool, long[-5:], 1, seed=3)
    assert {c.prompt_id: c.token_ids for c in alone} == {p.prompt_id: together[p.prompt_id] for p in long[-5:]}
