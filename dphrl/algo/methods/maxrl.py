"""MaxRL: maximum likelihood reinforcement learning (Tajwar et al. 2026, arXiv 2602.02710).

For a prompt whose answers are right with probability p, the maximum-likelihood objective is

    log p = - sum over k >= 1 of (1 - p)^k / k,    with gradient    sum over k >= 1 of (1/k) grad pass@k,

of which plain RL keeps the term k = 1. With N answers of rewards r_i, K of them right and r_mean = K / N, the paper's
algorithm gives

    A_i = (r_i - r_mean) / r_mean,    and 0 to all of a group without a right answer.

The mean over the group of A_i grad log pi(y_i) is then, in expectation, the gradient's terms k = 1 .. N - 1 (the
paper's theorem on the centred estimator that leaves out groups without success): (1 - (1 - p)^(N - 1)) / p grad p.

Assumes: rewards of 0 and 1; answers from the policy itself; a loss in which completions count the same
(`algorithm.aggregation: fixed_length`, or answers of one length).

Departs: the authors' code adds 1e-6 to the mean, this does not. Scores other than 0 and 1 (a signal, a length penalty)
are not in the paper: a group whose mean is not above 0 gets zeros, and the divisor is at least 1/N, the mean of a
group with one right answer, because a mean near 0 would make advantages of any size.

The formula and the theorem were compared with the authors' code and with public notes on the paper, not with its
pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from dphrl.algo.advantages import AdvantageFn, register_advantage


@register_advantage("maxrl")
def _maxrl() -> AdvantageFn:
    """(score - mean) / mean: rare successes weigh more, as in maximum likelihood (MaxRL, arXiv 2602.02710)."""

    def advantages(scores: Sequence[float]) -> list[float]:
        mean = sum(scores) / len(scores)
        if mean <= 0:
            return [0.0] * len(scores)
        return [(score - mean) / max(mean, 1 / len(scores)) for score in scores]

    return advantages
