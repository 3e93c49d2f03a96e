"""Global denominators: how much each completion token of a row counts.

The weights are fixed before rows are dealt to micro-batches and ranks. A micro-batch's loss is then a plain
weighted *sum*, and a sum is the same however it is split.
"""

from __future__ import annotations

from collections.abc import Sequence


def row_weights(num_tokens: Sequence[int], aggregation: str, max_tokens: float) -> list[float]:
    """Per-token weight of each row, given the rows' completion lengths in tokens over the whole mini-batch.

    token_mean: 1 / total tokens (every token counts the same; DAPO, arXiv 2503.14476). sequence_mean: 1 / (rows x
    own length) (every row counts the same; GRPO, arXiv 2402.03300). fixed_length: 1 / (rows x max_tokens)
    (Dr.GRPO, arXiv 2503.20783). Rows of length 0 get weight 0 and do not count as rows. Without rows the list is empty.
    """
    if aggregation == "token_mean":
        total = sum(num_tokens)
        return [1.0 / total if n else 0.0 for n in num_tokens]
    num_rows = sum(n > 0 for n in num_tokens)
    if aggregation == "fixed_length":
        return [1.0 / (num_rows * max_tokens) if n else 0.0 for n in num_tokens]
    assert aggregation == "sequence_mean", aggregation
    return [1.0 / (num_rows * n) if n else 0.0 for n in num_tokens]
