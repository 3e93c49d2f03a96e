"""A run on Kubernetes: a KubeRay RayJob with its cluster, its configuration, and the volume that all pods share.

The head schedules and runs the driver, but no actor that takes CPUs or GPUs. Workers come in one group of GPU nodes,
and a group of CPU nodes for reward workers that find no room there. The operator makes the cluster's token itself, so
no secret is in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.planning.placement import Node, PlacementError, plan_bundles, plan_placement
from cluster.render.nodes import (
    CONFIG_PATH,
    DASHBOARD_PORT,
    HEALTH_PATH,
    HEALTH_PORT,
    MEMORY_GIB_PER_CPU,
    MEMORY_GIB_PER_GPU,
    RAY_PORT,
    USER_ID,
    Nodes,
    RenderOptions,
    check_max_nodes,
    image_for,
    made_by,
    node_shape,
    nodes_for,
    object_name,
    shared_memory_gib,
    store_gib,
    to_yaml,
    with_settings,
)
from dphrl.config.loading import InputError, config_to_yaml
from dphrl.config.schema import Config

# The images hold at least this version of Ray; by it the operator decides how to start and authenticate.
RAY_VERSION = "2.60.0"
MOUNT = "/shared"
RUN_DIR = f"{MOUNT}/runs"
ENVIRONMENT = {
    "DPHRL_DATA": f"{MOUNT}/data",
    "HF_HOME": f"{MOUNT}/huggingface",
    # Embedded models are made once and read by every pod.
    "DPHRL_CACHE": f"{MOUNT}/cache",
    # A line of a run should be in the log when it is written.
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CLAIM = "dphrl-shared"
# The driver reads the data and checks gold queries.
HEAD_CPUS, HEAD_MEMORY_GIB, HEAD_STORE_GIB = 4, 16, 4
# CPU nodes of reward workers are no larger than this.
MAX_REWARD_CPUS = 16
# A node may have to boot and to pull an image of 20 GB.
PLACEMENT_TIMEOUT_S = 1800.0
# Longer than preparing data and model takes: nodes must not leave just before they are needed.
IDLE_TIMEOUT_S = 900


@dataclass(frozen=True)
class Group:
    """Worker pods of one kind; `count` holds the run, `most` is how far the autoscaler goes."""

    name: str
    cpus: int
    gpus: int
    memory_gib: int
    count: int
    most: int


def render_kubernetes(config: Config, options: RenderOptions) -> str:
    """The objects of a run as YAML. Raises InputError when the nodes cannot hold it."""
    groups = worker_groups(config, options)
    image = image_for(options, node_shape(config, options))
    name = object_name(config.run_name)
    metadata = {"name": name, **({"namespace": options.namespace} if options.namespace else {})}
    labels = {"app.kubernetes.io/name": "dphrl", "app.kubernetes.io/instance": name}
    there = with_settings(
        config,
        RUN_DIR,
        # Nodes that died, or that were removed as idle, come back when the run asks for them.
        autoscaling="gpu" if groups[0].gpus else "cpu",
        placement_timeout_s=max(config.cluster.placement_timeout_s, PLACEMENT_TIMEOUT_S),
    )
    documents: list[Mapping[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {**metadata, "labels": labels},
            "data": {"config.yaml": config_to_yaml(there)},
        }
    ]
    if not options.volume_claim:
        documents.append(_claim({**metadata, "name": CLAIM, "labels": labels}, options.volume_size))
    documents.append(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {**metadata, "labels": labels},
            "spec": _job_spec(config, options, name, image, groups),
        }
    )
    return to_yaml(documents, _header(config, options, name, groups))


def worker_groups(config: Config, options: RenderOptions) -> list[Group]:
    """The nodes of the run, those with GPUs first.

    As few GPU nodes as hold the learner and the engines; reward workers go beside them where they fit, else on CPU
    nodes of their own, since a GPU node for them would be expensive.
    """
    shape = node_shape(config, options)
    if not shape.num_gpus:
        nodes = nodes_for(config, options, shape)
        return [_group("cpu", nodes, config, options, options.max_nodes)]
    gpus = sum(bundle.num_gpus for bundle in plan_bundles(config, with_gpus=True))
    workers = [bundle for bundle in plan_bundles(config, with_gpus=True) if bundle.role == "reward"]
    reward_cpus = sum(bundle.num_cpus for bundle in workers)
    size = max(math.ceil(workers[0].num_cpus), min(MAX_REWARD_CPUS, math.ceil(reward_cpus)))
    beside = Node("cpu", float(size))
    # For every number of GPU nodes, no extra CPU nodes come first: room on the GPU nodes costs nothing.
    for count in range(math.ceil(gpus / shape.num_gpus), len(plan_bundles(config, with_gpus=True)) + 1):
        for extra in range(math.ceil(reward_cpus / size) + 2):
            if _fits(config, [shape] * count + [beside] * extra):
                nodes = Nodes(shape, count)
                check_max_nodes(nodes, options)
                found = [_group("gpu", nodes, config, options, options.max_nodes)]
                return found + ([_group("cpu", Nodes(beside, extra), config, RenderOptions())] if extra else [])
    # No number of nodes holds the run: this call raises the error that says why.
    return [_group("gpu", nodes_for(config, options, shape), config, options)]


def _fits(config: Config, shapes: list[Node]) -> bool:
    nodes = [Node(f"{shape.name}-{i}", shape.num_cpus, shape.num_gpus) for i, shape in enumerate(shapes)]
    try:
        plan_placement(config, nodes)
    except PlacementError:
        return False
    return True


def _group(name: str, nodes: Nodes, config: Config, options: RenderOptions, most: int | None = None) -> Group:
    usual = MEMORY_GIB_PER_GPU * nodes.gpus or MEMORY_GIB_PER_CPU * nodes.cpus
    # An object store larger than usual needs a larger node, not a failing pod.
    shared = shared_memory_gib(store_gib(config, usual), nodes.gpus)
    memory = options.memory_gib_per_node or max(usual, 2 * shared)
    shared = shared_memory_gib(store_gib(config, memory), nodes.gpus)
    if shared >= memory:
        raise InputError(
            f"--memory-per-node {memory}: /dev/shm alone takes {shared} GiB (the object store, 1, and 1 a GPU); "
            f"give {2 * shared} or more"
        )
    return Group(name, nodes.cpus, nodes.gpus, memory, nodes.count, max(most or 0, nodes.count))


# ------------------------------------------------------------------------------------------ the objects
def _claim(metadata: Mapping[str, Any], size: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": dict(metadata),
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}},
    }


def _job_spec(config: Config, options: RenderOptions, name: str, image: str, groups: list[Group]) -> dict[str, Any]:
    return {
        # A first start finds no checkpoint and begins at step 1; a retry, on a new cluster, goes on from the last one.
        "entrypoint": f"dphrl train {CONFIG_PATH} --resume",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "backoffLimit": 2,
        "submitterPodTemplate": _submitter(image),
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "upscalingMode": "Default",
                "idleTimeoutSeconds": IDLE_TIMEOUT_S,
                "imagePullPolicy": "IfNotPresent",
                "securityContext": _container_security(),
                "resources": _resources("500m", "1Gi"),
            },
            "headGroupSpec": {
                "rayStartParams": {
                    # No actor of the run may come here: it would compete with the driver, and there is no GPU.
                    "num-cpus": "0",
                    "num-gpus": "0",
                    "dashboard-host": "0.0.0.0",
                    **_start_params(HEAD_STORE_GIB),
                },
                "template": _head(options, name, image),
            },
            "workerGroupSpecs": [_worker_group(group, config, options, image) for group in groups],
        },
    }


def _head(options: RenderOptions, name: str, image: str) -> dict[str, Any]:
    container = _ray_container("ray-head", image, HEAD_CPUS, 0, HEAD_MEMORY_GIB)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": RAY_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
    ]
    folder = CONFIG_PATH.rpartition("/")[0]
    container["volumeMounts"].append({"name": "config", "mountPath": folder, "readOnly": True})
    pod = _pod(container, options, shared_memory_gib(HEAD_STORE_GIB, 0))
    pod["spec"]["volumes"].append({"name": "config", "configMap": {"name": name}})
    return pod


def _worker_group(group: Group, config: Config, options: RenderOptions, image: str) -> dict[str, Any]:
    store = store_gib(config, group.memory_gib)
    container = _ray_container("ray-worker", image, group.cpus, group.gpus, group.memory_gib)
    pod = _pod(container, options, shared_memory_gib(store, group.gpus))
    pod["spec"]["automountServiceAccountToken"] = False
    if group.gpus:
        # GPU nodes commonly keep other pods away by this taint.
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": group.name,
        # All nodes start at once, so that the run can begin; idle ones may go later.
        "replicas": group.count,
        "minReplicas": 0,
        "maxReplicas": group.most,
        "rayStartParams": _start_params(store),
        "template": pod,
    }


def _start_params(store: int) -> dict[str, str]:
    return {
        "object-store-memory": str(store * 2**30),
        "dashboard-agent-listen-port": str(HEALTH_PORT),
    }


def _submitter(image: str) -> dict[str, Any]:
    """Submits the job and shows its log; the operator adds the command and the token."""
    container = {
        "name": "ray-job-submitter",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "resources": _resources("500m", "1Gi"),
        "securityContext": _container_security(),
    }
    return {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _pod_security(),
            "containers": [container],
        }
    }


def _pod(container: dict[str, Any], options: RenderOptions, shared_gib: int) -> dict[str, Any]:
    return {
        "spec": {
            # A dead node is replaced, not restarted, because Ray would not know a restarted one.
            "restartPolicy": "Never",
            "securityContext": _pod_security(),
            "containers": [container],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": options.volume_claim or CLAIM}},
                # This volume is memory, and it counts as memory of the container.
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}},
            ],
        }
    }


def _ray_container(name: str, image: str, cpus: int, gpus: int, memory_gib: int) -> dict[str, Any]:
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": key, "value": value} for key, value in ENVIRONMENT.items()],
        "resources": _resources(str(cpus), f"{memory_gib}Gi", gpus),
        "securityContext": _container_security(),
        "readinessProbe": _probe(delay_s=10, period_s=10, failures=12),
        # This probe is patient, because a node that is busy compiling or loading answers late.
        "livenessProbe": _probe(delay_s=60, period_s=15, failures=20),
        "volumeMounts": [{"name": "shared", "mountPath": MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _probe(*, delay_s: int, period_s: int, failures: int) -> dict[str, Any]:
    # The operator's own probes may call wget, which a small image does not have.
    return {
        "httpGet": {"path": HEALTH_PATH, "port": HEALTH_PORT},
        "initialDelaySeconds": delay_s,
        "periodSeconds": period_s,
        "timeoutSeconds": 10,
        "failureThreshold": failures,
    }


def _resources(cpus: str, memory: str, gpus: int = 0) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": cpus, "memory": memory} | ({"nvidia.com/gpu": gpus} if gpus else {})
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        # This group may write to the volume. Owners are changed only where they differ: a large volume takes minutes.
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _header(config: Config, options: RenderOptions, name: str, groups: list[Group]) -> list[str]:
    sizes = [f"{g.count} x ({g.gpus} GPUs, {g.cpus} CPUs, {g.memory_gib} GiB)" for g in groups]
    flag = f" -n {options.namespace}" if options.namespace else ""
    claim = options.volume_claim or CLAIM
    kept = [] if options.volume_claim else ["          (`delete -f` would delete the claim too, and the results on it)"]
    made = [] if options.volume_claim else [f"          (made here; for the next run: --volume-claim {CLAIM})"]
    return [
        f"Run {config.run_name} on Kubernetes: a RayJob for KubeRay's operator, 1.5.1 or newer.",
        *made_by(options),
        f"Workers:  {' + '.join(sizes)}",
        f"Start:    kubectl create{flag} -f FILE",
        f"Watch:    kubectl logs{flag} -f -l job-name={name}",
        f"Results:  {RUN_DIR}/{config.run_name} on the claim {claim}, of a storage class that offers ReadWriteMany",
        *made,
        f"Data:     {ENVIRONMENT['DPHRL_DATA']} on the same claim",
        f"Clean up: kubectl delete{flag} rayjob,configmap {name}",
        *kept,
    ]
