"""Which rows share a sequence, a micro-batch and a rank.

Completions of one prompt may share it: a `Bundle` is one sequence [prompt, completion 1, ..., completion n]. Bundles
are dealt to ranks and gathered into micro-batches by what they cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from dphrl.types import TrainRow

# What one pair of positions costs in attention, in units of what one position costs everywhere else, for a model of
# width 576 (SmolLM2). `pair_cost` of dphrl.learner.prefixes has it for others.
PAIR_COST = 1 / 1728
# What a micro-batch costs besides its positions, where there should be as few of them as possible.
FEWEST_MICRO_BATCHES = 1e12


@dataclass(frozen=True)
class Bundle:
    """Rows in one sequence: the prompt that all of them have, once, then the completion of each. One row is a bundle
    too."""

    rows: tuple[TrainRow, ...]

    @cached_property
    def num_tokens(self) -> int:
        return self.rows[0].num_prompt_tokens + sum(row.num_completion_tokens for row in self.rows)

    def cost(self, pair_cost: float) -> float:
        """Work of a forward and backward pass, in units of one position's without attention.

        A row alone is causal attention, for which kernels leave out half of the pairs. A mask of one's own makes them
        compute all.
        """
        pairs = self.num_tokens**2 / (2 if len(self.rows) == 1 else 1)
        return self.num_tokens + pairs * pair_cost


@dataclass(frozen=True)
class Sharing:
    """How rows share their prompts, and micro-batches.

    prefixes: `learner.share_prefix`, resolved. pair_cost: see `Bundle.cost`. micro_batch_cost: of one more micro-batch,
    in the same unit.
    """

    prefixes: str = "never"
    pair_cost: float = PAIR_COST
    micro_batch_cost: float = FEWEST_MICRO_BATCHES


APART = Sharing()


def make_bundles(rows: Sequence[TrainRow], max_tokens: int, sharing: Sharing) -> list[Bundle]:
    """Each row in one bundle, of at most `max_tokens` as far as single rows allow that.

    Where the completions of a prompt need several bundles, each repeats the prompt. `auto` makes as many as cost least,
    `always` as few as fit.
    """
    if sharing.prefixes == "never":
        return [Bundle((row,)) for row in rows]
    groups: dict[tuple[int, ...], list[TrainRow]] = {}
    for row in rows:
        groups.setdefault(row.token_ids[: row.num_prompt_tokens], []).append(row)
    return [bundle for group in groups.values() for bundle in _split(group, max_tokens, sharing)]


def _split(group: Sequence[TrainRow], max_tokens: int, sharing: Sharing) -> list[Bundle]:
    best, least = [Bundle((row,)) for row in group], float("inf")
    for num_parts in range(1, len(group) + 1):
        parts = split_evenly(group, num_parts)
        if num_parts < len(group) and any(bundle.num_tokens > max_tokens for bundle in parts):
            continue
        cost = sum(bundle.cost(sharing.pair_cost) for bundle in parts)
        if cost < least:
            best, least = parts, cost
        if sharing.prefixes == "always":
            break
    return best


def split_evenly(rows: Sequence[TrainRow], num_parts: int) -> list[Bundle]:
    """Rows of one prompt in so many bundles of about the same length."""
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    return [Bundle(tuple(ordered[i::num_parts])) for i in range(num_parts)]


def deal(bundles: Sequence[Bundle], num_ranks: int, pair_cost: float) -> list[list[Bundle]]:
    """Deal bundles so that all ranks get about the same work: the costliest first, each to the rank that has least."""
    dealt: list[list[Bundle]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for bundle in sorted(bundles, key=lambda bundle: -bundle.cost(pair_cost)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(bundle)
        heapq.heappush(loads, (load + bundle.cost(pair_cost), rank))
    return dealt


def work(bundles: Sequence[Bundle], pair_cost: float) -> float:
    return sum(bundle.cost(pair_cost) for bundle in bundles)


def share_out(rows: Sequence[TrainRow], num_ranks: int, max_tokens: int, sharing: Sharing) -> list[list[Bundle]]:
    """Each rank's bundles. A prompt is repeated on several ranks only where they are done earlier for it."""

    def busiest(dealt: Sequence[Sequence[Bundle]]) -> Sequence[Bundle]:
        return max(dealt, key=lambda mine: work(mine, sharing.pair_cost))

    bundles = make_bundles(rows, max_tokens, sharing)
    best = dealt = deal(bundles, num_ranks, sharing.pair_cost)
    # The rank that has most halves its largest bundle. That may help only when others have done the same.
    num_tries = num_ranks
    while num_ranks > 1 and num_tries:
        shared = [bundle for bundle in busiest(dealt) if len(bundle.rows) > 1]
        if not shared:
            break
        largest = max(shared, key=lambda bundle: bundle.num_tokens)
        bundles = [bundle for bundle in bundles if bundle is not largest] + split_evenly(largest.rows, 2)
        dealt = deal(bundles, num_ranks, sharing.pair_cost)
        num_tries -= 1
        if work(busiest(dealt), sharing.pair_cost) < work(busiest(best), sharing.pair_cost):
            best, num_tries = dealt, num_ranks
    return best


def cut_micro_batches(
    bundles: Sequence[Bundle], max_tokens: int, *, packed: bool, one_sequence: bool = False, sharing: Sharing = APART
) -> list[list[Bundle]]:
    """Groups of bundles that each fit `max_tokens` positions (padding counted when padded), shortest bundles first.

    one_sequence: a micro-batch is one sequence, so that bundles that are not packed come alone.

    Raises ValueError for a bundle that fits no micro-batch.
    """
    ordered = sorted(bundles, key=lambda bundle: bundle.num_tokens)
    lengths = [bundle.num_tokens for bundle in ordered]
    if lengths and lengths[-1] > max_tokens:
        raise ValueError(f"a row of {lengths[-1]} tokens exceeds learner.micro_batch_tokens={max_tokens}; raise it")
    if packed:
        starts = _pack(lengths, max_tokens)
    elif one_sequence:
        starts = list(range(len(ordered)))
    else:
        starts = _cut_where_padding_costs_least(lengths, max_tokens, sharing)
    return [ordered[start:end] for start, end in pairwise([*starts, len(ordered)])]


def _pack(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Where micro-batches begin that take as many rows as fit."""
    starts: list[int] = []
    num_positions = max_tokens
    for i, length in enumerate(lengths):
        if num_positions + length > max_tokens:
            starts.append(i)
            num_positions = 0
        num_positions += length
    return starts


def _cut_where_padding_costs_least(lengths: Sequence[int], max_tokens: int, sharing: Sharing) -> list[int]:
    """Where micro-batches begin of rows in ascending length, each row padded to the longest of its micro-batch.

    Of all ways to cut them the cheapest: with the best one of every shorter list at hand, the last micro-batch decides.
    """
    least = np.zeros(len(lengths) + 1)  # cost of the first n rows
    start_of_last = [0] * (len(lengths) + 1)
    for num_rows, width in enumerate(lengths, start=1):
        row_cost = width + width**2 * sharing.pair_cost
        starts = np.arange(max(0, num_rows - max_tokens // width), num_rows)
        costs = least[starts] + (num_rows - starts) * row_cost
        best = int(costs.argmin())
        least[num_rows] = costs[best] + sharing.micro_batch_cost
        start_of_last[num_rows] = int(starts[best])
    found, end = [], len(lengths)
    while end:
        end = start_of_last[end]
        found.append(end)
    return found[::-1]


def plan_micro_batches(
    rows: Sequence[TrainRow],
    *,
    rank: int,
    num_ranks: int,
    max_tokens: int,
    packed: bool,
    ranks_per_row: int = 1,
    sharing: Sharing = APART,
) -> list[list[Bundle]]:
    """This rank's micro-batches of a mini-batch. `rows` is the whole mini-batch, the same on every rank.

    Every rank gets the same number of micro-batches: collectives in forward (ZeRO-3) and backward (ZeRO-2) would hang
    on unequal numbers. A rank with fewer gets extra ones, which hold the shortest row with weight 0: it adds nothing
    to any sum. ranks_per_row: this many ranks next to each other share each row, and so get the same micro-batches,
    each of one sequence. sharing: how completions share prompts, and rows micro-batches. Raises ValueError for a row
    that fits no micro-batch.
    """
    assert rows, "a mini-batch has at least one row"
    dealt = share_out(rows, num_ranks // ranks_per_row, max_tokens, sharing)
    plans = [
        cut_micro_batches(part, max_tokens, packed=packed, one_sequence=ranks_per_row > 1, sharing=sharing)
        for part in dealt
    ]
    shortest = min(rows, key=lambda row: row.num_tokens)
    filler = Bundle((replace(shortest, weight=0.0),))
    num_turns = max(len(plan) for plan in plans)
    own = plans[rank // ranks_per_row]
    return own + [[filler]] * (num_turns - len(own))
