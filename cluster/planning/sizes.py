"""What to ask for on machines that are given out by size: memory, /dev/shm and object store of a node, a shared volume.

It adds to the sums of memory.py and storage.py what is beside them: processes, Ray's object store, caches, data. Those
additions are allowances, not measured, and are stated here one by one. A tenth is kept free of everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.planning.memory import BYTES_PER_PARAMETER, GIB, HEADROOM, host_memory, terms_in_gib
from cluster.planning.placement import Bundle
from cluster.planning.shapes import ModelShape
from cluster.planning.storage import buffer_bytes, disk_need
from dphrl.config.schema import Config

# Of a node's CPUs the system takes some: of the 96 that common nodes of 8 GPUs have, a pod never gets 96.
CPUS_PER_GPU = 10
# Ray's processes of a node; then a process of ours with its libraries and, if it has a GPU, the host's part of CUDA and
# NCCL. An engine has as many processes as GPUs. A reward worker has children that run what it grades.
RAY_BYTES, LEARNER_BYTES, ENGINE_BYTES, REWARD_BYTES = 2 * GIB, 3 * GIB, 4 * GIB, 0.5 * GIB
# The driver: data, databases' schemas, the answers of evaluations.
DRIVER_BYTES = 4 * GIB
MIN_HEAD_GIB = 16
# A token in a batch: its id, log-probs, mask and version. While a batch is in use the next is made.
BYTES_PER_TOKEN, BATCHES = 24, 2
# /dev/shm besides the object store: NCCL, torch and vLLM pass data there, and more with more GPUs.
SHARED_BYTES, SHARED_BYTES_PER_GPU = GIB, GIB
# Compiled graphs and kernels of one node, and data sets with their databases (BIRD with its databases takes 34).
CODE_BYTES, DATA_BYTES = 2 * GIB, 64 * GIB


@dataclass(frozen=True)
class Size:
    """What to ask for, and what it is made of in bytes. free: the share that is kept free."""

    parts: Mapping[str, float]
    free: float = HEADROOM

    @property
    def gib(self) -> int:
        """Whole GiB."""
        return math.ceil(sum(self.parts.values()) / (1 - self.free) / GIB - 1e-9)

    def __str__(self) -> str:
        return terms_in_gib(self.parts) + (f", {self.free:.0%} free" if self.free else "")


@dataclass(frozen=True)
class NodeSize:
    """One node besides its GPUs. `shared` is of /dev/shm, which is memory too and holds the object store; store_gib is
    of that alone."""

    memory: Size
    shared: Size
    store_gib: int


def node_size(
    config: Config, shape: ModelShape | None, dtype: str, on_node: Sequence[Bundle], num_gpus: int
) -> NodeSize:
    """The size of a node with these actors: what they take at most at a time, all processes, and shared memory.

    shape: of the model; None for a node without learner ranks and engines.
    """
    phases = host_memory(config, shape, dtype, on_node) if shape else {}
    weights = max((phase.parts.get("object store", 0.0) for phase in phases.values()), default=0.0)
    largest = {name: phase.total - phase.parts.get("object store", 0.0) for name, phase in phases.items()}
    phase = max(largest, key=largest.__getitem__, default="")
    store = object_store_gib(config, weights)
    beside = shared_beside(num_gpus)
    memory = {phase: largest[phase]} if phase else {}
    memory |= {"processes": _processes(config, on_node), "object store": float(store * GIB), "/dev/shm": beside}
    return NodeSize(Size(memory), Size({"object store": store * GIB, "NCCL, torch, vLLM": beside}, free=0.0), store)


def head_size(config: Config) -> NodeSize:
    """The size of a node for Ray's head and the driver, which takes no actor that reserves anything. The reference
    buffer may be there."""
    store = object_store_gib(config, 0.0)
    memory = {
        "driver": DRIVER_BYTES + buffer_bytes(config) + _batches(config),
        "Ray": float(RAY_BYTES),
        "object store": float(store * GIB),
        "/dev/shm": shared_beside(0),
    }
    asked = Size(memory)
    if asked.gib < MIN_HEAD_GIB:
        asked = Size({"driver and Ray, at least": float(MIN_HEAD_GIB * GIB)}, free=0.0)
    return NodeSize(asked, Size({"object store": store * GIB, "torch": shared_beside(0)}, free=0.0), store)


def object_store_gib(config: Config, weights: float) -> int:
    """Ray's object store of a node in GiB: the configuration's, else weights on their way (bytes), two batches and the
    reference buffer, which may be on any node."""
    if config.cluster.object_store_gib:
        return math.ceil(config.cluster.object_store_gib)
    return math.ceil((weights + buffer_bytes(config) + _batches(config)) / GIB) + 1


def shared_beside(num_gpus: int) -> float:
    """Bytes of /dev/shm besides the object store."""
    return float(SHARED_BYTES + num_gpus * SHARED_BYTES_PER_GPU)


def volume_size(config: Config, shape: ModelShape, dtype: str, num_nodes: int) -> Size:
    """The size of a volume that all nodes share and that holds everything of one run: its folder with all checkpoints,
    the model's files, what each node compiles, and data where the run reads any."""
    need = disk_need(config, shape, dtype)
    reads = [dataset.path for dataset in (config.data.train, *config.data.evaluation) if dataset.path]
    return Size(
        {
            need.checkpoints: need.number * (need.checkpoint + need.export),
            "reference buffer": need.buffer,
            "the model": shape.num_parameters * BYTES_PER_PARAMETER[dtype],
            "compiled code": float(num_nodes * CODE_BYTES),
            "data": float(DATA_BYTES if reads else 0),
        }
    )


def _processes(config: Config, on_node: Sequence[Bundle]) -> float:
    each = {
        "learner": LEARNER_BYTES,
        "rollout": config.rollout.tensor_parallel * ENGINE_BYTES,
        "reward": REWARD_BYTES,
    }
    return float(RAY_BYTES + sum(each[bundle.role] for bundle in on_node))


def _batches(config: Config) -> float:
    """The batches of steps, every row as long as it may be."""
    rows = config.rollout.num_prompts * config.rollout.num_samples
    rows += config.reference.rows_per_step if config.uses_reference_samples else 0
    return float(BATCHES * rows * config.max_sequence_tokens * BYTES_PER_TOKEN)
