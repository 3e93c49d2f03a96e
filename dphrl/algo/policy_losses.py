"""Policy losses: tokens of exploration in, (loss, metrics) out.

A user's own, complete:

    @register_policy_loss("reinforce")
    def reinforce(scale: Annotated[float, Field(gt=0)] = 1.0) -> PolicyLoss:
        '''Policy gradient without a trust region.'''

        def loss(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
            weights_N = tokens.weights_N * importance(tokens, settings)
            value = -scale * (weights_N * tokens.advantages_N * tokens.logprobs_N).sum()
            return value, {"policy/scaled_loss": value.detach()}

        return loss
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dphrl.algo.registry import METHODS, Registry

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class PolicyTokens:
    """The exploration tokens of one micro-batch along the axis N, of which there may be none.

    logprobs_N: log-probabilities by the policy in training, the only input with a gradient. old_logprobs_N: by the
    learner at the start of the step. rollout_logprobs_N: by the engine that sampled. advantages_N: each completion's
    advantage at every one of its tokens. weights_N: each token's share of the loss, with the denominator of the whole
    mini-batch in it. row_index_N: which tokens share a completion.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    row_index_N: Tensor


@dataclass(frozen=True)
class PolicyLossSettings:
    """The trust region as the configuration has it; every policy loss gets it and uses what it needs.

    clip_low, clip_high: how far the ratio may fall below 1 and rise above it. dual_clip: bound on ratio x |advantage|
    when the advantage is negative. importance_cap: truncation of the engine-to-learner importance weight. ratio: of
    each "token", or one for the whole "sequence" (GSPO).
    """

    clip_low: float
    clip_high: float
    dual_clip: float
    importance_cap: float
    ratio: str = "token"


# Returns the loss, a plain sum of terms that each hold their weights_N, so that micro-batches and ranks add up; and
# metrics, which are summed likewise (those whose name ends in _max take the largest).
PolicyLoss = Callable[[PolicyTokens, PolicyLossSettings], tuple[Tensor, Metrics]]

_POLICY_LOSSES: Registry[PolicyLoss] = METHODS["policy_loss"]

# Decorator: register_policy_loss("mine") makes `factory(**params) -> PolicyLoss` available to configurations.
register_policy_loss = _POLICY_LOSSES.register


def get_policy_loss(name: str, **params: Any) -> PolicyLoss:
    """The registered policy loss `name` with its parameters.

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return _POLICY_LOSSES.build(name, params)


def importance(tokens: PolicyTokens, settings: PolicyLossSettings) -> Tensor:
    """Truncated importance weight of what lies between the engine that sampled and the learner at the start of the
    step: numerics, staleness. Without a gradient."""
    return (tokens.old_logprobs_N - tokens.rollout_logprobs_N).exp().clamp(max=settings.importance_cap).detach()


def clipped_surrogate(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
    """Clipped surrogate with separate bounds (DAPO, arXiv 2503.14476, eq. 8) and dual clip (arXiv 1912.09729, eq. 5).

    The ratio pi_theta / pi_old is against the learner at the start of the step.
    """
    log_ratio_N = tokens.logprobs_N - tokens.old_logprobs_N
    if settings.ratio == "sequence":
        log_ratio_N = sequence_log_ratio(log_ratio_N, tokens.row_index_N)
    ratio_N, advantages_N, weights_N = log_ratio_N.exp(), tokens.advantages_N, tokens.weights_N
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate_N = torch.maximum(unclipped_N, clipped_N)
    bounded_N = torch.minimum(surrogate_N, -advantages_N * settings.dual_clip)
    surrogate_N = torch.where(advantages_N < 0, bounded_N, surrogate_N)
    importance_N = importance(tokens, settings)
    loss = (weights_N * importance_N * surrogate_N).sum()
    with torch.no_grad():
        metrics = {
            "policy/clip_fraction": (weights_N * (clipped_N > unclipped_N)).sum(),
            "policy/importance_mean": (weights_N * importance_N).sum(),
        }
    return loss, metrics


def sequence_log_ratio(log_ratio_N: Tensor, row_index_N: Tensor) -> Tensor:
    """Each completion's mean log-ratio, at every one of its tokens (GSPO, arXiv 2507.18071, eq. 7).

    The gradient goes to each token's own log-prob (GSPO-token, eq. 14): summed over a completion with equal
    weights it is the gradient of the sequence's ratio.
    """
    if not len(log_ratio_N):
        return log_ratio_N
    detached = log_ratio_N.detach()
    totals = detached.new_zeros(int(row_index_N.max()) + 1)
    sums = totals.index_add(0, row_index_N, detached)
    counts = totals.index_add(0, row_index_N, torch.ones_like(detached))
    mean = (sums / counts.clamp(min=1))[row_index_N]
    return mean + log_ratio_N - detached


@register_policy_loss("clipped")
def _clipped() -> PolicyLoss:
    """Clipped surrogate with separate bounds and dual clip (PPO, GRPO, DAPO); algorithm.ratio chooses the ratio."""
    return clipped_surrogate


@register_policy_loss("gspo")
def _gspo() -> PolicyLoss:
    """clipped with one ratio for each completion, whatever algorithm.ratio says (GSPO); wants bounds of about 3e-4."""
    return lambda tokens, settings: clipped_surrogate(tokens, replace(settings, ratio="sequence"))
