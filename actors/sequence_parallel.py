"""Rows shared by learner ranks through DeepSpeed's Ulysses."""

from __future__ import annotations

from typing import Any

from dphrl.config.loading import InputError
from dphrl.learner.sequence_parallel import SequenceShare, check_shareable


def share_rows(lm: Any, attention: str, size: int) -> SequenceShare:
    """Make attention of this process exchange heads for positions with the `size` - 1 ranks next to this one.

    A collective; the process group must be there. It changes transformers' attention for every model of the process.
    Raises InputError for a model that cannot be shared so.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    check_shareable(lm, attention)
    try:
        # One sequence at a time: Ulysses is built for a fixed number of rows.
        state = UlyssesSPAttentionHF.register_with_transformers(lm, attention, size, 1, seq_length_is_variable=True)
    except ValueError as error:  # heads that do not divide
        raise InputError(f"learner.sequence_parallel: {error}; lower it") from error
    return SequenceShare(
        state.get_sequence_parallel_rank(),
        state.get_sequence_parallel_world_size(),
        state.get_sequence_parallel_group(),
    )
