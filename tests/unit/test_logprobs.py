"""The output head's log-probs against the plain computation, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dphrl.algo import logprobs as module
from dphrl.learner.head import LogprobHead, install_logprob_head

SHAPE = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def gradients(outputs: torch.Tensor, upstream: torch.Tensor, *inputs: torch.Tensor) -> Any:
    return torch.autograd.grad((outputs * upstream).sum(), inputs, retain_graph=True)


def set_chunk_bytes(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", num_bytes)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_equals_plain_log_softmax(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, chunk_rows: int, temperature: float, num_tokens: int
) -> None:
    torch.manual_seed(0)
    vocab_size, width = 23, 8
    set_chunk_bytes(monkeypatch, 4 * vocab_size * chunk_rows)
    head = nn.Linear(width, vocab_size, bias=with_bias).double()
    hidden = torch.randn(num_tokens, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab_size, (num_tokens,))
    upstream = torch.randn(num_tokens, dtype=torch.float64)

    expected_all = (head(hidden) / temperature).log_softmax(-1)
    expected = expected_all.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    got, entropy = LogprobHead(head).logprobs(hidden, targets, temperature)
    torch.testing.assert_close(got, expected)
    expected_entropy = -(expected_all.exp() * expected_all).sum(-1)
    torch.testing.assert_close(entropy, expected_entropy)
    inputs = (hidden, *head.parameters())
    for mine, plain in (
        (got, expected),
        (entropy, expected_entropy),
        (got - 3 * entropy, expected - 3 * expected_entropy),
    ):
        torch.testing.assert_close(gradients(mine, upstream, *inputs), gradients(plain, upstream, *inputs))


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_bfloat16_logits_are_not_rounded(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    """Log-probs and gradients against float64, within bounds that logits rounded to bfloat16 miss by far."""
    torch.manual_seed(0)
    set_chunk_bytes(monkeypatch, 4 * 500 * chunk_rows)
    head = nn.Linear(64, 500, bias=False).bfloat16()
    with torch.no_grad():
        head.weight.mul_(12)  # logits of a sharp distribution, about 30 at most
    hidden = torch.randn(40, 64).bfloat16().requires_grad_()
    targets = torch.randint(500, (40,))
    wide = copy.deepcopy(head).double()
    wide_hidden = hidden.detach().double().requires_grad_()

    got, entropy = LogprobHead(head).logprobs(hidden, targets, 1.0)
    exact, exact_entropy = LogprobHead(wide).logprobs(wide_hidden, targets, 1.0)
    rounded = head(hidden).float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert (got.dtype, entropy.dtype) == (torch.float32, torch.float32)
    assert (got - exact).abs().max() < 1e-4
    assert (entropy - exact_entropy).abs().max() < 1e-4
    assert (rounded - exact).abs().max() > 0.02

    (got + 0.1 * entropy).sum().backward()
    (exact + 0.1 * exact_entropy).sum().backward()
    for mine, true in ((hidden.grad, wide_hidden.grad), (head.weight.grad, wide.weight.grad)):
        assert mine is not None
        assert mine.dtype == torch.bfloat16
        # One rounding of the result to 8 bits, 2^-9 at most, and no more.
        assert torch.linalg.norm(mine - true) < 2e-3 * torch.linalg.norm(true)


def test_only_the_needed_gradients_are_made() -> None:
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    hidden = torch.randn(6, 8, requires_grad=True)
    LogprobHead(head).logprobs(hidden, torch.arange(6), 1.0)[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_the_head_takes_the_place_and_the_parameters_of_the_models_own() -> None:
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    names, tokens = list(lm.state_dict()), torch.arange(6).unsqueeze(0)
    expected = lm(tokens).logits
    head = install_logprob_head(lm)
    assert lm.get_output_embeddings() is head
    assert head.weight is lm.get_input_embeddings().weight
    assert list(lm.state_dict()) == names
    assert torch.equal(lm(tokens).logits, expected)
    assert install_logprob_head(lm) is head


def test_a_head_that_is_not_linear_is_refused() -> None:
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE))
    lm.set_output_embeddings(nn.Sequential(nn.Linear(16, 30)))
    with pytest.raises(ValueError, match="the output head is Sequential, where only a linear layer is supported"):
        install_logprob_head(lm)
