"""Chunked log-probs against the plain computation, forward and backward, by both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dphrl.algo import logprobs as module
from dphrl.algo.logprobs import token_logprobs


class Called(nn.Module):
    """A head the fused path must not open up."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)


def gradients(outputs: torch.Tensor, upstream: torch.Tensor, *inputs: torch.Tensor) -> Any:
    return torch.autograd.grad((outputs * upstream).sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_equals_plain_log_softmax(
    monkeypatch: pytest.MonkeyPatch, called: bool, chunk_rows: int, temperature: float, num_tokens: int
) -> None:
    torch.manual_seed(0)
    vocab_size, width = 23, 8
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * vocab_size * chunk_rows)
    head = nn.Linear(width, vocab_size, bias=False).double()
    hidden = torch.randn(num_tokens, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab_size, (num_tokens,))
    upstream = torch.randn(num_tokens, dtype=torch.float64)

    expected_all = (head(hidden) / temperature).log_softmax(-1)
    expected = expected_all.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    got, entropy = token_logprobs(
        hidden, Called(head) if called else head, targets, vocab_size=vocab_size, temperature=temperature
    )
    torch.testing.assert_close(got, expected)
    expected_entropy = -(expected_all.exp() * expected_all).sum(-1)
    torch.testing.assert_close(entropy, expected_entropy)
    for mine, plain in (
        (got, expected),
        (entropy, expected_entropy),
        (got - 3 * entropy, expected - 3 * expected_entropy),
    ):
        ours = gradients(mine, upstream, hidden, head.weight)
        theirs = gradients(plain, upstream, hidden, head.weight)
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_hidden_states_give_float32_logprobs_and_bfloat16_gradients() -> None:
    head = nn.Linear(8, 50, bias=False).bfloat16()
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    got, entropy = token_logprobs(hidden, head, torch.arange(6), vocab_size=50)
    got.sum().backward()
    assert (got.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert hidden.grad is not None
    assert (hidden.grad.dtype, head.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_only_the_needed_gradients_are_made() -> None:
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(6, 8, requires_grad=True)
    token_logprobs(hidden, head, torch.arange(6), vocab_size=50)[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
