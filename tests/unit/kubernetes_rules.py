"""What Kubernetes and KubeRay take: types of fields (kubernetes_facts.yaml) as JSON schemas, and rules across fields.

The rules are those of the API server for pods, claims and configuration maps, and those that KubeRay's operator applies
to a RayJob before it makes a cluster (1.5.1 to 1.7.1; a rule that came later holds for all, as a newer operator may be
there). None of the CEL rules in KubeRay's schema concerns a field that we use; `managedBy` and `deletionRules`, which
we could use, are here all the same. No rule needs a CEL interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
Tree = dict[str, Any]

FACTS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("kubernetes_facts.yaml").read_text(encoding="utf-8")
)
# The oldest operator that the rendered file is for, as its header says.
OLDEST_KUBERAY = (1, 6)

LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
LABEL_VALUE = "^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$"
LABEL_KEY = rf"^({LABEL}(\.{LABEL})*/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?$"
SUFFIXES = {"": 1, "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": 1000}
SUFFIXES |= {letter: Decimal(1000) ** (i + 2) for i, letter in enumerate("MGTPE")}
SUFFIXES |= {f"{letter}i": Decimal(1024) ** (i + 1) for i, letter in enumerate("KMGTPE")}
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)")


def _integer(least: int, most: int = 2**31 - 1) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _text(pattern: str, most: int | None = None) -> Schema:
    return {"type": "string", "pattern": pattern} | ({"maxLength": most} if most else {})


SCALARS: dict[str, Schema] = {
    "string": {"type": "string"},
    "word": {"type": "string", "minLength": 1},
    "boolean": {"type": "boolean"},
    "number": {"type": "number", "minimum": 0},
    "count": _integer(0),
    "positive": _integer(1),
    "seconds": _integer(0, 2**63 - 1),
    "port": _integer(1, 65535),
    "mode": _integer(0, 0o777),
    "path": _text("^/"),
    "label": _text(f"^{LABEL}$"),
    "subdomain": _text(rf"^{LABEL}(\.{LABEL})*$", 253),
    "variable": _text("^[-._a-zA-Z][-._a-zA-Z0-9]*$"),
    "service": _text("^(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]*[a-z0-9])?$", 15),
    "quantity": {
        "anyOf": [_integer(0), _text(r"^[0-9]+(\.[0-9]+)?(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")],
    },
    "labels": {
        "type": "object",
        "patternProperties": {LABEL_KEY: _text(LABEL_VALUE)},
        "additionalProperties": False,
    },
}


def schema_of(kind: str, kuberay: tuple[int, ...] = OLDEST_KUBERAY) -> Schema:
    """The JSON schema of a type of the facts, as an operator of this version has it; it refuses what is no field."""
    properties, required = {}, []
    for name, text in FACTS[kind].items():
        words = str(text).split()
        since = words[words.index("since") + 1] if "since" in words else "0"
        if tuple(int(part) for part in since.split(".")) > kuberay:
            continue
        properties[name] = _type(words[0], kuberay)
        required += [name] if "required" in words else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _type(word: str, kuberay: tuple[int, ...]) -> Schema:
    if word.startswith("["):
        item, least = word.rstrip("+")[1:-1], word.endswith("+")
        return {"type": "array", "items": _type(item, kuberay)} | ({"minItems": 1} if least else {})
    if word.startswith("{"):
        return {"type": "object", "additionalProperties": _type(word[1:-1], kuberay)}
    if word in SCALARS:
        return SCALARS[word]
    return schema_of(word, kuberay) if word in FACTS else {"enum": word.removeprefix("=").split("|")}


KINDS = ("ConfigMap", "PersistentVolumeClaim", "RayJob")


def amount(quantity: str | int) -> Decimal:
    """4, "500m" and "16Gi" as a number."""
    found = QUANTITY.fullmatch(str(quantity))
    assert found, quantity
    return Decimal(found[1]) * SUFFIXES[found[2]]


# ------------------------------------------------------------------------------------------ rules
def complaints(documents: Sequence[Tree]) -> list[str]:
    """What the API server or the operator would say against these objects, whose fields all have the right types."""
    found = []
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        rules = {"RayJob": ray_job, "ConfigMap": config_map, "PersistentVolumeClaim": claim}[kind]
        found += [f"{kind} {name}: {text}" for text in rules(document)]
    if len({document["metadata"].get("namespace") for document in documents}) > 1:
        found.append("objects that belong together are in several namespaces")
    return found


def config_map(document: Tree) -> Iterator[str]:
    data = document.get("data", {})
    for key in data:
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key) or key in (".", ".."):
            yield f"data: {key} is no key"
    if sum(len(key) + len(text.encode()) for key, text in data.items()) > 2**20:
        yield "data: more than 1 MiB"


def claim(document: Tree) -> Iterator[str]:
    modes = document["spec"]["accessModes"]
    if "ReadWriteOncePod" in modes and len(modes) > 1:
        yield "accessModes: ReadWriteOncePod stands alone"
    if amount(document["spec"]["resources"].get("requests", {}).get("storage", 0)) <= 0:
        yield "resources: no request for storage"


def ray_job(document: Tree) -> Iterator[str]:
    name, spec = document["metadata"]["name"], document["spec"]
    # Services are named after the cluster, which is named after the job.
    if not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > 47:
        yield "name: not a DNS-1035 label of at most 47 characters"
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    shutdown, selector = spec.get("shutdownAfterJobFinishes"), spec.get("clusterSelector")
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "entrypoint: nothing to run"
    if spec.get("suspend") and not shutdown:
        yield "suspend: needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if spec.get("deletionStrategy", {}).get("deletionRules") and shutdown:
        yield "deletionRules: not with shutdownAfterJobFinishes"
    if selector:
        if not selector.get("ray.io/cluster"):
            yield "clusterSelector: names no cluster"
        if spec.get("suspend") or mode == "SidecarMode" or retries:
            yield "clusterSelector: not with suspend, SidecarMode or backoffLimit"
        if "rayClusterSpec" in spec:
            # The operator would leave the cluster that is described unmade, and say nothing.
            yield "clusterSelector: makes rayClusterSpec meaningless"
    elif "rayClusterSpec" not in spec:
        yield "neither rayClusterSpec nor clusterSelector"
    if mode == "InteractiveMode" and retries:
        yield "backoffLimit: not in InteractiveMode"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "submitterPodTemplate, submitterConfig: not in SidecarMode"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        yield "runtimeEnvYAML: no YAML"
    cluster = spec.get("rayClusterSpec")
    if cluster:
        if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "enableK8sTokenAuth: not in a RayJob"
        yield from ray_cluster(cluster, sidecar=mode == "SidecarMode")
    if "submitterPodTemplate" in spec:
        submitter = spec["submitterPodTemplate"]["spec"]
        if submitter.get("restartPolicy", "Never") == "Always":
            yield "submitterPodTemplate: pods of a Job are not restarted always"
        yield from (f"submitterPodTemplate: {text}" for text in pod(submitter))


def ray_cluster(cluster: Tree, *, sidecar: bool) -> Iterator[str]:
    head, groups = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    head_env = {
        item["name"]: item.get("value", "") for item in head["template"]["spec"]["containers"][0].get("env", [])
    }
    options, autoscaling = cluster.get("autoscalerOptions", {}), cluster.get("enableInTreeAutoscaling", False)
    second = head_env.get("RAY_enable_autoscaler_v2") in ("1", "true")
    if second and not autoscaling:
        yield "RAY_enable_autoscaler_v2: needs enableInTreeAutoscaling"
    if "version" in options and "RAY_enable_autoscaler_v2" in head_env:
        yield "autoscalerOptions.version: not beside RAY_enable_autoscaler_v2"
    if any(item["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for item in options.get("env", [])):
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD: is the operator's own"
    second = autoscaling and (second or options.get("version") == "v2")
    if "RAY_REDIS_ADDRESS" in head_env:
        yield "RAY_REDIS_ADDRESS: needs gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in head_env or head["rayStartParams"].get("redis-username"):
        yield "redis-username: belongs to gcsFaultToleranceOptions"
    if cluster.get("authOptions", {}).get("mode") == "token":
        found = re.match(r"v?(\d+)\.(\d+)", cluster.get("rayVersion", ""))
        if not found or (int(found[1]), int(found[2])) < (2, 52):
            yield "authOptions: tokens need rayVersion 2.52.0 or newer"
    for name, group in [("head", head), *((group["groupName"], group) for group in groups)]:
        yield from (f"{name}: {text}" for text in _group(group, autoscaling=autoscaling, second=second))
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if policy != "Never" and (second or (sidecar and name == "head")):
            yield f"{name}: restartPolicy must be Never"
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield "workerGroupSpecs: two groups of one name"


def _group(group: Tree, *, autoscaling: bool, second: bool) -> Iterator[str]:
    params = group["rayStartParams"]
    if "labels" in params:
        yield "rayStartParams: labels are a field of the group"
    if group.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield "resources: not both here and in rayStartParams"
    if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
        yield "minReplicas: more than maxReplicas"
    if group.get("suspend"):
        yield "suspend: is for the operator's own use"
    if not second and ("idleTimeoutSeconds" in group or group.get("priority")):
        yield "idleTimeoutSeconds, priority: need the second autoscaler"
    yield from pod(group["template"]["spec"])


def pod(spec: Tree) -> Iterator[str]:
    containers = [*spec["containers"], *spec.get("initContainers", [])]
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    for what, names in (("containers", [item["name"] for item in containers]), ("volumes", volumes)):
        if len(set(names)) < len(names):
            yield f"{what}: two of one name"
    for volume in spec.get("volumes", []):
        if len(volume) != 2:
            yield f"volume {volume['name']}: not of one kind"
    security = spec.get("securityContext", {})
    for container in containers:
        own = security | container.get("securityContext", {})
        if own.get("runAsNonRoot") and own.get("runAsUser") == 0:
            yield f"{container['name']}: runAsNonRoot, as user 0"
        yield from (f"{container['name']}: {text}" for text in _container(container, volumes))
    for toleration in spec.get("tolerations", []):
        operator = toleration.get("operator", "Equal")
        if operator == "Exists" and toleration.get("value"):
            yield "toleration: a value that Exists does not look at"
        if "key" not in toleration and operator != "Exists":
            yield "toleration: no key"
        if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
            yield "toleration: tolerationSeconds are for NoExecute"


def _container(container: Tree, volumes: list[str]) -> Iterator[str]:
    paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"mounts {mount['name']}, which is no volume of the pod"
        if ":" in mount["mountPath"]:
            yield f"mountPath {mount['mountPath']}: has a colon"
    if len(set(paths)) < len(paths):
        yield "two mounts at one path"
    ports = [port["name"] for port in container.get("ports", []) if "name" in port]
    if len(set(ports)) < len(ports):
        yield "two ports of one name"
    for item in container.get("env", []):
        if item.get("value") and "valueFrom" in item:
            yield f"{item['name']}: both value and valueFrom"
    requests, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
    for name, quantity in requests.items():
        if name in limits and amount(quantity) > amount(limits[name]):
            yield f"requests more {name} than its limit"
    for name in requests | limits:
        # Devices are whole and cannot be promised twice.
        if "/" in name and (requests.get(name, limits.get(name)) != limits.get(name) or amount(limits[name]) % 1):
            yield f"{name}: not a whole number that is request and limit"
        own = name in ("cpu", "memory", "ephemeral-storage") or name.startswith("hugepages-")
        if "/" not in name and not own:
            yield f"{name}: no resource"
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(kind)
        if probe is None:
            continue
        if len(probe.keys() & {"httpGet", "exec"}) != 1:
            yield f"{kind}: not one way of asking"
        if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
            yield f"{kind}: one success is enough"
    security = container.get("securityContext", {})
    more = security.get("privileged") or "SYS_ADMIN" in security.get("capabilities", {}).get("add", [])
    if security.get("allowPrivilegeEscalation") is False and more:
        yield "allowPrivilegeEscalation: false, and privileged all the same"


KUBERNETES = {kind: schema_of(kind) for kind in KINDS}
