"""Token log-probabilities and entropies from hidden states, without ever holding [N, V] logits.

The output head's weight is multiplied with chunks of tokens, once in forward and again in backward. So the memory
beyond the inputs and their gradients is a few [chunk, V] buffers, whatever the number of tokens. The price is one more
product with the head: four instead of three.

Logits are float32 at least, whatever the weights: rounded to bfloat16, a logit of 20 would be off by up to 0.06.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# float32 logits [chunk, V] take at most this many bytes. A CPU's products are efficient with few tokens; a GPU's read
# the whole weight for every chunk, so that small chunks would cost more memory traffic than arithmetic.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_ids_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it is drawn from, in nats.

    hidden_ND: the hidden state that predicts each target. weight_VD, bias_V: the output head's, in hidden's dtype.
    target_ids_N: int64. Returns (logprobs_N, entropy_N) in float32 (float64 for float64 inputs), both differentiable.
    """
    logprobs_N, entropy_N = _LinearLogprobs.apply(hidden_ND, weight_VD, bias_V, target_ids_N, temperature)  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


class _LinearLogprobs(torch.autograd.Function):
    """log_softmax((hidden @ weight.T + bias) / temperature) at the targets, and its entropy H.

    With z = logits / temperature and p = softmax(z): d logprob / dz = one_hot - p and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_ids_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, _chunk_bytes(hidden_ND.device) // (4 * len(weight_VD)))
        logprobs, entropies, normalizers = [], [], []
        for hidden, targets in zip(hidden_ND.split(chunk), target_ids_N.split(chunk), strict=True):
            logits = _logits(hidden, weight_VD, bias_V, temperature)
            chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            normalizer = logits.logsumexp(-1)
            # Entropy = log Z - E[logit], computed in place: a third [chunk, V] buffer would raise the peak of memory.
            probabilities = torch.sub(logits, normalizer.unsqueeze(-1)).exp_()
            entropies.append(normalizer - probabilities.mul_(logits).sum(-1))
            logprobs.append(chosen - normalizer)
            normalizers.append(normalizer)
        normalizer_N, entropy_N = torch.cat(normalizers), torch.cat(entropies)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_ids_N, normalizer_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        # When nobody differentiates the entropy, its gradient arrives as None and costs nothing.
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, bias_V, target_ids_N, normalizer_N, entropy_N = ctx.saved_tensors
        logprob_grad = torch.zeros_like(normalizer_N) if gradients[0] is None else gradients[0]
        entropy_grad = gradients[1]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        # Sums over chunks are float32 at least: a bfloat16 sum of many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=normalizer_N.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=normalizer_N.dtype) if needs_bias else None
        for start in range(0, len(target_ids_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_logits = _logits(hidden_ND[part], weight_VD, bias_V, ctx.temperature)
            grad_logits.sub_(normalizer_N[part].unsqueeze(-1))
            scale = (logprob_grad[part] / ctx.temperature).unsqueeze(-1)
            if entropy_grad is None:
                grad_logits.exp_().mul_(-scale)
            else:
                slope = (entropy_grad[part] / ctx.temperature).unsqueeze(-1)
                pull = (grad_logits + entropy_N[part].unsqueeze(-1)).mul_(slope).add_(scale)
                grad_logits.exp_().mul_(pull.neg_())
            grad_logits.scatter_add_(-1, target_ids_N[part].unsqueeze(-1), scale)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))
            if grad_hidden is not None:
                _times_weight(grad_logits, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                _add_outer(grad_weight, grad_logits, hidden_ND[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(weight_VD.dtype),
            None,
            None,
        )


def _logits(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    if _is_wide(weight_VD):
        logits = hidden @ weight_VD.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight_VD.T, out_dtype=torch.float32)
    else:
        hidden = hidden.float()
        logits = hidden.new_empty(len(hidden), len(weight_VD))
        for rows in _blocks(weight_VD):
            torch.mm(hidden, weight_VD[rows].float().T, out=logits[:, rows])
    if bias_V is not None:
        logits += bias_V
    # Temperature is part of the policy: engines report log-probs after dividing by it, so the learner divides too.
    return logits if temperature == 1.0 else logits.div_(temperature)


def _times_weight(grad_logits: Tensor, weight_VD: Tensor, out: Tensor) -> None:
    """out = grad_logits @ weight."""
    if _is_wide(weight_VD) or weight_VD.is_cuda:
        torch.mm(grad_logits.to(weight_VD.dtype), weight_VD, out=out)
        return
    total = grad_logits.new_zeros(out.shape)
    for rows in _blocks(weight_VD):
        total.addmm_(grad_logits[:, rows], weight_VD[rows].float())
    out.copy_(total)


def _add_outer(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """grad_weight += grad_logits.T @ hidden, summed in grad_weight's dtype."""
    if _is_wide(hidden) or not hidden.is_cuda:
        grad_weight.addmm_(grad_logits.T, hidden.to(grad_weight.dtype))
        return
    grad_logits = grad_logits.to(hidden.dtype)
    for rows in _blocks(grad_weight):
        grad_weight[rows].add_(torch.mm(grad_logits[:, rows].T, hidden, out_dtype=grad_weight.dtype))


def _is_wide(tensor: Tensor) -> bool:
    """Whether products in this dtype are float32 at least. A product of others would be rounded to their few bits."""
    return tensor.dtype in (torch.float32, torch.float64)


def _blocks(weight_VD: Tensor) -> Iterator[slice]:
    """Rows of the weight whose float32 copy takes no more than a chunk of logits."""
    num_rows = max(1, _chunk_bytes(weight_VD.device) // (4 * weight_VD.shape[1]))
    for start in range(0, len(weight_VD), num_rows):
        yield slice(start, start + num_rows)
