"""The hybrid loss: a registered policy loss (see `policy_losses`) plus eta times a registered divergence.

Tensors in, (loss, metrics) out. Everything is per selected completion token (axis N), whatever rows, padding or
packing it came from, and `weights_N` already holds each term's global denominator (see `reduce`): all results
are plain sums, so micro-batches and ranks add up to the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dphrl.algo.divergences import LINEAR_BEYOND, Divergence
from dphrl.algo.policy_losses import Metrics, PolicyLoss, PolicyLossSettings, PolicyTokens, clipped_surrogate
from dphrl.algo.rollout_estimators import (
    KL_ESTIMATORS,
    js_definition_on_reference,
    js_definition_on_rollouts,
    on_rollouts,
)


@dataclass(frozen=True)
class DivergenceTerm:
    """Which divergence, estimated where.

    estimator "reference": f(u) on stored samples of pi_ref, no reference model (arXiv 2509.07430, eq. 5-8).
    "rollout": on the policy's own samples. "definition": Jensen-Shannon as the sum of its two KL halves, one on
    each (eq. 9). The last two need pi_ref's log-probs at the rollouts. kl_estimator picks k1, k2, k3 or k3_as_loss
    for reverse KL on rollouts; None is the generic f(u) / u.
    """

    divergence: Divergence
    eta: float
    estimator: str = "reference"
    kl_estimator: str | None = None

    @property
    def needs_reference_model(self) -> bool:
        return self.estimator != "reference"

    def on_reference(self, log_u_N: Tensor) -> Tensor | None:
        """Per-token values at rehearsal tokens; None when they take no part."""
        if self.estimator == "rollout":
            return None
        return js_definition_on_reference(log_u_N) if self.estimator == "definition" else self.divergence(log_u_N)

    def on_rollouts(self, log_u_N: Tensor) -> Tensor:
        """Per-token values at exploration tokens, with the gradient of the divergence they estimate."""
        if self.estimator == "definition":
            return js_definition_on_rollouts(log_u_N)
        return KL_ESTIMATORS[self.kl_estimator](log_u_N) if self.kl_estimator else on_rollouts(self.divergence, log_u_N)


def hybrid_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    stored_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    is_policy_N: Tensor,
    row_index_N: Tensor,
    *,
    policy: PolicyLossSettings,
    policy_loss: PolicyLoss = clipped_surrogate,
    term: DivergenceTerm | None,
    reference_logprobs_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Policy loss on the exploration tokens + eta x divergence (arXiv 2509.07430, eq. 4).

    Tokens are routed by `is_policy_N`, one by one; stored_logprobs_N are the rollout engine's for policy tokens
    and the reference policy's for the others. reference_logprobs_N: a resident reference model's, for estimators
    that need it. A term without tokens is exactly 0.
    """
    chosen = is_policy_N
    tokens = PolicyTokens(
        logprobs_N[chosen],
        old_logprobs_N[chosen],
        stored_logprobs_N[chosen],
        advantages_N[chosen],
        weights_N[chosen],
        row_index_N[chosen],
    )
    loss, own_metrics = policy_loss(tokens, policy)
    # Every step's record has these two; a loss without a trust region cuts no gradient.
    metrics = {"policy/loss": loss.detach(), "policy/clip_fraction": torch.zeros_like(loss.detach()), **own_metrics}
    if term is None:
        return loss, metrics
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # log u, its per-token values, their weights
    rest = ~is_policy_N
    log_u = _at_least_float(logprobs_N[rest] - stored_logprobs_N[rest])
    if (values := term.on_reference(log_u)) is not None:
        parts.append((log_u, values, weights_N[rest]))
    if term.needs_reference_model:
        assert reference_logprobs_N is not None, "this estimator needs a resident reference model"
        log_u = _at_least_float(logprobs_N[chosen] - reference_logprobs_N[chosen])
        # The samples are the rollout engine's; the expectation is over pi_theta.
        importance = (logprobs_N[chosen] - stored_logprobs_N[chosen]).detach().exp().clamp(max=policy.importance_cap)
        parts.append((log_u, term.on_rollouts(log_u), weights_N[chosen] * importance))
    divergence = torch.stack([(weights * values).sum() for _, values, weights in parts]).sum()
    with torch.no_grad():
        metrics["divergence/loss"] = divergence.detach()
        metrics["divergence/log_u_mean"] = torch.stack([(w * x).sum() for x, _, w in parts]).sum() / len(parts)
        far = [(w * (x.abs() > LINEAR_BEYOND)).sum() for x, _, w in parts]
        metrics["divergence/continued_fraction"] = torch.stack(far).sum() / len(parts)
    return loss + term.eta * divergence, metrics


def _at_least_float(log_u: Tensor) -> Tensor:
    return log_u if log_u.dtype == torch.float64 else log_u.float()
