"""Tables of what a run would start: batch arithmetic, placement, memory, time. Nothing is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planning.capacity import (
    GIB,
    HEADROOM,
    Memory,
    ModelShape,
    Speed,
    cached_sequences,
    engine_memory,
    learner_memory,
    model_shape,
    step_time,
)
from cluster.planning.placement import Bundle, Node, PlacementError, plan_placement
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.tracking.console import format_table

ROLES = ("learner", "rollout", "reward")
HEADINGS = ["what", "how much"]


@dataclass(frozen=True)
class SimulatedCluster:
    """Nodes that need not exist. gpu_gib: memory of a GPU, the smallest where they differ."""

    nodes: tuple[Node, ...]
    gpu_gib: float


def parse_cluster(texts: Sequence[str]) -> SimulatedCluster:
    """From `nodes=8,gpus=8,cpus=96,gpu_gib=80`; several texts give nodes of several shapes.

    Raises InputError for an unknown key, or a value that is no positive number (gpus may be 0).
    """
    nodes: list[Node] = []
    smallest = float("inf")
    for text in texts:
        shape = {"nodes": 1.0, "gpus": 0.0, "cpus": 0.0, "gpu_gib": 80.0}
        for part in text.split(","):
            key, _, value = part.partition("=")
            try:
                if key not in shape:
                    raise ValueError(key)
                shape[key] = float(value)
            except ValueError:
                raise InputError(
                    f"--simulate {text}: cannot read {part!r}; write nodes=8,gpus=8,cpus=96,gpu_gib=80 (nodes, and "
                    "what one node has)"
                ) from None
        # Cloud nodes commonly have twelve cores for each GPU.
        cpus = shape["cpus"] or max(8.0, 12 * shape["gpus"])
        if shape["nodes"] < 1 or shape["nodes"] % 1 or shape["gpus"] < 0 or cpus < 0 or shape["gpu_gib"] <= 0:
            raise InputError(f"--simulate {text}: give at least one node, and what it has as positive numbers")
        nodes += [Node(f"node-{len(nodes) + i}", cpus, shape["gpus"]) for i in range(int(shape["nodes"]))]
        smallest = min(smallest, shape["gpu_gib"])
    return SimulatedCluster(tuple(nodes), smallest)


def describe_plan(config: Config, cluster: SimulatedCluster | None = None, speed: Speed | None = None) -> str:
    """The batch arithmetic of a run and its placement on this machine, or on a simulated cluster. A simulated cluster
    adds the memory of a GPU, and a speed adds the time of a step.

    Raises InputError, with the arithmetic, when the simulated cluster cannot hold the run.
    """
    parts = [format_table(HEADINGS, _batch(config))]
    if cluster is None:
        parts.append(_placement_here(config))
    else:
        try:
            placed = plan_placement(config, cluster.nodes)
        except PlacementError as error:
            raise InputError(f"--simulate: this run {error}") from None
        parts += [_placement_table(placed, cluster.nodes), _memory(config, cluster)]
    if speed is not None:
        parts.append(format_table(HEADINGS, _time(config, speed)))
    return "\n\n".join(parts)


def _batch(config: Config) -> list[tuple[str, str]]:
    rollout, reference, parts = config.rollout, config.reference, config.algorithm.num_minibatches
    rows = rollout.num_prompts * rollout.num_samples
    rehearsal = reference.rows_per_step if config.uses_reference_samples else 0
    divergence = config.algorithm.divergence
    named = f"{divergence.name}{divergence.params or ''}, eta {config.algorithm.eta:g}, on {config.algorithm.estimator}"
    if config.uses_reference_model:
        named += ", with a resident reference model in each learner rank"
    return [
        ("model", config.model.path),
        ("steps", f"{config.learner.num_steps} (seed {config.seed})"),
        ("rollouts a step", f"{rollout.num_prompts} prompts x {rollout.num_samples} samples = {rows} completions"),
        ("tokens a step", f"at most {rows * rollout.max_tokens} generated"),
        ("divergence", named if config.uses_divergence else "none"),
        ("rehearsal rows a step", str(rehearsal)),
        ("optimizer steps a step", f"{parts} of {rows // parts} + {rehearsal // parts} rows"),
        ("micro-batches", f"up to {config.learner.micro_batch_tokens} tokens each"),
        ("staleness", f"at most {rollout.max_staleness}"),
        ("run folder", str(config.folder)),
    ]


# ------------------------------------------------------------------------------------------ placement
def _placement_here(config: Config) -> str:
    if config.cluster.address != "auto" or os.environ.get("RAY_ADDRESS"):
        return "placement   decided by the nodes of the cluster when the run starts; see --simulate"
    here = Node("this machine", float(config.cluster.num_cpus or os.cpu_count() or 1))
    try:
        return _placement_table(plan_placement(config, [here]), [here])
    except PlacementError as error:
        return f"placement   does not fit this machine: {error}"


def _placement_table(placed: Sequence[Bundle], nodes: Sequence[Node]) -> str:
    """Actors and resources in use by node; nodes with the same load share a line."""
    on_node: dict[str, list[Bundle]] = {node.name: [] for node in nodes}
    for bundle in placed:
        on_node[bundle.node].append(bundle)
    lines: dict[tuple[object, ...], list[str]] = {}
    for node in nodes:
        mine = on_node[node.name]
        gpus, cpus = sum(bundle.num_gpus for bundle in mine), sum(bundle.num_cpus for bundle in mine)
        actors = tuple(sum(bundle.role == role for bundle in mine) for role in ROLES)
        load = (*actors, f"{gpus:g} of {node.num_gpus:g}", f"{cpus:g} of {node.num_cpus:g}")
        lines.setdefault(load, []).append(node.name)
    rows = [(_names(names), *load) for load, names in lines.items()]
    return format_table(["placement", "learner ranks", "engines", "reward workers", "GPUs", "CPUs"], rows)


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} nodes, {names[0]} ... {names[-1]}"


# ------------------------------------------------------------------------------------------ memory and time
def _memory(config: Config, cluster: SimulatedCluster) -> str:
    with_gpus = any(node.num_gpus for node in cluster.nodes)
    shape = model_shape(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if not with_gpus:
        return "memory      no GPUs in this cluster"
    if shape is None:
        return (
            f"memory      unknown: the configuration of {config.model.path} is not on this machine; fetch it, or name "
            "a directory as model.path"
        )
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    gpu_bytes = cluster.gpu_gib * GIB
    learner = learner_memory(config, shape, dtype)
    engine = engine_memory(config, shape, dtype, gpu_bytes)
    who = [("learner rank", learner), ("engine", engine)]
    if config.cluster.colocate:
        together = {**{f"learner's {name}": size for name, size in learner.parts.items()}, **engine.parts}
        who.append(("both, colocated", Memory(together)))
    rows = [
        (name, f"{memory.total / GIB:.1f} of {cluster.gpu_gib:g}", _terms(memory), _verdict(memory, gpu_bytes, name))
        for name, memory in who
    ]
    tail = _cache_line(config, shape, dtype, engine.parts["KV cache"])
    return format_table(["GPU memory", f"GiB ({dtype})", "made of", ""], rows) + f"\n{tail}"


def _terms(memory: Memory) -> str:
    return " + ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts.items())


def _verdict(memory: Memory, gpu_bytes: float, who: str) -> str:
    # An engine takes as much memory as it is told to take, so only its weights can be too large.
    if who == "engine":
        return "" if memory.parts["KV cache"] > 0 else "TOO LARGE: raise rollout.tensor_parallel"
    if memory.total <= gpu_bytes * (1 - HEADROOM):
        return ""
    return "TOO LARGE: more ranks, zero_stage 3, gradient_checkpointing, or a smaller micro_batch_tokens"


def _cache_line(config: Config, shape: ModelShape, dtype: str, cache_bytes: float) -> str:
    count = cached_sequences(config, shape, dtype, cache_bytes)
    engines = config.rollout.num_engines
    rows = config.rollout.num_prompts * config.rollout.num_samples
    return (
        f"KV cache    an engine holds {count} sequences of {config.max_sequence_tokens} tokens, and takes "
        f"{-(-rows // engines)} a step, {config.rollout.max_concurrent_sequences} at a time at most"
    )


def _time(config: Config, speed: Speed) -> list[tuple[str, str]]:
    time = step_time(config, speed)
    hidden = ", the next rollout behind the update" if config.rollout.max_staleness else ""
    hours = time.step_s * config.learner.num_steps / 3600
    return [
        ("time a step", f"{time.step_s:.3g} s{hidden}"),
        ("  rollout", f"{time.rollout_s:.3g} s at {speed.engine_tokens_per_s:.0f} tokens/s an engine"),
        ("  update", f"{time.learn_s:.3g} s at {speed.rank_tokens_per_s:.0f} tokens/s a learner rank"),
        ("  sync", f"{time.sync_s:.3g} s"),
        ("lengths", f"{speed.prompt_tokens:.0f} tokens a prompt, {speed.completion_tokens:.0f} a completion"),
        ("the whole run", f"{hours:.3g} hours for {config.learner.num_steps} steps, evaluation aside"),
    ]
