"""What an update asks of its engine, in which order; and what one rank or several make of a batch."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dphrl.inline import InlineLearner
from dphrl.learner.policy import PolicyModel, rows_at
from dphrl.learner.torch_engine import TorchEngine
from dphrl.learner.update import (
    UpdateSettings,
    combine_rank_metrics,
    measure_sequences,
    run_update,
    score_sequences,
)
from dphrl.types import RowKind, TrainBatch, TrainRow
from tests.checkpoints import save


def row(length: int, kind: RowKind = RowKind.POLICY, token: int = 5) -> TrainRow:
    return TrainRow(kind, (1, 2, *[token] * length), 2, (-1.0,) * length, 0.01, 1.0)


class RecordingEngine:
    """Log-probs of -2 everywhere from one trainable number; writes down what it is asked."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.weight = torch.tensor(-2.0, requires_grad=True)
        self.calls: list[Any] = []

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("forward" if torch.is_grad_enabled() else "old")
        return self.weight.expand(len(batch.target_ids_N)), torch.ones(len(batch.target_ids_N))

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        self.calls.append("last backward" if last else "backward")

    def step(self, learning_rate: float) -> float:
        self.calls.append(("step", learning_rate))
        return 4.0 if len([call for call in self.calls if isinstance(call, tuple)]) == 1 else 1.0


def test_a_step_follows_the_last_micro_batch_of_each_mini_batch(make_config: Any) -> None:
    settings = UpdateSettings.from_config(make_config(learner={"micro_batch_tokens": 40}))
    engine = RecordingEngine()
    first = tuple(row(18) for _ in range(6))  # two rows of 20 tokens fit
    second = (row(18), row(18), row(18))
    metrics = run_update(TrainBatch(0, 0, (first, second), 0.125), engine, settings)
    assert engine.calls == [
        *["old"] * 2,  # of the second mini-batch alone: the first is trained by the weights that define pi_old
        *["forward", "backward"] * 2,
        *["forward", "last backward"],
        ("step", 0.125),
        *["forward", "backward"],
        *["forward", "last backward"],
        ("step", 0.125),
    ]
    assert metrics["learner/grad_norm"] == 2.5, "the mean of the two steps'"


def test_the_gap_is_the_largest_of_any_micro_batch_and_rank(make_config: Any) -> None:
    settings = UpdateSettings.from_config(make_config(learner={"micro_batch_tokens": 40}))
    rows = tuple(
        TrainRow(RowKind.POLICY, (1, 2, *[5] * 30), 2, (-2.0 - gap,) * 30, 0.01, 1.0) for gap in (0.25, 0.5, 0.125)
    )
    rehearsed = TrainRow(RowKind.REFERENCE, (1, 2, *[5] * 30), 2, (-9.0,) * 30, 0.01)
    batch = TrainBatch(0, 0, ((*rows, rehearsed),), 1e-3)
    for num_ranks in (1, 2, 4):
        parts = [run_update(batch, RecordingEngine(), settings, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
        together = combine_rank_metrics(parts)
        assert together["rollout/logprob_gap_max"] == pytest.approx(0.5)
        assert together["policy/entropy"] == pytest.approx(3 * 30 * 0.01)


@pytest.mark.parametrize("proximal_policy", ["learner", "behavior"])
def test_the_gap_to_the_engine_is_that_at_the_start_of_the_step(make_config: Any, proximal_policy: str) -> None:
    class Moving(RecordingEngine):
        def step(self, learning_rate: float) -> float:
            self.weight = torch.tensor(-7.0, requires_grad=True)
            return super().step(learning_rate)

    settings = UpdateSettings.from_config(make_config(algorithm={"proximal_policy": proximal_policy}))
    rows = tuple(TrainRow(RowKind.POLICY, (1, 2, 5), 2, (-2.5,), 0.05, 1.0) for _ in range(2))
    metrics = run_update(TrainBatch(0, 0, ((rows[0],), (rows[1],)), 1e-3), Moving(), settings)
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("stored", "advantage", "loss", "gradient"),
    [
        (-2.1, 1.0, -math.exp(0.1), -math.exp(0.1)),
        (-3.0, 1.0, -1.28, 0.0),  # it is likelier by far than when it was sampled: no further
        (-3.0, -1.0, math.exp(1.0), math.exp(1.0)),  # but it may be taken back
        (-1.0, -1.0, 0.8, 0.0),
    ],
)
def test_a_trust_region_around_the_policy_that_sampled(
    make_config: Any, stored: float, advantage: float, loss: float, gradient: float
) -> None:
    config = make_config(algorithm={"proximal_policy": "behavior", "num_minibatches": 1})
    settings = UpdateSettings.from_config(config)
    rows = [TrainRow(RowKind.POLICY, (1, 2, *[5] * 10), 2, (stored,) * 10, 0.05, advantage) for _ in range(2)]

    class Engine(RecordingEngine):
        gradients: tuple[float, ...] = ()

        def step(self, learning_rate: float) -> float:
            assert self.weight.grad is not None
            self.gradients += (float(self.weight.grad),)
            return super().step(learning_rate)

    engine = Engine()
    # The second mini-batch too is compared with the policy that sampled it, and no log-probs of before are needed.
    metrics = run_update(TrainBatch(0, 0, ((rows[0],), (rows[1],)), 1e-3), engine, settings)
    assert "old" not in engine.calls
    assert metrics["policy/loss"] == pytest.approx(loss * 0.5, rel=1e-6)
    assert engine.gradients[0] == pytest.approx(gradient * 0.5, rel=1e-6)
    weight = 0.5 * min(2.0, math.exp(-2.0 - stored))
    assert metrics["policy/importance_mean"] == pytest.approx(weight), "what it would be, though nothing is weighted"
    assert "policy/importance_affected" not in metrics
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(abs(-2.0 - stored))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "learner"),
        ({"rollout": {"max_staleness": 1}}, "behavior"),
        ({"algorithm": {"proximal_policy": "behavior"}}, "behavior"),
        ({"rollout": {"max_staleness": 1}, "algorithm": {"proximal_policy": "learner"}}, "learner"),
        ({"rollout": {"max_staleness": 1}, "algorithm": {"importance": "mask"}}, "learner"),
        ({"rollout": {"max_staleness": 1}, "algorithm": {"importance_cap": 5.0}}, "learner"),
        ({"rollout": {"max_staleness": 1}, "algorithm": {"ratio": "sequence"}}, "learner"),
        ({"rollout": {"max_staleness": 1}, "algorithm": {"policy_loss": "gspo"}}, "learner"),
    ],
)
def test_the_proximal_policy(make_config: Any, changes: dict[str, Any], expected: str) -> None:
    config = make_config(**changes)
    assert config.proximal_policy == expected
    assert UpdateSettings.from_config(config).around_behavior == (expected == "behavior")


def test_an_importance_weight_that_nobody_would_use_is_refused(make_config: Any) -> None:
    with pytest.raises(ValueError, match=r"importance=mask would do nothing; set algorithm\.proximal_policy: learner"):
        make_config(algorithm={"proximal_policy": "behavior", "importance": "mask"})


def test_metrics_of_the_policy_are_means_over_the_rows_that_are_computed(make_config: Any) -> None:
    """Half of the first mini-batch was left out, and three quarters of the second."""
    settings = UpdateSettings.from_config(make_config())
    rows = [TrainRow(RowKind.POLICY, (1, 2, *[5] * n), 2, (-2.5,) * n, 0.05, 1.0) for n in (10, 5)]
    batch = TrainBatch(0, 0, ((rows[0],), (rows[1],)), 1e-3, policy_shares=(0.5, 0.25))
    for num_ranks in (1, 2):
        parts = [run_update(batch, RecordingEngine(), settings, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
        metrics = combine_rank_metrics(parts)
        assert metrics["policy/entropy"] == pytest.approx(1.0)
        assert metrics["policy/importance_mean"] == pytest.approx(math.exp(0.5))
        assert metrics["policy/loss"] == pytest.approx(-math.exp(0.5) * (0.5 + 0.25) / 2), "a row left out adds 0"


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    from dphrl.tiny import TinyShape, build_model, build_tokenizer

    return PolicyModel(build_model(TinyShape(), build_tokenizer(), seed=0).eval(), temperature=1.0)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_score_every_sequence_once_and_no_filler(policy: Any, make_config: Any, num_ranks: int) -> None:
    class Engine:
        device = torch.device("cpu")
        forward = staticmethod(policy)

    settings = UpdateSettings.from_config(make_config(learner={"micro_batch_tokens": 40}))
    # Long rows that fill a micro-batch each, and a short one: some rank has fewer, and repeats a row.
    lengths = (29, 28, 3, 27, 26)
    sequences = [((1, 2, *[5 + i % 12 for i in range(length)]), 2) for length in lengths]
    alone = score_sequences(sequences, Engine(), settings)
    parts = [score_sequences(sequences, Engine(), settings, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    assert sorted(index for part in parts for index in part) == [0, 1, 2, 3, 4]
    for part in parts:
        for index, logprobs in part.items():
            assert logprobs == pytest.approx(alone[index], abs=1e-5)
            assert len(logprobs) == lengths[index]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_entropies_are_measured_with_the_scores(policy: Any, make_config: Any, num_ranks: int) -> None:
    class Engine:
        device = torch.device("cpu")
        forward = staticmethod(policy)

    settings = UpdateSettings.from_config(make_config(learner={"micro_batch_tokens": 40}))
    sequences = [((1, 2, *[5 + i % 12 for i in range(length)]), 2) for length in (29, 3, 26)]
    found: dict[int, Any] = {}
    for rank in range(num_ranks):
        found |= measure_sequences(sequences, Engine(), settings, rank=rank, num_ranks=num_ranks)
        scored = score_sequences(sequences, Engine(), settings, rank=rank, num_ranks=num_ranks)
        assert scored.items() <= {i: logprobs for i, (logprobs, _) in found.items()}.items()
    for i, (ids, num_prompt) in enumerate(sequences):
        with torch.no_grad():
            distributions = policy.lm(torch.tensor([ids])).logits[0].log_softmax(-1)[num_prompt - 1 : -1]
        entropies = -(distributions.exp() * distributions).sum(-1)
        assert found[i][1] == pytest.approx(entropies.tolist(), abs=1e-5)
        assert len(found[i][1]) == len(found[i][0]) == len(ids) - num_prompt


def test_gradients_of_positions_that_several_tokens_read_repeat_to_the_bit() -> None:
    """As the last position of a prompt that completions share. Indexing would add its gradients with atomics."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(4000, (6000,), generator=generator)
    index[::7] = 5
    given = torch.randn(6000, 128, generator=generator)
    values = torch.randn(4000, 128, generator=generator, requires_grad=True)
    assert torch.equal(rows_at(values, index), values[index])
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = [torch.autograd.grad(rows_at(values, index), values, given)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    expected = torch.zeros(4000, 128, dtype=torch.float64).index_add(0, index, given.double())
    torch.testing.assert_close(gradients[0].double(), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- the inline learner


@pytest.fixture
def learner(make_config: Any, tiny_dir: str) -> InlineLearner:
    return InlineLearner(make_config(rollout={"temperature": 0.8}), tiny_dir)


def batch_of(learner: InlineLearner) -> TrainBatch:
    return TrainBatch(0, learner.policy_version, ((row(4), row(6, RowKind.REFERENCE)),), 1e-2)


def test_an_update_moves_the_policy_and_raises_its_version(learner: InlineLearner) -> None:
    sequence = [((1, 2, 5, 6, 7), 2)]
    before = asyncio.run(learner.score(sequence))
    assert learner.policy_version == 0
    asyncio.run(learner.update(batch_of(learner)))
    assert learner.policy_version == 1
    after = asyncio.run(learner.score(sequence))
    assert max(abs(a - b) for a, b in zip(before[0], after[0], strict=True)) > 1e-3
    asyncio.run(learner.update(batch_of(learner)))
    assert learner.policy_version == 2


def test_scores_are_at_the_sampling_temperature(learner: InlineLearner) -> None:
    ids = (1, 2, 5, 6, 7)
    with torch.no_grad():
        logits = learner.policy.lm(torch.tensor([ids])).logits[0] / 0.8
    expected = [float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(2, 5)]
    assert asyncio.run(learner.score([(ids, 2)]))[0] == pytest.approx(expected, abs=1e-5)
    p = [logits[t - 1].log_softmax(-1) for t in range(2, 5)]
    ((logprobs, entropies),) = asyncio.run(learner.measure([(ids, 2)]))
    assert logprobs == asyncio.run(learner.score([(ids, 2)]))[0]
    assert entropies == pytest.approx([-float((one.exp() * one).sum()) for one in p], abs=1e-5)
    assert asyncio.run(learner.measure([])) == []


def test_a_checkpoint_brings_back_weights_moments_and_version(
    learner: InlineLearner, make_config: Any, tiny_dir: str, tmp_path: Path
) -> None:
    asyncio.run(learner.update(batch_of(learner)))
    asyncio.run(save(learner, tmp_path))
    other = InlineLearner(make_config(rollout={"temperature": 0.8}), tiny_dir)
    asyncio.run(other.load(tmp_path, 1))
    for one in (learner, other):
        asyncio.run(one.update(batch_of(one)))
    assert other.policy_version == learner.policy_version == 2
    for ours, theirs in zip(learner.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_does_not_bring_its_weight_decay_back(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    first, second = (InlineLearner(make_config(learner={"weight_decay": decay}), tiny_dir) for decay in (0.0, 0.5))
    asyncio.run(save(first, tmp_path))
    asyncio.run(second.load(tmp_path, 0))
    assert [group["weight_decay"] for group in second.engine.optimizer.param_groups] == [0.5]


def test_a_step_without_any_signal_is_the_one_that_all_its_rows_make(make_config: Any, tiny_dir: str) -> None:
    """AdamW's moments decay, and the weights go on by them: with one row as with all, to the bit."""
    flat = tuple(TrainRow(RowKind.POLICY, (1, 2, *[5 + i] * 4), 2, (-1.0,) * 4, 1 / 16, 0.0) for i in range(4))
    learners = [InlineLearner(make_config(), tiny_dir) for _ in range(2)]
    for learner, rows in zip(learners, (flat, flat[:1]), strict=True):
        asyncio.run(learner.update(batch_of(learner)))
        metrics = asyncio.run(learner.update(TrainBatch(1, 1, (rows,), 1e-2)))
        assert (metrics["learner/grad_norm"], metrics["policy/loss"]) == (0.0, 0.0)
    for all_rows, one_row in zip(*[learner.policy.parameters() for learner in learners], strict=True):
        assert torch.equal(all_rows, one_row)
        assert bool(torch.isfinite(one_row).all())


def flat(learner: InlineLearner) -> list[torch.Tensor]:
    moments = [value for state in learner.engine.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*learner.policy.parameters(), *moments)]


@pytest.mark.parametrize("what", ["advantage", "sampled", "rehearsed"])
def test_a_skipped_step_leaves_no_trace(make_config: Any, tiny_dir: str, what: str) -> None:
    """A NaN advantage; log-probs of a sample that are no number; and an infinite loss with finite gradients: the
    divergence goes on along its tangent, whose slope is finite wherever log u is."""
    policy, rehearsed = batch_rows = batch_of(InlineLearner(make_config(), tiny_dir)).minibatches[0]
    bad = {
        "advantage": (dataclasses.replace(policy, advantage=math.nan), rehearsed),
        "sampled": (dataclasses.replace(policy, logprobs=(math.nan, *policy.logprobs[1:])), rehearsed),
        "rehearsed": (policy, dataclasses.replace(rehearsed, logprobs=(-math.inf, *rehearsed.logprobs[1:]))),
    }[what]
    ends = []
    for minibatches in ((batch_rows, batch_rows), (batch_rows, bad, batch_rows)):
        learner = InlineLearner(make_config(algorithm={"proximal_policy": "behavior"}), tiny_dir)
        metrics = asyncio.run(learner.update(TrainBatch(0, 0, minibatches, 1e-2)))
        assert metrics["learner/skipped_steps"] == len(minibatches) - 2
        ends.append(flat(learner))
    assert all(map(torch.equal, *ends))
    assert not math.isfinite(metrics["policy/loss"] + metrics["divergence/loss"] + metrics["learner/grad_norm"])


def test_skipped_steps_and_a_gap_that_is_no_number_add_up_over_ranks(make_config: Any) -> None:
    class Engine(RecordingEngine):
        def step(self, learning_rate: float) -> float:
            super().step(learning_rate)
            return [math.nan, 1.0, math.inf][sum(isinstance(call, tuple) for call in self.calls) - 1]

    settings = UpdateSettings.from_config(make_config(learner={"micro_batch_tokens": 40}))
    rows = (row(36), TrainRow(RowKind.POLICY, (1, 2, *[5] * 35), 2, (math.nan,) * 35, 0.01, 1.0))
    batch = TrainBatch(0, 0, (rows, rows, rows), 1e-3)
    for num_ranks in (1, 2):
        parts = [run_update(batch, Engine(), settings, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        metrics = combine_rank_metrics(parts)
        assert metrics["learner/skipped_steps"] == pytest.approx(2)
        assert math.isnan(metrics["rollout/logprob_gap_max"]), "whichever micro-batch or rank has it"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(make_config: Any, bad: float) -> None:
    model: Any = torch.nn.Linear(2, 1, bias=False)
    engine = TorchEngine(model, make_config())
    before = model.weight.detach().clone()
    engine.backward(model(torch.tensor([[1.0, bad]])).sum(), last=True)
    assert not math.isfinite(engine.step(1e-2)), "and its norm tells of it"
    assert torch.equal(model.weight, before)
    assert not engine.optimizer.state, "nor does it enter the moments"
    # The next step is made as if there had been none.
    engine.backward(model(torch.tensor([[1.0, 2.0]])).sum(), last=True)
    assert engine.step(1e-2) == pytest.approx(math.sqrt(5))
    assert not torch.equal(model.weight, before)
    assert bool(torch.isfinite(model.weight).all())
