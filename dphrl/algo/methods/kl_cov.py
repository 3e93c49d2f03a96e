"""KL-Cov (arXiv 2505.22617): the tokens of highest covariance are held near the old policy.

The paper's equations 13 and 14, as the authors' code has them: r = pi_theta / pi_old, and for a share of the tokens,
those of highest covariance,

    L = -A r + beta |log r|            and L = -A r for all others, without clip bounds.

|log r| stands for the KL divergence of the old policy; it is 0, and so is its gradient, while pi_theta is pi_old.
"""

from __future__ import annotations

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
    importance,
    log_rho,
    register_policy_loss,
    sequence_log_ratio,
)
from dphrl.algo.ratios import bounded_ratio


@register_policy_loss("kl_cov")
def _kl_cov(
    share: Annotated[float, Field(gt=0, lt=1)] = 0.002, beta: Annotated[float, Field(gt=0)] = 1.0
) -> PolicyLoss:
    """Policy gradient; tokens of highest covariance of log-prob and advantage pay for leaving the old policy (KL-Cov).

    share: of the mini-batch's tokens, rounded down, but at least one; only such with a positive covariance. The paper
    has 0.002 at 7B and 0.0002 at 32B, and beta 1.
    """

    def choose(logprobs_N: Floats, advantages_N: Floats, rng: np.random.Generator) -> Bools:
        covariance_N = token_covariance(logprobs_N, advantages_N)
        num_chosen = min(max(1, int(share * len(covariance_N))), int((covariance_N > 0).sum()))
        chosen_N = np.zeros(len(covariance_N), dtype=np.bool_)
        # A stable order, so that equal ones are chosen in the order of the batch.
        chosen_N[np.argsort(-covariance_N, kind="stable")[:num_chosen]] = True
        return chosen_N

    def loss(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
        assert tokens.chosen_N is not None
        token_log_ratio_N = tokens.logprobs_N - tokens.old_logprobs_N
        log_ratio_N = token_log_ratio_N
        if settings.ratio == "sequence":
            log_ratio_N = sequence_log_ratio(log_ratio_N, tokens.row_index_N)
        penalty_N = torch.where(tokens.chosen_N, beta * token_log_ratio_N.abs(), 0.0)
        importance_N = importance(tokens, settings)
        surrogate_N = penalty_N - tokens.advantages_N * bounded_ratio(log_ratio_N)
        with torch.no_grad():
            whole_N = bounded_ratio(log_rho(tokens, settings))
            metrics = {
                "policy/chosen_fraction": (tokens.weights_N * tokens.chosen_N).sum(),
                "policy/chosen_penalty": (tokens.weights_N * penalty_N).sum(),
                "policy/importance_mean": (tokens.weights_N * importance_N).sum(),
                "policy/importance_affected": (tokens.weights_N * (importance_N != whole_N)).sum(),
            }
        return (tokens.weights_N * importance_N * surrogate_N).sum(), metrics

    return Choosing(loss, choose)
