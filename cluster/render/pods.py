"""The pods of a run on Kubernetes: containers, what they ask for, their variables, volumes and rights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cluster.planning.sizes import NodeSize
from cluster.render.nodes import (
    CONFIG_PATH,
    DASHBOARD_PORT,
    HEALTH_PATH,
    HEALTH_PORT,
    HOME,
    NODE_NAME,
    RAY_PORT,
    USER_ID,
    RenderOptions,
)
from cluster.render.options import pairs

MOUNT = "/shared"
DATA_DIR = f"{MOUNT}/data"
CLAIM = "dphrl-shared"
# Compiled code is for one kind of machine, and its files are locked: so each node has a folder of its own.
NODE_CACHE = f"{MOUNT}/cache/nodes/$({NODE_NAME})"
ENVIRONMENT = {
    "DPHRL_DATA": DATA_DIR,
    "HF_HOME": f"{MOUNT}/huggingface",
    # Embedded models are made once and read by every pod.
    "DPHRL_CACHE": f"{MOUNT}/cache",
    # vLLM's graphs and DeepSpeed's operators go below the first. They outlive the pod, so that a retry finds them.
    "XDG_CACHE_HOME": NODE_CACHE,
    "TRITON_CACHE_DIR": f"{NODE_CACHE}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{NODE_CACHE}/inductor",
    "CUDA_CACHE_PATH": f"{NODE_CACHE}/cuda",
    # A line of a run should be in the log when it is written.
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Nothing else of a container's file system can be written to: Ray's sessions and what its store spills are below /tmp,
# some libraries' caches in the home folder. On the node's disk, and gone with the pod.
WRITABLE = {"tmp": "/tmp", "home": HOME}
# The driver reads the data and checks gold queries.
HEAD_CPUS = 4
# Adapters of these kinds register memory, which must not be swapped out.
_REGISTERS_MEMORY = re.compile(r"rdma|roce|infiniband|hca|(?:^|[/_-])(?:ib|efa)(?:$|[_-])", re.IGNORECASE)


def head_pod(options: RenderOptions, name: str, image: str, size: NodeSize) -> dict[str, Any]:
    """The pod of Ray's head and the driver; `name` is the ConfigMap's."""
    container = _ray_container("ray-head", image, options, resources(str(HEAD_CPUS), f"{size.memory.gib}Gi"))
    container["ports"] = [
        {"name": "gcs-server", "containerPort": RAY_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
    ]
    folder = CONFIG_PATH.rpartition("/")[0]
    container["volumeMounts"].append({"name": "config", "mountPath": folder, "readOnly": True})
    pod = _pod(container, options, size)
    pod["spec"]["volumes"].append({"name": "config", "configMap": {"name": name}})
    return pod


def worker_pod(
    options: RenderOptions, image: str, size: NodeSize, cpus: int, gpus: int, *, is_chosen: bool
) -> dict[str, Any]:
    """A pod of a worker group. is_chosen: --node-selector and --resource are about this group."""
    extra = dict(pairs("--resource", options.resources)) if is_chosen else {}
    asked = resources(str(cpus), f"{size.memory.gib}Gi", gpus, extra)
    container = _ray_container("ray-worker", image, options, asked)
    if is_chosen and registers_memory(options):
        # It reaches a process of root only. For our user the nodes' own limit of locked memory counts, see the header.
        container["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    pod = _pod(container, options, size)
    pod["spec"]["automountServiceAccountToken"] = False
    if is_chosen and options.node_selector:
        pod["spec"]["nodeSelector"] = dict(pairs("--node-selector", options.node_selector))
    if gpus:
        # GPU nodes commonly keep other pods away by this taint.
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def registers_memory(options: RenderOptions) -> bool:
    """Whether workers ask for an adapter that registers memory."""
    return any(_REGISTERS_MEMORY.search(name) for name, _ in pairs("--resource", options.resources))


def submitter_pod(options: RenderOptions, image: str) -> dict[str, Any]:
    """Submits the job and shows its log; the operator adds the command and the token."""
    container = {
        "name": "ray-job-submitter",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        **_secrets(options),
        "resources": resources("500m", "1Gi"),
        "securityContext": container_security(),
        "volumeMounts": writable_mounts(),
    }
    return {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _pod_security(),
            **_pulled_by(options),
            "containers": [container],
            "volumes": _writable_volumes(),
        }
    }


def copying_pod(options: RenderOptions, image: str, name: str) -> str:
    """As JSON for `kubectl run --overrides`: a pod that has the shared volume, does nothing, and can be copied to."""
    container = {
        "name": name,
        "image": image,
        "command": ["sleep", "infinity"],
        "resources": resources("1", "1Gi"),
        "securityContext": container_security(),
        "volumeMounts": [{"name": "shared", "mountPath": MOUNT}, *writable_mounts()],
    }
    spec = {
        "securityContext": _pod_security(),
        **_pulled_by(options),
        "containers": [container],
        "volumes": [_shared_volume(options), *_writable_volumes()],
    }
    return json.dumps({"apiVersion": "v1", "spec": spec}, separators=(",", ":"))


def _pod(container: dict[str, Any], options: RenderOptions, size: NodeSize) -> dict[str, Any]:
    return {
        "spec": {
            # A dead node is replaced, not restarted, because Ray would not know a restarted one.
            "restartPolicy": "Never",
            "securityContext": _pod_security(),
            **_pulled_by(options),
            "containers": [container],
            "volumes": [
                _shared_volume(options),
                # This volume is memory, and it counts as memory of the container.
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size.shared.gib}Gi"}},
                *_writable_volumes(),
            ],
        }
    }


def writable_mounts() -> list[dict[str, Any]]:
    """Where a container may write beside the shared volume; its pod has the volumes."""
    return [{"name": name, "mountPath": path} for name, path in WRITABLE.items()]


def _writable_volumes() -> list[dict[str, Any]]:
    return [{"name": name, "emptyDir": {}} for name in WRITABLE]


def _shared_volume(options: RenderOptions) -> dict[str, Any]:
    return {"name": "shared", "persistentVolumeClaim": {"claimName": options.volume_claim or CLAIM}}


def _pulled_by(options: RenderOptions) -> dict[str, Any]:
    return {"imagePullSecrets": [{"name": options.image_pull_secret}]} if options.image_pull_secret else {}


def _secrets(options: RenderOptions) -> dict[str, Any]:
    """Every key of the Secret as a variable. It is optional: a run with a free model needs none."""
    return {"envFrom": [{"secretRef": {"name": options.secret, "optional": True}}]} if options.secret else {}


def _ray_container(name: str, image: str, options: RenderOptions, asked: dict[str, Any]) -> dict[str, Any]:
    # Kubernetes replaces $(NAME) itself, so each dollar sign of the user's is written twice.
    given = {key: value.replace("$", "$$") for key, value in pairs("--env", options.env)}
    values = {key: value for key, value in ENVIRONMENT.items() if key not in given} | given
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            {"name": NODE_NAME, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            *({"name": key, "value": value} for key, value in values.items()),
        ],
        **_secrets(options),
        "resources": asked,
        "securityContext": container_security(),
        "readinessProbe": _probe(delay_s=10, period_s=10, failures=12),
        # This probe is patient, because a node that is busy compiling or loading answers late.
        "livenessProbe": _probe(delay_s=60, period_s=15, failures=20),
        "volumeMounts": [
            {"name": "shared", "mountPath": MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},
            *writable_mounts(),
        ],
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


def resources(cpus: str, memory: str, gpus: int = 0, extra: Mapping[str, str] = {}) -> dict[str, Any]:
    """What a container asks for, and at most gets."""
    amounts: dict[str, Any] = {"cpu": cpus, "memory": memory, **({"nvidia.com/gpu": gpus} if gpus else {}), **extra}
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        # This group may write to the volume; Kubernetes does not apply it to NFS, see the header. Owners are changed
        # only where they differ: a large volume takes minutes.
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    """The rights of a container: none but those of its user, and the image stays as it is."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
