"""Completions that share their prompt: the attention mask that keeps them apart, and the models that can have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.config.loading import InputError
from dphrl.learner.attention import needs_padding_mask, window_kinds
from dphrl.learner.batching import MicroBatch, collate, collate_bundles
from dphrl.learner.bundles import FEWEST_MICRO_BATCHES, PAIR_COST, Bundle, Sharing
from dphrl.learner.utilization import full_size
from dphrl.types import RowKind, TrainRow

# How many times longer attention takes for one operation than matrix products do: scores, softmax and their gradients
# go through memory. A guess; it only decides how many completions share one prompt, and which rows a micro-batch.
ATTENTION_FACTOR = 2.0
# What a micro-batch costs on a CPU besides its positions, in positions: adding its gradients to those of the others,
# and CALLS_COST / number of weights, for the calls from Python. Within a factor of two of what
# `python -m tests.benchmarks micro_batches` measures.
GRADIENTS_COST, CALLS_COST = 80.0, 5e7


def shared_prefix_mask(batch: MicroBatch, kernel: str) -> Any:
    """What each position of a micro-batch with shared prompts sees, as `kernel` takes it: bool [B, 1, T, T], or a
    BlockMask for flex_attention.

    A position sees those before it and itself that are of its own prompt or of its own completion.
    """
    prompts_BT, completions_BT = cast(Tensor, batch.prompt_index_BT), cast(Tensor, batch.completion_index_BT)
    num_rows, width = prompts_BT.shape
    if kernel != "flex_attention":
        return _sees(
            torch.arange(width, device=prompts_BT.device)[:, None],
            torch.arange(width, device=prompts_BT.device)[None, :],
            (prompts_BT[:, None, :, None], prompts_BT[:, None, None, :]),
            (completions_BT[:, None, :, None], completions_BT[:, None, None, :]),
        )
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompts, completions = prompts_BT[b], completions_BT[b]
        return _sees(query, key, (prompts[query], prompts[key]), (completions[query], completions[key]))

    on_gpu = prompts_BT.is_cuda
    # Compiled, the mask is made block by block; otherwise with all pairs in memory.
    return create_block_mask(sees, num_rows, None, width, width, device=str(prompts_BT.device), _compile=on_gpu)


def _sees(query: Tensor, key: Tensor, prompts: tuple[Tensor, Tensor], completions: tuple[Tensor, Tensor]) -> Tensor:
    """Whether a query position sees a key position. Both are -1 in the padding, which sees itself: no row of a softmax
    may be empty."""
    own = (completions[1] == 0) | (completions[0] == completions[1])
    return (key <= query) & (prompts[0] == prompts[1]) & own


def pair_cost(lm: nn.Module) -> float:
    """See `Bundle.cost`. A layer's products take about 24 x width^2 operations a position, and a pair of positions
    takes 4 for each value of its queries."""
    config = cast(Any, lm).config.get_text_config()
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not width or not heads:
        return PAIR_COST
    queries = heads * (getattr(config, "head_dim", None) or width // heads)
    return float(ATTENTION_FACTOR * 4 * queries / (24 * width**2))


def micro_batch_cost(lm: nn.Module, device: torch.device, num_ranks: int) -> float:
    """See `Sharing`. On a GPU small micro-batches leave it idle, and ranks exchange gradients after each one, so there
    should be as few as possible. On a CPU a position takes so long that padding costs more."""
    if device.type != "cpu" or num_ranks > 1:
        return FEWEST_MICRO_BATCHES
    return GRADIENTS_COST + CALLS_COST / sum(map(full_size, lm.parameters()))


def fit_to_model(
    sharing: Sharing,
    lm: nn.Module,
    forward: Callable[[MicroBatch], tuple[Tensor, Tensor]],
    device: torch.device,
    num_ranks: int = 1,
) -> Sharing:
    """`sharing` as this model can have it, and with the model's own costs.

    Before prompts are shared a few tokens are tried: two tiny forward passes, under ZeRO-3 a collective. Raises
    InputError where `always` cannot be.
    """
    sharing = replace(sharing, pair_cost=pair_cost(lm), micro_batch_cost=micro_batch_cost(lm, device, num_ranks))
    if sharing.prefixes == "never":
        return sharing
    why = model_obstacle(lm)
    # A model that takes positions from elsewhere than position_ids gives other log-probs, or fails. So without being
    # asked only those are tried that are known to turn queries and keys by the positions that they are given.
    if why is None and sharing.prefixes == "auto" and not hasattr(cast(Any, lm).base_model, "rotary_emb"):
        why = "nobody knows whether it goes by the positions that it is given"
    why = why or _trial(forward, device, cast(Any, lm).config.get_text_config().vocab_size)
    if why and sharing.prefixes == "always":
        raise InputError(
            f"learner.share_prefix: always cannot be with this model: {why}; set learner.share_prefix: auto"
        )
    return replace(sharing, prefixes="never") if why else sharing


def model_obstacle(lm: nn.Module) -> str | None:
    """Why a model's completions cannot share prompts, by what transformers says of it; None if it seems they can."""
    if needs_padding_mask(lm):
        return "it is not causal attention alone"
    if kinds := window_kinds(lm):
        return f"it has layers of {', '.join(sorted(kinds))}, for which one mask of all layers does not do"
    return None


def _trial(forward: Callable[[MicroBatch], tuple[Tensor, Tensor]], device: torch.device, vocabulary: int) -> str | None:
    """Why not, when a completion's log-probs beside another one are not those that it has alone."""
    # From the middle of the vocabulary: its first tokens are often control tokens, at which a bfloat16 model is off by
    # nats from one batch to the next. The first completion is long, so that positions that count on show.
    prompt, first, second = (
        tuple((vocabulary // 2 + start + i % 7) % vocabulary for i in range(length))
        for start, length in ((0, 16), (7, 48), (3, 8))
    )

    def row(*parts: Sequence[int]) -> TrainRow:
        ids = tuple(token for part in parts for token in part)
        length = len(parts[-1])
        return TrainRow(RowKind.REFERENCE, ids, len(ids) - length, (0.0,) * length, 1.0)

    with torch.no_grad():
        together = forward(
            collate_bundles([Bundle((row(prompt, first), row(prompt, second)))], packed=False).to(device)
        )
        # The last row is the second completion as it would be if it saw the first.
        apart = forward(
            collate([row(prompt, first), row(prompt, second), row(prompt, first, second)], packed=False).to(device)
        )
    alone, in_context = apart[0][:-8], apart[0][-8:]
    moved = (together[0] - alone).abs().mean()
    as_context = (in_context - alone[-8:]).abs().mean()
    if bool(moved > as_context / 10):
        return f"completions that share a prompt are moved by it (by {float(moved):.2g} nats a token)"
    return None
