"""What only a GPU can show of the learner's forward pass: kernels for packed rows, and the head's float32 logits.

It needs torch 2.11 and transformers 5 at least, pydantic and PyYAML, and flash-attn for its own part; not ray, vllm or
deepspeed:

    python -m pytest tests/gpu/test_kernels.py -m gpu      # or, for the table alone: python -m tests.gpu.test_kernels
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from dphrl.algo.logprobs import CHUNK_BYTES, token_logprobs
from dphrl.learner.attention import check_rows_apart
from dphrl.learner.batching import collate, collate_bundles
from dphrl.learner.bundles import Bundle, Sharing
from dphrl.learner.policy import PolicyModel
from dphrl.learner.prefixes import fit_to_model
from dphrl.types import RowKind, TrainRow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LENGTHS = (37, 200, 411, 640)
needs_flash = pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")


def make_rows(*lengths: int) -> list[TrainRow]:
    generator = torch.Generator().manual_seed(1)
    return [
        TrainRow(
            RowKind.POLICY, tuple(torch.randint(1, 1000, (n,), generator=generator).tolist()), 8, (0.0,) * (n - 8), 1.0
        )
        for n in lengths
    ]


def make_policy(attention: str, dtype: torch.dtype, **shape: Any) -> PolicyModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, intermediate_size=1024, num_key_value_heads=2,
        **{"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4} | shape,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return PolicyModel(lm.to("cuda", dtype).eval(), temperature=1.0)


def run(policy: PolicyModel, rows: list[TrainRow], *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and a gradient in which every token counts differently."""
    policy.zero_grad()
    logprobs, _ = policy(collate(rows, packed=packed).to(torch.device("cuda")))
    (logprobs * torch.linspace(-1, 1, len(logprobs), device="cuda")).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_need_no_mask(dtype: torch.dtype) -> None:
    """Without a mask another kernel runs, so the bits may differ here."""
    policy = make_policy("sdpa", dtype)
    rows = make_rows(*LENGTHS)
    logprobs, gradient = run(policy, rows, packed=False)
    policy.needs_padding_mask = True
    expected, expected_gradient = run(policy, rows, packed=False)
    assert (logprobs - expected).abs().max() < (1e-4 if dtype is torch.float32 else 0.2)
    assert relative(gradient, expected_gradient) < (1e-4 if dtype is torch.float32 else 5e-2)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("flex_attention", torch.float32),
        ("flex_attention", torch.bfloat16),
        pytest.param("flash_attention_2", torch.bfloat16, marks=needs_flash),
    ],
)
def test_packed_rows_equal_padded_rows(attention: str, dtype: torch.dtype) -> None:
    rows = make_rows(*LENGTHS)
    expected, expected_gradient = run(make_policy("sdpa", dtype), rows, packed=False)
    policy = make_policy(attention, dtype)
    check_rows_apart(policy, torch.device("cuda"))
    for packed in (True, False):
        logprobs, gradient = run(policy, rows, packed=packed)
        assert (logprobs - expected).abs().max() < (1e-4 if dtype is torch.float32 else 0.2), packed
        assert relative(gradient, expected_gradient) < (1e-4 if dtype is torch.float32 else 5e-2), packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_shared_prompts_equal_rows_apart(attention: str, dtype: torch.dtype) -> None:
    prompt = make_rows(200)[0].token_ids
    completions = [row.token_ids for row in make_rows(37, 64, 411)]
    rows = [
        TrainRow(RowKind.POLICY, prompt + ids, len(prompt), (0.0,) * len(ids), 1.0) for ids in completions
    ] + make_rows(640)
    expected, expected_gradient = run(make_policy("sdpa", dtype), rows, packed=False)
    policy = make_policy(attention, dtype)
    device = torch.device("cuda")
    assert fit_to_model(Sharing("always"), policy.lm, policy, device).prefixes == "always"
    bundles = [Bundle(tuple(rows[:3])), Bundle((rows[3],))]
    for packed in (True, False):
        policy.zero_grad()
        logprobs, _ = policy(collate_bundles(bundles, packed=packed).to(device))
        (logprobs * torch.linspace(-1, 1, len(logprobs), device=device)).sum().backward()
        gradient = torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])
        assert (logprobs - expected).abs().max() < (1e-4 if dtype is torch.float32 else 0.2), packed
        assert relative(gradient, expected_gradient) < (1e-4 if dtype is torch.float32 else 5e-2), packed


def test_bfloat16_logits_are_accumulated_in_float32() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(32_000, 512, device="cuda") * 0.2).bfloat16().requires_grad_()
    hidden = torch.randn(600, 512, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(32_000, (600,), device="cuda")
    wide, wide_hidden = (t.detach().double().requires_grad_() for t in (weight, hidden))
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    exact, exact_entropy = token_logprobs(wide_hidden, wide, targets)
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert (logprobs - exact).abs().max() < 1e-3
    assert (entropy - exact_entropy).abs().max() < 1e-3
    assert (rounded - exact).abs().max() > 1e-2
    logprobs.sum().backward()
    exact.sum().backward()
    for ours, theirs in ((hidden.grad, wide_hidden.grad), (weight.grad, wide.grad)):
        assert ours is not None
        assert theirs is not None
        assert relative(ours, theirs) < 1e-2


def seconds_of(work: Callable[[], Any], num_rounds: int = 5) -> float:
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_rounds):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / num_rounds


def measure_mask() -> str:
    policy, rows = make_policy("sdpa", torch.bfloat16, hidden_size=1024, num_attention_heads=16), make_rows(4096, 3700)
    times = []
    for masked in (False, True):
        policy.needs_padding_mask = masked
        times.append(seconds_of(lambda: run(policy, rows, packed=False)))
    return f"2 x 4096 padded rows, forward + backward: {times[0]:.3f} s without a mask, {times[1]:.3f} s with"


def measure_chunks() -> str:
    """8192 targets of a vocabulary of 128k and width 4096, as an 8B model has."""
    weight = torch.randn(128_256, 4096, device="cuda").bfloat16().mul_(0.02).requires_grad_()
    hidden = torch.randn(8192, 4096, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(128_256, (8192,), device="cuda")
    normal, times = CHUNK_BYTES["cuda"], []
    try:
        for num_bytes in (normal, CHUNK_BYTES["cpu"]):
            CHUNK_BYTES["cuda"] = num_bytes
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times.append(seconds_of(lambda: token_logprobs(hidden, weight, targets)[0].sum().backward(), 2))
            times.append((torch.cuda.max_memory_allocated() - before) / 2**30)
    finally:
        CHUNK_BYTES["cuda"] = normal
    return (
        f"head of 8192 targets, forward + backward: {times[0]:.3f} s and {times[1]:.1f} GiB at its peak in chunks of "
        f"1 GiB, {times[2]:.3f} s and {times[3]:.1f} GiB in chunks of 64 MiB"
    )


@pytest.mark.parametrize("measure", [measure_mask, measure_chunks])
def test_measurements_run(measure: Callable[[], str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + measure())


if __name__ == "__main__":
    print(measure_mask())
    print(measure_chunks())
