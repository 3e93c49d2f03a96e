"""The tensors of a micro-batch: its rows padded or packed, and prompts laid out once for all of their completions.

The learner only sees `MicroBatch`: flat arrays over the completion tokens (axis N), with the flat index of the position
that predicts each token. Code after this module is the same for padded and packed rows, and but for the attention mask
for those that share their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dphrl.learner.bundles import Bundle
from dphrl.types import RowKind, TrainRow


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs.

    input_ids_BT, position_ids_BT: int64. attention_mask_BT: int64 for padded rows; None for packed rows, where a
    position of 0 starts a new sequence. prompt_index_BT, completion_index_BT: int64, where completions share prompts,
    else None: the bundle that each position is of, and in it the number of its completion, from 1; 0 in the prompt.
    Both are -1 in the padding. predictor_index_N: int64, indices into the flattened B*T positions.
    target_ids_N: int64. row_index_N: int64, the row of each token in the micro-batch. is_policy_N: bool. chosen_N:
    bool, the policy rows' chosen tokens, where the policy loss chooses any, else None. The other arrays are float32;
    in weights_N a token of a reference row that does not count has 0.
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
    prompt_index_BT: Tensor | None = None
    completion_index_BT: Tensor | None = None
    chosen_N: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(rows: Sequence[TrainRow], *, packed: bool, pad_token_id: int = 0) -> MicroBatch:
    """One micro-batch of rows that share nothing: see `collate_bundles`."""
    return collate_bundles([Bundle((row,)) for row in rows], packed=packed, pad_token_id=pad_token_id)


def collate_bundles(bundles: Sequence[Bundle], *, packed: bool, pad_token_id: int = 0) -> MicroBatch:
    """One micro-batch, packed as [1, sum of lengths] or padded on the right as [bundles, longest].

    Its tokens (axis N) are those of the bundles' rows, in order.
    """
    laid = [_lay_out(bundle) for bundle in bundles]
    lengths = [bundle.num_tokens for bundle in bundles]
    rows = [row for bundle in bundles for row in bundle.rows]
    width = sum(lengths) if packed else max(lengths)
    starts = [sum(lengths[:i]) if packed else i * width for i in range(len(bundles))]

    def side_by_side(parts: Sequence[Tensor], fill: int) -> Tensor:
        if packed:
            return torch.cat(list(parts)).unsqueeze(0)
        return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)

    position_ids = side_by_side([one.position_ids for one in laid], 0)
    attention_mask, shared = None, len(rows) > len(bundles)
    if not packed:
        places = torch.arange(width).expand(len(bundles), -1)
        behind = places >= torch.tensor(lengths).unsqueeze(1)
        attention_mask = (~behind).long()
        # Positions count on in the padding of a row, as if it went on there.
        position_ids = torch.where(behind, places, position_ids)
    counts = torch.tensor([row.num_completion_tokens for row in rows])

    def per_token(values: list[float] | list[bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    return MicroBatch(
        input_ids_BT=side_by_side([torch.tensor(one.input_ids) for one in laid], pad_token_id),
        position_ids_BT=position_ids,
        attention_mask_BT=attention_mask,
        predictor_index_N=torch.cat([start + one.predictors for start, one in zip(starts, laid, strict=True)]),
        target_ids_N=torch.tensor([t for row in rows for t in row.token_ids[row.num_prompt_tokens :]]),
        stored_logprobs_N=torch.tensor([lp for row in rows for lp in row.logprobs], dtype=torch.float32),
        advantages_N=per_token([row.advantage for row in rows], torch.float32),
        weights_N=_weights(rows),
        is_policy_N=per_token([row.kind is RowKind.POLICY for row in rows], torch.bool),
        row_index_N=torch.arange(len(rows)).repeat_interleave(counts),
        prompt_index_BT=side_by_side([torch.full((n,), i) for i, n in enumerate(lengths)], -1) if shared else None,
        completion_index_BT=side_by_side([one.completions for one in laid], -1) if shared else None,
        chosen_N=_chosen(rows),
    )


def _weights(rows: Sequence[TrainRow]) -> Tensor:
    """Of each completion token, [N] float32."""
    parts = [torch.full((row.num_completion_tokens,), row.weight, dtype=torch.float32) for row in rows]
    for row, weights in zip(rows, parts, strict=True):
        if row.kind is RowKind.REFERENCE and row.chosen is not None:
            weights[~_marked(row, row.chosen)] = 0.0
    return torch.cat(parts)


def _chosen(rows: Sequence[TrainRow]) -> Tensor | None:
    """Which completion tokens the policy loss chose, [N] bool; None where it chooses none anywhere."""
    if all(row.chosen is None for row in rows if row.kind is RowKind.POLICY):
        return None
    return torch.cat([_marked(row, (row.kind is RowKind.POLICY and row.chosen) or ()) for row in rows])


def _marked(row: TrainRow, places: Sequence[int]) -> Tensor:
    """[num_completion_tokens] bool, True at `places`."""
    marked = torch.zeros(row.num_completion_tokens, dtype=torch.bool)
    marked[list(places)] = True
    return marked


@dataclass(frozen=True)
class _Layout:
    """One bundle's sequence. input_ids, position_ids, completions: of each position; a completion's number is 1 for the
    first and 0 in the prompt. predictors: of each completion token, the position that predicts it."""

    input_ids: list[int]
    position_ids: Tensor
    completions: Tensor
    predictors: Tensor


def _lay_out(bundle: Bundle) -> _Layout:
    num_prompt = bundle.rows[0].num_prompt_tokens
    input_ids = list(bundle.rows[0].token_ids[:num_prompt])
    positions, completions, predictors = [torch.arange(num_prompt)], [torch.zeros(num_prompt, dtype=torch.long)], []
    for i, row in enumerate(bundle.rows):
        start, length = len(input_ids), row.num_completion_tokens
        input_ids += row.token_ids[num_prompt:]
        positions.append(torch.arange(num_prompt, num_prompt + length))
        completions.append(torch.full((length,), i + 1))
        # The prompt's last position predicts the first token of every completion.
        predictors += [torch.tensor([num_prompt - 1]), torch.arange(start, start + length - 1)]
    return _Layout(input_ids, torch.cat(positions), torch.cat(completions), torch.cat(predictors))
