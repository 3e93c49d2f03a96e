"""What a plan needs: memory on each GPU, sequences in the cache, seconds a step. It is arithmetic, so it also works
for clusters that one does not have.

The formulas are the usual ones, stated below one by one; they leave out fragmentation and the frameworks' own
buffers, for which `HEADROOM` is kept free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.tracking.tracker import METRICS_FILE

GIB = 2**30
# The share of a GPU's memory that is kept free for CUDA contexts, buffers of collectives and fragmentation.
HEADROOM = 0.1
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2}
# Activations kept for the backward pass, in values for each token, layer and unit of hidden size: attention and MLP
# inputs, projections and gates of a Llama block with a fused attention kernel.
VALUES_PER_LAYER = 16
# With checkpointing, only the input of each layer.
VALUES_PER_CHECKPOINTED_LAYER = 1


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its memory depends on. `num_parameters` counts tied embeddings once."""

    num_parameters: float
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_size: int

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size


# The models of the paper's presets are gated or large: planning should not need their files.
KNOWN_SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": ModelShape(8.03e9, 32, 4096, 8, 128),
    "Qwen/Qwen2.5-Math-7B": ModelShape(7.62e9, 28, 3584, 4, 128),
    "tiny-factor": ModelShape(0.38e6, 2, 128, 4, 32),
    "tiny-sql": ModelShape(0.4e6, 2, 128, 4, 32),
    "smollm2-135m-instruct": ModelShape(0.1345e9, 30, 576, 3, 64),
}


def model_shape(path: str, *, trust_remote_code: bool = False) -> ModelShape | None:
    """From the models known here, else from the model's own configuration if it is on this machine, else None."""
    if path in KNOWN_SHAPES:
        return KNOWN_SHAPES[path]
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
    return shape_of(found.get_text_config())


def shape_of(text: Any) -> ModelShape:
    """The shape of a Llama-like `PretrainedConfig`: gated MLP, grouped queries; norms are left out of the count."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention = text.hidden_size * head_size * (2 * heads + 2 * kv_heads)
    mlp = 3 * text.hidden_size * text.intermediate_size
    embeddings = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    count = text.num_hidden_layers * (attention + mlp) + embeddings
    return ModelShape(float(count), text.num_hidden_layers, text.hidden_size, kv_heads, head_size)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())


def learner_memory(config: Config, shape: ModelShape, dtype: str) -> Memory:
    """Memory of one learner rank.

    AdamW keeps two float32 moments, and for a bfloat16 model a float32 copy of the weights; gradients are summed in
    float32. ZeRO divides the optimizer's share by the ranks from stage 1, the gradients from 2, the weights from 3.
    """
    learner, count = config.learner, shape.num_parameters
    ranks, stage, width = learner.num_ranks, learner.zero_stage, BYTES_PER_PARAMETER[dtype]
    values = VALUES_PER_CHECKPOINTED_LAYER if learner.gradient_checkpointing else VALUES_PER_LAYER
    layers = shape.num_layers * values + (VALUES_PER_LAYER if learner.gradient_checkpointing else 0)
    parts = {
        "weights": count * width / (ranks if stage >= 3 else 1),
        "gradients": count * 4 / (ranks if stage >= 2 else 1),
        "optimizer": count * (8 + (4 if dtype == "bfloat16" else 0)) / ranks,
        "activations": float(learner.micro_batch_tokens * shape.hidden_size * layers * width),
    }
    if config.uses_reference_model:
        parts["reference model"] = count * width
    return Memory(parts)


def engine_memory(config: Config, shape: ModelShape, dtype: str, gpu_bytes: float) -> Memory:
    """Memory on one GPU of an engine: its part of the weights, and a cache in the rest of gpu_memory_utilization."""
    rollout, width = config.rollout, BYTES_PER_PARAMETER[dtype]
    weights = shape.num_parameters * width / rollout.tensor_parallel
    return Memory({"weights": weights, "KV cache": max(0.0, gpu_bytes * rollout.gpu_memory_utilization - weights)})


def cached_sequences(config: Config, shape: ModelShape, dtype: str, cache_bytes: float) -> int:
    """How many sequences of full length the cache of one engine holds; cache_bytes is on each of its GPUs."""
    per_sequence = shape.kv_values_per_token * BYTES_PER_PARAMETER[dtype] * config.max_sequence_tokens
    return int(cache_bytes * config.rollout.tensor_parallel // per_sequence)


# ------------------------------------------------------------------------------------------ time
@dataclass(frozen=True)
class Speed:
    """Tokens a second that one engine generates, and that one learner rank trains on (prompts, completions and
    rehearsal); mean lengths of completions and prompts in tokens; seconds that a sync takes."""

    engine_tokens_per_s: float
    rank_tokens_per_s: float
    completion_tokens: float
    prompt_tokens: float
    sync_s: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and of its parts."""

    rollout_s: float
    learn_s: float
    sync_s: float
    step_s: float


def step_time(config: Config, speed: Speed) -> StepTime:
    """Engines share the rollout and ranks share the update; with max_staleness 1 both of these run at the same time."""
    rollout = config.rollout
    rows = rollout.num_prompts * rollout.num_samples
    rehearsal = config.reference.rows_per_step if config.uses_reference_samples else 0
    rollout_s = rows * speed.completion_tokens / (speed.engine_tokens_per_s * rollout.num_engines)
    trained = (rows + rehearsal) * (speed.completion_tokens + speed.prompt_tokens)
    learn_s = trained / (speed.rank_tokens_per_s * config.learner.num_ranks)
    busy = max(rollout_s, learn_s) if rollout.max_staleness else rollout_s + learn_s
    return StepTime(rollout_s, learn_s, speed.sync_s, busy + speed.sync_s)


def given_speed(config: Config, text: str) -> Speed:
    """From `ENGINE,RANK` tokens a second, with completions and prompts as long as they may be.

    Raises InputError for anything but two positive numbers.
    """
    try:
        engine, rank = (float(part) for part in text.split(","))
    except ValueError:
        engine = rank = 0.0
    if not (engine > 0 and rank > 0):
        raise InputError(
            f"--tokens-per-s {text}: give two positive numbers, ENGINE,RANK: tokens a second that one engine generates "
            "and one learner rank trains on"
        )
    return Speed(engine, rank, config.rollout.max_tokens, config.data.max_prompt_tokens)


def measured_speed(folder: Path) -> Speed:
    """From a run's own metrics: its speed by engine and by rank, its lengths, its syncs.

    Raises InputError when the folder holds no steps.
    """
    from dphrl.config.loading import load_config

    path = folder / METRICS_FILE
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"--measured {folder}: no metrics of a run there ({error}); name a run's folder") from None
    # The first quarter is left out, because kernels, caches and the allocator settle in the first steps.
    steps = steps[len(steps) // 4 :]
    if not steps:
        raise InputError(f"--measured {folder}: the run has no step yet; name a finished run's folder")
    run = load_config(str(folder / "config.yaml"), [])
    generated = _sum(steps, "rollout/num_tokens")
    num_completions = sum(step["rollout/num_tokens"] / step["rollout/completion_tokens_mean"] for step in steps)
    trained = _sum(steps, "learner/num_tokens")
    completion_tokens = generated / num_completions
    num_rows = num_completions + _sum(steps, "divergence/num_rows")
    return Speed(
        engine_tokens_per_s=generated / _sum(steps, "time/rollout_s") / run.rollout.num_engines,
        rank_tokens_per_s=trained / _sum(steps, "time/learn_s") / run.learner.num_ranks,
        completion_tokens=completion_tokens,
        prompt_tokens=max(0.0, trained / num_rows - completion_tokens),
        sync_s=_sum(steps, "time/sync_s") / len(steps),
    )


def _sum(steps: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(step[key] for step in steps)
