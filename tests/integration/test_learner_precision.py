"""The DeepSpeed learner in bfloat16 on two ranks: its masters, its clipping, its checkpoints, and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dphrl.types import RowKind, TrainBatch, TrainRow

pytestmark = pytest.mark.integration

LEARNING_RATE, GRAD_CLIP = 1e-6, 0.05


def make_batch(step: int) -> TrainBatch:
    """Rows of unequal lengths that no micro-batch holds together."""
    rng = random.Random(step)

    def row(kind: RowKind) -> TrainRow:
        ids = tuple(rng.randrange(5, 20) for _ in range(rng.randint(9, 26)))
        logprobs = tuple(-rng.uniform(2, 4) for _ in ids[6:])
        return TrainRow(kind, ids, 6, logprobs, 0.01 * rng.random(), rng.uniform(-1, 1))

    rows = [row(RowKind.POLICY) for _ in range(7)] + [row(RowKind.REFERENCE) for _ in range(4)]
    return TrainBatch(step, step, (tuple(rows),), LEARNING_RATE)


class Pair:
    """Two ranks that stay up from test to test; `build` gives them a new engine."""

    def __init__(self, ranks: list[Any], model: str, make_config: Callable[..., Any]) -> None:
        self.ranks, self.model, self.make_config = ranks, model, make_config
        self.master: Any = None

    def all(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        import ray

        return ray.get([rank.__ray_call__.remote(function, *arguments) for rank in self.ranks], timeout=120)

    def build(self, zero_stage: int, dtype: str = "bfloat16", algorithm: Any = None, **learner: Any) -> None:
        import ray

        config = self.make_config(
            model={"dtype": dtype},
            algorithm=algorithm or {},
            learner={"num_ranks": 2, "zero_stage": zero_stage, "grad_clip": GRAD_CLIP, "micro_batch_tokens": 96}
            | learner,
        )
        self.master = self.master or ray.get(self.ranks[0].address.remote())
        self.all(_take_config, config)
        ray.get([rank.connect.remote(self.master, self.model) for rank in self.ranks], timeout=240)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        from actors.learner_group import RayLearner

        return asyncio.run(RayLearner(self.ranks).update(batch))

    def digest(self) -> str:
        from actors.learner_group import RayLearner

        return asyncio.run(RayLearner(self.ranks).digest())


@pytest.fixture(scope="module")
def pair(ray_cluster: None, tiny_dir: str, make_config: Callable[..., Any]) -> Iterator[Pair]:
    import ray

    from actors.learner_rank import LearnerRank

    config = make_config(learner={"num_ranks": 2})
    ranks = [LearnerRank.options(num_cpus=0.1).remote(config, i) for i in range(2)]
    yield Pair(ranks, tiny_dir, make_config)
    for rank in ranks:
        ray.kill(rank)


def _take_config(rank: Any, config: Any) -> None:
    rank._config = config


def _state(rank: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Float32 masters, and the weights that the model computes with; both whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = {name: safe_get_full_fp32_param(p).clone() for name, p in rank._policy.lm.named_parameters()}
    return {"masters": masters, "weights": {name: p.detach().clone() for name, p in rank._weights}}


def _momentum_square(rank: Any) -> float:
    """Sum of squares of this rank's part of AdamW's first moment, after one step a tenth of the clipped gradient."""
    states = rank._engine.module.optimizer.optimizer.state.values()
    return sum(float(one["exp_avg"].double().square().sum()) for one in states)


def _optimizer_kind(rank: Any) -> tuple[set[bool], set[str]]:
    inner = rank._engine.module.optimizer.optimizer
    return {group["fused"] for group in inner.param_groups}, {
        str(one["exp_avg"].device) for one in inner.state.values()
    }


def _score(rank: Any, batch: TrainBatch) -> torch.Tensor:
    """Log-probs by the resident reference model, of rows in one micro-batch."""
    from dphrl.learner.batching import collate

    with torch.no_grad():
        return rank._engine.reference_forward(collate(batch.minibatches[0], packed=False))


def _num_held(rank: Any) -> tuple[int, int]:
    """Numbers of the reference that this rank holds between its passes, and numbers it has."""
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    parameters = list(rank._engine.reference.parameters())
    return (
        sum(p.ds_tensor.numel() if is_zero_param(p) else p.numel() for p in parameters),
        sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
    )


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def plain_norm(tiny_dir: str, make_config: Callable[..., Any]) -> float:
    """Of the first batch's gradient, by torch alone and in float32."""
    from dphrl.inline import InlineLearner

    learner = InlineLearner(make_config(learner={"micro_batch_tokens": 96}), tiny_dir)
    return asyncio.run(learner.update(make_batch(0)))["learner/grad_norm"]


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "none"), (2, "none"), (2, "optimizer"), (3, "none")])
def test_small_steps_are_kept_clipped_and_repeated(
    pair: Pair, plain_norm: float, zero_stage: int, offload: str, tmp_path: Path
) -> None:
    pair.build(zero_stage, offload=offload)
    start = pair.all(_state)[0]
    assert {one.dtype for one in start["masters"].values()} == {torch.float32}
    assert {one.dtype for one in start["weights"].values()} == {torch.bfloat16}

    rows = make_batch(0).minibatches[0]
    poisoned = (dataclasses.replace(rows[0], advantage=math.nan), *rows[1:])
    refused = pair.update(dataclasses.replace(make_batch(0), minibatches=(poisoned,)))
    after_nan = pair.all(_state)[0]
    assert not math.isfinite(refused["learner/grad_norm"]), "nobody would see that a step was skipped"
    assert same(after_nan["masters"], start["masters"])
    assert same(after_nan["weights"], start["weights"])

    first = pair.update(make_batch(0))
    moved = pair.all(_state)[0]
    assert first["learner/grad_norm"] == pytest.approx(plain_norm, rel=0.02)
    clipped = 10 * math.sqrt(sum(pair.all(_momentum_square)))
    assert clipped == pytest.approx(GRAD_CLIP, rel=1e-3)
    num_moved = sum(int((moved["masters"][name] != one).sum()) for name, one in start["masters"].items())
    num_numbers = sum(one.numel() for one in start["masters"].values())
    assert num_moved > 0.95 * num_numbers, "a rate of 1e-6 is below bfloat16's steps, and the masters lost it"
    assert all(torch.equal(moved["weights"][name], one.bfloat16()) for name, one in moved["masters"].items()), (
        "the weights are the masters, rounded"
    )
    assert pair.all(_optimizer_kind) == [({True}, {"cpu"})] * 2

    import ray

    ray.get([rank.copy_state.remote() for rank in pair.ranks])
    ray.get([rank.write_state.remote(str(tmp_path)) for rank in pair.ranks])
    second = pair.update(make_batch(1))
    then, digest = pair.all(_state)[0], pair.digest()
    ray.get([rank.load.remote(str(tmp_path), False) for rank in pair.ranks])
    assert pair.digest() != digest
    again = pair.update(make_batch(1))
    restored = pair.all(_state)[0]
    assert pair.digest() == digest, "one number for weights and optimizer of all ranks"
    assert again == second
    assert same(restored["masters"], then["masters"])
    assert same(restored["weights"], then["weights"])


def _moments(rank: Any) -> list[dict[str, torch.Tensor]]:
    """AdamW's state on this rank, its count of steps included."""
    states = rank._engine.module.optimizer.optimizer.state.values()
    return [{name: value.clone() for name, value in one.items()} for one in states]


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "offload"),
    [
        (1, "bfloat16", "none"),
        (1, "float32", "optimizer"),
        (2, "float32", "none"),
        (2, "bfloat16", "optimizer"),
        (3, "float32", "none"),
        (3, "bfloat16", "optimizer"),
    ],
)
def test_a_skipped_step_leaves_no_trace(pair: Pair, zero_stage: int, dtype: str, offload: str) -> None:
    """A gradient that is not finite on one rank alone, and a loss that is not finite but has finite gradients."""
    batch, then = make_batch(0), make_batch(1)
    rows = batch.minibatches[0]
    nan_gradient = (dataclasses.replace(rows[0], advantage=math.nan), *rows[1:])
    # The divergence goes on along its tangent, whose slope is finite wherever log u is.
    infinite_loss = (*rows[:-1], dataclasses.replace(rows[-1], logprobs=(-math.inf, *rows[-1].logprobs[1:])))
    ends = []
    for bad in ((), (nan_gradient, infinite_loss)):
        pair.build(zero_stage, dtype, offload=offload)
        assert pair.update(batch)["learner/skipped_steps"] == 0
        for minibatch in bad:
            before = pair.all(_state), pair.all(_moments)
            refused = pair.update(dataclasses.replace(batch, minibatches=(minibatch,)))
            assert refused["learner/skipped_steps"] == pytest.approx(1)
            assert not math.isfinite(refused["learner/grad_norm"])
            assert not math.isfinite(refused["policy/loss"] + refused["divergence/loss"])
            assert _equal(before, (pair.all(_state), pair.all(_moments)))
        told = pair.update(then)
        ends.append((told, pair.all(_state), pair.all(_moments)))
    assert _equal(*ends), "the step after is the one that it would have been"
    assert {float(one["step"]) for one in ends[1][2][0]} == {2.0}


def _equal(ours: Any, theirs: Any) -> bool:
    """To the bit, however deep."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_sharded_reference_scores_as_a_whole_one(pair: Pair, dtype: str) -> None:
    """The reference of stage 3 against that of stage 2; the policy learns between, and the reference stays.

    Stage 3 comes first, because it gives the whole process another `linear`, which rounds differently in bfloat16.
    """
    estimator = {"divergence": "reverse_kl", "estimator": "rollout", "eta": 0.1}
    batch, scores = make_batch(0), {}
    for zero_stage in (3, 2):
        pair.build(zero_stage, dtype, algorithm=estimator, lr=1e-3)
        before = pair.all(_score, batch)
        assert torch.equal(before[0], before[1]), "both ranks hold the same reference"
        metrics = pair.update(dataclasses.replace(batch, learning_rate=1e-2))
        assert math.isfinite(metrics["learner/grad_norm"])
        scores[zero_stage] = pair.all(_score, batch)[0]
        assert torch.equal(scores[zero_stage], before[0]), "training moved the reference"
        shares = [held / numbers for held, numbers in pair.all(_num_held)]
        assert shares == pytest.approx([1, 1] if zero_stage == 2 else [0.5, 0.5], rel=0.01)
    torch.testing.assert_close(scores[3], scores[2], rtol=0, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradient_under_zero3(pair: Pair) -> None:
    norms = []
    for gradient_checkpointing in (False, True):
        pair.build(3, gradient_checkpointing=gradient_checkpointing)
        norms.append(pair.update(make_batch(0))["learner/grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
