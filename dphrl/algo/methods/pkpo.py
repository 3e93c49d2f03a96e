"""PKPO: pass-at-k policy optimization (Walder and Karkhanis 2025, arXiv 2505.15201).

maxg@k is the expected largest reward g of k answers; with rewards of 0 and 1 it is pass@k. From n >= k answers the
paper estimates its gradient without bias as the sum over i of s_i grad log p(x_i). With a baseline that leaves out
answer i and takes k - 1 others (its eq. 33, the variant it recommends),

    s_i^(loo-1) = 1 / C(n, k)  sum over sets I of k answers, i among them, of  (max over I - max over I without i) of g,

that is what answer i adds to the best of k - 1 others. If g_(1) <= ... <= g_(n-1) are the others' rewards, the j-th of
them is the largest of k - 1 with probability w_j = C(j - 1, k - 2) / C(n - 1, k - 1), so

    s_i = (k / n)  sum over j of  w_j max(0, g_i - g_(j)).

With rewards of 0 and 1 and c right answers a right one has s_i = (k / n) C(n - c, k - 1) / C(n - 1, k - 1) and a wrong
one 0: where more than n - k answers are right nothing is left to learn. For k = 1 there are no others to be the best
of, and the paper's s_i^(loo) is leave-one-out (RLOO).

Assumes: answers drawn from the policy itself, and a loss in which completions count the same (`algorithm.aggregation:
fixed_length`, or answers of one length). Any scores will do: what is estimated is maxg@k.

Departs: the advantage is n s_i, because the loss here is a mean over completions where the paper has a sum. k = 1 is
then `leave_one_out`. Completions whose grader failed leave n smaller; fewer than k give zeros.

The formula was compared with public implementations of the paper's listing, not with its pages.
"""

from __future__ import annotations

from math import comb
from typing import Annotated

from pydantic import Field

from dphrl.algo.advantages import Group, GroupAdvantage, get_group_advantage, register_advantage


@register_advantage("pkpo")
def _pkpo(k: Annotated[int, Field(ge=1)] = 4) -> GroupAdvantage:
    """What a completion adds to the best of k - 1 others: the gradient of pass@k (PKPO, arXiv 2505.15201)."""
    if k == 1:
        return get_group_advantage("leave_one_out")

    def advantages(group: Group) -> list[float]:
        n = len(group.scores)
        ascending = sorted(group.scores)
        # Only smaller scores count, and those stand before the completion's own: their places among the others are
        # their places among all.
        weights = [comb(j - 1, k - 2) / comb(n - 1, k - 1) for j in range(1, n)]
        return [
            k * sum(w * max(0.0, g - other) for w, other in zip(weights, ascending, strict=False)) for g in group.scores
        ]

    return GroupAdvantage(advantages, min_size=k)
