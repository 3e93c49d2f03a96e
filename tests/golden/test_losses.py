"""Losses, advantages and denominators against numbers worked out by hand in the comments."""

from __future__ import annotations

import math

import pytest
import torch

from dphrl.algo.advantages import group_advantages
from dphrl.algo.divergences import get_divergence
from dphrl.algo.losses import DivergenceTerm, hybrid_loss
from dphrl.algo.policy_losses import PolicyLossSettings, PolicyTokens, clipped_surrogate
from dphrl.algo.reduce import row_weights
from dphrl.config.reference import ReferenceConfig
from dphrl.reference.split import PromptCounts, split_prompts

SETTINGS = PolicyLossSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0, importance_cap=2.0)


@pytest.mark.parametrize(
    ("mode", "scores", "expected"),
    [
        # mean 1/4; squared deviations 9/16 + 3/16 = 3/4, / 3 = 1/4, std 1/2: (3/4)/(1/2), (-1/4)/(1/2)
        ("group_normalized", [1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        ("mean_only", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        # others of the 1: mean 0; others of a 0: mean 1/3
        ("leave_one_out", [1, 0, 0, 0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        # the failed item leaves mean 1/2 over two, std sqrt(1/2)
        ("group_normalized", [1, None, 0], [math.sqrt(0.5), None, -math.sqrt(0.5)]),
        ("mean_only", [1, None, 0], [0.5, None, -0.5]),
        ("leave_one_out", [1, None, None], [0.0, None, None]),
        ("group_normalized", [1, 1, 1], [0.0, 0.0, 0.0]),
    ],
)
def test_advantages(mode, scores, expected):
    got = group_advantages(scores, mode)
    assert [None if a is None else pytest.approx(a, abs=1e-5) for a in expected] == got


def test_row_weights():
    # 2 + 3 + 0 = 5 tokens; two rows that have any, 1/(2*2) and 1/(2*3)
    assert row_weights([2, 3, 0], "token_mean", 10) == pytest.approx([0.2, 0.2, 0.0])
    assert row_weights([2, 3, 0], "sequence_mean", 10) == pytest.approx([1 / 4, 1 / 6, 0.0])
    assert row_weights([2, 3, 0], "fixed_length", 10) == pytest.approx([1 / 20, 1 / 20, 0.0])
    assert row_weights([], "token_mean", 10) == []


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 1.0, -1.0, -1.0),  # -A r
        (1.2, 1.0, -1.2, -1.2),  # inside 1 + 0.28: d(-A r)/d log r = -A r
        (1.5, 1.0, -1.28, 0.0),  # clipped above
        (0.5, 1.0, -0.5, -0.5),  # a good action that became rare is never clipped
        (0.5, -1.0, 0.8, 0.0),  # clipped below
        (1.5, -1.0, 1.5, 1.5),  # a bad action that became likely is pushed back
        (4.0, -1.0, 3.0, 0.0),  # until the dual clip
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, slope):
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    one, row = torch.ones(1).double(), torch.zeros(1).long()
    value, _ = clipped_surrogate(PolicyTokens(logprobs, old, old, advantage * one, one, row), SETTINGS)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-9)
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-9)


def test_importance_weight_is_truncated_and_carries_no_gradient():
    old = torch.log(torch.tensor([0.4, 0.4])).double()
    rollout = torch.log(torch.tensor([0.5, 0.1])).double()  # weights 0.8 and 4 -> 2
    logprobs = old.clone().requires_grad_()
    weights, rows = torch.full((2,), 0.5).double(), torch.zeros(2).long()
    tokens = PolicyTokens(logprobs, old, rollout, torch.ones(2).double(), weights, rows)
    value, metrics = clipped_surrogate(tokens, SETTINGS)
    value.backward()
    assert value.item() == pytest.approx(-(0.8 + 2.0) / 2)
    assert logprobs.grad.tolist() == pytest.approx([-0.4, -1.0])
    assert metrics["policy/importance_mean"].item() == pytest.approx(1.4)


def test_sequence_ratio_is_the_geometric_mean_with_a_token_gradient():
    # Completion 0 has log-ratios 0.2, 0.4: mean 0.3, s = e^0.3. Completion 1 has -0.1 alone: s = e^-0.1.
    # sequence_mean weights 1/(2*2), 1/(2*2), 1/(2*1); A = 1, -1. Nothing is clipped by bounds this wide.
    wide = PolicyLossSettings(clip_low=0.9, clip_high=9.0, dual_clip=9.0, importance_cap=2.0, ratio="sequence")
    old = torch.tensor([-1.0, -2.0, -3.0]).double()
    logprobs = (old + torch.tensor([0.2, 0.4, -0.1]).double()).requires_grad_()
    weights, advantages = torch.tensor([0.25, 0.25, 0.5]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    tokens = PolicyTokens(logprobs, old, old, advantages, weights, torch.tensor([0, 0, 1]))
    value, _ = clipped_surrogate(tokens, wide)
    value.backward()
    up, down = math.exp(0.3), math.exp(-0.1)
    assert value.item() == pytest.approx(-0.5 * up + 0.5 * down)
    # d/dlogp of -(1/2) s_0 is -(1/2) s_0 / 2 for each of its two tokens; of +(1/2) s_1, (1/2) s_1.
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * up, -0.25 * up, 0.5 * down])


def test_hybrid_loss_routes_each_token_by_its_own_kind():
    # token 0 explores: A = 2, r = 1, weight 1 -> -2. token 1 rehearses: u = 2, weight 1/2, f = 2 - 1 - ln 2.
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    stored = torch.tensor([-1.0, -1.0 - math.log(2)], dtype=torch.float64)
    loss, metrics = hybrid_loss(
        logprobs,
        logprobs,
        stored,
        torch.tensor([2.0, 0.0]).double(),
        torch.tensor([1.0, 0.5]).double(),
        torch.tensor([True, False]),
        torch.tensor([0, 1]),
        policy=SETTINGS,
        term=DivergenceTerm(get_divergence("forward_kl"), eta=0.1),
    )
    assert metrics["policy/loss"].item() == pytest.approx(-2.0)
    assert metrics["divergence/loss"].item() == pytest.approx(0.5 * (1 - math.log(2)))
    assert loss.item() == pytest.approx(-2.0 + 0.1 * 0.5 * (1 - math.log(2)))


def test_a_term_without_tokens_is_exactly_zero():
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    loss, metrics = hybrid_loss(
        empty,
        empty,
        empty,
        empty,
        empty,
        none,
        none.long(),
        policy=SETTINGS,
        term=DivergenceTerm(get_divergence("js"), eta=1.0),
    )
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in metrics.values())


def test_split():
    counts = {name: PromptCounts(8, correct, correct) for name, correct in {"a": 8, "b": 7, "c": 6, "d": 0}.items()}
    split = split_prompts(counts, ReferenceConfig(num_samples=8, threshold=7, all_wrong="keep"))
    assert (split.near_perfect, split.exploration, split.dropped) == (("a", "b"), ("c", "d"), ())
    split = split_prompts(counts, ReferenceConfig(num_samples=8, threshold=7, all_wrong="drop"))
    assert (split.near_perfect, split.exploration, split.dropped) == (("a", "b"), ("c",), ("d",))
