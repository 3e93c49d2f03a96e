"""What a plan needs of memory, on each GPU and on each node. It is arithmetic, so it also works for clusters that one
does not have.

The formulas are the usual ones, stated below one by one; they leave out fragmentation and the frameworks' own
buffers, for which `HEADROOM` is kept free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.planning.placement import Bundle
from cluster.planning.shapes import ModelShape
from dphrl.config.schema import Config

GIB = 2**30
# The share of memory that is kept free for CUDA contexts, buffers of collectives, fragmentation and processes.
HEADROOM = 0.1
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2}
# Of each trained parameter DeepSpeed keeps a float32 master, also in a float32 run, and AdamW's two moments.
STATE_BYTES = 12
GRADIENT_BYTES = 4
# Activations kept for the backward pass, in values for each token, layer and unit of hidden size: attention and MLP
# inputs, projections and gates of a Llama block with a fused attention kernel.
VALUES_PER_LAYER = 16
# With checkpointing, only the input of each layer.
VALUES_PER_CHECKPOINTED_LAYER = 1
# Allowances for what nobody can move off a shared GPU, of the learner and of an engine that sleeps: CUDA context,
# buffers of collectives, CUDA graphs. They are guesses, not measured.
LEARNER_CONTEXT = 1.5 * GIB
SLEEPING_ENGINE = 2.0 * GIB
# Logits, and what is made of them: the learner's head takes tokens in chunks for which each is at most 1 GiB on a GPU.
HEAD_BYTES = 2.0 * GIB
# vLLM reads a model file by file, and the hub cuts files at this size.
LARGEST_FILE = 5e9


def dtype_on_gpu(config: Config) -> str:
    """The number type of the weights on GPUs."""
    return "bfloat16" if config.model.dtype == "auto" else config.model.dtype


def dtype_on(config: Config, *, with_gpus: bool) -> str:
    """The number type of the weights where nodes have GPUs, or have none."""
    return dtype_on_gpu(config) if with_gpus or config.model.dtype != "auto" else "float32"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())


def terms_in_gib(parts: Mapping[str, float]) -> str:
    """`weights 15.0 + cache 4.2`, from bytes by what they are for."""
    return " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)


def learner_memory(config: Config, shape: ModelShape, dtype: str) -> Memory:
    """Memory of one learner rank.

    Gradients are summed in float32. ZeRO divides the optimizer's share by the ranks from stage 1, the gradients from 2,
    the weights, and those of a resident reference model, from 3. With adapters, only these have gradients and an
    optimizer. Offloading puts the optimizer's share into host memory.
    """
    learner, trained = config.learner, shape.num_trained(config.model.lora)
    values = VALUES_PER_CHECKPOINTED_LAYER if learner.gradient_checkpointing else VALUES_PER_LAYER
    layers = shape.num_layers * values + (VALUES_PER_LAYER if learner.gradient_checkpointing else 0)
    weights = _weights(config, shape, dtype)
    optimizer = 0.0 if learner.offload == "optimizer" else trained * STATE_BYTES / learner.num_ranks
    parts = {
        "weights": weights["weights"],
        "gradients": trained * GRADIENT_BYTES / (learner.num_ranks if learner.zero_stage >= 2 else 1),
        "optimizer": optimizer,
        "activations": _activations(config, shape, dtype, layers),
        "mask": _mask(config, dtype),
    }
    return Memory(parts | {name: size for name, size in weights.items() if name != "weights"})


def _weights(config: Config, shape: ModelShape, dtype: str) -> dict[str, float]:
    """What a rank holds at all times: weights, and those of a resident reference model if there is one."""
    size = shape.num_parameters * BYTES_PER_PARAMETER[dtype]
    size /= config.learner.num_ranks if config.learner.zero_stage >= 3 else 1
    return {"weights": size} | ({"reference model": size} if config.uses_reference_model else {})


def _activations(config: Config, shape: ModelShape, dtype: str, values: int) -> float:
    tokens = config.learner.micro_batch_tokens / config.learner.sequence_parallel
    return float(tokens * shape.hidden_size * values * BYTES_PER_PARAMETER[dtype])


def _mask(config: Config, dtype: str) -> float:
    """What each position of a micro-batch sees, where completions share prompts: a byte for each pair of positions of
    the longest sequence that may be, and what the kernel makes of it. flex_attention needs none."""
    if config.share_prefix == "never" or config.model.attention == "flex_attention":
        return 0.0
    tokens = config.learner.micro_batch_tokens
    longest = min(tokens, config.data.max_prompt_tokens + config.rollout.num_samples * config.rollout.max_tokens)
    return float(tokens * longest * (1 + BYTES_PER_PARAMETER[dtype]))


def engine_memory(config: Config, shape: ModelShape, dtype: str, gpu_bytes: float) -> Memory:
    """Memory on one GPU of an engine: its part of the weights, and a cache in the rest of gpu_memory_utilization."""
    rollout, width = config.rollout, BYTES_PER_PARAMETER[dtype]
    weights = shape.num_parameters * width / rollout.tensor_parallel
    return Memory({"weights": weights, "KV cache": max(0.0, gpu_bytes * rollout.gpu_memory_utilization - weights)})


def cached_sequences(config: Config, shape: ModelShape, dtype: str, cache_bytes: float) -> int:
    """How many sequences of full length the cache of one engine holds; cache_bytes is on each of its GPUs."""
    per_sequence = shape.kv_values_per_token * BYTES_PER_PARAMETER[dtype] * config.max_sequence_tokens
    return int(cache_bytes * config.rollout.tensor_parallel // per_sequence)


# ------------------------------------------------------------------------------------------ shared GPUs
def while_decoding(config: Config, shape: ModelShape, dtype: str, gpu_bytes: float) -> Memory:
    """A GPU that an engine shares with a learner rank, while the engine is awake: the rank has put its gradients and
    its optimizer away, but scores with its weights, for which it needs the activations of one layer at a time."""
    beside = {f"learner's {name}": size for name, size in _weights(config, shape, dtype).items()}
    scoring = _activations(config, shape, dtype, VALUES_PER_LAYER)
    share = gpu_bytes * config.rollout.gpu_memory_utilization
    scoring += HEAD_BYTES
    return Memory({"engine": share, **beside, "scoring": scoring, "learner's context": LEARNER_CONTEXT})


def while_updating(config: Config, shape: ModelShape, dtype: str) -> Memory:
    """The same GPU while the learner updates and the engine sleeps."""
    return Memory({**learner_memory(config, shape, dtype).parts, "sleeping engine": SLEEPING_ENGINE})


def colocation_obstacle(config: Config, shape: ModelShape, dtype: str, gpu_bytes: float) -> str | None:
    """Why an engine cannot decode beside its learner rank, with the arithmetic and the largest share that can; None if
    it can."""
    memory, share = while_decoding(config, shape, dtype, gpu_bytes), config.rollout.gpu_memory_utilization
    if memory.total <= gpu_bytes:
        return None
    rest = memory.total - memory.parts["engine"]
    terms = " + ".join(f"{size / GIB:.1f} {name}" for name, size in memory.parts.items() if name != "engine")
    highest = math.floor((1 - rest / gpu_bytes) * 100) / 100
    weights = shape.num_parameters * BYTES_PER_PARAMETER[dtype] / config.rollout.tensor_parallel
    remedy = (
        f"set rollout.gpu_memory_utilization to {highest:g} or less"
        if highest * gpu_bytes > weights
        else "no share leaves room for the engine's own weights; set learner.zero_stage=3, take more ranks, a smaller "
        "learner.micro_batch_tokens, or cluster.colocate=false"
    )
    return (
        f"cluster.colocate: rollout.gpu_memory_utilization={share:g} of {gpu_bytes / GIB:.0f} GiB = "
        f"{memory.parts['engine'] / GIB:.1f} for an engine, and beside it {terms} = {memory.total / GIB:.1f} GiB do "
        f"not fit on a GPU of {gpu_bytes / GIB:.0f}; {remedy}"
    )


# ------------------------------------------------------------------------------------------ nodes
def host_memory(config: Config, shape: ModelShape, dtype: str, on_node: Sequence[Bundle]) -> dict[str, Memory]:
    """Host memory of a node with these actors: while they load the model, and afterwards."""
    ranks = [bundle for bundle in on_node if bundle.role == "learner"]
    num_engines = sum(bundle.role == "rollout" for bundle in on_node)
    model = shape.num_parameters * BYTES_PER_PARAMETER[dtype]
    if any(rank.num_gpus for rank in ranks) or any(b.num_gpus for b in on_node if b.role == "rollout"):
        workers = num_engines * config.rollout.tensor_parallel
        # A rank may hold the whole model in host memory before it goes to the GPU; at ZeRO-3 it reads its part alone.
        held = model / config.learner.num_ranks if config.learner.zero_stage >= 3 else model
        loading = {"learner ranks": len(ranks) * held, "engines": workers * min(LARGEST_FILE, model)}
        running = _in_host_memory(config, shape, model, len(ranks), num_engines)
        uses_store = config.sync.backend == "object_store"
    else:
        loading = {}
        held = learner_memory(config, shape, dtype).total + _offloaded(config, shape)
        engine = model + config.rollout.kv_cache_gib * GIB
        running = {"learner ranks": len(ranks) * held, "engines": num_engines * engine}
        uses_store = True
    # The first rank puts weights there, and a node with engines fetches them: a few chunks at a time, but a chunk holds
    # one tensor at least, so no more than the model.
    if uses_store and (num_engines or any(rank.index == 0 for rank in ranks)):
        running["object store"] = model
    # A checkpoint is written from a copy: each rank's part of masters and moments, and on the first the model.
    if ranks:
        part = shape.num_trained(config.model.lora) * STATE_BYTES / config.learner.num_ranks
        running["checkpoint"] = len(ranks) * part + (model if any(rank.index == 0 for rank in ranks) else 0.0)
    phases = {"while loading": loading, "while training": running}
    return {
        phase: Memory({k: v for k, v in parts.items() if v}) for phase, parts in phases.items() if any(parts.values())
    }


def _offloaded(config: Config, shape: ModelShape) -> float:
    """Bytes that a rank keeps in host memory because of learner.offload."""
    per_rank = shape.num_trained(config.model.lora) / config.learner.num_ranks
    return per_rank * STATE_BYTES if config.learner.offload == "optimizer" else 0.0


def _in_host_memory(
    config: Config, shape: ModelShape, model: float, num_ranks: int, num_engines: int
) -> dict[str, float]:
    """What ranks and engines that have GPUs keep in host memory after they have loaded."""
    learner, state = config.learner, _offloaded(config, shape)
    parts = {"offloaded optimizer": num_ranks * state}
    if config.cluster.colocate:
        trained = shape.num_trained(config.model.lora)
        put_away = trained * GRADIENT_BYTES / (learner.num_ranks if learner.zero_stage >= 2 else 1)
        put_away += 0.0 if state else trained * STATE_BYTES / learner.num_ranks
        # While a checkpoint is written, engines keep their weights there.
        parts |= {"learner's state": num_ranks * put_away, "sleeping engines": num_engines * model}
    return parts
