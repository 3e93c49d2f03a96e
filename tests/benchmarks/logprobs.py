"""Token log-probs, forward and backward, against the plain matmul + log_softmax: time and peak memory as ratios."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NUM_TOKENS, WIDTH, VOCAB_SIZE, NUM_ROUNDS = 4096, 1024, 128_000, 3


def _plain(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    return head(hidden).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _chunked(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    from dphrl.algo.logprobs import token_logprobs

    return token_logprobs(hidden, head.weight, targets)[0]


SIDES: dict[str, Callable[..., torch.Tensor]] = {"plain": _plain, "chunked": _chunked}


def _peak_rss_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def measure(side: str) -> dict[str, float]:
    """One forward and backward in this process; memory above inputs and their gradients."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
    hidden = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB_SIZE, (NUM_TOKENS,))
    held = _peak_rss_bytes() + 4 * (head.weight.numel() + hidden.numel())
    started = time.perf_counter()
    SIDES[side](hidden, head, targets).sum().backward()
    seconds = time.perf_counter() - started
    assert head.weight.grad is not None
    assert hidden.grad is not None
    return {"seconds": seconds, "peak_bytes": float(_peak_rss_bytes() - held)}


def run() -> dict[str, Any]:
    """Each side in a process of its own (a peak is per process), in turn, NUM_ROUNDS times."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(NUM_ROUNDS):
        for side, seen in results.items():
            output = subprocess.run([sys.executable, "-m", __name__, side], check=True, capture_output=True, text=True)
            seen.append(json.loads(output.stdout.splitlines()[-1]))
    median = {
        side: {key: statistics.median(each[key] for each in seen) for key in seen[0]} for side, seen in results.items()
    }
    return {
        "benchmark": "logprobs",
        "num_tokens": NUM_TOKENS,
        "hidden_size": WIDTH,
        "vocab_size": VOCAB_SIZE,
        "time_ratio": median["chunked"]["seconds"] / median["plain"]["seconds"],
        "memory_ratio": median["chunked"]["peak_bytes"] / median["plain"]["peak_bytes"],
        **{f"{side}_{key}": value for side, values in median.items() for key, value in values.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
