"""Uniqueness-aware RL (Hu et al. 2026, "Rewarding the Rare", arXiv 2601.08763).

A judge puts the K answers of a prompt into clusters by the way they solve it. With f_i the size of the cluster of
answer i, the advantage of GRPO is divided by a power of it:

    w_i = 1 / f_i^alpha,    A_i = w_i (r_i - mean) / (std + epsilon),    0 <= alpha <= 1,

so that right answers of a rare kind move the policy more than common ones. The weight is on advantages of both signs.

Assumes: a reward that tells ways of solving apart.

Departs: no judge. Two answers are of one cluster when the reward writes the same solution for both, the one by which
an evaluation counts `distinct_correct`: divisor and quotient in the embedded factorisation, the canonical query in
SQL. A right and a wrong answer are then never of one cluster, and wrong ones, which are wrong in many ways, are mostly
alone: they keep their weight where right ones share theirs, so that a group's advantages have a mean below 0. For
mathematics, where the reward has only the final answer, that is the cluster: all right answers of a prompt are one, so
that the method takes weight from prompts that are often solved, and tells no ways apart. A reward of one's own may
return a `solution`.

The formula was compared with public notes on the paper, not with its pages. Its published value of alpha was not
found: the default, 1, is the inverse of the size, as its abstract says.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field

from dphrl.algo.advantages import Group, GroupAdvantage, normalized, register_advantage


@register_advantage("uniqueness")
def _uniqueness(alpha: Annotated[float, Field(ge=0, le=1)] = 1.0) -> GroupAdvantage:
    """group_normalized / (how many of the group solve the prompt in the same way)^alpha (arXiv 2601.08763)."""

    def advantages(group: Group) -> list[float]:
        sizes = Counter(group.clusters)
        pairs = zip(normalized(group.scores), group.clusters, strict=True)
        return [advantage / sizes[cluster] ** alpha for advantage, cluster in pairs]

    return GroupAdvantage(advantages, reads=("clusters",))
