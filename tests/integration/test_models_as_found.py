"""A real engine on a model as users have them: a replaced tokenizer, a tied head that is stored twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integration.test_rollout import LocalLearner, generate, perturbed_policy
from tests.model_folders import write_head, write_tokenizer

pytestmark = pytest.mark.integration

TEXT = "<|im_start|>user\nWhat is 12 + 30?  1000\n\n\tx<|im_end|>\n"


@pytest.fixture(scope="module")
def found(ray_cluster: None, make_config: Any, tiny_dir: str, tmp_path_factory: Any) -> Iterator[Any]:
    import ray

    from actors.rollout_engine import RolloutEngine

    folder: Path = write_head(tiny_dir, tmp_path_factory.mktemp("found") / "model", "copy")
    own = write_tokenizer(folder, "bytes", "LlamaTokenizerFast")
    actor = RolloutEngine.options(num_cpus=0.5).remote(make_config(), str(folder), 0)
    ray.get(actor.ready.remote(), timeout=120)
    yield SimpleNamespace(folder=str(folder), own=own, engine=actor)
    ray.kill(actor)


def test_the_engine_decodes_by_the_models_own_tokenizer(found: Any) -> None:
    import ray

    def encode_and_decode(engine: Any) -> tuple[list[int], str]:
        token_ids = engine._tokenizer.encode(TEXT)
        return token_ids, engine._tokenizer.decode(token_ids)

    token_ids, text = ray.get(found.engine.__ray_call__.remote(encode_and_decode))
    assert token_ids == found.own.encode(TEXT).ids
    assert text == TEXT


def test_a_head_that_is_stored_twice_follows_its_embedding(found: Any, make_config: Any, prompts: list[Any]) -> None:
    from actors.rollout_pool import RayRolloutPool

    config = make_config()
    pool = RayRolloutPool([found.engine], config, prompts[:8])
    for version, scale in enumerate((0.0, 0.05, 0.1)):
        learner = LocalLearner(perturbed_policy(found.folder, config, scale), config, version)
        assert asyncio.run(pool.refit(learner))["sync/logprob_gap_max"] < 1e-4  # type: ignore[arg-type]


def test_it_stops_at_the_tokenizers_end_and_at_the_generation_configurations(
    found: Any, make_config: Any, prompts: list[Any]
) -> None:
    from actors.rollout_pool import RayRolloutPool

    config = make_config()
    policy = perturbed_policy(found.folder, config, 1.0)  # wild enough to sample every token
    pool = RayRolloutPool([found.engine], config, prompts[:8])
    asyncio.run(pool.refit(LocalLearner(policy, config, 9)))  # type: ignore[arg-type]
    declared = policy.lm.generation_config.eos_token_id
    ends = {declared, found.own.token_to_id("<|im_end|>")}
    assert len(ends) == 2
    completions = generate(pool, prompts[:8], 32, seed=1)
    for completion in completions:
        assert ends.isdisjoint(completion.token_ids[:-1])
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in ends)
        assert completion.text == found.own.decode(list(completion.token_ids))
    assert ends <= {completion.token_ids[-1] for completion in completions}
    assert torch.isfinite(torch.tensor([value for one in completions for value in one.logprobs])).all()
