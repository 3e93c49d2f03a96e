"""Parts that need torch and transformers alone. With `small` they also run on a CPU, which tries the code of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dphrl.types import RowKind, TrainBatch, TrainRow
from tests.gpu.parts import Figures

# What needs more packages than torch is imported where it is used, so that the first parts run without them.
if TYPE_CHECKING:
    from dphrl.config.schema import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_s(run: Callable[[], Any], rounds: int = 5) -> float:
    """Median seconds of `run`, after one round that warms up."""
    times = []
    for _ in range(rounds + 1):
        wait()
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[rounds // 2]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(run: Callable[[], Any]) -> float:
    """Memory of the GPU that `run` takes beyond what was taken before, at its peak; 0 on a CPU."""
    if DEVICE.type != "cuda":
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def llama(small: bool, dtype: torch.dtype, **changes: Any) -> Any:
    """A Llama with random weights on DEVICE: of two layers, or of the layer shape of a model of 1 B parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not small:
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32}
    given = {"vocab_size": 512 if small else 128_256, "num_key_value_heads": shape["num_attention_heads"] // 4}
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**(shape | given | {"tie_word_embeddings": True} | changes)))
    return lm.to(DEVICE, dtype).eval()


def config(**changes: Any) -> Config:
    """A configuration of the embedded task, for its learner settings."""
    from dphrl.config.schema import Config

    base = {
        "data": {
            "train": {"name": "factor", "kind": "tiny"},
            "evaluation": [{"name": "factor", "kind": "tiny", "split": "held_out"}],
            "max_prompt_tokens": 2048,
        },
        "reward": {"name": "factorization"},
        "rollout": {"max_tokens": 2048},
        "learner": {"lr": 1e-3, "micro_batch_tokens": 8192},
    }
    merged = {name: base.get(name, {}) | changes.get(name, {}) for name in {**base, **changes}}
    return Config.model_validate(merged)


def rows(vocab_size: int, lengths: list[int]) -> tuple[TrainRow, ...]:
    """Rows of both kinds, prompts of a quarter of each length."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, length in enumerate(lengths):
        ids = tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())
        num_prompt = max(1, length // 4)
        kind = RowKind.REFERENCE if i % 3 == 2 else RowKind.POLICY
        made.append(
            TrainRow(kind, ids, num_prompt, (-6.0,) * (length - num_prompt), 1 / length, 1.0 if i % 2 else -1.0)
        )
    return tuple(made)


def one_update(
    lm: Any, minibatch: tuple[TrainRow, ...], settings: Config
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and parameters after one optimizer step on a copy of `lm`."""
    from dphrl.learner.policy import PolicyModel
    from dphrl.learner.torch_engine import TorchEngine
    from dphrl.learner.update import UpdateSettings, run_update

    policy = PolicyModel(copy.deepcopy(lm), settings.rollout.temperature)
    engine = TorchEngine(policy, settings)
    metrics = run_update(TrainBatch(0, 0, (minibatch,), 1e-3), engine, UpdateSettings.from_config(settings))
    return metrics, {name: p.detach().cpu() for name, p in policy.named_parameters()}


# ------------------------------------------------------------------------------------------ the parts
def update(small: bool) -> Figures:
    """One optimizer step in float32 on this device and on the CPU: the same losses and weights."""
    torch.backends.cuda.matmul.allow_tf32 = False
    lm, settings = llama(True, torch.float32), config()
    minibatch = rows(512, [40, 60, 30, 80, 50, 70])
    metrics, weights = one_update(lm, minibatch, settings)
    expected, expected_weights = one_update(lm.cpu(), minibatch, settings)
    off = max(abs(metrics[name] - value) / (abs(value) + 1e-6) for name, value in expected.items())
    moved = max(float((weights[name] - value).norm() / value.norm()) for name, value in expected_weights.items())
    assert off < 1e-3, f"metrics differ by {off:.2g}"
    assert moved < 1e-4, f"weights differ by {moved:.2g}"
    return {"metrics_off": off, "weights_off": moved}


def deterministic(small: bool) -> Figures:
    """Two updates from the same weights with deterministic kernels: equal to the last bit."""
    torch.use_deterministic_algorithms(True)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    lm, settings = llama(small, dtype), config()
    minibatch = rows(512, [40, 60, 30, 80] if small else [700, 900, 1100, 1300])
    (metrics, first), (again, second) = (one_update(lm, minibatch, settings) for _ in range(2))
    assert metrics == again, f"metrics differ: {metrics} and {again}"
    assert all(torch.equal(first[name], second[name]) for name in first), "weights differ"
    return {"equal": f"{len(first)} tensors"}


def fused_adamw(small: bool) -> Figures:
    """torch's fused AdamW against its plain one: seconds a step, and how far the weights part in ten steps."""
    shapes = [(64, 64)] * 4 if small else [(4096, 4096)] * 8

    def trained(fused: bool) -> tuple[list[Tensor], float]:
        torch.manual_seed(0)
        parameters = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
        return parameters, median_s(optimizer.step, rounds=9)

    (plain, plain_s), (fused, fused_s) = trained(False), trained(True)
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(fused, plain, strict=True))
    assert off < 1e-5, f"weights differ by {off:.2g}"
    return {"time_ratio": fused_s / plain_s, "off": off}


def checksum(small: bool) -> Figures:
    """A GPU's checksum of some bytes is the one that torch computes on the CPU, and one other bit changes it."""
    from actors.weight_transfer.ledger import device_digest

    there = torch.randn(2**12 if small else 2**28, dtype=torch.bfloat16, device=DEVICE).view(torch.uint8)
    on_device = int(device_digest(there))
    here = there.cpu()
    assert on_device == int(device_digest(here)), "the checksum depends on the device"
    here[-1] ^= 1
    assert on_device != int(device_digest(here)), "one other bit is not seen"
    return {"gb_per_s": there.nbytes / 1e9 / median_s(lambda: device_digest(there))}


def mask(small: bool) -> Figures:
    """Rows of unequal length side by side, without a mask: the log-probs of each row alone; and what a mask costs."""
    from dphrl.learner.policy import PolicyModel
    from dphrl.learner.torch_engine import TorchEngine
    from dphrl.learner.update import UpdateSettings, score_sequences

    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    lm, settings = llama(small, dtype), config()
    engine = TorchEngine(PolicyModel(lm, 1.0), settings)
    lengths = [40, 64] if small else [1500, 2048]
    sequences = [(row.token_ids, row.num_prompt_tokens) for row in rows(512, lengths)]
    update_settings = UpdateSettings.from_config(settings)
    together = score_sequences(sequences, engine, update_settings)
    alone = [score_sequences([each], engine, update_settings)[0] for each in sequences]
    off = max(abs(a - b) for i, each in enumerate(alone) for a, b in zip(together[i], each, strict=True))
    assert off < (0.1 if dtype == torch.bfloat16 else 1e-5), f"log-probs differ by {off:.2g}"
    ids = torch.randint(3, 512, (2, lengths[1]), device=DEVICE)
    attended = torch.ones_like(ids)
    attended[0, lengths[0] :] = 0

    def step(attention_mask: Tensor | None) -> None:
        lm.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state.sum().backward()
        lm.zero_grad()

    without_s, with_s = median_s(lambda: step(None)), median_s(lambda: step(attended))
    return {"logprobs_off": off, "time_ratio": without_s / with_s}


def head(small: bool) -> Figures:
    """Log-probs of a large vocabulary against float64; seconds and memory of forward and backward in chunks of the
    device's size, and the seconds as a ratio to chunks of 64 MiB."""
    from dphrl.algo import logprobs

    size, vocab = (16, 512) if small else (2048, 128_256)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    torch.manual_seed(0)
    linear = torch.nn.Linear(size, vocab, bias=False, device=DEVICE, dtype=dtype)
    hidden = torch.randn(64 if small else 8192, size, device=DEVICE, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (len(hidden),), device=DEVICE)

    def run() -> Tensor:
        found, _ = logprobs.token_logprobs(hidden, linear.weight, targets)
        found.sum().backward()
        return found

    few = slice(0, 64)
    exact = torch.log_softmax(hidden[few].double() @ linear.weight.double().T, -1)
    off = float((run()[few] - exact.gather(-1, targets[few, None])[:, 0]).abs().max())
    assert off < 5e-3, f"log-probs differ by {off:.2g} from float64"
    seconds, peak = median_s(run, rounds=3), peak_gib(run)
    logprobs.CHUNK_BYTES[DEVICE.type] = 64 * 2**20
    return {"off": off, "seconds": seconds, "peak_gib": peak, "time_ratio": seconds / median_s(run, rounds=3)}
