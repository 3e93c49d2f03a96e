"""Methods as a user would write them, registered by the configurations of test_algorithms.py (algorithm.plugins)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dphrl.algo.advantages import register_advantage
from dphrl.algo.divergences import Divergence, register_divergence
from dphrl.algo.policy_losses import PolicyLossSettings, PolicyTokens, importance, register_policy_loss

if TYPE_CHECKING:  # as users do: the registry must not need the return type
    from dphrl.algo.advantages import AdvantageFn
    from dphrl.algo.policy_losses import Metrics, PolicyLoss


@register_divergence("scaled_kl")
def scaled_kl(scale: Annotated[float, Field(gt=0, le=8)] = 1.0) -> Divergence:
    """Forward KL times a number.

    More that no list shows.
    """
    return Divergence("scaled_kl", lambda x: scale * (torch.expm1(x) - x), lambda x: scale * torch.expm1(x))


@register_advantage("above")
def above(
    threshold: float, shape: Literal["step", "linear"] = "linear", times: Annotated[int, Field(ge=1)] = 1
) -> AdvantageFn:
    """How far a score lies above a threshold."""
    if threshold == 13:
        raise ValueError("threshold=13 brings bad luck; take 12")

    def advantages(scores: Sequence[float]) -> list[float]:
        distances = [times * (score - threshold) for score in scores]
        return [float(d > 0) for d in distances] if shape == "step" else distances

    return advantages


@register_policy_loss("reinforce")
def reinforce(scale: Annotated[float, Field(gt=0)] = 1.0) -> PolicyLoss:
    """Policy gradient without a trust region."""

    def loss(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
        weights_N = tokens.weights_N * importance(tokens, settings)
        value = -scale * (weights_N * tokens.advantages_N * tokens.logprobs_N).sum()
        return value, {"policy/logprob_sum": (tokens.weights_N * tokens.logprobs_N).sum().detach()}

    return loss
