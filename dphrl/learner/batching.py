"""From rows to micro-batches: rows are dealt to ranks, cut by a token budget, and padded or packed.

The learner only sees `MicroBatch`: flat arrays over the completion tokens (axis N), with the flat index of the position
that predicts each token. Code after this module is the same for padded and packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dphrl.types import RowKind, TrainRow


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs.

    input_ids_BT, position_ids_BT: int64. attention_mask_BT: int64 for padded rows; None for packed rows, where a
    position of 0 starts a new sequence. predictor_index_N: int64, indices into the flattened B*T positions.
    target_ids_N: int64. row_index_N: int64, the row of each token in the micro-batch. is_policy_N: bool. The other
    arrays are float32.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    predictor_index_N: Tensor
    target_ids_N: Tensor
    stored_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    is_policy_N: Tensor
    row_index_N: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def deal_rows(rows: Sequence[TrainRow], num_ranks: int) -> list[list[TrainRow]]:
    """Deal rows so that all ranks get about the same number of tokens: longest first, back and forth over the ranks."""
    dealt: list[list[TrainRow]] = [[] for _ in range(num_ranks)]
    ordered = sorted(rows, key=lambda row: -row.num_tokens)
    for i, row in enumerate(ordered):
        lap, place = divmod(i, num_ranks)
        dealt[place if lap % 2 == 0 else num_ranks - 1 - place].append(row)
    return dealt


def cut_micro_batches(
    rows: Sequence[TrainRow], max_tokens: int, *, packed: bool, one_sequence: bool = False
) -> list[list[TrainRow]]:
    """Groups of rows that each fit `max_tokens` positions (padding counted when padded), shortest rows first.

    one_sequence: a micro-batch is one sequence, so that rows that are not packed come alone.

    Raises ValueError for a row that fits no micro-batch.
    """
    groups: list[list[TrainRow]] = []
    num_positions = 0
    for row in sorted(rows, key=lambda row: row.num_tokens):
        if row.num_tokens > max_tokens:
            raise ValueError(
                f"a row of {row.num_tokens} tokens exceeds learner.micro_batch_tokens={max_tokens}; raise it"
            )
        # Rows come in ascending length, so this row is the longest of its group and sets the padded width.
        grown = num_positions + row.num_tokens if packed else (len(groups[-1]) + 1 if groups else 1) * row.num_tokens
        if not groups or grown > max_tokens or (one_sequence and not packed):
            groups.append([])
            grown = row.num_tokens
        groups[-1].append(row)
        num_positions = grown
    return groups


def plan_micro_batches(
    rows: Sequence[TrainRow], *, rank: int, num_ranks: int, max_tokens: int, packed: bool, sharing: int = 1
) -> list[list[TrainRow]]:
    """This rank's micro-batches of a mini-batch. `rows` is the whole mini-batch, the same on every rank.

    Every rank gets the same number of micro-batches: collectives in forward (ZeRO-3) and backward (ZeRO-2) would hang
    on unequal numbers. A rank with fewer gets extra ones, which hold the shortest row with weight 0: it adds nothing
    to any sum. sharing: this many ranks next to each other share each row, and so get the same micro-batches, each of
    one sequence. Raises ValueError for a row that fits no micro-batch.
    """
    assert rows, "a mini-batch has at least one row"
    plans = [
        cut_micro_batches(part, max_tokens, packed=packed, one_sequence=sharing > 1)
        for part in deal_rows(rows, num_ranks // sharing)
    ]
    shortest = min(rows, key=lambda row: row.num_tokens)
    filler = replace(shortest, weight=0.0)
    num_turns = max(len(plan) for plan in plans)
    own = plans[rank // sharing]
    return own + [[filler]] * (num_turns - len(own))


def collate(rows: Sequence[TrainRow], *, packed: bool, pad_token_id: int = 0) -> MicroBatch:
    """One micro-batch, packed as [1, sum of lengths] or padded on the right as [rows, longest]."""
    lengths = [row.num_tokens for row in rows]
    if packed:
        width, starts = sum(lengths), [sum(lengths[:i]) for i in range(len(rows))]
        input_ids = torch.tensor([[token for row in rows for token in row.token_ids]])
        position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        attention_mask = None
    else:
        width = max(lengths)
        starts = [i * width for i in range(len(rows))]
        input_ids = torch.tensor([[*row.token_ids, *[pad_token_id] * (width - row.num_tokens)] for row in rows])
        position_ids = torch.arange(width).repeat(len(rows), 1)
        attention_mask = (position_ids < torch.tensor(lengths).unsqueeze(1)).long()
    predictors = [
        torch.arange(start + row.num_prompt_tokens - 1, start + row.num_tokens - 1)
        for start, row in zip(starts, rows, strict=True)
    ]
    targets = [token for row in rows for token in row.token_ids[row.num_prompt_tokens :]]
    counts = torch.tensor([row.num_completion_tokens for row in rows])

    def per_token(values: list[float] | list[bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    return MicroBatch(
        input_ids_BT=input_ids,
        position_ids_BT=position_ids,
        attention_mask_BT=attention_mask,
        predictor_index_N=torch.cat(predictors),
        target_ids_N=torch.tensor(targets, dtype=torch.long),
        stored_logprobs_N=torch.tensor([lp for row in rows for lp in row.logprobs], dtype=torch.float32),
        advantages_N=per_token([row.advantage for row in rows], torch.float32),
        weights_N=per_token([row.weight for row in rows], torch.float32),
        is_policy_N=per_token([row.kind is RowKind.POLICY for row in rows], torch.bool),
        row_index_N=torch.arange(len(rows)).repeat_interleave(counts),
    )
