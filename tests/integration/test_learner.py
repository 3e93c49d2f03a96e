"""The DeepSpeed learner against plain torch: same completions, same losses, same weights."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dphrl.types import RowKind, TrainBatch, TrainRow
from tests.checkpoints import save

pytestmark = pytest.mark.integration


def make_batches(prompts: list[Any], seed: int = 0) -> list[TrainBatch]:
    """Rows of unequal lengths and both kinds, several to a prompt, in two mini-batches, for two steps; and a third
    step, in which no row has an advantage."""
    rng = random.Random(seed)
    prompts = prompts[:4]

    def row(kind: RowKind) -> TrainRow:
        prompt = rng.choice(prompts).token_ids
        length = rng.randint(3, 20)
        completion = tuple(rng.randrange(5, 20) for _ in range(length))
        logprobs = tuple(-rng.uniform(2, 4) for _ in range(length))
        return TrainRow(kind, prompt + completion, len(prompt), logprobs, 0.01 * rng.random(), rng.uniform(-1, 1))

    def minibatch() -> tuple[TrainRow, ...]:
        rows = [row(RowKind.POLICY) for _ in range(7)] + [row(RowKind.REFERENCE) for _ in range(4)]
        rng.shuffle(rows)
        return tuple(rows)

    flat = replace(row(RowKind.POLICY), advantage=0.0)
    batches = [TrainBatch(step, step, (minibatch(), minibatch()), 1e-3) for step in range(2)]
    return [*batches, TrainBatch(2, 2, ((flat,),), 1e-3)]


def inline_results(config: Any, tiny_dir: str, batches: list[TrainBatch]) -> tuple[list[Any], Any]:
    from dphrl.inline import InlineLearner

    learner = InlineLearner(config, tiny_dir)
    metrics = [asyncio.run(learner.update(batch)) for batch in batches]
    return metrics, dict(learner.policy.lm.named_parameters())


@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "sequence_parallel", "prefixes"),
    [
        (1, 1, 1, "never"),
        (2, 2, 1, "always"),
        (2, 3, 1, "always"),
        (2, 3, 2, "auto"),
        (4, 2, 2, "auto"),
    ],
)
def test_deepspeed_ranks_train_as_plain_torch(
    ray_cluster: None,
    make_config: Any,
    tiny_dir: str,
    tokenizer: Any,
    prompts: list[Any],
    num_ranks: int,
    zero_stage: int,
    sequence_parallel: int,
    prefixes: str,
    tmp_path: Path,
) -> None:
    import ray

    from actors.learner_group import RayLearner
    from actors.learner_rank import LearnerRank
    from actors.weight_transfer.packing import unpack_tensors
    from dphrl.inline import InlineLearner

    learner_config = {
        "num_ranks": num_ranks,
        "zero_stage": zero_stage,
        "micro_batch_tokens": 96,
        "sequence_parallel": sequence_parallel,
    }
    config = make_config(learner=learner_config | {"share_prefix": prefixes})
    batches = make_batches(prompts)
    apart = make_config(learner=learner_config | {"share_prefix": "never"})
    expected, expected_weights = inline_results(apart, tiny_dir, batches)

    ranks = [LearnerRank.options(num_cpus=0.1).remote(config, i) for i in range(num_ranks)]

    async def run() -> tuple[list[Any], dict[str, torch.Tensor], Any, Any]:
        master = await ranks[0].address.remote()
        await asyncio.gather(*[rank.connect.remote(master, tiny_dir) for rank in ranks])
        learner = RayLearner(ranks)
        first = await learner.update(batches[0])
        await save(learner, tmp_path / "checkpoint")
        second = await learner.update(batches[1])
        third = await learner.update(batches[2])
        chunks = [await chunk async for chunk in learner.publish()]
        await learner.load(tmp_path / "checkpoint", 1)
        again = await learner.update(batches[1])
        weights = {name: tensor.clone() for chunk in chunks for name, tensor in unpack_tensors(chunk)}
        return [first, second, third], weights, second, again

    try:
        metrics, weights, second, again = asyncio.run(run())
    finally:
        for rank in ranks:
            ray.kill(rank)

    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert torch.linalg.norm(weights[name] - value) <= 1e-4 * torch.linalg.norm(value), name
    assert again == second, "a restored learner repeats the step it had made, to the bit"

    # Another learner, that shards nothing, goes on from what these ranks wrote.
    other = InlineLearner(apart, tiny_dir)
    asyncio.run(other.load(tmp_path / "checkpoint", 1))
    assert asyncio.run(other.update(batches[1])) == pytest.approx(second, rel=1e-4, abs=1e-6)

    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint" / "hf", dtype=torch.float32)
    assert exported.config.tie_word_embeddings
    assert not torch.equal(exported.get_input_embeddings().weight, expected_weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_zero3_ranks_gather_the_head_once_a_pass(
    ray_cluster: None, make_config: Any, tokenizer: Any, tmp_path: Path, tied: bool
) -> None:
    """Over seven chunks of tokens on one rank and one on the other; the gradient is plain torch's."""
    import ray
    from transformers import LlamaConfig, LlamaForCausalLM

    from actors.learner_group import RayLearner
    from actors.learner_rank import LearnerRank

    torch.manual_seed(0)
    # 2048 x 64 is above the size below which DeepSpeed leaves a parameter whole.
    shape = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64, tie_word_embeddings=tied))
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    long_row = TrainRow(RowKind.POLICY, tuple(range(5, 65)), 4, (-7.0,) * 56, 0.01, 1.0)
    short_row = TrainRow(RowKind.REFERENCE, tuple(range(5, 15)), 4, (-7.0,) * 6, 0.02)
    batches = [TrainBatch(step, step, ((long_row, short_row),), 1e-3) for step in range(3)]
    config = make_config(learner={"num_ranks": 2, "zero_stage": 3})
    expected, expected_weights = inline_results(config, str(tmp_path / "model"), batches)
    ranks = [LearnerRank.options(num_cpus=0.1).remote(config, i) for i in range(2)]

    async def run() -> Any:
        master = await ranks[0].address.remote()
        await asyncio.gather(*[rank.connect.remote(master, str(tmp_path / "model")) for rank in ranks])
        await asyncio.gather(*[rank.__ray_call__.remote(_count_gathers_of_the_head) for rank in ranks])
        learner = RayLearner(ranks)
        metrics = [await learner.update(batch) for batch in batches]
        gathers = await asyncio.gather(*[rank.__ray_call__.remote(lambda self: self._head_gathers) for rank in ranks])
        weights = await asyncio.gather(*[rank.__ray_call__.remote(_full_weights) for rank in ranks])
        return metrics, gathers, weights[0]

    try:
        metrics, gathers, weights = asyncio.run(asyncio.wait_for(run(), 120))
    finally:
        for rank in ranks:
            ray.kill(rank)
    for ours, theirs in zip(metrics, expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, value in expected_weights.items():
        assert torch.linalg.norm(weights[name] - value) <= 1e-4 * torch.linalg.norm(value), name
    # After the first step DeepSpeed knows that the backward pass needs it next, and may keep it. A tied weight may be
    # gathered for the embedding, too.
    uses = 2 if tied else 1
    for each in gathers:
        assert len(batches) <= each["forward"] <= uses * len(batches), each
        assert 1 <= each["backward"] <= uses * len(batches), each


def _count_gathers_of_the_head(rank: Any) -> None:
    """Eight tokens a chunk, and a count of how often the head's weight is gathered in each direction."""
    from collections import Counter

    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from dphrl.algo import logprobs

    logprobs.CHUNK_BYTES["cpu"] = 4 * 2048 * 8
    rank._head_gathers = Counter()
    weight = rank._policy.lm.get_output_embeddings().weight
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather = getattr(PartitionedParameterCoordinator, name)

    def counted(self: Any, params: Any, forward: bool, *args: Any, **kwargs: Any) -> Any:
        rank._head_gathers["forward" if forward else "backward"] += sum(param is weight for param in params)
        return gather(self, params, forward, *args, **kwargs)

    setattr(PartitionedParameterCoordinator, name, counted)


def _full_weights(rank: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in rank._weights}
