"""A run on Kubernetes: a KubeRay RayJob with its cluster, its configuration, and the volume that all pods share.

The head schedules and runs the driver, but no actor that takes CPUs or GPUs. Workers come in one group of GPU nodes,
and a group of CPU nodes for reward workers that find no room there. They are not there from the start: the run asks for
them when it has checked its configuration, model and data, so that a mistake costs no GPU. The operator makes the
cluster's token itself, and other secrets are in a Secret of the user's, so no secret is in the file.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.planning.memory import GIB, dtype_on
from cluster.planning.placement import Bundle, Node, PlacementError, plan_bundles, plan_placement
from cluster.planning.shapes import ModelShape, model_shape
from cluster.planning.sizes import NodeSize, Size, head_size, node_size, object_store_gib, shared_beside, volume_size
from cluster.render.missing import code_lines, needs_data, path_lines
from cluster.render.nodes import (
    CONFIG_PATH,
    HEALTH_PORT,
    Nodes,
    RenderOptions,
    check_max_nodes,
    image_for,
    made_by,
    node_shape,
    nodes_for,
    object_name,
    to_yaml,
    with_settings,
)
from cluster.render.pods import (
    CLAIM,
    DATA_DIR,
    MOUNT,
    USER_ID,
    container_security,
    copying_pod,
    head_pod,
    registers_memory,
    resources,
    submitter_pod,
    worker_pod,
    writable_mounts,
)
from dphrl.config.loading import InputError, config_to_yaml
from dphrl.config.schema import Config

# The images hold at least this version of Ray; by it the operator decides how to start and authenticate.
RAY_VERSION = "2.60.0"
RUN_DIR = f"{MOUNT}/runs"
# By this label kubectl handles the volume, which outlives the run, apart from the run.
COMPONENT = "app.kubernetes.io/component"
# CPU nodes of reward workers are no larger than this.
MAX_REWARD_CPUS = 16
# A node may have to boot and to pull an image of 20 GB.
PLACEMENT_TIMEOUT_S = 1800.0
# Longer than the reference stage of one engine may leave the others idle.
IDLE_TIMEOUT_S = 900
# How often the operator starts a failed job again, each time on a new cluster.
NUM_RETRIES = 2
COPIER = "dphrl-copy"


@dataclass(frozen=True)
class Group:
    """Worker pods of one kind; `count` holds the run, `most` is how far the autoscaler goes."""

    name: str
    cpus: int
    gpus: int
    size: NodeSize
    count: int
    most: int


def render_kubernetes(config: Config, options: RenderOptions) -> str:
    """The objects of a run as YAML. Raises InputError when the nodes cannot hold it, or when sizes are neither given
    nor known."""
    groups = worker_groups(config, options)
    image = image_for(options, node_shape(config, options))
    name = object_name(config.run_name)
    place = {"namespace": options.namespace} if options.namespace else {}
    labels = {"app.kubernetes.io/name": "dphrl", "app.kubernetes.io/instance": name}
    of_run = {"name": name, **place, "labels": {**labels, COMPONENT: "run"}}
    there = with_settings(
        config,
        RUN_DIR,
        # The run asks for its nodes, and asks again for those that died.
        autoscaling="gpu" if groups[0].gpus else "cpu",
        placement_timeout_s=max(config.cluster.placement_timeout_s, PLACEMENT_TIMEOUT_S),
    )
    documents: list[Mapping[str, Any]] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": of_run, "data": {"config.yaml": config_to_yaml(there)}}
    ]
    volume = None if options.volume_claim else _volume(config, options, groups)
    if volume is not None:
        size = options.volume_size or f"{volume.gib}Gi"
        of_volume = {"name": CLAIM, **place, "labels": {**labels, COMPONENT: "volume"}}
        documents.append(_claim(of_volume, size, options.storage_class))
    spec = _job_spec(there, options, name, image, groups)
    documents.append({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": of_run, "spec": spec})
    return to_yaml(documents, _header(config, options, name, image, groups, volume))


# ------------------------------------------------------------------------------------------ sizes
def worker_groups(config: Config, options: RenderOptions) -> list[Group]:
    """The nodes of the run, those with GPUs first.

    As few GPU nodes as hold the learner and the engines; reward workers go beside them where they fit, else on CPU
    nodes of their own, since a GPU node for them would be expensive.
    """
    shape = node_shape(config, options)
    if not shape.num_gpus:
        nodes = nodes_for(config, options, shape)
        return [_group("cpu", nodes, _placed(config, [shape] * nodes.count), config, options, options.max_nodes)]
    gpus = sum(bundle.num_gpus for bundle in plan_bundles(config, with_gpus=True))
    workers = [bundle for bundle in plan_bundles(config, with_gpus=True) if bundle.role == "reward"]
    reward_cpus = sum(bundle.num_cpus for bundle in workers)
    size = max(math.ceil(workers[0].num_cpus), min(MAX_REWARD_CPUS, math.ceil(reward_cpus)))
    beside = Node("cpu", float(size))
    # For every number of GPU nodes, no extra CPU nodes come first: room on the GPU nodes costs nothing.
    for count in range(math.ceil(gpus / shape.num_gpus), len(plan_bundles(config, with_gpus=True)) + 1):
        for extra in range(math.ceil(reward_cpus / size) + 2):
            if placed := _placed(config, [shape] * count + [beside] * extra):
                nodes = Nodes(shape, count)
                check_max_nodes(nodes, options)
                found = [_group("gpu", nodes, placed[:count], config, options, options.max_nodes)]
                return found + (
                    [_group("cpu", Nodes(beside, extra), placed[count:], config, RenderOptions())] if extra else []
                )
    # No number of nodes holds the run: this call raises the error that says why.
    return [_group("gpu", nodes_for(config, options, shape), [], config, options)]


def _placed(config: Config, shapes: Sequence[Node]) -> list[list[Bundle]]:
    """What is on each node of these shapes; nothing at all when they do not hold the run."""
    nodes = [Node(f"{shape.name}-{i}", shape.num_cpus, shape.num_gpus) for i, shape in enumerate(shapes)]
    try:
        bundles = plan_placement(config, nodes)
    except PlacementError:
        return []
    return [[bundle for bundle in bundles if bundle.node == node.name] for node in nodes]


def _group(
    name: str,
    nodes: Nodes,
    placed: Sequence[Sequence[Bundle]],
    config: Config,
    options: RenderOptions,
    most: int | None = None,
) -> Group:
    """placed: what is on each of the nodes, of which the fullest decides the size of all."""
    if options.memory_gib_per_node:
        size = _given_size(config, options.memory_gib_per_node, nodes, placed)
    else:
        # Only graders know nothing of the model.
        needs_model = any(bundle.role != "reward" for bundles in placed for bundle in bundles)
        shape = _known_model(config, "--memory-per-node") if needs_model else None
        dtype = dtype_on(config, with_gpus=nodes.gpus > 0)
        sizes = [node_size(config, shape, dtype, bundles, nodes.gpus) for bundles in placed]
        size = max(sizes, key=lambda size: size.memory.gib)
    return Group(name, nodes.cpus, nodes.gpus, size, nodes.count, max(most or 0, nodes.count))


def _given_size(config: Config, memory_gib: int, nodes: Nodes, placed: Sequence[Sequence[Bundle]]) -> NodeSize:
    """The memory that was given, of which the object store gets what a plan gives it, where the model is known."""
    shape, dtype = _model(config), dtype_on(config, with_gpus=nodes.gpus > 0)
    planned = [node_size(config, shape, dtype, bundles, nodes.gpus) for bundles in placed] if shape else []
    store = max((size.store_gib for size in planned), default=object_store_gib(config, 0.0))
    shared = Size({"object store": store * GIB, "NCCL, torch, vLLM": shared_beside(nodes.gpus)}, free=0.0)
    if shared.gib >= memory_gib:
        wanted = max((size.memory.gib for size in planned), default=2 * shared.gib)
        raise InputError(
            f"--memory-per-node {memory_gib}: /dev/shm alone takes {shared.gib} GiB (the object store, 1, and 1 a "
            f"GPU); give {wanted} or more"
        )
    return NodeSize(Size({"--memory-per-node": memory_gib * GIB}, free=0.0), shared, store)


def _volume(config: Config, options: RenderOptions, groups: Sequence[Group]) -> Size:
    if options.volume_size:
        return Size({}, free=0.0)
    shape = _known_model(config, "--volume-size, or --volume-claim")
    return volume_size(
        config, shape, dtype_on(config, with_gpus=groups[0].gpus > 0), sum(group.count for group in groups)
    )


def _model(config: Config) -> ModelShape | None:
    return model_shape(config.model.path, trust_remote_code=config.model.trust_remote_code)


def _known_model(config: Config, flags: str) -> ModelShape:
    """The model's sizes. Raises InputError where they are not known: a guess would be too small for some model."""
    shape = _model(config)
    if shape is None:
        raise InputError(
            f"model.path: the size of {config.model.path} is not known here, and memory and disk follow from it; bring "
            f"its config.json here (`hf download` for a hub model), or give {flags}"
        )
    return shape


# ------------------------------------------------------------------------------------------ the objects
def _claim(metadata: Mapping[str, Any], size: str, storage_class: str) -> dict[str, Any]:
    chosen = {"storageClassName": storage_class} if storage_class else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": dict(metadata),
        "spec": {"accessModes": ["ReadWriteMany"], **chosen, "resources": {"requests": {"storage": size}}},
    }


def _job_spec(config: Config, options: RenderOptions, name: str, image: str, groups: list[Group]) -> dict[str, Any]:
    head = head_size(config)
    # No default: nobody knows how long a run takes, and one that is going well must not be ended.
    limit = {"activeDeadlineSeconds": options.active_deadline_s} if options.active_deadline_s else {}
    return {
        # A first start finds no checkpoint and begins at step 1; a retry, on a new cluster, goes on from the last one.
        # What was refused is refused at once when it is retried.
        "entrypoint": f"dphrl train {CONFIG_PATH} --resume --retries {NUM_RETRIES}",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "backoffLimit": NUM_RETRIES,
        # For a head, or a volume, that never comes. The run itself waits as long for its workers, and says for what.
        "preRunningDeadlineSeconds": math.ceil(config.cluster.placement_timeout_s),
        **limit,
        "submitterPodTemplate": submitter_pod(options, image),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "upscalingMode": "Default",
                "idleTimeoutSeconds": IDLE_TIMEOUT_S,
                "imagePullPolicy": "IfNotPresent",
                "securityContext": container_security(),
                "resources": resources("500m", "1Gi"),
                # It runs in the head's pod, with that pod's volumes. The operator adds one for Ray's logs.
                "volumeMounts": writable_mounts(),
            },
            "headGroupSpec": {
                "rayStartParams": {
                    # No actor of the run may come here: it would compete with the driver, and there is no GPU.
                    "num-cpus": "0",
                    "num-gpus": "0",
                    "dashboard-host": "0.0.0.0",
                    **_start_params(head.store_gib),
                },
                "template": head_pod(options, name, image, head),
            },
            "workerGroupSpecs": [
                _worker_group(group, config, options, image, is_chosen=i == 0) for i, group in enumerate(groups)
            ],
        },
    }


def _worker_group(
    group: Group, config: Config, options: RenderOptions, image: str, *, is_chosen: bool
) -> dict[str, Any]:
    # The autoscaler cannot know which type of GPU a group has, so a run that names one begins with its nodes.
    by_type = group.gpus and (config.learner.accelerator or config.rollout.accelerator)
    return {
        "groupName": group.name,
        "replicas": group.count if by_type else 0,
        "minReplicas": 0,
        "maxReplicas": group.most,
        "rayStartParams": _start_params(group.size.store_gib),
        "template": worker_pod(options, image, group.size, group.cpus, group.gpus, is_chosen=is_chosen),
    }


def _start_params(store: int) -> dict[str, str]:
    return {
        "object-store-memory": str(store * 2**30),
        "dashboard-agent-listen-port": str(HEALTH_PORT),
    }


# ------------------------------------------------------------------------------------------ the header
def _header(
    config: Config, options: RenderOptions, name: str, image: str, groups: list[Group], volume: Size | None
) -> list[str]:
    flag = f" -n {options.namespace}" if options.namespace else ""
    sizes = [f"{g.count} x ({g.gpus} GPUs, {g.cpus} CPUs, {g.size.memory.gib} GiB)" for g in groups]
    locked = ["Adapters: the nodes must not limit locked memory (LimitMEMLOCK=infinity of their container runtime)"]
    return [
        f"Run {config.run_name} on Kubernetes: a RayJob for KubeRay's operator, 1.6 or newer.",
        *made_by(options),
        f"Workers:  {' + '.join(sizes)}, when configuration, model and data are checked",
        *(f"          {group.size.memory}" for group in groups),
        *(locked if registers_memory(options) else []),
        *code_lines(config, image),
        *_secrets_lines(options, flag),
        *_volume_lines(config, options, flag, volume),
        *_data_lines(config, options, image, flag),
        f"Start:    kubectl create{flag} -f FILE -l {COMPONENT}=run",
        f"Watch:    kubectl logs{flag} -f -l job-name={name}",
        f"Results:  {RUN_DIR}/{config.run_name} on the claim",
        f"Clean up: kubectl delete{flag} -f FILE -l {COMPONENT}=run",
        *([] if volume is None else ["          (without -l the claim would go too, and the results on it)"]),
    ]


def _secrets_lines(options: RenderOptions, flag: str) -> list[str]:
    if not options.secret:
        return []
    return [
        f"Secrets:  kubectl create{flag} secret generic {options.secret} --from-env-file=ENV_FILE",
        "          with lines such as HF_TOKEN=... (a gated model needs it) or WANDB_API_KEY=...; a run may do without",
    ]


def _volume_lines(config: Config, options: RenderOptions, flag: str, volume: Size | None) -> list[str]:
    nfs = f"          fsGroup has no effect on NFS: there, make its folder writable for user {USER_ID} on the server"
    if volume is None:
        return [f"Volume:   the claim {options.volume_claim}, which offers ReadWriteMany", nfs]
    made_of = f"{volume.gib}Gi: {volume}" if volume.parts else options.volume_size
    return [
        f"Volume:   {made_of}",
        f"          kubectl create{flag} -f FILE -l {COMPONENT}=volume",
        f"          the claim {CLAIM}, of the {options.storage_class or 'default'} storage class, which must offer "
        f"ReadWriteMany{'' if options.storage_class else ' (--storage-class names another)'}; for the next run: "
        f"--volume-claim {CLAIM}",
        nfs,
    ]


def _data_lines(config: Config, options: RenderOptions, image: str, flag: str) -> list[str]:
    if not needs_data(config, DATA_DIR):
        return []
    overrides = shlex.quote(copying_pod(options, image, COPIER))
    return [
        *path_lines(config, DATA_DIR),
        f"Data:     goes to {DATA_DIR} on the claim, by a pod that holds it:",
        f"          kubectl run{flag} {COPIER} --image={image} --overrides={overrides}",
        f"          kubectl wait{flag} --for=condition=Ready pod/{COPIER} --timeout=30m",
        f'          tar -C "$DPHRL_DATA" -cf - . | kubectl exec{flag} -i {COPIER} -- '
        f"sh -c 'mkdir -p {DATA_DIR} && tar -C {DATA_DIR} -xmf -'",
        f"          kubectl delete{flag} pod {COPIER}",
    ]
