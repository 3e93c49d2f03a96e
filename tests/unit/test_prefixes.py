"""Completions that share their prompt train as those that do not; and who shares with whom."""

from __future__ import annotations

import asyncio
import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from dphrl.config.loading import InputError
from dphrl.inline import InlineLearner
from dphrl.learner.batching import collate, collate_bundles
from dphrl.learner.bundles import (
    FEWEST_MICRO_BATCHES,
    Bundle,
    Sharing,
    deal,
    make_bundles,
    plan_micro_batches,
    share_out,
    work,
)
from dphrl.learner.policy import PolicyModel
from dphrl.learner.prefixes import (
    CALLS_COST,
    GRADIENTS_COST,
    fit_to_model,
    micro_batch_cost,
    pair_cost,
    shared_prefix_mask,
)
from dphrl.learner.update import UpdateSettings, combine_rank_metrics, run_update, score_sequences
from dphrl.types import RowKind, TrainBatch, TrainRow
from tests.unit.test_attention import CONFIGS, SHAPE, make_lm
from tests.unit.test_batching import GradientEngine, policy, update

__all__ = ["policy"]  # a fixture

CPU = torch.device("cpu")


def row(prompt: tuple[int, ...], length: int, weight: float = 1.0, first: int = 5) -> TrainRow:
    ids = tuple(first + i % 9 for i in range(length))
    return TrainRow(RowKind.POLICY, prompt + ids, len(prompt), (-1.0,) * length, weight, 1.0)


def make_groups(seed: int = 0, num_prompts: int = 4, largest: int = 5) -> list[TrainRow]:
    """Groups of 1 to 5 rows of one prompt, among them rehearsal rows, and of all lengths down to one token."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_prompts):
        prompt = tuple(rng.randrange(5, 20) for _ in range((3, 9, 1, 14)[i % 4]))
        for _ in range(largest - i % largest):
            length = rng.choice((1, 2, 9, 15))
            ids = tuple(rng.randrange(5, 20) for _ in range(length))
            kind = RowKind.REFERENCE if rng.random() < 0.3 else RowKind.POLICY
            logprobs = tuple(-rng.uniform(2, 4) for _ in range(length))
            rows.append(TrainRow(kind, prompt + ids, len(prompt), logprobs, rng.random() / 50, rng.uniform(-2, 2)))
    rng.shuffle(rows)
    return rows


# ------------------------------------------------------------------------------------ the same gradient
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [40, 96, 4096])
@pytest.mark.parametrize("prefixes", ["auto", "always"])
def test_shared_prompts_give_the_gradient_of_rows_apart(
    policy: Any, make_config: Any, num_ranks: int, packing: str, max_tokens: int, prefixes: str
) -> None:
    rows = make_groups()
    apart = {"share_prefix": "never", "packing": "padded", "micro_batch_tokens": 4096}
    expected, expected_metrics = update(policy, make_config, rows, **apart)
    shared = {"share_prefix": prefixes, "packing": packing, "micro_batch_tokens": max_tokens}
    got, metrics = update(policy, make_config, rows, num_ranks=num_ranks, **shared)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)


def test_shared_prompts_in_float32(policy: Any, make_config: Any) -> None:
    rows, policy = make_groups(), copy.deepcopy(policy).float()
    expected, _ = update(policy, make_config, rows, share_prefix="never")
    got, _ = update(policy, make_config, rows, share_prefix="always", micro_batch_tokens=96)
    assert torch.linalg.norm(got - expected) <= 1e-4 * torch.linalg.norm(expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_old_log_probs_of_later_mini_batches_are_their_own(policy: Any, make_config: Any, num_ranks: int) -> None:
    """The order of rows in a micro-batch is that of its bundles, in both passes."""
    batch = TrainBatch(0, 0, (tuple(make_groups(1)), tuple(make_groups(2))), 1e-3)
    results = []
    for prefixes in ("never", "always"):
        config = make_config(learner={"share_prefix": prefixes, "micro_batch_tokens": 64})
        engine = GradientEngine(policy)
        parts = [
            run_update(batch, engine, UpdateSettings.from_config(config), rank=rank, num_ranks=num_ranks)
            for rank in range(num_ranks)
        ]
        results.append((engine.gradient() / num_ranks, combine_rank_metrics(parts)))
    (expected, expected_metrics), (got, metrics) = results
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_scores_go_to_their_own_sequences(policy: Any, make_config: Any, num_ranks: int) -> None:
    class Engine:
        device = CPU
        forward = staticmethod(policy)

    sequences = [(one.token_ids, one.num_prompt_tokens) for one in make_groups(3)]
    sequences.append(sequences[0])  # twice the same is no mistake
    scores = []
    for prefixes in ("never", "always"):
        config = make_config(learner={"share_prefix": prefixes, "micro_batch_tokens": 64})
        parts = [
            score_sequences(sequences, Engine(), UpdateSettings.from_config(config), rank=rank, num_ranks=num_ranks)
            for rank in range(num_ranks)
        ]
        scores.append({index: logprobs for part in parts for index, logprobs in part.items()})
        assert sum(map(len, parts)) == len(sequences)
    assert scores[0].keys() == scores[1].keys()
    for index, expected in scores[0].items():
        assert scores[1][index] == pytest.approx(expected, abs=1e-6)


def test_the_inline_learner_trains_the_same(make_config: Any, tiny_dir: str) -> None:
    results = []
    for prefixes in ("never", "auto"):
        learner = InlineLearner(make_config(learner={"share_prefix": prefixes}), tiny_dir)
        assert learner.settings.sharing.prefixes == prefixes
        metrics = asyncio.run(learner.update(TrainBatch(0, 0, (tuple(make_groups()),), 1e-3)))
        results.append((metrics, torch.cat([p.detach().flatten() for p in learner.policy.parameters()])))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert (results[1][1] - results[0][1]).abs().max() <= 1e-4, "of a step of 1e-3"


def test_flex_attention_takes_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch has only its forward pass. It is not compiled here, which would take a minute."""
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: integration.flex_attention)
    bundles = make_bundles(make_groups(), 4096, Sharing("always"))
    rows = [one for bundle in bundles for one in bundle.rows]
    with torch.no_grad():
        expected, _ = PolicyModel(make_lm(LlamaConfig(**SHAPE)), temperature=1.0)(collate(rows, packed=False))
        flex = PolicyModel(make_lm(LlamaConfig(**SHAPE), "flex_attention"), temperature=1.0)
        for packed in (True, False):
            shared, _ = flex(collate_bundles(bundles, packed=packed))
            assert (shared - expected).abs().max() <= 2e-5
    assert fit_to_model(Sharing("always"), flex.lm, flex, CPU).prefixes == "always"


# ------------------------------------------------------------------------------------ the mask
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3)), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_position_sees_its_prompt_and_its_own_completion(shapes: list[tuple[int, list[int]]], packed: bool) -> None:
    bundles = [
        Bundle(tuple(row((i + 1,) * prompt, length) for length in lengths))
        for i, (prompt, lengths) in enumerate(shapes)
    ]
    batch = collate_bundles(bundles, packed=packed)
    if all(len(lengths) == 1 for _, lengths in shapes):
        assert batch.prompt_index_BT is None, "rows that share nothing need no mask"
        return
    mask = shared_prefix_mask(batch, "sdpa")
    # Who is where: (bundle, completion) of each position; completion 0 is the prompt.
    owners: list[list[Any]] = [
        [(i, 0)] * prompt + [(i, k + 1) for k, length in enumerate(lengths) for _ in range(length)]
        for i, (prompt, lengths) in enumerate(shapes)
    ]
    owners = [[owner for line in owners for owner in line]] if packed else owners
    width = max(map(len, owners))
    assert mask.shape == (len(owners), 1, width, width)
    assert mask.any(-1).all(), "padding sees itself: a softmax over nothing is no number"
    for b, line in enumerate(owners):
        for i, (bundle, completion) in enumerate(line):
            sees = [j for j in range(i + 1) if line[j] in ((bundle, 0), (bundle, completion))]
            assert mask[b, 0, i].nonzero().flatten().tolist() == sees
            # As in the row alone, whose own positions these are.
            assert batch.position_ids_BT[b, i] == len(sees) - 1


# ------------------------------------------------------------------------------------ who shares with whom
def test_a_prompt_is_repeated_where_a_micro_batch_is_full() -> None:
    rows = [row((1,) * 10, length) for length in (5, 6, 7, 8)]
    (whole,) = make_bundles(rows, 36, Sharing("always"))
    assert (whole.num_tokens, len(whole.rows)) == (10 + 26, 4)
    halves = make_bundles(rows, 35, Sharing("always"))
    assert [bundle.num_tokens for bundle in halves] == [22, 24]
    assert [len(bundle.rows) for bundle in make_bundles(rows, 20, Sharing("always"))] == [1] * 4
    assert [len(bundle.rows) for bundle in make_bundles(rows, 4096, Sharing("never"))] == [1] * 4


def test_rows_of_other_prompts_or_splits_do_not_share() -> None:
    same_ids = TrainRow(RowKind.POLICY, (1, 1, 5, 6), 3, (-1.0,), 1.0)
    rows = [row((1, 1), 2), row((2, 1), 2), row((1, 1), 3), same_ids]
    assert [len(bundle.rows) for bundle in make_bundles(rows, 4096, Sharing("always"))] == [2, 1, 1]


def test_auto_shares_by_arithmetic() -> None:
    def num_bundles(prompt: int, length: int, count: int, cost: float, prefixes: str = "auto") -> int:
        rows = [row((1,) * prompt, length, first=5 + i) for i in range(count)]
        return len(make_bundles(rows, 10**6, Sharing(prefixes, cost)))

    # 4 completions: all pairs of 512 + 4 x 64 positions cost less than the prompt three times more.
    assert num_bundles(512, 64, 4, 1 / 2000) == 1
    # The longer they are together, the more pairs: then several bundles cost less than one, and than rows alone.
    assert 1 < num_bundles(2048, 128, 32, 1 / 1000) < 32
    # A short prompt is cheaper repeated than seen by long completions that pay for each other's pairs.
    assert num_bundles(8, 512, 4, 1 / 2000) == 4
    assert num_bundles(8, 512, 4, 1 / 2000, "always") == 1
    assert num_bundles(8, 512, 4, 0.0) == 1, "without a cost of attention only positions count"


def test_ranks_get_the_same_work_though_not_the_same_tokens() -> None:
    """A row of four times the tokens takes sixteen times the attention."""
    bundles = [Bundle((row((1,), 4000),))] + [Bundle((row((1,), 999),)) for _ in range(8)]
    dealt = deal(bundles, 2, 1 / 1000)
    loads = sorted(sum(bundle.cost(1 / 1000) for bundle in mine) for mine in dealt)
    assert loads == pytest.approx([8 * 1500, 12000], rel=0.01), "4 + 4 x 4 / 2 = 12 = 8 x (1 + 1 / 2)"
    assert sorted(len(mine) for mine in dealt) == [1, 8]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 4))
def test_no_rank_waits_longer_than_the_costliest_row(lengths: list[int], num_ranks: int) -> None:
    bundles = [Bundle((row((1,), n),)) for n in lengths]
    dealt = deal(bundles, num_ranks, 1 / 50)
    costs = [bundle.cost(1 / 50) for bundle in bundles]
    assert max(work(mine, 1 / 50) for mine in dealt) <= sum(costs) / num_ranks + max(costs)
    assert sorted(b.num_tokens for mine in dealt for b in mine) == sorted(n + 1 for n in lengths)


def test_groups_are_dealt_whole_unless_a_rank_would_wait() -> None:
    groups = [[row((1 + i,) * 50, 10, first=5 + k) for k in range(4)] for i in range(4)]
    dealt = share_out([one for group in groups for one in group], 2, 4096, Sharing("always"))
    assert [[len(bundle.rows) for bundle in mine] for mine in dealt] == [[4, 4], [4, 4]]
    # One group on two ranks: half of it each, and the prompt twice.
    dealt = share_out(groups[0], 2, 4096, Sharing("always"))
    assert [[len(bundle.rows) for bundle in mine] for mine in dealt] == [[2], [2]]
    dealt = share_out(groups[0], 4, 4096, Sharing("always"))
    assert [[len(bundle.rows) for bundle in mine] for mine in dealt] == [[1], [1], [1], [1]]
    # Three groups on two ranks: the third is halved, because its prompt is less than half of it.
    long = [row((1 + i,) * 10, 30, first=5 + k) for i in range(3) for k in range(4)]
    dealt = share_out(long, 2, 4096, Sharing("always", 0.0))
    assert [sorted(len(bundle.rows) for bundle in mine) for mine in dealt] == [[2, 4], [2, 4]]


@given(st.integers(0, 50), st.integers(1, 4), st.booleans(), st.sampled_from(["auto", "always"]))
def test_every_row_is_trained_once(seed: int, num_ranks: int, packed: bool, prefixes: str) -> None:
    rows = make_groups(seed)
    options = {"num_ranks": num_ranks, "max_tokens": 40, "packed": packed, "sharing": Sharing(prefixes)}
    plans = [plan_micro_batches(rows, rank=rank, **options) for rank in range(num_ranks)]
    assert len({len(plan) for plan in plans}) == 1, "ranks must take part in the same number of collectives"
    trained = [one for plan in plans for group in plan for bundle in group for one in bundle.rows if one.weight]
    assert sorted(map(id, trained)) == sorted(map(id, rows))
    for group in (group for plan in plans for group in plan):
        sizes = [bundle.num_tokens for bundle in group]
        assert (sum(sizes) if packed else max(sizes) * len(sizes)) <= 40


# ------------------------------------------------------------------------------------ what cannot
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"attention": "eager"}},
            r"model.attention: eager \(it would add the mask to the scores as a number\)",
        ),
        (
            {"model": {"attention": "flash_attention_2"}},
            r"model.attention: flash_attention_2 \(it takes no mask of pairs",
        ),
        ({"learner": {"num_ranks": 2, "sequence_parallel": 2}}, "always cannot be with learner.sequence_parallel=2"),
    ],
)
def test_settings_that_exclude_shared_prompts(make_config: Any, changes: dict[str, Any], message: str) -> None:
    assert make_config(**changes).share_prefix == "never", "auto does without"
    assert make_config().share_prefix == "auto"
    learner = {**changes.get("learner", {}), "share_prefix": "always"}
    with pytest.raises(ValueError, match=message):
        make_config(**(changes | {"learner": learner}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SHAPE, sliding_window=8), "layers of sliding_attention, for which one mask"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding_attention"),
        (BertConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=4), "not causal attention"),
    ],
)
def test_models_whose_completions_cannot_share(config: Any, message: str) -> None:
    lm = AutoModelForCausalLM.from_config(config)
    policy = PolicyModel(lm, temperature=1.0)
    with pytest.raises(InputError, match=rf"^learner.share_prefix: always cannot be with this model: .*{message}"):
        fit_to_model(Sharing("always"), lm, policy, CPU)
    assert fit_to_model(Sharing("auto"), lm, policy, CPU).prefixes == "never"


def test_models_whose_completions_can_share() -> None:
    lm = make_lm(LlamaConfig(**SHAPE))
    policy = PolicyModel(lm, temperature=1.0)
    for prefixes in ("auto", "always", "never"):
        fitted = fit_to_model(Sharing(prefixes), lm, policy, CPU)
        assert fitted == Sharing(prefixes, pair_cost(lm), micro_batch_cost(lm, CPU, 1))
    assert pair_cost(lm) == pytest.approx(2 * 4 * 32 / (24 * 32**2))


def test_more_micro_batches_than_needed_are_for_a_rank_alone_on_a_cpu() -> None:
    lm = make_lm(LlamaConfig(**SHAPE))
    num_weights = sum(weights.numel() for weights in lm.parameters())
    assert micro_batch_cost(lm, CPU, 1) == pytest.approx(GRADIENTS_COST + CALLS_COST / num_weights)
    assert micro_batch_cost(lm, CPU, 2) == FEWEST_MICRO_BATCHES
    assert micro_batch_cost(lm, torch.device("cuda"), 1) == FEWEST_MICRO_BATCHES
    policy = PolicyModel(lm, temperature=1.0)
    assert fit_to_model(Sharing(), lm, policy, CPU, num_ranks=2).micro_batch_cost == FEWEST_MICRO_BATCHES


def test_a_model_is_tried_before_it_shares() -> None:
    """One that takes the mask for numbers, and one that counts positions by itself."""
    counting = make_lm(CONFIGS["gpt2"])
    counting.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]}),
        with_kwargs=True,
    )
    for lm in (make_lm(LlamaConfig(**SHAPE), "eager"), counting):
        policy = PolicyModel(lm, temperature=1.0)
        assert fit_to_model(Sharing("auto"), lm, policy, CPU).prefixes == "never"
        with pytest.raises(InputError, match=r"completions that share a prompt are moved by it \(by .* nats a token\)"):
            fit_to_model(Sharing("always"), lm, policy, CPU)


def test_a_model_of_unknown_positions_shares_when_it_is_asked_to() -> None:
    config = OPTConfig(
        vocab_size=80, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    lm = make_lm(config)
    policy = PolicyModel(lm, temperature=1.0)
    assert fit_to_model(Sharing("auto"), lm, policy, CPU).prefixes == "never"
    assert fit_to_model(Sharing("always"), lm, policy, CPU).prefixes == "always"
