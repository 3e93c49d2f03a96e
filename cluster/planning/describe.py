"""Tables of what a run would start: batch arithmetic, placement, memory, time. Nothing is started."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.address import joined_cluster
from cluster.doctor.machine import memory_limits
from cluster.planning.memory import (
    GIB,
    HEADROOM,
    Memory,
    cached_sequences,
    colocation_obstacle,
    dtype_on,
    engine_memory,
    host_memory,
    learner_memory,
    terms_in_gib,
    while_decoding,
    while_updating,
)
from cluster.planning.placement import Bundle, Node, PlacementError, plan_placement
from cluster.planning.shapes import ModelShape, model_shape
from cluster.planning.sizes import CPUS_PER_GPU, node_size, volume_size
from cluster.planning.storage import disk_need, free_disk
from cluster.planning.timing import Speed, step_time
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.processors import whole_cpus
from dphrl.tracking.console import format_table

ROLES = ("learner", "rollout", "reward")
HEADINGS = ["what", "how much"]
SHARING = {
    "auto": "shared by their completions where that costs less and the model can",
    "always": "shared by their completions as far as a micro-batch holds them",
    "never": "one for each completion",
}

PROXIMAL = {"learner": "the learner at the start of the step", "behavior": "the policy that sampled"}


@dataclass(frozen=True)
class SimulatedCluster:
    """Nodes that need not exist. gpu_gib: memory of a GPU, the smallest where they differ. disk_gib: free for the run's
    folder, where it is told."""

    nodes: tuple[Node, ...]
    gpu_gib: float
    disk_gib: float | None = None


def parse_cluster(texts: Sequence[str]) -> SimulatedCluster:
    """From `nodes=8,gpus=8,cpus=96,gpu_gib=80,accelerator=H100,host_gib=1024,disk_gib=2000`; several texts give nodes
    of several shapes.

    Raises InputError for an unknown key, or a value that is no positive number (gpus may be 0).
    """
    nodes: list[Node] = []
    smallest, disks = math.inf, []
    for text in texts:
        shape, accelerator = _shape(text)
        cpus = shape["cpus"] or max(8.0, CPUS_PER_GPU * shape["gpus"])
        sizes = [shape[key] for key in ("gpu_gib", "host_gib", "disk_gib") if key in shape]
        if shape["nodes"] < 1 or shape["nodes"] % 1 or shape["gpus"] < 0 or cpus < 0 or min(sizes) <= 0:
            raise InputError(f"--simulate {text}: give at least one node, and what it has as positive numbers")
        here = Node("", cpus, shape["gpus"], accelerator, shape.get("host_gib"))
        nodes += [replace(here, name=f"node-{len(nodes) + i}") for i in range(int(shape["nodes"]))]
        smallest = min(smallest, shape["gpu_gib"])
        disks += [shape["disk_gib"]] if "disk_gib" in shape else []
    return SimulatedCluster(tuple(nodes), smallest, min(disks, default=None))


def _shape(text: str) -> tuple[dict[str, float], str | None]:
    """The numbers of one `--simulate`, and the type of its GPUs if it is told."""
    shape, accelerator = {"nodes": 1.0, "gpus": 0.0, "cpus": 0.0, "gpu_gib": 80.0}, None
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            if key == "accelerator" and value:
                accelerator = value
                continue
            if key not in (*shape, "host_gib", "disk_gib"):
                raise ValueError(key)
            shape[key] = float(value)
        except ValueError:
            raise InputError(
                f"--simulate {text}: cannot read {part!r}; write nodes=8,gpus=8,cpus=96,gpu_gib=80 (nodes, and what "
                "one node has), and where it matters accelerator=H100, host_gib=1024, disk_gib=2000 (for run_dir)"
            ) from None
    return shape, accelerator


def describe_plan(config: Config, cluster: SimulatedCluster | None = None, speed: Speed | None = None) -> str:
    """The batch arithmetic of a run, its placement on this machine or on a simulated cluster, and what it needs there
    of memory and disk. A speed adds the time of a step.

    Raises InputError, with the arithmetic, when the simulated cluster cannot hold the run.
    """
    parts = [format_table(HEADINGS, _batch(config))]
    shape = model_shape(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if cluster is None:
        parts += _here(config, shape)
    else:
        try:
            placed = plan_placement(config, cluster.nodes)
        except PlacementError as error:
            raise InputError(f"--simulate: this run {error}") from None
        parts.append(_placement_table(placed, cluster.nodes))
        parts += _needs(config, shape, cluster, placed)
        if shape is not None:
            parts.append(_to_ask_for(config, shape, cluster, placed))
    if speed is not None:
        parts.append(format_table(HEADINGS, _time(config, speed)))
    return "\n\n".join(parts)


def _batch(config: Config) -> list[tuple[str, str]]:
    rollout, reference, parts = config.rollout, config.reference, config.algorithm.num_minibatches
    rows = rollout.num_prompts * rollout.num_samples
    rehearsal = reference.rows_per_step if config.uses_reference_samples else 0
    divergence = config.algorithm.divergence
    has_ratio = config.algorithm.policy_loss.name in ("clipped", "gspo", "clip_cov", "kl_cov")
    named = f"{divergence.name}{divergence.params or ''}, eta {config.algorithm.eta:g}, on {config.algorithm.estimator}"
    if config.uses_reference_model:
        named += ", with a resident reference model in each learner rank"
    return [
        ("model", config.model.path),
        ("steps", f"{config.learner.num_steps} (seed {config.seed})"),
        ("rollouts a step", f"{rollout.num_prompts} prompts x {rollout.num_samples} samples = {rows} completions"),
        ("tokens a step", f"at most {rows * rollout.max_tokens} generated"),
        ("divergence", named if config.uses_divergence else "none"),
        ("rehearsal rows a step", f"{rehearsal}{_tokens_that_count(config)}"),
        *([("replayed prompts a step", f"{config.num_replayed} near-perfect ones")] if config.num_replayed else []),
        ("optimizer steps a step", f"{parts} of {rows // parts} + {rehearsal // parts} rows"),
        ("micro-batches", f"up to {config.learner.micro_batch_tokens} tokens each"),
        ("prompts in the learner", SHARING[config.share_prefix]),
        ("staleness", f"at most {rollout.max_staleness}"),
        *([("trust region", f"around {PROXIMAL[config.proximal_policy]}")] if has_ratio else []),
        ("run folder", str(config.folder)),
    ]


def _tokens_that_count(config: Config) -> str:
    share = config.algorithm.rehearsal_share
    return "" if share is None else f", of their tokens the {share:g} of highest entropy"


# ------------------------------------------------------------------------------------------ placement
def _here(config: Config, shape: ModelShape | None) -> list[str]:
    """Placement, memory and disk on this machine."""
    if joined_cluster(config.cluster.address, os.environ):
        return ["placement   decided by the nodes of the cluster when the run starts; see --simulate"]
    limits = memory_limits()
    host_gib = min(limits) / GIB if limits else None
    here = Node("this machine", float(config.cluster.num_cpus or whole_cpus()), host_gib=host_gib)
    try:
        placed = plan_placement(config, [here])
    except PlacementError as error:
        return [f"placement   does not fit this machine: {error}"]
    cluster = SimulatedCluster((here,), math.inf, free_disk(config.folder) / GIB)
    return [_placement_table(placed, [here]), *_needs(config, shape, cluster, placed)]


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
def _needs(config: Config, shape: ModelShape | None, cluster: SimulatedCluster, placed: Sequence[Bundle]) -> list[str]:
    """Tables of memory and disk, with a word on what does not fit."""
    if shape is None:
        return [
            f"memory      unknown: the configuration of {config.model.path} is not on this machine; fetch it, or name "
            "a directory as model.path"
        ]
    with_gpus, dtype = any(node.num_gpus for node in cluster.nodes), _dtype(config, cluster)
    tables = [_gpu_memory(config, shape, dtype, cluster.gpu_gib)] if with_gpus else []
    return [*tables, _host_memory(config, shape, dtype, cluster.nodes, placed), _disk(config, shape, dtype, cluster)]


def _dtype(config: Config, cluster: SimulatedCluster) -> str:
    return dtype_on(config, with_gpus=any(node.num_gpus for node in cluster.nodes))


def _gpu_memory(config: Config, shape: ModelShape, dtype: str, gpu_gib: float) -> str:
    gpu_bytes = gpu_gib * GIB
    engine = engine_memory(config, shape, dtype, gpu_bytes)
    who = [("learner rank", learner_memory(config, shape, dtype)), ("engine", engine)]
    if config.cluster.colocate:
        if obstacle := colocation_obstacle(config, shape, dtype, gpu_bytes):
            raise InputError(f"--simulate: {obstacle}")
        together = while_decoding(config, shape, dtype, gpu_bytes), while_updating(config, shape, dtype)
        who = [("shared, decoding", together[0]), ("shared, updating", together[1]), who[1]]
    rows = [
        (
            name,
            f"{memory.total / GIB:.1f} of {gpu_gib:g}",
            terms_in_gib(memory.parts),
            _verdict(memory, gpu_bytes, name),
        )
        for name, memory in who
    ]
    tail = _cache_line(config, shape, dtype, engine.parts["KV cache"])
    return format_table(["GPU memory", f"GiB ({dtype})", "made of", ""], rows) + f"\n{tail}"


def _host_memory(config: Config, shape: ModelShape, dtype: str, nodes: Sequence[Node], placed: Sequence[Bundle]) -> str:
    """Memory of the nodes besides GPUs, what all processes need for themselves left out; like nodes share a line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for node in nodes:
        needs = host_memory(config, shape, dtype, [bundle for bundle in placed if bundle.node == node.name])
        for phase, memory in needs.items():
            size = f"{memory.total / GIB:.1f}" + (f" of {node.host_gib:.0f}" if node.host_gib else "")
            fits = node.host_gib is None or memory.total <= node.host_gib * GIB * (1 - HEADROOM)
            verdict = "" if fits else "TOO LARGE: more nodes, or fewer ranks and engines on each"
            lines.setdefault((phase, size, terms_in_gib(memory.parts), verdict), []).append(node.name)
    rows = [(_names(names), *line) for line, names in lines.items()]
    return format_table(["host memory", "when", "GiB", "made of", ""], rows)


def _disk(config: Config, shape: ModelShape, dtype: str, cluster: SimulatedCluster) -> str:
    need = disk_need(config, shape, dtype)
    state, export = need.checkpoint / GIB, need.export / GIB
    terms = f"{need.checkpoints} x ({state:.1f} state + {export:.1f} model)"
    if need.buffer:
        terms += f" + at most {need.buffer / GIB:.1f} reference buffer"
    size, fits = f"{need.total / GIB:.1f}", cluster.disk_gib is None or need.total <= cluster.disk_gib * GIB
    if cluster.disk_gib is not None:
        size += f" of {cluster.disk_gib:.0f} free"
    verdict = "" if fits else "TOO LARGE: a lower checkpoint.keep, or another run_dir"
    return format_table(["disk", "GiB", "made of", ""], [(str(config.folder), size, terms, verdict)])


def _to_ask_for(config: Config, shape: ModelShape, cluster: SimulatedCluster, placed: Sequence[Bundle]) -> str:
    """What `dphrl render kubernetes` asks for: each node's memory and /dev/shm, and a volume that all nodes share."""
    dtype, lines, num_used = _dtype(config, cluster), dict[tuple[str, ...], list[str]](), 0
    for node in cluster.nodes:
        if not (mine := [bundle for bundle in placed if bundle.node == node.name]):
            continue
        num_used += 1
        size = node_size(config, shape, dtype, mine, int(node.num_gpus))
        for what, asked in (("memory", size.memory), ("of it /dev/shm", size.shared)):
            lines.setdefault((what, f"{asked.gib}", str(asked)), []).append(node.name)
    volume = volume_size(config, shape, dtype, num_used)
    rows = [(_names(names), *line) for line, names in lines.items()]
    rows.append(("all nodes", "shared volume", f"{volume.gib}", str(volume)))
    return format_table(["to ask for", "what", "GiB", "made of"], rows)


def _verdict(memory: Memory, gpu_bytes: float, who: str) -> str:
    # An engine takes as much memory as it is told to take, so only its weights can be too large.
    if who == "engine":
        return "" if memory.parts["KV cache"] > 0 else "TOO LARGE: raise rollout.tensor_parallel"
    # The terms of a shared GPU count contexts by themselves.
    if memory.total <= gpu_bytes * (1 if who == "shared, decoding" else 1 - HEADROOM):
        return ""
    return "TOO LARGE: more ranks, zero_stage 3, offload, gradient_checkpointing, or a smaller micro_batch_tokens"


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
