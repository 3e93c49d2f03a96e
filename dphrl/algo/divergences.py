"""f-divergence generators, all written as functions of log u with u = pi_theta(y) / pi_ref(y).

With y ~ pi_ref, E[f(u)] is the f-divergence named below (arXiv 2509.07430, section 3). Every f here is evaluated at
*reference* samples, which do not depend on theta, so the gradient of f is the gradient of that divergence: no
score-function term is missing. Each f is convex with f(1) = 0 and f'(1) = 0 (total variation has a kink there), so
every token's term is >= 0.

| name              | f(u)                                    | E_ref[f(u)]                          |
|-------------------|-----------------------------------------|--------------------------------------|
| forward_kl        | u - 1 - log u                           | KL(pi_ref, pi_theta)                 |
| reverse_kl        | u log u - u + 1                         | KL(pi_theta, pi_ref)                 |
| js                | u log u - (u + 1) log((u + 1) / 2)      | 2 x Jensen-Shannon                   |
| alpha, 0 < a < 1  | (u^(1-a) - (1-a) u - a) / (a (a - 1))   | a -> 1 forward KL, a -> 0 reverse KL |
| squared_hellinger | (sqrt(u) - 1)^2                         | sum (sqrt(pi_theta) - sqrt(pi_ref))^2|
| chi_square        | (u - 1)^2                               | chi^2(pi_theta, pi_ref)              |
| total_variation   | abs(u - 1) / 2                          | total variation                      |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from dphrl.algo.registry import METHODS, Registry, one_line

ElementwiseFn = Callable[[Tensor], Tensor]

# Beyond this |log u| a generator continues along its tangent. Up to it float32 is exact enough, and the gradient of a
# single token never exceeds |slope(10)|, which is 2e4 for forward KL.
LINEAR_BEYOND = 10.0
# How far a user's formula may be from 0 at u = 1, and below it elsewhere, by rounding.
TOLERANCE = 1e-6
_LOG2 = math.log(2.0)


@dataclass(frozen=True)
class Divergence:
    """A generator f and its slope df/dlog(u), both elementwise in log u.

    Calling it maps log_u of any shape and floating dtype to f of the same shape, in float32 at least. Outside
    |log u| <= LINEAR_BEYOND it follows the tangent in log u. A plain clamp would have no gradient there, and would
    hide tokens that the policy has forgotten (log u very negative).

    signed: this is no divergence but another term on reference samples, such as cross-entropy: its value may be
    negative.
    """

    name: str
    value: ElementwiseFn
    slope: ElementwiseFn
    signed: bool = False

    def __call__(self, log_u: Tensor) -> Tensor:
        log_u = log_u if log_u.dtype == torch.float64 else log_u.float()
        inside = log_u.clamp(-LINEAR_BEYOND, LINEAR_BEYOND)
        # Inside the range, (log_u - inside) and its gradient are zero. Outside, the clamp cuts the gradient of
        # `value`, and the second term has the gradient of the tangent.
        return self.value(inside) + self.slope(inside).detach() * (log_u - inside)


_DIVERGENCES: Registry[Divergence] = METHODS["divergence"]

# Decorator: register_divergence("mine") makes `factory(**params) -> Divergence` available to configurations.
register_divergence = _DIVERGENCES.register


def get_divergence(name: str, **params: Any) -> Divergence:
    """The registered generator `name` with its parameters, e.g. get_divergence("alpha", alpha=0.2).

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return _DIVERGENCES.build(name, params)


def _checked(label: str, made: Any) -> Divergence:
    """`made`, tried at a few points, so that a wrong formula is told before anything starts."""
    if not isinstance(made, Divergence):
        raise ValueError(f"{label}: its factory returned {made!r}; return a Divergence(name, value, slope)")
    log_u = torch.tensor([0.0, -LINEAR_BEYOND, -1.0, 1.0, LINEAR_BEYOND], dtype=torch.float64)
    for part, function in (("value", made.value), ("slope", made.slope)):
        try:
            at = function(log_u)
        except Exception as error:
            raise ValueError(f"{label}: its {part} fails at a tensor of log u ({one_line(error)})") from error
        if not (isinstance(at, Tensor) and at.shape == log_u.shape and at.is_floating_point()):
            raise ValueError(f"{label}: its {part} returns no number for each log u; compute it elementwise")
        if not bool(at.isfinite().all()):
            raise ValueError(f"{label}: its {part} is not finite where log u is {_where(log_u, ~at.isfinite())}")
        if part == "value" and abs(at[0].item()) > TOLERANCE:
            raise ValueError(f"{label}: its value at log u = 0 is {at[0].item():g}; make it 0, as f(1) is")
        if part == "value" and not made.signed and bool((at < -TOLERANCE).any()):
            raise ValueError(
                f"{label}: its value is negative where log u is {_where(log_u, at < -TOLERANCE)}; "
                "make f convex with f'(1) = 0: add a multiple of u - 1"
            )
    return made


def _where(log_u: Tensor, chosen: Tensor) -> str:
    return ", ".join(f"{x:g}" for x in log_u[chosen].tolist())


_DIVERGENCES.accept = _checked


@register_divergence("forward_kl")
def _forward_kl() -> Divergence:
    """KL(pi_ref, pi_theta): covers all that the initial policy does."""
    return Divergence("forward_kl", lambda x: torch.expm1(x) - x, torch.expm1)


@register_divergence("reverse_kl")
def _reverse_kl() -> Divergence:
    """KL(pi_theta, pi_ref): the penalty of most trainers; seeks one mode."""
    return Divergence("reverse_kl", lambda x: x.exp() * x - torch.expm1(x), lambda x: x.exp() * x)


@register_divergence("js")
def _js() -> Divergence:
    """Twice the Jensen-Shannon divergence: symmetric, bounded."""

    # This is u log u - (u + 1) log((u + 1) / 2), regrouped so that no two large terms cancel.
    def slope(x: Tensor) -> Tensor:
        return x.exp() * (_LOG2 - softplus(-x))

    return Divergence("js", lambda x: slope(x) - (softplus(x) - _LOG2), slope)


@register_divergence("alpha")
def _alpha(
    alpha: Annotated[
        float, Field(gt=0, lt=1, description="its limits are forward_kl (alpha -> 1) and reverse_kl (alpha -> 0)")
    ],
) -> Divergence:
    """Alpha divergence, between reverse KL (alpha -> 0) and forward KL (alpha -> 1)."""

    def value(x: Tensor) -> Tensor:
        return (torch.expm1((1 - alpha) * x) - (1 - alpha) * torch.expm1(x)) / (alpha * (alpha - 1))

    def slope(x: Tensor) -> Tensor:
        return ((1 - alpha) * x).exp() * torch.expm1(alpha * x) / alpha

    return Divergence(f"alpha({alpha:g})", value, slope)


@register_divergence("squared_hellinger")
def _squared_hellinger() -> Divergence:
    """Squared Hellinger distance: symmetric, bounded."""

    def slope(x: Tensor) -> Tensor:
        return torch.expm1(x / 2) * (x / 2).exp()

    return Divergence("squared_hellinger", lambda x: torch.expm1(x / 2).square(), slope)


@register_divergence("chi_square")
def _chi_square() -> Divergence:
    """Chi-square of pi_theta from pi_ref: punishes what the initial policy hardly ever does."""
    return Divergence("chi_square", lambda x: torch.expm1(x).square(), lambda x: 2 * torch.expm1(x) * x.exp())


@register_divergence("total_variation")
def _total_variation() -> Divergence:
    """Total variation: every excess counts by its probability alone."""
    return Divergence("total_variation", lambda x: torch.expm1(x).abs() / 2, lambda x: x.sign() * x.exp() / 2)
