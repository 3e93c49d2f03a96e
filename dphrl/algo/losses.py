"""The two terms of the hybrid loss, and their sum.

Tensors in, (loss, metrics) out. Everything is per selected completion token (axis N), whatever rows, padding or
packing it came from, and `weights_N` already holds each term's global denominator (see `reduce`): all results
are plain sums, so micro-batches and ranks add up to the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dphrl.algo.divergences import LINEAR_BEYOND, Divergence

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class PolicyLossSettings:
    """clip_low, clip_high: the trust region of the ratio. dual_clip: bound on ratio x |advantage| when the
    advantage is negative. importance_cap: truncation of the engine-to-learner importance weight."""

    clip_low: float
    clip_high: float
    dual_clip: float
    importance_cap: float


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    settings: PolicyLossSettings,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate with separate bounds (DAPO, arXiv 2503.14476, eq. 8) and dual clip (arXiv 1912.09729, eq. 5).

    The ratio pi_theta / pi_old is against the learner at the start of the step. What lies between the engine
    that sampled and that learner (numerics, staleness) is corrected by a truncated importance weight.
    """
    ratio = (logprobs_N - old_logprobs_N).exp()
    unclipped = -advantages_N * ratio
    clipped = -advantages_N * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    bounded = torch.minimum(surrogate, -advantages_N * settings.dual_clip)
    surrogate = torch.where(advantages_N < 0, bounded, surrogate)
    importance = (old_logprobs_N - rollout_logprobs_N).exp().clamp(max=settings.importance_cap).detach()
    loss = (weights_N * importance * surrogate).sum()
    with torch.no_grad():
        metrics = {
            "policy/loss": loss.detach(),
            "policy/clip_fraction": (weights_N * (clipped > unclipped)).sum(),
            "policy/importance_mean": (weights_N * importance).sum(),
        }
    return loss, metrics


def divergence_loss(
    logprobs_N: Tensor, reference_logprobs_N: Tensor, weights_N: Tensor, divergence: Divergence
) -> tuple[Tensor, Metrics]:
    """Mean over rehearsal tokens of f(u), u = pi_theta / pi_ref, on samples of pi_ref (arXiv 2509.07430, eq. 5-8)."""
    log_u = logprobs_N - reference_logprobs_N
    loss = (weights_N * divergence(log_u)).sum()
    with torch.no_grad():
        metrics = {
            "divergence/loss": loss.detach(),
            "divergence/log_u_mean": (weights_N * log_u).sum(),
            "divergence/continued_fraction": (weights_N * (log_u.abs() > LINEAR_BEYOND)).sum(),
        }
    return loss, metrics


def hybrid_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    stored_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    is_policy_N: Tensor,
    *,
    policy: PolicyLossSettings,
    divergence: Divergence | None,
    eta: float,
) -> tuple[Tensor, Metrics]:
    """Policy loss on the exploration tokens + eta x divergence on the rehearsal tokens (arXiv 2509.07430, eq. 4).

    Tokens are routed by `is_policy_N`, one by one; stored_logprobs_N are the rollout engine's for policy tokens
    and the reference policy's for the others. A term without tokens is exactly 0.
    """
    chosen = is_policy_N
    loss, metrics = policy_loss(
        logprobs_N[chosen],
        old_logprobs_N[chosen],
        stored_logprobs_N[chosen],
        advantages_N[chosen],
        weights_N[chosen],
        policy,
    )
    if divergence is not None:
        rest = ~is_policy_N
        term, more = divergence_loss(logprobs_N[rest], stored_logprobs_N[rest], weights_N[rest], divergence)
        loss, metrics = loss + eta * term, metrics | more
    return loss, metrics
