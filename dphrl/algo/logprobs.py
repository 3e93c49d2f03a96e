"""Token log-probabilities and entropies from hidden states, without ever holding [N, V] logits.

The output head runs on chunks of tokens and is recomputed in the backward pass, so that the memory beyond the
inputs is a few [chunk, V] buffers whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# [chunk, V] float32 logits of at most this many bytes; large enough to keep the matmul efficient.
CHUNK_BYTES = 64 * 2**20


def token_logprobs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    target_ids_N: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it is drawn from, in nats.

    hidden_ND: the hidden state that predicts each target. head: [chunk, D] -> logits [chunk, V].
    Returns (logprobs_N, entropy_N) in float32 (float64 for float64 logits); entropy carries no gradient.
    """
    chunk = max(1, CHUNK_BYTES // (4 * vocab_size))
    starts = range(0, max(1, len(target_ids_N)), chunk)
    parts = [
        checkpoint(
            _chunk_logprobs,
            hidden_ND[start : start + chunk],
            target_ids_N[start : start + chunk],
            head,
            temperature,
            use_reentrant=False,
        )
        for start in starts
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _chunk_logprobs(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Temperature is part of the policy: engines report log-probs after it, so the learner divides too.
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy
