"""Methods that act on tokens, against numbers worked out by hand in the comments, and against exact enumeration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dphrl.algo.divergences import get_divergence
from dphrl.algo.losses import DivergenceTerm, hybrid_loss
from dphrl.algo.methods.covariance import token_covariance
from dphrl.algo.policy_losses import PolicyLossSettings, PolicyTokens, get_policy_loss, token_choice
from dphrl.batch import reference_rows
from dphrl.types import ReferenceSample

SETTINGS = PolicyLossSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0, importance_cap=2.0)

# Mean log-prob -3, mean advantage 1/2. Centred: 2, 1, 0, -3 and 3/2, 1/2, -3/2, -1/2. Products: 3, 1/2, 0, 3/2.
# Without the advantages' mean they would be 4, 1, 0, 0, without the log-probs' -3/2, -1, 9/2, 3.
LOGPROBS = np.array([-1.0, -2.0, -3.0, -6.0])
ADVANTAGES = np.array([2.0, 1.0, -1.0, 0.0])


def chosen(name: str, seed: int = 0, advantages: Any = ADVANTAGES, **params: Any) -> list[int]:
    """The places that the policy loss `name` chooses of the four tokens."""
    choose = token_choice(get_policy_loss(name, **params))
    assert choose is not None
    return np.flatnonzero(choose(LOGPROBS, advantages, np.random.default_rng(seed))).tolist()


def test_covariance() -> None:
    assert token_covariance(LOGPROBS, ADVANTAGES).tolist() == [3.0, 0.5, 0.0, 1.5]
    assert token_covariance(np.array([]), np.array([])).tolist() == []


# ------------------------------------------------------------------------------------------------ KL-Cov


def test_kl_cov_chooses_a_share_from_the_top() -> None:
    assert chosen("kl_cov", share=0.25) == [0]
    assert chosen("kl_cov", share=0.5) == [0, 3]
    assert chosen("kl_cov", share=0.01) == [0], "at least one"
    assert chosen("kl_cov", share=0.7) == [0, 3], "4 x 0.7 = 2.8, rounded down"
    assert chosen("kl_cov", share=0.99) == [0, 1, 3], "none without a covariance"
    assert chosen("kl_cov", share=0.5, advantages=np.zeros(4)) == [], "nor where no completion is better than another"


@pytest.mark.parametrize(
    ("ratio", "advantage", "marked", "loss", "slope"),
    [
        # beta is 2. -A r + beta |log r|; d/d log r: -A r + beta sign(log r)
        (1.5, 1.0, True, -1.5 + 2 * math.log(1.5), -1.5 + 2),
        (0.5, 1.0, True, -0.5 + 2 * math.log(2), -0.5 - 2),
        (0.5, -2.0, True, 1.0 + 2 * math.log(2), 1.0 - 2),
        (1.0, 1.0, True, -1.0, -1.0),  # nothing pulls where the policy is the old one
        (1.5, 1.0, False, -1.5, -1.5),  # beyond 1 + clip_high, and not clipped
        (4.0, -1.0, False, 4.0, 4.0),  # nor by the dual clip
        (0.5, -2.0, False, 1.0, 1.0),
        (1.5, 0.0, True, 2 * math.log(1.5), 2.0),  # a token without advantage is held as well
    ],
)
def test_kl_cov(ratio: float, advantage: float, marked: bool, loss: float, slope: float) -> None:
    old = torch.tensor([-2.0]).double()
    logprobs = (old + math.log(ratio)).requires_grad_()
    one, row = torch.ones(1).double(), torch.zeros(1).long()
    tokens = PolicyTokens(logprobs, old, old, advantage * one, one, row, torch.tensor([marked]))
    value, metrics = get_policy_loss("kl_cov", beta=2.0)(tokens, SETTINGS)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-12)
    assert metrics["policy/chosen_fraction"].item() == float(marked)
    assert metrics["policy/chosen_penalty"].item() == pytest.approx(2 * abs(math.log(ratio)) if marked else 0.0)


def test_kl_cov_weighs_both_parts_and_corrects_them_for_the_engine() -> None:
    # Weights 1/2; importance exp(log 0.4 - log 0.5) = 0.8, and exp(log 0.4 - log 0.1) = 4, cut to 2.
    # (0.8 (-1.5 + log 1.5) + 2 (2 x 0.5)) / 2
    old = torch.log(torch.tensor([0.4, 0.4])).double()
    rollout = torch.log(torch.tensor([0.5, 0.1])).double()
    logprobs = old + torch.log(torch.tensor([1.5, 0.5])).double()
    weights, rows = torch.full((2,), 0.5).double(), torch.tensor([0, 0])
    advantages, marked = torch.tensor([1.0, -2.0]).double(), torch.tensor([True, False])
    tokens = PolicyTokens(logprobs, old, rollout, advantages, weights, rows, marked)
    value, metrics = get_policy_loss("kl_cov")(tokens, SETTINGS)
    assert value.item() == pytest.approx((0.8 * (-1.5 + math.log(1.5)) + 2.0) / 2, abs=1e-6)
    assert metrics["policy/chosen_fraction"].item() == 0.5
    assert metrics["policy/importance_mean"].item() == pytest.approx(1.4)
    assert metrics["policy/importance_affected"].item() == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------- Clip-Cov


def test_clip_cov_draws_a_share_from_within_its_bounds() -> None:
    assert chosen("clip_cov", share=0.5, low=1.0, high=2.0) == [3], "3 is above, 1/2 below: one of the two it may have"
    assert chosen("clip_cov", share=0.5, low=1.5, high=3.0) == [0, 3], "the bounds belong to it"
    assert chosen("clip_cov", share=0.5, low=4.0, high=5.0) == []
    drawn = [chosen("clip_cov", seed, share=0.25, low=0.4, high=5.0) for seed in range(600)]
    counts = [drawn.count([place]) for place in range(4)]
    # One of three each time: 200 of 600, with a deviation of sqrt(600 x 1/3 x 2/3) = 11.5.
    assert sum(counts) == 600
    assert counts[2] == 0
    assert all(abs(counts[place] - 200) < 50 for place in (0, 1, 3))
    assert drawn[0] == chosen("clip_cov", 0, share=0.25, low=0.4, high=5.0)


@pytest.mark.parametrize(
    ("marked", "loss", "slope", "clipped"),
    [
        (True, 0.0, 0.0, 0.0),
        (False, -1.28, 0.0, 1.0),  # A = 1 and r = 1.5: clipped at 1 + 0.28
    ],
)
def test_clip_cov_leaves_out_what_it_chose_and_clips_the_rest(
    marked: bool, loss: float, slope: float, clipped: float
) -> None:
    # Beside it one with A = -2 and r = 0.9, which no bound meets: 1.8, slope 1.8. Weights 1/2.
    old = torch.tensor([-2.0, -2.0]).double()
    logprobs = (old + torch.log(torch.tensor([1.5, 0.9]).double())).requires_grad_()
    rows, advantages = torch.tensor([0, 1]), torch.tensor([1.0, -2.0]).double()
    tokens = PolicyTokens(
        logprobs, old, old, advantages, torch.full((2,), 0.5).double(), rows, torch.tensor([marked, False])
    )
    value, metrics = get_policy_loss("clip_cov")(tokens, SETTINGS)
    value.backward()
    assert value.item() == pytest.approx((loss + 1.8) / 2)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([slope / 2, 0.9])
    assert metrics["policy/clip_fraction"].item() == clipped / 2
    assert metrics["policy/chosen_fraction"].item() == marked / 2
    assert metrics["policy/importance_mean"].item() == 1.0, "over all tokens"


# -------------------------------------------------------------------------------------------------- SFT


def test_sft_is_cross_entropy_up_to_what_has_no_gradient() -> None:
    # Two tokens of weight 1/2, pi 0.2 and 0.6, stored 0.4 and 0.3: -(log 0.5 + log 2) / 2 = 0.
    logprobs = torch.log(torch.tensor([0.2, 0.6]).double()).requires_grad_()
    stored = torch.log(torch.tensor([0.4, 0.3]).double())
    none = torch.zeros(2).double()
    term = DivergenceTerm(get_divergence("sft"), eta=0.1)
    loss, metrics = hybrid_loss(
        logprobs,
        logprobs.detach(),
        stored,
        none,
        torch.full((2,), 0.5).double(),
        torch.zeros(2, dtype=torch.bool),
        torch.tensor([0, 1]),
        policy=SETTINGS,
        term=term,
    )
    assert metrics["divergence/loss"].item() == pytest.approx(0.0, abs=1e-12)
    assert get_divergence("sft")(torch.tensor([math.log(0.5), math.log(2.0), -30.0])).tolist() == pytest.approx(
        [math.log(2.0), -math.log(2.0), 30.0]
    )
    (ours,) = torch.autograd.grad(loss, logprobs)
    (cross_entropy,) = torch.autograd.grad(-0.1 * logprobs.mean(), logprobs)
    torch.testing.assert_close(ours, cross_entropy, rtol=1e-12, atol=0)


def test_sft_has_forward_kls_mean_gradient_over_pi_ref_and_another_one_at_each_token() -> None:
    torch.manual_seed(0)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def gradients(name: str, at: torch.Tensor) -> torch.Tensor:
        """Of each token that pi_ref may draw, the gradient in the logits: [7 tokens, 7 logits]."""
        values = get_divergence(name)(at.log_softmax(-1) - reference)
        return torch.stack([torch.autograd.grad(value, at, retain_graph=True)[0] for value in values])

    ours, forward_kl = gradients("sft", logits), gradients("forward_kl", logits)
    mean_sft, mean_forward_kl = reference.exp() @ ours, reference.exp() @ forward_kl
    # Exactly: d KL(pi_ref, pi_theta) / d logits = pi_theta - pi_ref.
    exact = logits.softmax(-1) - reference.exp()
    torch.testing.assert_close(mean_sft, exact.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mean_forward_kl, exact.detach(), rtol=1e-9, atol=1e-12)
    assert (ours - forward_kl).abs().max() > 0.1

    # At the initial policy forward KL rests at every token. SFT pulls at each: by the softmax less the token itself.
    start = reference.clone().requires_grad_()
    assert gradients("forward_kl", start).abs().max() < 1e-12
    torch.testing.assert_close(gradients("sft", start), reference.exp() - torch.eye(7).double(), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------- undecided tokens alone

# Five tokens. In descending entropy: the second of the first, the first of the second, the last of the first.
ENTROPIES = ((0.1, 0.9, 0.5), (0.7, 0.0))


def rows_of(make_config: Any, share: float, aggregation: str) -> list[tuple[Any, float]]:
    samples = [
        ReferenceSample(f"p{i}", (1, 2), (5,) * len(one), (-0.5,) * len(one), one) for i, one in enumerate(ENTROPIES)
    ]
    algorithm = {"rehearsal_tokens": "entropy", "rehearsal_share": share, "aggregation": aggregation}
    rows = reference_rows(samples, make_config(algorithm=algorithm, rollout={"max_tokens": 24}))
    return [(row.chosen, pytest.approx(row.weight)) for row in rows]


def test_the_most_undecided_tokens_count_and_have_the_denominator(make_config: Any) -> None:
    # 0.4 x 5 = 2 of the tokens, and 0.6 x 5 = 3; 0.2 x 5 = 1; 0.01 x 5 is none, so one.
    assert rows_of(make_config, 0.4, "token_mean") == [((1,), 1 / 2), ((0,), 1 / 2)]
    assert rows_of(make_config, 0.6, "token_mean") == [((1, 2), 1 / 3), ((0,), 1 / 3)]
    assert rows_of(make_config, 0.2, "token_mean") == [((1,), 1.0), ((), 0.0)]
    assert rows_of(make_config, 0.01, "token_mean") == [((1,), 1.0), ((), 0.0)]
    # Two rows have any: 1 / (2 x 2) and 1 / (2 x 1). With one, it has the whole weight.
    assert rows_of(make_config, 0.6, "sequence_mean") == [((1, 2), 1 / 4), ((0,), 1 / 2)]
    assert rows_of(make_config, 0.2, "sequence_mean") == [((1,), 1.0), ((), 0.0)]
    # A token as one of 0.6 x 24 = 14.4: 1 / (2 x 14.4).
    assert rows_of(make_config, 0.6, "fixed_length") == [((1, 2), 1 / 28.8), ((0,), 1 / 28.8)]


def test_of_equal_entropies_the_first_count(make_config: Any) -> None:
    samples = [ReferenceSample("p", (1,), (5, 5, 5, 5), (-0.5,) * 4, (0.3, 0.3, 0.3, 0.3))]
    config = make_config(algorithm={"rehearsal_tokens": "entropy", "rehearsal_share": 0.5})
    assert [row.chosen for row in reference_rows(samples, config)] == [(0, 1)]
