"""Ranks that share rows: who gets what, and what is refused. An integration test shows that they train as one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MistralConfig, Qwen2Config

from dphrl.config.loading import InputError
from dphrl.learner.batching import collate
from dphrl.learner.bundles import plan_micro_batches
from dphrl.learner.sequence_parallel import SequenceShare, check_shareable
from dphrl.learner.update import UpdateSettings, combine_rank_metrics, run_update
from dphrl.types import RowKind, TrainBatch, TrainRow

SHAPE: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
}  # fmt: skip


def make_rows(lengths: list[int]) -> list[TrainRow]:
    return [
        TrainRow(RowKind.POLICY, tuple(range(100 * i, 100 * i + n + 1)), 1, (-1.0,) * n, 0.1, 0.5)
        for i, n in enumerate(lengths)
    ]


@settings(deadline=None)  # a first call on a busy machine is slow
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 5))
def test_every_token_is_predicted_on_one_rank(lengths: list[int], size: int) -> None:
    batch = collate(make_rows(lengths), packed=True)
    parts = [SequenceShare(index, size, None).cut(batch) for index in range(size)]
    assert len({part.input_ids_BT.shape for part in parts}) == 1, "attention exchanges stretches of one length"
    num_positions = batch.input_ids_BT.shape[1]
    for whole, pieces in (
        (batch.input_ids_BT, [part.input_ids_BT for part in parts]),
        (batch.position_ids_BT, [part.position_ids_BT for part in parts]),
    ):
        assert torch.equal(torch.cat(pieces, dim=1)[:, :num_positions], whole)
    behind = torch.cat([part.position_ids_BT for part in parts], dim=1)[0, num_positions - 1 :]
    assert (behind.diff() == 1).all(), "filling starts no sequence of its own"
    assert torch.cat([part.token_index_K for part in parts]).sort()[0].tolist() == list(range(sum(lengths)))
    for part in parts:
        expected = batch.input_ids_BT[0][batch.predictor_index_N[part.token_index_K]]
        assert torch.equal(part.input_ids_BT[0][part.predictor_index_K], expected)


@pytest.mark.parametrize("packed", [False, True])
def test_ranks_that_share_rows_get_the_same_sequences(packed: bool) -> None:
    rows = make_rows([3, 9, 4, 12, 7])
    plans = [
        plan_micro_batches(rows, rank=rank, num_ranks=6, max_tokens=40, packed=packed, ranks_per_row=2)
        for rank in range(6)
    ]
    assert len({len(plan) for plan in plans}) == 1
    assert plans[0::2] == plans[1::2]
    trained = [
        row.token_ids[0]
        for plan in plans[::2]
        for group in plan
        for bundle in group
        for row in bundle.rows
        if row.weight
    ]
    assert sorted(trained) == [0, 100, 200, 300, 400]
    assert packed or all(len(group) == 1 for plan in plans for group in plan)


class CountingEngine:
    device = torch.device("cpu")

    def forward(self, batch: Any) -> Any:
        values = torch.linspace(-2, -1, len(batch.target_ids_N), requires_grad=True)
        return values, values.exp()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        return 3.0


def test_what_shared_rows_measure_counts_once(make_config: Any) -> None:
    rows = make_rows([3, 3, 3, 3])
    batch = TrainBatch(0, 0, (tuple(rows),), 1e-3)

    def metrics(num_ranks: int, sharing: int) -> dict[str, float]:
        config = make_config(learner={"num_ranks": num_ranks, "sequence_parallel": sharing, "micro_batch_tokens": 64})
        settings = UpdateSettings.from_config(config)
        return combine_rank_metrics(
            run_update(batch, CountingEngine(), settings, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
        )

    shared, alone = metrics(4, 2), metrics(2, 1)
    assert shared["learner/grad_norm"] == 3.0
    assert shared["policy/entropy"] > 0
    assert shared.keys() == alone.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": {"num_ranks": 3}}, "=2 does not divide learner.num_ranks=3"),
        ({"model": {"attention": "flex_attention"}}, "needs model.attention: sdpa or flash_attention_2"),
        ({"learner": {"packing": "packed"}}, "cannot tell packed rows apart; set learner.packing: auto"),
        ({"algorithm": {"estimator": "rollout"}}, "goes without a resident reference model"),
    ],
)
def test_settings_that_do_not_go_together(make_config: Any, changes: dict[str, Any], message: str) -> None:
    shared = {"num_ranks": 2, "sequence_parallel": 2, "zero_stage": 3}
    make_config(learner=shared)
    with pytest.raises(ValueError, match=message):
        make_config(**(changes | {"learner": shared | changes.get("learner", {})}))


def test_models_whose_rows_cannot_be_shared() -> None:
    window = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    for config, attention, message in (
        (BertConfig(**SHAPE), "sdpa", "not causal attention alone"),
        (window, "sdpa", "layers of sliding_attention, which only model.attention: flash_attention_2 keeps"),
        (MistralConfig(**SHAPE, sliding_window=8), "sdpa", "layers of sliding_attention, which only"),
    ):
        with pytest.raises(InputError, match=message):
            check_shareable(AutoModelForCausalLM.from_config(config), attention)
    check_shareable(AutoModelForCausalLM.from_config(window), "flash_attention_2")
    check_shareable(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), "sdpa")
