"""Generators against their definitions and against exact enumeration over a small vocabulary."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from dphrl.algo.divergences import LINEAR_BEYOND, get_divergence, register_divergence

GENERATORS = [
    ("forward_kl", {}, lambda u: u - 1 - math.log(u)),
    ("reverse_kl", {}, lambda u: u * math.log(u) - u + 1),
    ("js", {}, lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2)),
    ("alpha", {"alpha": 0.2}, lambda u: (u**0.8 - 0.8 * u - 0.2) / (0.2 * -0.8)),
    ("alpha", {"alpha": 0.8}, lambda u: (u**0.2 - 0.2 * u - 0.8) / (0.8 * -0.2)),
    ("squared_hellinger", {}, lambda u: (math.sqrt(u) - 1) ** 2),
    ("chi_square", {}, lambda u: (u - 1) ** 2),
    ("total_variation", {}, lambda u: abs(u - 1) / 2),
]
IDS = [f"{name}{list(params.values()) or ''}" for name, params, _ in GENERATORS]


def exact_divergence(name: str, params: dict[str, float], p_ref: Tensor, p: Tensor) -> Tensor:
    """The divergence by its textbook definition, never through f."""
    if name == "forward_kl":
        return (p_ref * (p_ref / p).log()).sum()
    if name == "reverse_kl":
        return (p * (p / p_ref).log()).sum()
    if name == "js":
        middle = (p + p_ref) / 2
        return (p * (p / middle).log()).sum() + (p_ref * (p_ref / middle).log()).sum()
    if name == "alpha":
        a = params["alpha"]
        return (1 - (p ** (1 - a) * p_ref**a).sum()) / (a * (1 - a))
    if name == "squared_hellinger":
        return (p.sqrt() - p_ref.sqrt()).square().sum()
    if name == "chi_square":
        return ((p - p_ref).square() / p_ref).sum()
    return (p - p_ref).abs().sum() / 2


@pytest.mark.parametrize(("name", "params", "definition"), GENERATORS, ids=IDS)
def test_equals_its_formula(name, params, definition):
    log_u = torch.linspace(-LINEAR_BEYOND, LINEAR_BEYOND, 41, dtype=torch.float64)
    expected = torch.tensor([definition(math.exp(x)) for x in log_u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(get_divergence(name, **params)(log_u), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "params", "_"), GENERATORS, ids=IDS)
def test_zero_and_flat_at_one_and_never_negative(name, params, _):
    divergence = get_divergence(name, **params)
    log_u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = divergence(log_u)
    value.sum().backward()
    assert value.tolist() == [0.0] * 3
    if name != "total_variation":  # its kink has any slope between -1/2 and 1/2
        assert log_u.grad.abs().max() == 0
    assert divergence(torch.linspace(-60, 60, 2001)).min() >= -1e-6


@pytest.mark.parametrize(("name", "params", "_"), GENERATORS, ids=IDS)
def test_expectation_and_gradient_are_those_of_the_named_divergence(name, params, _):
    torch.manual_seed(0)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    estimated = (reference.exp() * get_divergence(name, **params)(logits.log_softmax(-1) - reference)).sum()
    exact = exact_divergence(name, params, reference.exp(), logits.softmax(-1))
    torch.testing.assert_close(estimated, exact, rtol=1e-9, atol=0)
    (ours,) = torch.autograd.grad(estimated, logits)
    (theirs,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "params", "_"), GENERATORS, ids=IDS)
def test_slope_is_the_derivative_in_log_u(name, params, _):
    divergence = get_divergence(name, **params)
    log_u = torch.linspace(-9.9, 9.9, 40, dtype=torch.float64, requires_grad=True)  # never 0, total variation's kink
    (derivative,) = torch.autograd.grad(divergence.value(log_u).sum(), log_u)
    torch.testing.assert_close(divergence.slope(log_u), derivative, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "params", "_"), GENERATORS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_far_out_and_continued_along_the_tangent(name, params, _, dtype):
    divergence = get_divergence(name, **params)
    log_u = torch.tensor([-50.0, -20, 20, 50], dtype=dtype, requires_grad=True)
    value = divergence(log_u)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(log_u.grad).all()
    edge = divergence.slope(torch.tensor([-LINEAR_BEYOND, -LINEAR_BEYOND, LINEAR_BEYOND, LINEAR_BEYOND]))
    torch.testing.assert_close(log_u.grad.float(), edge, rtol=1e-2, atol=1e-6)


def test_forward_kl_keeps_pulling_a_forgotten_token_where_a_clamp_would_let_go():
    log_u = torch.tensor([-30.0], requires_grad=True)
    get_divergence("forward_kl")(log_u).sum().backward()
    assert log_u.grad.item() == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize(("alpha", "limit"), [(1 - 1e-7, "forward_kl"), (1e-7, "reverse_kl")])
def test_alpha_limits(alpha, limit):
    log_u = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(
        get_divergence("alpha", alpha=alpha)(log_u), get_divergence(limit)(log_u), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("forward", {}, "unknown divergence 'forward'; known: none, alpha"),
        ("alpha", {}, "divergence 'alpha' needs alpha: a number > 0 and < 1; write {name: alpha, alpha: ...}"),
        ("alpha", {"alpha": 1.0}, "divergence 'alpha' takes alpha: a number > 0 and < 1 (got 1.0)"),
        ("alpha", {"alpha": 0}, "divergence 'alpha' takes alpha: a number > 0 and < 1 (got 0)"),
        ("alpha", {"alpha": "0.5"}, "divergence 'alpha' takes alpha: a number > 0 and < 1 (got \"0.5\")"),
        ("js", {"alpha": 0.5}, "divergence 'js' has no parameter 'alpha'; it takes no parameters"),
    ],
)
def test_bad_names_and_parameters_say_the_remedy(name, params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_divergence(name, **params)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        register_divergence("js")(lambda: get_divergence("js"))
