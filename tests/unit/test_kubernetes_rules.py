"""Every rendered RayJob is one that the API server and KubeRay's operator take, and each of their rules can refuse."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.render.nodes import MAX_NAME_CHARS, RenderOptions, render
from dphrl.config.loading import list_presets, load_config
from tests.unit.kubernetes_rules import FACTS, KINDS, OLDEST_KUBERAY, SCALARS, amount, complaints, schema_of

Tree = dict[str, Any]
Path = tuple[Any, ...]
ABSENT = object()

OPTIONS = [
    {},
    {"gpus_per_node": 0},
    {"gpus_per_node": 4},
    {"gpus_per_node": 8, "cpus_per_node": 33},
    {"max_nodes": 64, "namespace": "team-1"},
    {"volume_claim": "shared", "memory_gib_per_node": 2048},
    {"volume_size": "2Ti", "image": "registry.example:5000/dphrl@sha256:" + "0" * 64},
]


@functools.cache
def validators(version: tuple[int, ...]) -> dict[str, jsonschema.Draft202012Validator]:
    return {kind: jsonschema.Draft202012Validator(schema_of(kind, version)) for kind in KINDS}


def refusals(documents: list[Tree], version: tuple[int, ...] = OLDEST_KUBERAY) -> list[str]:
    """What the schemas say, or, where fields have the right types, the rules."""
    found = [
        f"{error.json_path}: {error.message}"
        for document in documents
        for error in validators(version)[document["kind"]].iter_errors(document)
    ]
    return found or complaints(documents)


def rendered(name: str, overrides: tuple[str, ...] = (), **options: Any) -> list[Tree]:
    return list(yaml.safe_load_all(render("kubernetes", load_config(name, list(overrides)), RenderOptions(**options))))


@functools.cache
def sample() -> list[Tree]:
    """A file with every kind of object and of worker."""
    documents = rendered("paper/sql-dph-js", gpus_per_node=8, cpus_per_node=32)
    groups = documents[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [document["kind"] for document in documents] == list(KINDS)
    assert [group["groupName"] for group in groups] == ["gpu", "cpu"]
    return documents


# ------------------------------------------------------------------------------------------ what we render
@pytest.mark.parametrize("name", list_presets())
def test_every_preset_is_taken_with_every_option(name: str) -> None:
    config = load_config(name, [])
    for options in OPTIONS:
        documents = list(yaml.safe_load_all(render("kubernetes", config, RenderOptions(**options))))
        assert refusals(documents) == [], options


@pytest.mark.parametrize(
    "run_name", ["a", "9lives", "_", "Größe_3.1", "x" * 200, "a" * 40 + "-." * 20, "-".join("ab" for _ in range(40))]
)
def test_every_run_name_becomes_a_name_that_is_taken(run_name: str) -> None:
    documents = rendered("demo-math", (f"run_name={run_name}",))
    assert refusals(documents) == []
    assert len(documents[-1]["metadata"]["name"]) <= MAX_NAME_CHARS


def test_parameters_of_ray_start_are_parameters_of_ray_start() -> None:
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    cluster = sample()[-1]["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert set(group["rayStartParams"]) <= known


def test_the_header_names_the_oldest_operator_that_the_file_is_for() -> None:
    text = render("kubernetes", load_config("demo-math", []), RenderOptions())
    found = re.search(r"KubeRay's operator, ([0-9.]+) or newer", text)
    assert found
    assert tuple(int(part) for part in found[1].split(".")) == OLDEST_KUBERAY


# ------------------------------------------------------------------------------------------ what is refused
JOB, CLAIM, MAP = 2, 1, 0
SPEC: Path = (JOB, "spec")
CLUSTER: Path = (*SPEC, "rayClusterSpec")
HEAD: Path = (*CLUSTER, "headGroupSpec")
GROUP: Path = (*CLUSTER, "workerGroupSpecs", 0)
POD: Path = (*GROUP, "template", "spec")
BOX: Path = (*POD, "containers", 0)


def changed(*changes: tuple[Path, Any]) -> list[Tree]:
    documents = copy.deepcopy(sample())
    for path, value in changes:
        *above, last = path
        place: Any = functools.reduce(lambda tree, key: tree[key], above, documents)
        if value is ABSENT:
            del place[last]
        elif isinstance(place, list) and last == len(place):
            place.append(value)
        else:
            place[last] = value
    return documents


REFUSED: list[tuple[str, list[tuple[Path, Any]]]] = [
    # Fields and types
    (r"spec: .*'shutDownAfterJobFinishes' was unexpected", [((*SPEC, "shutDownAfterJobFinishes"), True)]),
    ("'ttlSecondsAfterFinish' was unexpected", [((*SPEC, "ttlSecondsAfterFinish"), 1)]),
    ("'imagePullPolice' was unexpected", [((*BOX, "imagePullPolice"), "Always")]),
    ("'requets' was unexpected", [((*BOX, "resources", "requets"), {})]),
    ("'template' is a required property", [((*HEAD, "template"), ABSENT)]),
    ("'maxReplicas' is a required property", [((*GROUP, "maxReplicas"), ABSENT)]),
    ("-1 is less than the minimum", [((*GROUP, "replicas"), -1)]),
    ("-1 is less than the minimum", [((*SPEC, "backoffLimit"), -1)]),
    ("-1 is less than the minimum", [((*SPEC, "ttlSecondsAfterFinished"), -1)]),
    ("0 is less than the minimum", [((*SPEC, "activeDeadlineSeconds"), 0)]),
    ("0 is less than the minimum", [((*BOX, "livenessProbe", "periodSeconds"), 0)]),
    ("70000 is greater than the maximum", [((*BOX, "livenessProbe", "httpGet", "port"), 70000)]),
    ("is greater than the maximum", [((*GROUP, "maxReplicas"), 2**31)]),
    ("'4' is not of type 'integer'", [((*GROUP, "replicas"), "4")]),
    ("4 is not of type 'string'", [((*GROUP, "rayStartParams", "num-cpus"), 4)]),
    ("'Job' is not one of", [((*SPEC, "submissionMode"), "Job")]),
    ("'me' is not one of", [((*SPEC, "managedBy"), "me")]),
    ("'default' is not one of", [((*CLUSTER, "autoscalerOptions", "upscalingMode"), "default")]),
    ("'RWX' is not one of", [((CLAIM, "spec", "accessModes", 0), "RWX")]),
    ("should be non-empty", [((CLAIM, "spec", "accessModes"), [])]),
    ("should be non-empty", [((*POD, "containers"), [])]),
    # Syntax of names and quantities
    ("'16GB' is not valid", [((*BOX, "resources", "limits", "memory"), "16GB")]),
    ("'16K' is not valid", [((*BOX, "resources", "limits", "memory"), "16K")]),
    ("'-1' is not valid", [((*BOX, "resources", "limits", "cpu"), "-1")]),
    ("'Gpu' does not match", [((*GROUP, "groupName"), "Gpu")]),
    ("'ray_worker' does not match", [((*BOX, "name"), "ray_worker")]),
    ("'1ST VAR' does not match", [((*BOX, "env", 0, "name"), "1ST VAR")]),
    ("'a=b' does not match", [((*BOX, "env", 0, "name"), "a=b")]),
    ("is too long", [((*HEAD, "template", "spec", "containers", 0, "ports", 0, "name"), "p" * 16)]),
    ("'a--b' does not match", [((*HEAD, "template", "spec", "containers", 0, "ports", 0, "name"), "a--b")]),
    ("'-x-' does not match", [((JOB, "metadata", "labels", "app.kubernetes.io/name"), "-x-")]),
    ("does not match", [((JOB, "metadata", "labels", "app.kubernetes.io/name"), "x" * 64)]),
    ("match any of the regexes", [((JOB, "metadata", "labels", "a b"), "c")]),
    ("'shared' does not match", [((*BOX, "volumeMounts", 0, "mountPath"), "shared")]),
    ("'My_Claim' does not match", [((*POD, "volumes", 0, "persistentVolumeClaim", "claimName"), "My_Claim")]),
    # The operator's rules
    ("name: not a DNS-1035 label", [((JOB, "metadata", "name"), "9lives")]),
    ("name: not a DNS-1035 label", [((JOB, "metadata", "name"), "d" * 48)]),
    ("entrypoint: nothing to run", [((*SPEC, "entrypoint"), ABSENT)]),
    ("suspend: needs", [((*SPEC, "suspend"), True), ((*SPEC, "shutdownAfterJobFinishes"), False)]),
    ("ttlSecondsAfterFinished: needs", [((*SPEC, "shutdownAfterJobFinishes"), ABSENT)]),
    (
        "deletionRules: not with",
        [
            (
                (*SPEC, "deletionStrategy"),
                {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
            )
        ],
    ),
    ("neither rayClusterSpec nor clusterSelector", [(CLUSTER, ABSENT)]),
    ("makes rayClusterSpec meaningless", [((*SPEC, "clusterSelector"), {"ray.io/cluster": "mine"})]),
    ("names no cluster", [((*SPEC, "clusterSelector"), {"app": "mine"}), (CLUSTER, ABSENT)]),
    (
        "not with suspend, SidecarMode or backoffLimit",
        [((*SPEC, "clusterSelector"), {"ray.io/cluster": "mine"}), (CLUSTER, ABSENT)],
    ),
    ("backoffLimit: not in InteractiveMode", [((*SPEC, "submissionMode"), "InteractiveMode")]),
    ("not in SidecarMode", [((*SPEC, "submissionMode"), "SidecarMode")]),
    ("runtimeEnvYAML: no YAML", [((*SPEC, "runtimeEnvYAML"), "a: [")]),
    ("pods of a Job", [((*SPEC, "submitterPodTemplate", "spec", "restartPolicy"), "Always")]),
    ("tokens need rayVersion", [((*CLUSTER, "rayVersion"), "2.51.1")]),
    ("tokens need rayVersion", [((*CLUSTER, "rayVersion"), ABSENT)]),
    ("labels are a field", [((*GROUP, "rayStartParams", "labels"), "a=b")]),
    ("not both here and in rayStartParams", [((*HEAD, "resources"), {"CPU": "4"})]),
    ("minReplicas: more than", [((*GROUP, "minReplicas"), 100)]),
    ("suspend: is for the operator", [((*GROUP, "suspend"), True)]),
    ("need the second autoscaler", [((*GROUP, "idleTimeoutSeconds"), 60)]),
    ("two groups of one name", [((*CLUSTER, "workerGroupSpecs", 1, "groupName"), "gpu")]),
    (
        "gpu: restartPolicy must be Never",
        [((*POD, "restartPolicy"), "Always"), ((*CLUSTER, "autoscalerOptions", "version"), "v2")],
    ),
    (
        "head: restartPolicy must be Never",
        [
            ((*HEAD, "template", "spec", "restartPolicy"), "Always"),
            ((*SPEC, "submissionMode"), "SidecarMode"),
            ((*SPEC, "submitterPodTemplate"), ABSENT),
        ],
    ),
    *(
        (said, [((*HEAD, "template", "spec", "containers", 0, "env", 0), {"name": name, "value": "1"}), *more])
        for said, name, more in (
            ("RAY_REDIS_ADDRESS: needs", "RAY_REDIS_ADDRESS", []),
            ("redis-username: belongs", "REDIS_USERNAME", []),
            (
                "needs enableInTreeAutoscaling",
                "RAY_enable_autoscaler_v2",
                [((*CLUSTER, "enableInTreeAutoscaling"), False)],
            ),
            (
                "version: not beside",
                "RAY_enable_autoscaler_v2",
                [((*CLUSTER, "autoscalerOptions", "version"), "v2")],
            ),
        )
    ),
    (
        "is the operator's own",
        [((*CLUSTER, "autoscalerOptions", "env"), [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": ""}])],
    ),
    # Kubernetes' rules for pods, claims and configuration maps
    ("containers: two of one name", [((*POD, "containers", 1), {"name": "ray-worker", "image": "x"})]),
    ("volumes: two of one name", [((*POD, "volumes", 1, "name"), "shared")]),
    ("volume shm: not of one kind", [((*POD, "volumes", 1, "emptyDir"), ABSENT)]),
    ("volume shm: not of one kind", [((*POD, "volumes", 1, "secret"), {"secretName": "x"})]),
    ("mounts config, which is no volume", [((*BOX, "volumeMounts", 0, "name"), "config")]),
    ("has a colon", [((*BOX, "volumeMounts", 0, "mountPath"), "/a:b")]),
    ("two mounts at one path", [((*BOX, "volumeMounts", 0, "mountPath"), "/dev/shm")]),
    ("two ports of one name", [((*HEAD, "template", "spec", "containers", 0, "ports", 0, "name"), "dashboard")]),
    (
        "both value and valueFrom",
        [((*BOX, "env", 1, "valueFrom"), {"secretKeyRef": {"name": "tokens", "key": "huggingface"}})],
    ),
    ("requests more memory than", [((*BOX, "resources", "limits", "memory"), "1Gi")]),
    ("not a whole number that is request", [((*BOX, "resources", "requests", "nvidia.com/gpu"), 4)]),
    ("not a whole number that is request", [((*BOX, "resources", "limits", "nvidia.com/gpu"), ABSENT)]),
    ("cpus: no resource", [((*BOX, "resources", "requests", "cpus"), 4)]),
    ("livenessProbe: not one way", [((*BOX, "livenessProbe", "httpGet"), ABSENT)]),
    ("livenessProbe: one success", [((*BOX, "livenessProbe", "successThreshold"), 2)]),
    ("privileged all the same", [((*BOX, "securityContext", "privileged"), True)]),
    ("privileged all the same", [((*BOX, "securityContext", "capabilities", "add"), ["SYS_ADMIN"])]),
    ("runAsNonRoot, as user 0", [((*POD, "securityContext", "runAsUser"), 0)]),
    ("a value that Exists does not", [((*POD, "tolerations", 0, "value"), "true")]),
    ("toleration: no key", [((*POD, "tolerations", 0), {"operator": "Equal", "effect": "NoSchedule"})]),
    ("are for NoExecute", [((*POD, "tolerations", 0, "tolerationSeconds"), 60)]),
    ("ReadWriteOncePod stands alone", [((CLAIM, "spec", "accessModes", 1), "ReadWriteOncePod")]),
    ("no request for storage", [((CLAIM, "spec", "resources", "requests", "storage"), 0)]),
    ("data: a b is no key", [((MAP, "data", "a b"), "")]),
    ("more than 1 MiB", [((MAP, "data", "big"), "x" * 2**20)]),
    ("several namespaces", [((MAP, "metadata", "namespace"), "elsewhere")]),
]


@pytest.mark.parametrize(("said", "changes"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_each_rule_refuses_an_object_that_breaks_it(said: str, changes: list[tuple[Path, Any]]) -> None:
    assert refusals(sample()) == []
    found = refusals(changed(*changes))
    assert [text for text in found if re.search(said, text)], found


def test_a_field_of_a_newer_operator_is_one_only_there() -> None:
    documents = changed(((*SPEC, "preRunningDeadlineSeconds"), 600), ((*GROUP, "priority"), 0))
    assert refusals(documents, (1, 7, 1)) == []
    assert len(refusals(documents)) == 1
    assert len(refusals(documents, (1, 5, 1))) == 2
    found = refusals(changed(((*CLUSTER, "authOptions", "enableK8sTokenAuth"), True)), (1, 7, 1))
    assert [text for text in found if text.endswith("enableK8sTokenAuth: not in a RayJob")]


def test_every_type_that_the_facts_name_is_one() -> None:
    for kind, fields in FACTS.items():
        for name, text in fields.items():
            word = str(text).split()[0].strip("[]{}+")
            assert word in SCALARS or word in FACTS or "|" in word or word.startswith("="), (kind, name)


def test_amounts() -> None:
    assert [amount(text) for text in ("500m", 4, "1k", "2Ki", "1.5Gi", "2Ti")] == [
        amount("0.5"),
        amount("4"),
        1000,
        2048,
        3 * 2**29,
        2**41,
    ]
