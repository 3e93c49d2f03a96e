"""Probability ratios stay finite, and so do losses and gradients made of them, whatever the log-probs are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dphrl.algo.divergences import get_divergence
from dphrl.algo.losses import DivergenceTerm, hybrid_loss
from dphrl.algo.policy_losses import PolicyLossSettings, PolicyTokens, get_policy_loss, importance
from dphrl.algo.ratios import MAX_LOG_RATIO, bounded_ratio, is_beyond

SETTINGS = PolicyLossSettings(0.2, 0.28, 3.0, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_healthy_ratio_is_exp_to_the_bit_with_its_gradient(dtype: torch.dtype) -> None:
    log_ratio = torch.linspace(-MAX_LOG_RATIO, MAX_LOG_RATIO, 4001, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(bounded_ratio(log_ratio).sum(), log_ratio)
    assert torch.equal(bounded_ratio(log_ratio), log_ratio.exp())
    assert torch.equal(gradient, log_ratio.exp())
    assert not is_beyond(log_ratio).any()


def test_beyond_the_bound_it_is_held_without_a_gradient_and_a_nan_stays_one() -> None:
    log_ratio = torch.tensor([21.0, 200.0, math.inf, -21.0, -math.inf, math.nan], requires_grad=True)
    ratio = bounded_ratio(log_ratio)
    assert ratio[:5].tolist() == pytest.approx([math.exp(20)] * 3 + [math.exp(-20)] * 2)
    assert bool(ratio[5].isnan()), "a log-prob that is no number must be seen"
    (gradient,) = torch.autograd.grad(ratio[:5].sum(), log_ratio)
    assert gradient[:5].tolist() == [0.0] * 5
    assert is_beyond(log_ratio).tolist() == [True] * 5 + [False]


def tokens(logprobs: Tensor, old: Tensor, rollout: Tensor, advantage: float) -> PolicyTokens:
    count = len(logprobs)
    weights, rows = torch.full((count,), 1 / count), torch.zeros(count, dtype=torch.int64)
    return PolicyTokens(logprobs, old, rollout, torch.full((count,), advantage), weights, rows)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("gap", [150.0, -150.0])
def test_the_surrogate_of_a_token_that_is_far_off_is_finite(advantage: float, ratio: str, gap: float) -> None:
    """exp(150) is infinite in float32, and 0 times it, where the trust region cuts it, is no number."""
    logprobs = torch.tensor([-1.0 + gap, -1.0 + gap], requires_grad=True)
    old = torch.tensor([-1.0, -1.0])
    settings = PolicyLossSettings(0.2, 0.28, 3.0, 2.0, ratio)
    loss, _ = get_policy_loss("clipped")(tokens(logprobs, old, old, advantage), settings)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # Up: clipped at 1.28, or cut at 3 by the dual clip. Down: nothing is left, or it is clipped at 0.8.
    expected = {(1.0, 150.0): -1.28, (-1.0, 150.0): 3.0, (1.0, -150.0): -math.exp(-20), (-1.0, -150.0): 0.8}
    assert float(loss.detach()) == pytest.approx(expected[advantage, gap], rel=1e-5)
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("truncate", [2.0, math.exp(-20)]),
        ("mask", [0.0, 0.0]),
        ("sequence_truncate", [1.0, 1.0]),
        ("sequence_mask", [1.0, 1.0]),
    ],
)
def test_importance_weights_of_samples_far_off(kind: str, weights: list[float]) -> None:
    settings = PolicyLossSettings(0.2, 0.28, 3.0, 2.0, importance=kind)
    old, rollout = torch.tensor([-1.0, -201.0]), torch.tensor([-201.0, -1.0])
    assert importance(tokens(old, old, rollout, 1.0), settings).tolist() == pytest.approx(weights)


@pytest.mark.parametrize("estimator", ["reference", "rollout"])
def test_the_share_of_tokens_at_the_bound_is_counted_by_their_weights(estimator: str) -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -30.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -22.0, -30.0, -40.0])
    rollout = torch.tensor([-1.0, -1.0, -22.0, -1.0, -1.0])
    is_policy = torch.tensor([True, True, True, True, False])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.25, 1.0])
    term = DivergenceTerm(get_divergence("reverse_kl"), 0.1, estimator)
    given: Any = (logprobs, old, rollout, torch.ones(5), weights, is_policy, torch.arange(5))
    loss, metrics = hybrid_loss(
        *given, policy=SETTINGS, term=term, reference_logprobs_N=torch.full((5,), -1.0) - 100 * is_policy
    )
    assert float(metrics["policy/ratio_bounded_fraction"]) == pytest.approx(0.55), "to the learner, and from the engine"
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
