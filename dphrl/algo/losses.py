"""The hybrid loss: a registered policy loss (see `policy_losses`) plus eta times a registered divergence.

Tensors in, (loss, metrics) out. Every input has one value per selected completion token (axis N), whatever rows,
padding or packing it came from. `weights_N` already holds each term's global denominator (see `reduce`), so all
results are plain sums, and micro-batches and ranks add up to the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dphrl.algo.divergences import LINEAR_BEYOND, Divergence
from dphrl.algo.policy_losses import Metrics, PolicyLoss, PolicyLossSettings, PolicyTokens, clipped_surrogate
from dphrl.algo.ratios import bounded_ratio, is_beyond
from dphrl.algo.rollout_estimators import (
    KL_ESTIMATORS,
    js_definition_on_reference,
    js_definition_on_rollouts,
    on_rollouts,
)


@dataclass(frozen=True)
class DivergenceTerm:
    """Which divergence is added to the loss, and on which samples it is estimated.

    estimator "reference": f(u) on stored samples of pi_ref, without a reference model (arXiv 2509.07430, eq. 5-8).
    "rollout": on the policy's own samples. "definition": Jensen-Shannon as the sum of its two KL halves, one on each
    kind of sample (eq. 9). The last two need pi_ref's log-probs at the rollouts. kl_estimator chooses k1, k2, k3 or
    k3_as_loss for reverse KL on rollouts; None means the generic f(u) / u.
    """

    divergence: Divergence
    eta: float
    estimator: str = "reference"
    kl_estimator: str | None = None

    @property
    def needs_reference_model(self) -> bool:
        return self.estimator != "reference"

    def on_reference(self, log_u_N: Tensor) -> Tensor | None:
        """Per-token values at rehearsal tokens; None when the estimator does not use these tokens."""
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
    chosen_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Policy loss on the exploration tokens + eta x divergence (arXiv 2509.07430, eq. 4).

    `is_policy_N` says for each token which term it belongs to. stored_logprobs_N: by the rollout engine for policy
    tokens, by the reference policy for the others. reference_logprobs_N: by a resident reference model, for estimators
    that need one. chosen_N: see `PolicyTokens`. Returns a scalar and scalar metrics. A term without tokens is 0.
    """
    chosen = is_policy_N
    tokens = PolicyTokens(
        logprobs_N[chosen],
        old_logprobs_N[chosen],
        stored_logprobs_N[chosen],
        advantages_N[chosen],
        weights_N[chosen],
        row_index_N[chosen],
        None if chosen_N is None else chosen_N[chosen],
    )
    loss, own_metrics = policy_loss(tokens, policy)
    # Every step's record has these two metrics; a loss without a trust region cuts no gradient.
    metrics = {
        "policy/loss": loss.detach(),
        "policy/clip_fraction": torch.zeros_like(loss.detach()),
        "policy/ratio_bounded_fraction": _bounded_share(tokens),
        **own_metrics,
    }
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
        # The rollout engine drew the samples, but the expectation is over pi_theta: this weight corrects for that.
        log_rho = (logprobs_N[chosen] - stored_logprobs_N[chosen]).detach()
        importance = bounded_ratio(log_rho).clamp(max=policy.importance_cap)
        parts.append((log_u, term.on_rollouts(log_u), weights_N[chosen] * importance))
    divergence = torch.stack([(weights * values).sum() for _, values, weights in parts]).sum()
    with torch.no_grad():
        metrics["divergence/loss"] = divergence.detach()
        metrics["divergence/log_u_mean"] = torch.stack([(w * x).sum() for x, _, w in parts]).sum() / len(parts)
        far = [(w * (x.abs() > LINEAR_BEYOND)).sum() for x, _, w in parts]
        metrics["divergence/continued_fraction"] = torch.stack(far).sum() / len(parts)
    return loss + term.eta * divergence, metrics


@torch.no_grad()
def _bounded_share(tokens: PolicyTokens) -> Tensor:
    """Share of the tokens with a ratio, to the proximal policy or from the engine to it, that is held at its bound."""
    to_proximal = is_beyond(tokens.logprobs_N - tokens.old_logprobs_N)
    return (tokens.weights_N * (to_proximal | is_beyond(tokens.old_logprobs_N - tokens.rollout_logprobs_N))).sum()


def _at_least_float(log_u: Tensor) -> Tensor:
    return log_u if log_u.dtype == torch.float64 else log_u.float()
