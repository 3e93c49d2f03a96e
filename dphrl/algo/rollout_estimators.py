"""Divergence estimators on the policy's own samples, with the gradient of the divergence they name.

Samples of pi_theta come from a distribution that itself depends on theta. The derivative of an unbiased estimate is
therefore *not* an unbiased gradient: the score-function term is missing. So every function here returns its value with
the right gradient attached: for D_f = E_ref[f(u)] = E_theta[f(u) / u] it is E_theta[f'(u) grad log pi_theta]. The
functions take log u elementwise, in any shape. log u needs pi_ref at the rollouts, that is a resident reference model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dphrl.algo.divergences import LINEAR_BEYOND, Divergence

_LOG2 = math.log(2.0)


def _with_gradient(value: Tensor, score: Tensor, log_u: Tensor) -> Tensor:
    """`value` whose derivative in log pi_theta is `score`."""
    return value.detach() + score.detach() * (log_u - log_u.detach())


def on_rollouts(divergence: Divergence, log_u: Tensor) -> Tensor:
    """f(u) / u at samples of pi_theta, with gradient f'(u) grad log pi_theta. For reverse KL: k3 with k2's gradient.

    Beyond |log u| = LINEAR_BEYOND, value and score stay as they are at that bound.
    """
    inside = log_u.detach().clamp(-LINEAR_BEYOND, LINEAR_BEYOND)
    per_u = (-inside).exp()
    return _with_gradient(divergence.value(inside) * per_u, divergence.slope(inside) * per_u, log_u)


def reverse_kl_k1(log_u: Tensor) -> Tensor:
    """log u: unbiased, can be negative, has the largest variance. Gradient: that of reverse KL."""
    return _with_gradient(log_u, log_u, log_u)


def reverse_kl_k2(log_u: Tensor) -> Tensor:
    """(log u)^2 / 2: biased in value, has a low variance. Its plain derivative is also the gradient of reverse KL."""
    return log_u.square() / 2


def reverse_kl_k3(log_u: Tensor) -> Tensor:
    """1/u - 1 + log u: unbiased, never negative. Gradient: that of reverse KL."""
    return _with_gradient(torch.expm1(-log_u.clamp(min=-LINEAR_BEYOND)) + log_u, log_u, log_u)


def reverse_kl_k3_as_loss(log_u: Tensor) -> Tensor:
    """k3 with its plain derivative, as GRPO (arXiv 2402.03300, eq. 4) and most trainers use it.

    Its value estimates reverse KL, but its expected gradient (1 - 1/u) grad log pi_theta is that of *forward* KL. It
    is here to repeat published baselines.
    """
    inverse = torch.expm1(-log_u.detach().clamp(min=-LINEAR_BEYOND))  # 1/u - 1, bounded
    return _with_gradient(inverse + log_u, -inverse, log_u)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": reverse_kl_k1,
    "k2": reverse_kl_k2,
    "k3": reverse_kl_k3,
    "k3_as_loss": reverse_kl_k3_as_loss,
}


def js_definition_on_rollouts(log_u: Tensor) -> Tensor:
    """The rollout half of 2 x Jensen-Shannon by its definition: KL(pi_theta, m), where m is the even mixture.

    It is E_theta[log(2u / (u + 1))], with gradient (log(2u / (u + 1)) + 1 / (u + 1)) grad log pi_theta.
    """
    value = _LOG2 - softplus(-log_u)
    return _with_gradient(value, value + torch.sigmoid(-log_u), log_u)


def js_definition_on_reference(log_u: Tensor) -> Tensor:
    """The other half, KL(pi_ref, m) = E_ref[log(2 / (u + 1))]. pi_ref is fixed, so autograd's gradient is right."""
    return _LOG2 - softplus(log_u)
