"""Adapters under DeepSpeed's sharding: they train as in plain torch, and the rest stays as it was."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import save
from tests.integration.test_learner import inline_results, make_batches

pytestmark = pytest.mark.integration

SEQUENCES = [((1, 2, 5, 6, 7, 8), 2), ((1, 2, 9, 10, 11), 2)]


@pytest.mark.parametrize("zero_stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_deepspeed_ranks_train_adapters_as_plain_torch(
    ray_cluster: None, make_config: Any, tiny_dir: str, prompts: list[Any], zero_stage: int, tmp_path: Path
) -> None:
    import ray

    from actors.learner_group import RayLearner
    from actors.learner_rank import LearnerRank

    # Reverse KL on rollouts needs a resident reference policy.
    config = make_config(
        model={"lora": {"rank": 4}},
        algorithm={"divergence": "reverse_kl", "estimator": "rollout"},
        learner={"num_ranks": 2, "zero_stage": zero_stage, "micro_batch_tokens": 96, "gradient_checkpointing": True},
    )
    batches = make_batches(prompts)[:2]
    expected, _ = inline_results(config, tiny_dir, batches)
    ranks = [LearnerRank.options(num_cpus=0.1).remote(config, i) for i in range(2)]

    async def on_all(function: Any) -> list[Any]:
        return await asyncio.gather(*[rank.__ray_call__.remote(function) for rank in ranks])

    async def run() -> dict[str, Any]:
        master = await ranks[0].address.remote()
        found: dict[str, Any] = {}
        await asyncio.gather(*[rank.connect.remote(master, tiny_dir) for rank in ranks])
        learner = RayLearner(ranks)
        found["start"] = await learner.score(SEQUENCES)
        first = await learner.update(batches[0])
        await save(learner, tmp_path / "checkpoint")
        second = await learner.update(batches[1])
        found["metrics"] = [first, second]
        (found["weights"], found["parts"]), _ = await on_all(_weights_and_parts)
        found["trained"] = await learner.score(SEQUENCES)
        await on_all(_leave_adapters_out)
        found["reference"] = await learner.score(SEQUENCES)
        await on_all(_leave_adapters_in)
        await learner.load(tmp_path / "checkpoint", 1)
        (found["saved"], _), _ = await on_all(_weights_and_parts)
        found["again"] = await learner.update(batches[1])
        (found["weights again"], _), _ = await on_all(_weights_and_parts)
        found["trained again"] = await learner.score(SEQUENCES)
        return found

    try:
        found = asyncio.run(run())
    finally:
        for rank in ranks:
            ray.kill(rank)

    for ours, theirs in zip(found["metrics"], expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    assert found["reference"] == found["start"] != found["trained"], "the initial policy, to the bit"

    base = load_file(Path(tiny_dir) / "model.safetensors")
    assert found["weights"].keys() == base.keys()
    num_adapted = 0
    for name, (frozen, a, b) in found["parts"].items():
        assert torch.equal(frozen, base[name]), name
        merged = frozen if a is None else frozen.double() + 32.0 / 4 * (b.double() @ a.double())
        torch.testing.assert_close(found["weights"][name].double(), merged.double(), rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(found["weights"][name], base[name]) == (a is None), name
        num_adapted += a is not None
    assert num_adapted == 14

    assert found["again"] == found["metrics"][1], "a restored learner repeats the step it had made"
    assert found["trained again"] == found["trained"]
    for name, value in found["weights"].items():
        assert torch.equal(found["weights again"][name], value), name
    _check_files(tmp_path / "checkpoint", tiny_dir, found["saved"], base)


def _check_files(checkpoint: Path, tiny_dir: str, saved: dict[str, torch.Tensor], base: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    exported = load_file(checkpoint / "hf" / "model.safetensors")
    assert exported.keys() == base.keys()
    for name, value in exported.items():
        assert torch.equal(value, saved[name]), name
    whole = sum(value.nbytes for value in base.values())
    state = sum(path.stat().st_size for path in (checkpoint / "state").iterdir())
    # Of 38 k trained parameters at rank 8, 19 k at rank 4: 12 bytes each, beside a model of 1.6 MB.
    assert state < 0.6 * whole, "the state holds adapters alone"
    ids = torch.tensor([SEQUENCES[0][0]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(checkpoint / "hf", dtype=torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, checkpoint / "adapter")
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def _weights_and_parts(rank: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What engines would get, and what it is made of."""
    from dphrl.learner.lora import plain_weights

    weights = {name: tensor.detach().clone() for name, tensor in rank._weights}
    parts = {}
    for weight in plain_weights(rank._policy.lm):
        with rank._weights._gathered(weight.parameters):
            a, b = (p.detach().clone() for p in weight.adapter[:2]) if weight.adapter else (None, None)
            parts[weight.name] = (weight.base.detach().clone(), a, b)
    return weights, parts


def _leave_adapters_out(rank: Any) -> None:
    """From now on `score` is by the resident reference policy."""
    engine = rank._engine
    engine.forward = lambda batch: (
        (engine.reference_forward(batch),) * 2
    )  # in the place of entropies, which nobody reads


def _leave_adapters_in(rank: Any) -> None:
    del rank._engine.forward
