"""Token log-probabilities and entropies from hidden states, without ever holding [N, V] logits.

The output head runs on chunks of tokens, once in forward and again in backward. So the memory beyond the inputs and
their gradients is a few [chunk, V] buffers, whatever the number of tokens. The price is one more product with the
head: four instead of three.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# float32 logits [chunk, V] take at most this many bytes; this is large enough to keep the product efficient.
CHUNK_BYTES = 64 * 2**20


def token_logprobs(
    hidden_ND: Tensor,
    head: nn.Module,
    target_ids_N: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    max_targets: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it is drawn from, in nats.

    hidden_ND: the hidden state that predicts each target. target_ids_N: int64. head: maps [chunk, D] to logits
    [chunk, V]. max_targets: the largest N of all ranks in this call, for a head whose call is a collective; None means
    this rank's N. Returns (logprobs_N, entropy_N) in float32 (float64 for float64 logits), both differentiable.
    """
    chunk = max(1, CHUNK_BYTES // (4 * vocab_size))
    weight = getattr(head, "weight", None)
    # A head of another kind must be called, and so must one whose weight is gathered around its forward (ZeRO-3).
    plain = isinstance(head, nn.Linear) and head.bias is None and not hasattr(weight, "ds_tensor")
    if plain and weight is not None:
        logprobs_N, entropy_N = _LinearLogprobs.apply(hidden_ND, weight, target_ids_N, temperature, chunk)  # type: ignore[no-untyped-call]
        return logprobs_N, entropy_N
    # Every rank makes the same number of calls, even with few tokens: under ZeRO-3 each call gathers the weight.
    num_chunks = max(1, math.ceil(max(len(target_ids_N), max_targets or 0) / chunk))
    pieces = zip(hidden_ND.tensor_split(num_chunks), target_ids_N.tensor_split(num_chunks), strict=True)
    parts = [
        checkpoint(_called_logprobs, hidden, targets, head, temperature, use_reentrant=False)
        for hidden, targets in pieces
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


class _LinearLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T / temperature) at the targets, and its entropy H.

    With z = logits / temperature and p = softmax(z): d logprob / dz = one_hot - p and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_ids_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalizers = [], [], []
        for hidden, targets in zip(hidden_ND.split(chunk), target_ids_N.split(chunk), strict=True):
            logits = _logits(hidden, weight_VD, temperature)
            chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            normalizer = logits.logsumexp(-1)
            # Entropy = log Z - E[logit], computed in place: a third [chunk, V] buffer would raise the peak of memory.
            probabilities = torch.sub(logits, normalizer.unsqueeze(-1)).exp_()
            entropies.append(normalizer - probabilities.mul_(logits).sum(-1))
            logprobs.append(chosen - normalizer)
            normalizers.append(normalizer)
        empty = _logits(hidden_ND[:0], weight_VD, temperature).sum(-1)
        normalizer_N = torch.cat(normalizers) if normalizers else empty
        entropy_N = torch.cat(entropies) if entropies else empty
        ctx.save_for_backward(hidden_ND, weight_VD, target_ids_N, normalizer_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        # When nobody differentiates the entropy, its gradient arrives as None and costs nothing.
        ctx.set_materialize_grads(False)
        return (torch.cat(logprobs) if logprobs else empty), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, target_ids_N, normalizer_N, entropy_N = ctx.saved_tensors
        logprob_grad = torch.zeros_like(normalizer_N) if gradients[0] is None else gradients[0]
        entropy_grad = gradients[1]
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        # The sum over chunks is float32 at least: a bfloat16 sum of many chunks would lose the small ones.
        sum_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight_VD, dtype=sum_dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(target_ids_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden = hidden_ND[part]
            grad_logits = _logits(hidden, weight_VD, ctx.temperature)
            grad_logits.sub_(normalizer_N[part].unsqueeze(-1))
            scale = (logprob_grad[part] / ctx.temperature).unsqueeze(-1)
            if entropy_grad is None:
                grad_logits.exp_().mul_(-scale)
            else:
                slope = (entropy_grad[part] / ctx.temperature).unsqueeze(-1)
                pull = (grad_logits + entropy_N[part].unsqueeze(-1)).mul_(slope).add_(scale)
                grad_logits.exp_().mul_(pull.neg_())
            grad_logits.scatter_add_(-1, target_ids_N[part].unsqueeze(-1), scale)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                if sum_dtype == hidden.dtype:
                    grad_weight.addmm_(grad_logits.T, hidden)
                else:
                    grad_weight.add_(grad_logits.T @ hidden)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None


def _logits(hidden: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight_VD.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Temperature is part of the policy: engines report log-probs after dividing by it, so the learner divides too.
    return logits if temperature == 1.0 else logits.div_(temperature)


def _called_logprobs(hidden: Tensor, targets: Tensor, head: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy
