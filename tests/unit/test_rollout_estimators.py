"""Estimators on the policy's own samples: value and gradient against exact enumeration of two softmax policies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dphrl.algo.divergences import get_divergence
from dphrl.algo.losses import DivergenceTerm
from dphrl.algo.rollout_estimators import KL_ESTIMATORS, on_rollouts


@pytest.fixture
def policies() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    return torch.randn(6, dtype=torch.float64, requires_grad=True), reference


def expected_gradient(estimate: Callable[[Tensor], Tensor], logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """E_theta of an estimate's value, and of its derivative: the sampling distribution itself is not differentiated."""
    logprobs = logits.log_softmax(-1)
    values = estimate(logprobs - reference)
    weights = logprobs.detach().exp()
    (gradient,) = torch.autograd.grad((weights * values).sum(), logits)
    return (weights * values).sum().detach(), gradient


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "js", "squared_hellinger", "chi_square", "total_variation"]
)
def test_rollout_value_and_gradient_equal_those_on_reference_samples(
    name: str, policies: tuple[Tensor, Tensor]
) -> None:
    logits, reference = policies
    divergence = get_divergence(name)
    exact = (reference.exp() * divergence(logits.log_softmax(-1) - reference)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    value, gradient = expected_gradient(lambda log_u: on_rollouts(divergence, log_u), logits, reference)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_have_the_gradient_of_reverse_kl(kind: str, policies: tuple[Tensor, Tensor]) -> None:
    logits, reference = policies
    exact = kl(logits.softmax(-1), reference.exp())
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    value, gradient = expected_gradient(KL_ESTIMATORS[kind], logits, reference)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-9, atol=1e-12)
    if kind == "k2":  # biased in value by design
        assert value > 0
    else:
        torch.testing.assert_close(value, exact.detach(), rtol=1e-9, atol=0)


def test_k3_as_a_loss_has_the_gradient_of_forward_kl(policies: tuple[Tensor, Tensor]) -> None:
    logits, reference = policies
    value, gradient = expected_gradient(KL_ESTIMATORS["k3_as_loss"], logits, reference)
    torch.testing.assert_close(value, kl(logits.softmax(-1), reference.exp()).detach(), rtol=1e-9, atol=0)
    (forward,) = torch.autograd.grad(kl(reference.exp(), logits.softmax(-1)), logits)
    torch.testing.assert_close(gradient, forward, rtol=1e-9, atol=1e-12)


def test_a_plain_derivative_of_k1_would_have_no_gradient_at_all(policies: tuple[Tensor, Tensor]) -> None:
    logits, reference = policies
    _, gradient = expected_gradient(lambda log_u: log_u, logits, reference)
    assert gradient.abs().max() < 1e-12


def test_js_definition_sums_its_two_halves(policies: tuple[Tensor, Tensor]) -> None:
    logits, reference = policies
    term = DivergenceTerm(get_divergence("js"), eta=1.0, estimator="definition")
    middle = (logits.softmax(-1) + reference.exp()) / 2
    exact = kl(logits.softmax(-1), middle) + kl(reference.exp(), middle)
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    value, gradient = expected_gradient(term.on_rollouts, logits, reference)
    half = term.on_reference(logits.log_softmax(-1) - reference)
    assert half is not None
    rest = (reference.exp() * half).sum()
    torch.testing.assert_close(value + rest.detach(), exact.detach(), rtol=1e-9, atol=0)
    (rest_gradient,) = torch.autograd.grad(rest, logits)
    torch.testing.assert_close(gradient + rest_gradient, exact_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js", "squared_hellinger"])
def test_two_tokens_give_the_reference_prefix_expectation_of_per_token_divergences(name: str) -> None:
    """Sampled sequences of two tokens; the sum of the terms, enumerated over all of them."""
    torch.manual_seed(0)
    vocab_size = 4
    ref_first = torch.randn(vocab_size, dtype=torch.float64).log_softmax(-1)
    ref_second = torch.randn(vocab_size, vocab_size, dtype=torch.float64).log_softmax(-1)
    first = torch.randn(vocab_size, dtype=torch.float64, requires_grad=True)
    second = torch.randn(vocab_size, vocab_size, dtype=torch.float64, requires_grad=True)
    f = get_divergence(name)
    log_u_first = first.log_softmax(-1) - ref_first
    log_u_second = second.log_softmax(-1) - ref_second
    joint = (ref_first.unsqueeze(1) + ref_second).exp()
    estimated = (joint * (f(log_u_first).unsqueeze(1) + f(log_u_second))).sum()
    per_prefix = torch.stack([(ref_second[i].exp() * f(log_u_second[i])).sum() for i in range(vocab_size)])
    exact = (ref_first.exp() * f(log_u_first)).sum() + (ref_first.exp() * per_prefix).sum()
    torch.testing.assert_close(estimated, exact, rtol=1e-9, atol=0)
    if name == "forward_kl":  # the only one for which this is also the divergence of the two sequence distributions
        log_theta = first.log_softmax(-1).unsqueeze(1) + second.log_softmax(-1)
        torch.testing.assert_close(estimated, (joint * (joint.log() - log_theta)).sum(), rtol=1e-9, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(estimated, (first, second), retain_graph=True),
        torch.autograd.grad(exact, (first, second)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [*KL_ESTIMATORS, "generic"])
def test_finite_far_out(kind: str) -> None:
    estimate = KL_ESTIMATORS.get(kind, lambda log_u: on_rollouts(get_divergence("chi_square"), log_u))
    log_u = torch.tensor([-50.0, 50.0], requires_grad=True)
    value = estimate(log_u)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(log_u.grad).all()
    # A token the policy has all but dropped is pulled up, one it has blown up is pushed down, by every estimator.
    assert log_u.grad[0] < 0 < log_u.grad[1]


def test_a_plain_clamp_fails_the_gradient_test() -> None:
    """Why generators continue along the tangent: a clamped log u has no gradient where it is needed most."""
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    logits = torch.tensor([0.0, -12.0], dtype=torch.float64, requires_grad=True)  # the second token is forgotten
    f = get_divergence("forward_kl")

    def gradient(values: Callable[[Tensor], Tensor]) -> Tensor:
        estimated = (reference.exp() * values(logits.log_softmax(-1) - reference)).sum()
        return torch.autograd.grad(estimated, logits)[0]

    (exact,) = torch.autograd.grad(kl(reference.exp(), logits.softmax(-1)), logits)
    torch.testing.assert_close(gradient(f), exact, rtol=1e-4, atol=0)
    assert gradient(lambda log_u: f(log_u.clamp(-10, 10)))[1].abs() < 0.01 * exact[1].abs()
