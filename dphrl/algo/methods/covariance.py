"""The covariance of log-prob and advantage, token by token, which KL-Cov and Clip-Cov choose by (arXiv 2505.22617).

The paper's equation 10: over the N tokens of a batch, that of token i is
(log pi(y_i) - mean of log pi) x (A_i - mean of A). Under the policy gradient, the sum of these is about how fast
entropy falls, and few tokens have most of it.
"""

from __future__ import annotations

from dphrl.algo.policy_losses import Floats


def token_covariance(logprobs_N: Floats, advantages_N: Floats) -> Floats:
    """Each token's term, [N], with means over all N tokens of the mini-batch. N may be 0.

    log pi is by the policy that sampled the token. Nobody has that of the policy in training for a whole mini-batch
    before its first micro-batch is done; the two are equal in the first update after on-policy rollouts.
    """
    if not len(logprobs_N):
        return logprobs_N
    covariance_N: Floats = (logprobs_N - logprobs_N.mean()) * (advantages_N - advantages_N.mean())
    return covariance_N
