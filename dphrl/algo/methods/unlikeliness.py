"""The unlikeliness reward (He, Fried and Welleck 2025, arXiv 2506.02355).

GRPO raises what is likely already and neglects right answers that are rare. So likely right answers are paid less:
with G answers y_i of rewards R(x, y_i) in {0, 1},

    r_i = R(x, y_i) (1 - beta_rank (G - rank(y_i)) / G),

where rank(y_i) in {0, .., G - 1} counts from 0 for the likeliest of the group, wrong ones included, by the policy that
sampled; beta_rank = 0.25. The advantages are those of GRPO on r.

Assumes: rewards of 0 and 1. A score of 0 or less is no pay, and stays as it is.

Departs: a group whose scores are all equal gets zeros, as with GRPO; otherwise a group of right answers would push
half of them down at full strength. (The authors' runs leave such groups out, by a filter on groups.) Answers of one
likelihood share the mean of their ranks; without that, two copies of an answer would be paid differently. Likelihood
is that of the whole answer; the authors' code ranks by the mean per token, and takes beta_rank / G less from every
right answer.

The formula was compared with the authors' code and with public implementations, not with the paper's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dphrl.algo.advantages import Group, GroupAdvantage, normalized, register_advantage

# Engines compute one completion with differences in the last digits, which must not decide about its rank.
_DECIMALS = 3


@register_advantage("unlikeliness")
def _unlikeliness(beta: Annotated[float, Field(ge=0, le=1)] = 0.25) -> GroupAdvantage:
    """group_normalized, but likelier right completions are paid less, by up to beta (arXiv 2506.02355)."""

    def advantages(group: Group) -> list[float]:
        scores, size = group.scores, len(group.scores)
        if min(scores) == max(scores):
            return [0.0] * size
        discounts = [beta * (size - rank) / size for rank in likelihood_ranks(group.logprobs)]
        return normalized([s * (1 - d) if s > 0 else s for s, d in zip(scores, discounts, strict=True)])

    return GroupAdvantage(advantages, reads=("logprobs",))


def likelihood_ranks(logprobs: Sequence[float]) -> list[float]:
    """0 for the likeliest, n - 1 for the least likely of n; equal ones share the mean of their ranks."""
    rounded = [round(logprob, _DECIMALS) for logprob in logprobs]
    return [sum(other > own for other in rounded) + (rounded.count(own) - 1) / 2 for own in rounded]
