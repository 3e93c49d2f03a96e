"""The loss and its gradient must not know how rows were batched."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dphrl.data.schedule import step_indices
from dphrl.learner.batching import collate
from dphrl.learner.bundles import FEWEST_MICRO_BATCHES, Bundle, Sharing, cut_micro_batches, plan_micro_batches
from dphrl.learner.policy import PolicyModel
from dphrl.learner.update import UpdateSettings, combine_rank_metrics, run_update, score_sequences
from dphrl.types import RowKind, TrainBatch, TrainRow


def make_rows(num_rows: int, seed: int = 0) -> list[TrainRow]:
    rng = random.Random(seed)
    rows = []
    for i in range(num_rows):
        prompt, length = rng.randint(1, 9), rng.randint(1, 15)
        tokens = tuple(rng.randrange(5, 20) for _ in range(prompt + length))
        kind = RowKind.REFERENCE if i % 3 == 0 else RowKind.POLICY
        logprobs = tuple(-rng.uniform(2, 4) for _ in range(length))
        rows.append(TrainRow(kind, tokens, prompt, logprobs, rng.random() / 50, rng.uniform(-2, 2)))
    return rows


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    from dphrl.tiny import TinyShape, build_model, build_tokenizer

    return PolicyModel(build_model(TinyShape(), build_tokenizer(), seed=0).eval().double(), temperature=0.7)


class GradientEngine:
    """Accumulates gradients and never steps: what an update would have stepped with."""

    def __init__(self, policy: PolicyModel) -> None:
        self.policy, self.device = policy, torch.device("cpu")
        policy.zero_grad()

    def forward(self, batch: Any) -> Any:
        return self.policy(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        return 0.0

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.policy.parameters()])


def update(policy: Any, make_config: Any, rows: Any, *, num_ranks: int = 1, **learner: Any) -> tuple[Any, Any]:
    settings = UpdateSettings.from_config(make_config(learner=learner))
    batch = TrainBatch(0, 0, (tuple(rows),), 1e-3)
    engine = GradientEngine(policy)
    parts = [run_update(batch, engine, settings, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    # Each rank scaled its loss by num_ranks, for the average a real engine takes.
    return engine.gradient() / num_ranks, combine_rank_metrics(parts)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [40, 96, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_update_is_the_same_however_rows_are_batched(
    policy: Any, make_config: Any, num_ranks: int, packing: str, max_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    rows = make_rows(13)
    policy = copy.deepcopy(policy).to(dtype)
    expected, expected_metrics = update(policy, make_config, rows, packing="padded", micro_batch_tokens=4096)
    random.Random(1).shuffle(rows)
    got, metrics = update(
        policy, make_config, rows, num_ranks=num_ranks, packing=packing, micro_batch_tokens=max_tokens
    )
    assert torch.linalg.norm(got - expected) <= tolerance * torch.linalg.norm(expected)
    assert metrics == pytest.approx(expected_metrics, rel=tolerance, abs=1e-7)


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2, 4, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_gradients_add_up_over_micro_batches_of_any_number_of_rows(
    policy: Any, make_config: Any, rows_per_micro_batch: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Rows of one length, so that a token budget is a number of rows."""
    rows = [row for row in make_rows(1000) if row.num_tokens == 22][:13]
    assert len(rows) == 13
    assert len({row.kind for row in rows}) == 2
    policy = copy.deepcopy(policy).to(dtype)
    together, _ = update(policy, make_config, rows, micro_batch_tokens=4096)
    # One sequence of the longest kind must fit: 40 tokens hold one of these.
    budget = max(40, rows_per_micro_batch * 22)
    apart, _ = update(policy, make_config, rows, micro_batch_tokens=budget)
    assert torch.linalg.norm(apart - together) <= tolerance * torch.linalg.norm(together)


def test_rows_alone_give_what_they_give_together(policy: Any, make_config: Any) -> None:
    rows = make_rows(5)
    settings = UpdateSettings.from_config(make_config(learner={"packing": "packed"}))
    engine = SimpleNamespace(forward=policy, device=torch.device("cpu"))
    sequences = [(row.token_ids, row.num_prompt_tokens) for row in rows]
    together = score_sequences(sequences, engine, settings)
    for i, sequence in enumerate(sequences):
        assert score_sequences([sequence], engine, settings)[0] == pytest.approx(together[i], abs=1e-6)


def test_scores_equal_a_plain_log_softmax(policy: Any) -> None:
    row = make_rows(1)[0]
    logprobs, entropy = policy(collate([row], packed=False))
    logits = policy.lm(torch.tensor([row.token_ids])).logits[0] / 0.7
    expected = logits.log_softmax(-1)
    start = row.num_prompt_tokens
    for i, token in enumerate(row.token_ids[start:]):
        assert logprobs[i].item() == pytest.approx(expected[start + i - 1, token].item(), abs=1e-9)
        p = expected[start + i - 1]
        assert entropy[i].item() == pytest.approx(-(p.exp() * p).sum().item(), abs=1e-9)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4), st.booleans())
def test_every_row_is_trained_once_within_the_budget(lengths: list[int], num_ranks: int, packed: bool) -> None:
    rows = [TrainRow(RowKind.POLICY, (i,) * (n + 1), 1, (0.0,) * n, 1.0) for i, n in enumerate(lengths)]
    plans = [
        plan_micro_batches(rows, rank=r, num_ranks=num_ranks, max_tokens=40, packed=packed) for r in range(num_ranks)
    ]
    assert len({len(plan) for plan in plans}) == 1, "ranks must take part in the same number of collectives"
    seen = [
        row.token_ids[0] for plan in plans for group in plan for bundle in group for row in bundle.rows if row.weight
    ]
    assert sorted(seen) == list(range(len(lengths)))
    for group in (group for plan in plans for group in plan):
        longest = max(bundle.num_tokens for bundle in group)
        assert (sum(bundle.num_tokens for bundle in group) if packed else longest * len(group)) <= 40


def test_a_row_beyond_the_budget_is_refused() -> None:
    row = TrainRow(RowKind.POLICY, (1,) * 50, 1, (0.0,) * 49, 1.0)
    with pytest.raises(ValueError, match=r"50 tokens exceeds learner\.micro_batch_tokens=40; raise it"):
        cut_micro_batches([Bundle((row,))], 40, packed=True)


def alone(*lengths: int) -> list[Bundle]:
    return [Bundle((TrainRow(RowKind.POLICY, (1,) * n, n - 1, (0.0,), 1.0),)) for n in lengths]


def widths(plan: list[list[Bundle]]) -> list[list[int]]:
    return [[bundle.num_tokens for bundle in group] for group in plan]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (FEWEST_MICRO_BATCHES, [[10, 12, 30, 31, 32]]),
        (30.0, [[10, 12], [30, 31, 32]]),
        (0.5, [[10], [12], [30], [31], [32]]),
    ],
)
def test_padded_micro_batches_are_cut_where_padding_costs_least(cost: float, expected: list[list[int]]) -> None:
    sharing = Sharing(pair_cost=0.0, micro_batch_cost=cost)
    rows = alone(31, 10, 32, 12, 30)
    assert widths(cut_micro_batches(rows, 200, packed=False, sharing=sharing)) == expected


def test_of_two_micro_batches_the_padding_decides() -> None:
    plan = cut_micro_batches(alone(31, 10, 32, 12, 30), 100, packed=False, sharing=Sharing(pair_cost=0.0))
    assert widths(plan) == [[10, 12], [30, 31, 32]], "and not [10, 12, 30], which would fit as well"


def test_packed_micro_batches_are_as_few_as_fit() -> None:
    plan = cut_micro_batches(alone(31, 10, 32, 12, 30), 60, packed=True, sharing=Sharing(micro_batch_cost=0.0))
    assert widths(plan) == [[10, 12, 30], [31], [32]]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=7), st.sampled_from([0.0, 3.0, 20.0, FEWEST_MICRO_BATCHES]))
def test_no_other_cut_costs_less(lengths: list[int], cost: float) -> None:
    sharing = Sharing(pair_cost=1 / 50, micro_batch_cost=cost)
    ordered = sorted(lengths)

    def total(groups: list[list[int]]) -> float:
        return sum(len(group) * (max(group) + max(group) ** 2 / 50) + cost for group in groups)

    def cuts(start: int) -> Iterator[list[list[int]]]:
        if start == len(ordered):
            yield []
        for end in range(start + 1, len(ordered) + 1):
            if (end - start) * ordered[end - 1] <= 80:
                yield from ([ordered[start:end], *rest] for rest in cuts(end))

    plan = widths(cut_micro_batches(alone(*lengths), 80, packed=False, sharing=sharing))
    assert [length for group in plan for length in group] == ordered
    assert all(len(group) * max(group) <= 80 for group in plan)
    assert total(plan) == pytest.approx(min(map(total, cuts(0))))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_schedule_covers_every_epoch_without_repeats(num_items: int, count: int, seed: int) -> None:
    count = min(count, num_items)
    steps_per_epoch = num_items // count
    for epoch in range(2):
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        epoch_items = [i for step in steps for i in step_indices(num_items, step, count, seed)]
        assert len(epoch_items) == len(set(epoch_items)) == steps_per_epoch * count


def test_schedule_depends_on_seed_and_step_only() -> None:
    assert step_indices(100, 7, 10, 3) == step_indices(100, 7, 10, 3)
    assert step_indices(100, 7, 10, 3) != step_indices(100, 7, 10, 4)
    assert step_indices(5, 0, 10, 0) != [] == step_indices(0, 0, 10, 0)
    assert sorted(step_indices(5, 3, 10, 0)) == [0, 1, 2, 3, 4]
