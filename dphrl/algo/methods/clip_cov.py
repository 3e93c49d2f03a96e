"""Clip-Cov (arXiv 2505.22617): some tokens of high covariance are left out of the gradient.

The paper's equations 11 and 12, with the clip bounds that the authors' code keeps: of the tokens whose covariance is
within [low, high], a share of all tokens is drawn at random, and adds neither value nor gradient. The authors' code
draws from tokens that the trust region does not clip already. Here the draw is made before anybody knows which these
are; one that is clipped as well costs nothing, and no other takes its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dphrl.algo.methods.covariance import token_covariance
from dphrl.algo.policy_losses import (
    Bools,
    Choosing,
    Floats,
    Metrics,
    PolicyLoss,
    PolicyLossSettings,
    PolicyTokens,
    clipped_surrogate,
    register_policy_loss,
)


@register_policy_loss("clip_cov")
def _clip_cov(
    share: Annotated[float, Field(gt=0, lt=1)] = 0.0002,
    low: Annotated[float, Field(ge=0)] = 1.0,
    high: Annotated[float, Field(gt=0)] = 5.0,
) -> PolicyLoss:
    """clipped, without some tokens of high covariance of log-prob and advantage, drawn at random (Clip-Cov).

    share: of the mini-batch's tokens, rounded down, but at least one if any is within [low, high]. The defaults are the
    paper's. Raises ValueError when low is not below high.
    """
    if low >= high:
        raise ValueError(f"low={low:g} is not below high={high:g}; lower it")

    def choose(logprobs_N: Floats, advantages_N: Floats, rng: np.random.Generator) -> Bools:
        covariance_N = token_covariance(logprobs_N, advantages_N)
        (candidates,) = np.nonzero((covariance_N >= low) & (covariance_N <= high))
        chosen_N = np.zeros(len(covariance_N), dtype=np.bool_)
        chosen_N[rng.permutation(candidates)[: max(1, int(share * len(covariance_N)))]] = True
        return chosen_N

    def loss(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
        assert tokens.chosen_N is not None
        # Without an advantage a token adds nothing to the clipped surrogate, and still counts in all other metrics.
        kept = replace(tokens, advantages_N=torch.where(tokens.chosen_N, 0.0, tokens.advantages_N))
        value, metrics = clipped_surrogate(kept, settings)
        return value, metrics | {"policy/chosen_fraction": (tokens.weights_N * tokens.chosen_N).sum()}

    return Choosing(loss, choose)
