"""Rendered files: valid by their schemas for every preset, equal to the golden ones, and right in what schemas miss."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.planning.placement import Node, plan_placement
from cluster.render.kubernetes import RAY_VERSION, worker_groups
from cluster.render.nodes import KINDS as ALL_KINDS
from cluster.render.nodes import MAX_NAME_CHARS, RenderOptions, object_name, render
from dphrl.config.loading import InputError, list_presets, load_config
from dphrl.config.schema import Config
from tests.unit.kubernetes_rules import KUBERNETES, complaints
from tests.unit.render_schemas import COMPOSE

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "render"
UPDATE = os.environ.get("DPHRL_UPDATE_GOLDEN") == "1"
# Machines by SSH have to be named; test_render_launcher.py is about them.
KINDS = [kind for kind in ALL_KINDS if kind != "ray"]
SUFFIX = {"kubernetes": "yaml", "slurm": "sbatch", "compose": "yaml"}


@functools.cache
def preset(name: str) -> Config:
    return load_config(name, [])


def changed(name: str, *overrides: str) -> Config:
    return load_config(name, list(overrides))


def documents(text: str) -> dict[str, Any]:
    """Kubernetes objects by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def cluster_of(text: str) -> dict[str, Any]:
    return documents(text)["RayJob"]["spec"]["rayClusterSpec"]


def check(kind: str, text: str) -> None:
    if kind == "kubernetes":
        found = list(yaml.safe_load_all(text))
        for document in found:
            jsonschema.validate(document, KUBERNETES[document["kind"]])
        assert complaints(found) == []
    elif kind == "compose":
        jsonschema.validate(yaml.safe_load(text), COMPOSE)
    else:
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "@" not in text.partition("END_OF_CONFIG")[0].replace("B:USR1@300", "")


# ------------------------------------------------------------------------------------------ every preset
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list_presets())
def test_every_preset_renders_and_holds_to_the_schema(name: str, kind: str) -> None:
    text = render(kind, preset(name), RenderOptions(command=f"dphrl render {kind} {name}"))
    check(kind, text)
    assert f"# Made by:  dphrl render {kind} {name}\n" in text
    assert text.endswith("\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [0, 4])
def test_gpus_are_the_users_choice(kind: str, gpus: int) -> None:
    for name in ("demo-math", "paper/math-dph-f"):
        text = render(kind, preset(name), RenderOptions(gpus_per_node=gpus))
        check(kind, text)
        assert ("nvidia" in text or "#SBATCH --gpus-per-node" in text) == bool(gpus)
        assert ("dphrl:cuda" in text) == (bool(gpus) and kind != "slurm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["demo-math", "paper/sql-dph-js"])
def test_golden_files(name: str, kind: str) -> None:
    """After an intended change: DPHRL_UPDATE_GOLDEN=1 python -m pytest tests/unit/test_render.py -k golden"""
    text = render(kind, preset(name), RenderOptions(command=f"dphrl render {kind} {name}"))
    files = [GOLDEN / f"{name.replace('/', '-')}.{kind}.{SUFFIX[kind]}"]
    if (kind, name) == ("compose", "demo-math"):
        files.append(ROOT / "docker" / "compose.yaml")
    for file in files:
        if UPDATE:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert text == file.read_text(encoding="utf-8"), f"{file} is not what is rendered; see this test's docstring"


# ------------------------------------------------------------------------------------------ the schemas
def objects_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(tree, dict):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from objects_in(value, (*path, key))


# Below these, keys are the user's own.
FREE = {"labels", "annotations", "data", "rayStartParams", "requests", "limits", "environment"}
FREE_COMPOSE = {"services", "configs", "secrets", "volumes", "depends_on"}


@pytest.mark.parametrize("kind", ["kubernetes", "compose"])
def test_a_field_that_does_not_exist_fails_the_schema_wherever_it_stands(kind: str) -> None:
    text = render(kind, preset("paper/sql-dph-js"), RenderOptions())
    tried = 0
    for document in yaml.safe_load_all(text):
        # Once: checking the schema itself takes longer than checking a document.
        schema = KUBERNETES[document["kind"]] if kind == "kubernetes" else COMPOSE
        validator = jsonschema.Draft202012Validator(schema)
        for path, _ in objects_in(document):
            if path and (path[-1] in FREE or (kind == "compose" and path[-1] in FREE_COMPOSE)):
                continue
            broken = copy.deepcopy(document)
            functools.reduce(lambda tree, key: tree[key], path, broken)["imagePullPolice"] = "Always"
            with pytest.raises(jsonschema.ValidationError, match="imagePullPolice"):
                validator.validate(broken)
            tried += 1
    assert tried > 20


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backoffLimit"), "2"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "Token"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), -1),
        (("metadata", "name"), "dphrl_demo"),
        (("metadata", "name"), "d" * 64),
    ],
)
def test_a_value_of_the_wrong_kind_fails_the_schema(path: tuple[Any, ...], value: Any) -> None:
    job = documents(render("kubernetes", preset("demo-math"), RenderOptions()))["RayJob"]
    jsonschema.validate(job, KUBERNETES["RayJob"])
    functools.reduce(lambda tree, key: tree[key], path[:-1], job)[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, KUBERNETES["RayJob"])


# ------------------------------------------------------------------------------------------ what runs there
def read_back(text: str, tmp_path: Path) -> Config:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return load_config(str(tmp_path / "config.yaml"), [])


AWKWARD = "data.prompt_template=\"Solve {question}\n\n$HOME ${HOME} `id` @END@ 'x' \\boxed{}  \nEND_OF_CONFIG\""


def test_the_configuration_arrives_as_it_is(tmp_path: Path) -> None:
    config = changed("demo-math", AWKWARD)
    there = read_back(
        documents(render("kubernetes", config, RenderOptions()))["ConfigMap"]["data"]["config.yaml"], tmp_path
    )
    assert there.data == config.data
    assert (there.run_dir, there.cluster.autoscaling, there.cluster.address) == ("/shared/runs", "cpu", "auto")
    compose = yaml.safe_load(render("compose", config, RenderOptions()))
    content = compose["services"]["train"]["environment"]["DPHRL_RUN_CONFIG"]
    assert "$" not in content.replace("$$", "")
    there = read_back(content.replace("$$", "$"), tmp_path)
    assert (there.data, there.run_dir) == (config.data, "/app/runs")


def test_only_settings_of_the_place_are_changed(tmp_path: Path) -> None:
    config = changed("paper/sql-dph-js", "cluster.placement_timeout_s=7200", "cluster.address=1.2.3.4:6379")
    text = documents(render("kubernetes", config, RenderOptions()))["ConfigMap"]["data"]["config.yaml"]
    there = read_back(text, tmp_path)
    assert there.cluster.placement_timeout_s == 7200
    differing = {key for key, value in there.model_dump().items() if value != config.model_dump()[key]}
    assert differing == {"run_dir", "cluster"}


# ------------------------------------------------------------------------------------------ Kubernetes
def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", list_presets())
def test_pods_hold_the_run(name: str) -> None:
    config = preset(name)
    nodes: list[Node] = []
    for group in cluster_of(render("kubernetes", config, RenderOptions()))["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        size = (float(resources["limits"]["cpu"]), float(resources["limits"].get("nvidia.com/gpu", 0)))
        nodes += [Node(f"{group['groupName']}-{i}", *size) for i in range(group["maxReplicas"])]
        # The run asks for them, when it has checked what it was given.
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        shared = next(gib(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v["name"] == "shm")
        assert int(group["rayStartParams"]["object-store-memory"]) < shared * 2**30
        assert shared < gib(resources["limits"]["memory"])
        if config.cluster.object_store_gib:
            assert int(group["rayStartParams"]["object-store-memory"]) >= config.cluster.object_store_gib * 2**30
    plan_placement(config, nodes)


def test_the_head_takes_no_actor_and_no_gpu() -> None:
    spec = cluster_of(render("kubernetes", preset("paper/sql-dph-js"), RenderOptions()))
    head = spec["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True


def test_no_pod_runs_as_root() -> None:
    job = documents(render("kubernetes", preset("paper/sql-dph-js"), RenderOptions()))["RayJob"]
    pods = [tree["spec"] for _, tree in objects_in(job) if "containers" in tree.get("spec", {})]
    assert len(pods) == 3  # submitter, head, workers
    for pod in pods:
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001)
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_container_may_write_to_its_mounts_alone() -> None:
    """Ray needs /tmp, libraries need the home folder; every mount is a volume of the pod, the autoscaler's too."""
    job = documents(render("kubernetes", preset("paper/sql-dph-js"), RenderOptions()))["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    pods = [tree["spec"] for _, tree in objects_in(job) if "containers" in tree.get("spec", {})]
    containers = [(container, pod) for pod in pods for container in pod["containers"]]
    containers.append((cluster["autoscalerOptions"], head))
    assert len(containers) == 4  # submitter, head, workers, autoscaler
    for container, pod in containers:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/tmp"]["emptyDir"] == mounts["/home/dphrl"]["emptyDir"] == {}


def test_reward_workers_get_nodes_of_their_own_where_they_do_not_fit_beside() -> None:
    config = preset("paper/sql-dph-js")  # 4 ranks and 4 engines of 4 CPUs, 16 reward workers of a quarter
    roomy = worker_groups(config, RenderOptions(gpus_per_node=8, cpus_per_node=36))
    assert [(group.name, group.count) for group in roomy] == [("gpu", 1)]
    tight = worker_groups(config, RenderOptions(gpus_per_node=8, cpus_per_node=32))
    assert [(group.name, group.gpus, group.cpus, group.count) for group in tight] == [
        ("gpu", 8, 32, 1),
        ("cpu", 0, 4, 1),
    ]
    assert tight[1].size.memory.gib < tight[0].size.memory.gib / 4


def test_the_cluster_may_grow_to_max_nodes() -> None:
    groups = worker_groups(preset("paper/sql-dph-js"), RenderOptions(max_nodes=5))
    assert [(group.count, group.most) for group in groups] == [(1, 5)]


def test_a_claim_that_exists_is_used_and_not_made() -> None:
    options = RenderOptions(volume_claim="team-data", namespace="research")
    found = documents(render("kubernetes", preset("demo-math"), options))
    assert set(found) == {"ConfigMap", "RayJob"}
    assert {document["metadata"]["namespace"] for document in found.values()} == {"research"}
    claims = [tree["claimName"] for _, tree in objects_in(found) if "claimName" in tree]
    assert claims == ["team-data", "team-data"]


def test_the_ray_version_is_the_oldest_we_run_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = [text for text in project["dependencies"] if text.startswith("ray[")]
    assert f">={RAY_VERSION.removesuffix('.0')}," in ray


# ------------------------------------------------------------------------------------------ Compose
def test_workers_share_out_the_gpus_of_the_machine() -> None:
    services = yaml.safe_load(render("compose", preset("paper/sql-dph-js"), RenderOptions()))["services"]
    ids = [
        number
        for service in services.values()
        for device in service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        for number in device["device_ids"]
    ]
    assert sorted(ids) == [str(i) for i in range(8)]


@pytest.mark.parametrize("name", list_presets())
def test_compose_workers_hold_the_run(name: str) -> None:
    services = yaml.safe_load(render("compose", preset(name), RenderOptions()))["services"]
    assert {"head", "worker-1", "worker-2", "train"} <= set(services)
    nodes = []
    for service, settings in services.items():
        flags = dict(word.removeprefix("--").split("=", 1) for word in settings["command"] if "=" in word)
        nodes.append(Node(service, float(flags.get("num-cpus", 0)), float(flags.get("num-gpus", 0))))
    plan_placement(preset(name), nodes)


def test_the_token_is_in_no_file_and_services_wait_for_each_other() -> None:
    document = yaml.safe_load(render("compose", preset("demo-math"), RenderOptions()))
    services = document["services"]
    assert set(services["train"]["depends_on"]) == set(services) - {"train"}
    for name, service in services.items():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert "healthcheck" in service or name == "train"
        for target in service.get("depends_on", {}):
            assert "healthcheck" in services[target]


@pytest.mark.parametrize("name", list_presets())
def test_a_container_writes_into_memory_and_the_volume_alone(name: str) -> None:
    document = yaml.safe_load(render("compose", preset(name), RenderOptions()))
    # Compose refuses secrets and configurations that are no files for a read-only service.
    assert not {"secrets", "configs"} & {*document, *document["services"]["train"]}
    for service in document["services"].values():
        assert service["read_only"] is True
        # Where compiled kernels lie must not be noexec, which is what Docker makes of a tmpfs.
        options = {place: words.split(",") for place, words in (each.split(":") for each in service["tmpfs"])}
        assert set(options) == {"/tmp", "/home/dphrl"}
        assert all("exec" in words for words in options.values())
        assert {"uid=10001", "gid=10001", "mode=0700"} <= set(options["/home/dphrl"])
        (volume,) = [each for each in service["volumes"] if not each.get("read_only")]
        caches = {key: value for key, value in service["environment"].items() if "CACHE" in key or key == "HF_HOME"}
        assert {"HF_HOME", "DPHRL_CACHE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"} <= set(caches)
        assert all(path.startswith(f"{volume['target']}/") for path in caches.values())


def test_the_run_s_configuration_is_written_where_the_run_reads_it(tmp_path: Path) -> None:
    """The driver's own shell command, but for Ray and dphrl, which print what they were given."""
    config = changed("demo-math", AWKWARD)
    train = yaml.safe_load(render("compose", config, RenderOptions()))["services"]["train"]
    shell, flags, script, name = [
        word.replace("$$", "$").replace("/home/dphrl", str(tmp_path)) for word in train["entrypoint"]
    ]
    for program, words in (("ray", "exit 0"), ("dphrl", 'echo "$@"; env | grep -c DPHRL_RUN_CONFIG')):
        (tmp_path / program).write_text(f"#!/bin/sh\n{words}\n")
        (tmp_path / program).chmod(0o755)
    content = train["environment"]["DPHRL_RUN_CONFIG"].replace("$$", "$")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DPHRL_RUN_CONFIG": content}
    command = [shell, flags, script, name, *train["command"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["train /home/dphrl/config.yaml", "0"], done.stderr
    assert (tmp_path / "config.yaml").read_text() == content


def test_data_is_asked_for_only_where_the_run_reads_any() -> None:
    for name, wanted in (("demo-math", False), ("paper/sql-dph-js", True)):
        text = render("compose", preset(name), RenderOptions())
        assert ("${DPHRL_DATA:?" in text) == wanted


# ------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus_per_node": -1}, "--gpus-per-node -1: too few; give 0 or more"),
        ({"cpus_per_node": 0}, "--cpus-per-node 0: too few"),
        ({"max_nodes": 0}, "--max-nodes 0: too few"),
        ({"namespace": "My_Team"}, "--namespace My_Team: no name for a Kubernetes object"),
        ({"volume_claim": "-x"}, "--volume-claim -x: no name"),
        ({"volume_size": "big"}, "--volume-size big: no size; write 200Gi"),
        ({"image": "a b"}, "--image 'a b': has blanks"),
        ({"gpus_per_node": 1, "cpus_per_node": 2}, "--gpus-per-node 1 --cpus-per-node 2: this run needs"),
        ({"gpus_per_node": 2, "max_nodes": 1}, "--max-nodes 1: this run needs 4 nodes of 2 GPUs and 20 CPUs"),
    ],
)
def test_a_bad_option_is_one_line_that_says_what_and_what_to_do(
    kind: str, options: dict[str, Any], message: str
) -> None:
    if kind == "compose" and options.get("gpus_per_node") == 2:
        options = options | {"cpus_per_node": 20}
    with pytest.raises(InputError) as caught:
        render(kind, preset("paper/sql-dph-js"), RenderOptions(**options))
    assert len(caught.value.lines) == 1
    assert str(caught.value).startswith(message)
    assert "; " in str(caught.value)


def test_memory_that_does_not_hold_the_object_store() -> None:
    config = changed("demo-math", "cluster.object_store_gib=64")
    planned = worker_groups(config, RenderOptions())[0].size.memory.gib
    assert planned > 70
    with pytest.raises(
        InputError, match=rf"--memory-per-node 16: /dev/shm alone takes 65 GiB .* give {planned} or more"
    ):
        render("kubernetes", config, RenderOptions(memory_gib_per_node=16))


def test_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="nomad: nothing renders that; choose one of kubernetes, slurm, compose"):
        render("nomad", preset("demo-math"), RenderOptions())


@pytest.mark.parametrize(
    ("run_name", "name"),
    [("demo-math", "dphrl-demo-math"), ("Llama_3.1-8B", "dphrl-llama-3-1-8b"), ("größe", "dphrl-gr-e"), ("_", "dphrl")],
)
def test_names_of_objects(run_name: str, name: str) -> None:
    assert object_name(run_name) == name


def test_long_names_stay_short_and_apart() -> None:
    first, second = (object_name("x" * 80 + end) for end in "ab")
    assert first != second
    assert max(len(first), len(second)) <= MAX_NAME_CHARS
