"""W-REINFORCE and its halves PSR and NSR (Zhu et al. 2025, arXiv 2506.01347).

The paper splits the objective with rewards of +1 and -1 into reinforcement of right answers (PSR) and of wrong ones
(NSR), and finds that the second keeps diversity:

    L_PSR = - E[sum over right y of pi(y | x)],    L_NSR = - E[sum over wrong y of - pi(y | x)],
    L_W-REINFORCE = lambda L_PSR + L_NSR,    lambda = 0.1,

so that A = lambda for a right answer and A = -1 for a wrong one, without a baseline. lambda = 0 is NSR.

Parameters: positive_weight is lambda (`lambda` is a word of Python), negative_weight the weight of L_NSR. NSR is
`{name: w_reinforce, positive_weight: 0}`, PSR `{name: w_reinforce, positive_weight: 1, negative_weight: 0}`.

Assumes: scores of 0 (wrong) and 1 (right). Nothing is compared, so groups whose scores are all equal teach too, and so
does a lone completion. `algorithm.dynamic_sampling_rounds` above 1 would replace such groups.

Departs: a score s between or beyond the two (a signal, a length penalty) is taken on the line through them, A =
positive_weight s - negative_weight (1 - s); the paper knows none.

The weights were compared with the authors' code, the objective with public notes on the paper, not with its pages.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dphrl.algo.advantages import Group, GroupAdvantage, register_advantage

Weight = Annotated[float, Field(ge=0)]


@register_advantage("w_reinforce")
def _w_reinforce(positive_weight: Weight = 0.1, negative_weight: Weight = 1.0) -> GroupAdvantage:
    """Right completions positive_weight, wrong ones -negative_weight: W-REINFORCE, NSR, PSR (arXiv 2506.01347)."""
    if not positive_weight and not negative_weight:
        raise ValueError("both weights are 0, which teaches nothing; make one of them positive")

    def advantages(group: Group) -> list[float]:
        return [positive_weight * score - negative_weight * (1 - score) for score in group.scores]

    return GroupAdvantage(advantages, min_size=1)
