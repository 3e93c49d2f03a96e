"""Forward and backward of right-padded rows: the learner, which hands a causal model no mask, against itself with one.

The model has layers of SmolLM2-135M's shape (width 576, grouped-query attention) with random weights, so nothing is
downloaded; both sides run in one process, in turn, on the same rows, and their gradients are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from dphrl.processors import whole_cpus


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks attention_mask", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of the longer of two rows (default: 2048)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model (default: 6 of SmolLM2's 30)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each side, after one to warm up (default: 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    return parser.parse_args(arguments)


def _policy(num_layers: int, num_positions: int, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from dphrl.learner.policy import PolicyModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=num_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    return PolicyModel(LlamaForCausalLM(config).to(dtype).eval(), temperature=1.0)


def _batch(num_tokens: int) -> Any:
    """Two rows, one a tenth shorter; of each the last 64 tokens are the completion, so that the head weighs little."""
    from dphrl.learner.batching import collate
    from dphrl.types import RowKind, TrainRow

    generator = torch.Generator().manual_seed(1)

    def row(length: int) -> TrainRow:
        ids = tuple(torch.randint(5, 49152, (length,), generator=generator).tolist())
        return TrainRow(RowKind.POLICY, ids, length - 64, (0.0,) * 64, 1.0)

    return collate([row(num_tokens), row(num_tokens * 9 // 10)], packed=False)


def _pass(policy: Any, batch: Any, *, masked: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(seconds, log-probs, gradient) of one forward and backward."""
    policy.needs_padding_mask = masked
    policy.zero_grad()
    started = time.perf_counter()
    logprobs, _ = policy(batch)
    logprobs.mean().backward()
    seconds = time.perf_counter() - started
    return seconds, logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()]).float()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    policy = _policy(arguments.layers, arguments.tokens, getattr(torch, arguments.dtype))
    assert not policy.needs_padding_mask, "the model must be one that needs no mask"
    batch = _batch(arguments.tokens)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    results: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    for i in range(arguments.rounds + 1):
        for masked, seen in seconds.items():
            spent, *results[masked] = _pass(policy, batch, masked=masked)
            if i:  # the first pass of each side faults its memory in
                seen.append(spent)
    with_mask, without = statistics.median(seconds[True]), statistics.median(seconds[False])
    (masked_logprobs, masked_gradient), (logprobs, gradient) = results[True], results[False]
    return {
        "benchmark": "attention_mask",
        "num_cpus": whole_cpus(),
        "torch_threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "rows": f"2 x {arguments.tokens}",
        "layers": arguments.layers,
        "with_mask_s": with_mask,
        "without_mask_s": without,
        "time_ratio": without / with_mask,
        "logprobs_equal": bool(torch.equal(logprobs, masked_logprobs)),
        "logprobs_max_difference": float((logprobs - masked_logprobs).abs().max()),
        "gradient_difference": float(
            torch.linalg.norm(gradient - masked_gradient) / torch.linalg.norm(masked_gradient)
        ),
    }
