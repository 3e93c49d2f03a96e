"""What pods of a rendered run ask for and are given: sizes from the plan, secrets, variables, deadlines, data."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.planning.describe import describe_plan, parse_cluster
from cluster.render.kubernetes import worker_groups
from cluster.render.nodes import KINDS, RenderOptions, render
from dphrl.config.loading import InputError, load_config
from tests.unit.kubernetes_rules import schema_of
from tests.unit.test_render import AWKWARD, changed, check, cluster_of, documents, objects_in, preset

PAPER = "paper/sql-dph-js"
GIB = 2**30
LLAMA_8B = 8.03e9


def pods_of(text: str) -> dict[str, dict[str, Any]]:
    """The spec of each pod by its container's name."""
    job = documents(text)["RayJob"]
    pods = [tree["spec"] for _, tree in objects_in(job) if "containers" in tree.get("spec", {})]
    return {pod["containers"][0]["name"]: pod for pod in pods}


def header(text: str) -> str:
    return "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))


def rendered(name: str = PAPER, **options: Any) -> str:
    text = render("kubernetes", preset(name), RenderOptions(**options))
    check("kubernetes", text)
    return text


def plan_rows(text: str) -> dict[tuple[str, str], int]:
    """The table `to ask for` of `dphrl plan`: GiB by node and by what."""
    table = text[text.index("to ask for") :].splitlines()[2:]
    cells = [re.split(r"\s{2,}", line) for line in table]
    return {(who, what): int(size) for who, what, size, _ in cells}


# ------------------------------------------------------------------------------------------ sizes
def test_what_is_asked_for_equals_the_plan() -> None:
    text = rendered()
    told = plan_rows(describe_plan(preset(PAPER), parse_cluster(["nodes=1,gpus=8,gpu_gib=80"])))
    worker = pods_of(text)["ray-worker"]
    asked = worker["containers"][0]["resources"]["limits"]
    shared = next(v["emptyDir"]["sizeLimit"] for v in worker["volumes"] if v["name"] == "shm")
    claim = documents(text)["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
    assert asked["memory"] == f"{told['node-0', 'memory']}Gi"
    assert shared == f"{told['node-0', 'of it /dev/shm']}Gi"
    assert claim == f"{told['all nodes', 'shared volume']}Gi"
    assert asked["cpu"] == "80"  # of the 96 that nodes of 8 GPUs have


def test_the_sums_of_the_paper_s_run_by_hand() -> None:
    """4 checkpoints: 2 newest, the best, one in the making. 12 bytes of state and 2 of export a parameter."""
    checkpoints = 4 * LLAMA_8B * (12 + 2)
    volume = checkpoints + 4 * GIB + 2 * LLAMA_8B + 2 * GIB + 64 * GIB
    # All four ranks copy their part of the state, the first the model; their processes, those of four engines and
    # sixteen graders, and Ray's.
    store = 8 * GIB
    memory = LLAMA_8B * (12 + 2) + (4 * 3 + 4 * 4 + 16 * 0.5 + 2) * GIB + store + 9 * GIB
    text = rendered()
    claim = documents(text)["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
    assert int(claim.removesuffix("Gi")) == pytest.approx(volume / 0.9 / GIB, abs=1)
    (group,) = cluster_of(text)["workerGroupSpecs"]
    asked = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert int(asked.removesuffix("Gi")) == pytest.approx(memory / 0.9 / GIB, abs=1)
    assert group["rayStartParams"]["object-store-memory"] == str(store)


@pytest.mark.parametrize(
    ("overrides", "grows"),
    [
        (["checkpoint.keep=5"], "claim"),
        (["learner.offload=optimizer"], "memory"),
        (["sync.backend=object_store"], "store"),
        (["reference.max_bytes=20000000000"], "store"),
    ],
)
def test_a_run_that_needs_more_asks_for_more(overrides: list[str], grows: str) -> None:
    def sizes(config: Any) -> dict[str, int]:
        text = render("kubernetes", config, RenderOptions())
        (group,) = worker_groups(config, RenderOptions())
        claim = documents(text)["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
        return {"claim": int(claim[:-2]), "memory": group.size.memory.gib, "store": group.size.store_gib}

    assert sizes(changed(PAPER, *overrides))[grows] > sizes(preset(PAPER))[grows]


def test_sizes_that_are_given_stand() -> None:
    text = rendered(memory_gib_per_node=1000, volume_size="2Ti")
    assert pods_of(text)["ray-worker"]["containers"][0]["resources"]["limits"]["memory"] == "1000Gi"
    assert documents(text)["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] == "2Ti"


def test_a_model_of_unknown_size_is_one_line_unless_sizes_are_given() -> None:
    config = changed(PAPER, "model.path=someone/unheard-of")
    with pytest.raises(InputError, match=r"model.path: the size of someone/unheard-of .* or give --memory-per-node$"):
        render("kubernetes", config, RenderOptions())
    with pytest.raises(InputError, match=r"or give --volume-size, or --volume-claim$"):
        render("kubernetes", config, RenderOptions(memory_gib_per_node=500))
    for given in ({"volume_size": "1Ti"}, {"volume_claim": "team"}):
        # Graders' nodes are of their own size, which no model has a part in.
        text = render("kubernetes", config, RenderOptions(memory_gib_per_node=500, cpus_per_node=32, **given))
        check("kubernetes", text)
        assert [g["groupName"] for g in cluster_of(text)["workerGroupSpecs"]] == ["gpu", "cpu"]
    check("compose", render("compose", config, RenderOptions()))


# ------------------------------------------------------------------------------------------ secrets and variables
def test_every_pod_has_the_secret_if_it_exists() -> None:
    for options, name in (({}, "dphrl"), ({"secret": "team.tokens"}, "team.tokens")):
        pods = pods_of(rendered(**options))
        assert set(pods) == {"ray-job-submitter", "ray-head", "ray-worker"}
        for pod in pods.values():
            assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": name, "optional": True}}]
    without = rendered(secret="")
    assert "envFrom" not in without
    assert "Secrets:" not in without


def test_compose_reads_a_file_of_secrets_if_it_exists() -> None:
    services = yaml.safe_load(render("compose", preset(PAPER), RenderOptions(secret="mine")))["services"]
    assert {json.dumps(service["env_file"]) for service in services.values()} == {
        '[{"path": "mine.env", "required": false}]'
    }
    assert "env_file" not in render("compose", preset(PAPER), RenderOptions(secret=""))


def test_variables_reach_head_and_workers_as_they_are() -> None:
    given = ("NCCL_IB_HCA=mlx5", "X=$(NODE_NAME) $HOME", "HF_HOME=/elsewhere", "X2=a=b")
    pods = pods_of(rendered(env=given))
    for name in ("ray-head", "ray-worker"):
        variables = {one["name"]: one.get("value") for one in pods[name]["containers"][0]["env"]}
        assert len(variables) == len(pods[name]["containers"][0]["env"])
        assert (variables["NCCL_IB_HCA"], variables["HF_HOME"], variables["X2"]) == ("mlx5", "/elsewhere", "a=b")
        # Kubernetes makes one dollar sign of two, and replaces $(NAME).
        assert variables["X"] == "$$(NODE_NAME) $$HOME"
    document = yaml.safe_load(render("compose", preset(PAPER), RenderOptions(env=given)))
    for service in document["services"].values():
        assert service["environment"]["X"] == "$$(NODE_NAME) $$HOME"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_variable_named_like_a_secret_is_refused(kind: str, name: str) -> None:
    for value in ("hf_" + "aB1" * 9, "EMPTY", "/some/path"):
        ended = CliRunner().invoke(app, ["render", kind, "demo-math", "--env", f"{name}={value}"])
        assert ended.exit_code == 2
        assert f"--env {name}: looks like a secret" in ended.output
        assert "--secret" in ended.output
        assert value not in ended.output


def test_a_variable_with_a_password_in_it_is_refused() -> None:
    with pytest.raises(InputError, match="--env PLACE: looks like a secret"):
        rendered("demo-math", env=("PLACE=postgres://me:sesame@host/db",))


def test_what_is_secret_here_is_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "aB1" * 9)
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 6)
    for kind in KINDS:
        machines = tuple(f"10.0.0.{i}" for i in range(1, 9)) if kind == "ray" else ()
        text = render(kind, load_config(PAPER, ["run_dir=/shared/runs"]), RenderOptions(hosts=machines))
        assert os.environ["HF_TOKEN"] not in text
        assert os.environ["WANDB_API_KEY"] not in text


# ------------------------------------------------------------------------------------------ where pods go
def test_selectors_and_resources_are_for_the_workers_with_gpus() -> None:
    text = rendered(
        cpus_per_node=32, node_selector=("gpu=h100", "x.example/zone=a"), resources=("rdma/ib=8", "a.example/b=2Gi")
    )
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster_of(text)["workerGroupSpecs"]}
    assert groups["gpu"]["nodeSelector"] == {"gpu": "h100", "x.example/zone": "a"}
    container = groups["gpu"]["containers"][0]
    for amounts in container["resources"].values():
        assert (amounts["rdma/ib"], amounts["a.example/b"], amounts["nvidia.com/gpu"]) == ("8", "2Gi", 8)
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert "LimitMEMLOCK" in header(text)
    for pod in (groups["cpu"], pods_of(text)["ray-head"]):
        assert "nodeSelector" not in pod
        assert "rdma/ib" not in pod["containers"][0]["resources"]["limits"]
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    ("resource", "locks"),
    [
        ("rdma/hca_shared_devices_a=1", True),
        ("vpc.amazonaws.com/efa=4", True),
        ("example.com/roce=1", True),
        ("ephemeral-storage=100Gi", False),
        ("hugepages-2Mi=1Gi", False),
        ("example.com/fibre=1", False),
    ],
)
def test_only_adapters_that_register_memory_get_the_right_to_lock_it(resource: str, locks: bool) -> None:
    assert ("IPC_LOCK" in rendered(resources=(resource,))) == locks


def test_without_gpus_all_workers_are_selected() -> None:
    text = rendered("demo-math", node_selector=("pool=cpu",))
    (group,) = cluster_of(text)["workerGroupSpecs"]
    assert group["template"]["spec"]["nodeSelector"] == {"pool": "cpu"}


def test_every_pod_pulls_by_the_given_secret() -> None:
    text = rendered(image_pull_secret="registry")
    for pod in pods_of(text).values():
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert '"imagePullSecrets":[{"name":"registry"}]' in header(text)


def test_a_run_that_names_its_gpus_begins_with_its_nodes() -> None:
    """The autoscaler cannot know which type of GPU a group has."""
    text = render("kubernetes", changed(PAPER, "learner.accelerator=H100"), RenderOptions())
    assert [group["replicas"] for group in cluster_of(text)["workerGroupSpecs"]] == [1]


def test_each_node_compiles_into_a_folder_of_its_own() -> None:
    for name in ("ray-head", "ray-worker"):
        variables = pods_of(rendered())[name]["containers"][0]["env"]
        # Kubernetes replaces only names that stand before.
        assert variables[0] == {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
        values = {one["name"]: one.get("value", "") for one in variables}
        for cache in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
            assert values[cache].startswith("/shared/cache/nodes/$(NODE_NAME)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": ("X",)}, "--env X: write NAME=VALUE"),
        ({"env": ("=x",)}, "--env '': write NAME=VALUE"),
        ({"env": ("A-B=x",)}, "--env A-B: no name of a variable"),
        ({"node_selector": ("gpu",)}, "--node-selector gpu: write NAME=VALUE"),
        ({"node_selector": ("gpu=a b",)}, "--node-selector gpu=a b: no label"),
        ({"resources": ("rdma/ib=many",)}, "--resource rdma/ib=many: no amount of a resource; write rdma/ib=8"),
        ({"resources": ("rdma/ib=0",)}, "--resource rdma/ib=0: no amount"),
        ({"resources": ("nvidia.com/gpu=8",)}, "--resource nvidia.com/gpu=8: nvidia.com/gpu has an option of its own"),
        ({"resources": ("memory=8Gi",)}, "--resource memory=8Gi: memory has an option of its own; use --memory"),
        ({"secret": "My Secret"}, "--secret My Secret: no name of a Secret"),
        ({"image_pull_secret": "a..b"}, "--image-pull-secret a..b: no name of a Secret"),
        ({"storage_class": "Fast NFS"}, "--storage-class Fast NFS: no storage class"),
        ({"storage_class": "nfs", "volume_claim": "team"}, "--storage-class: is for a volume that is made"),
        ({"volume_size": "5Gi", "volume_claim": "team"}, "--volume-size: is for a volume that is made"),
        ({"env": ("NODE_NAME=x",)}, "--env NODE_NAME: each pod has a variable of that name"),
        ({"resources": ("gpu=8",)}, "--resource gpu=8: no amount of a resource; write rdma/ib=8"),
        ({"hosts": ("10.0.0.1",)}, "--host: is for `ray up`, and a file for kubernetes cannot hold it"),
        ({"ssh_key": "~/.ssh/id"}, "--ssh-key: is for `ray up`"),
        ({"warn_before_s": 10}, "--warn-before: is for Slurm, and a file for kubernetes cannot hold it"),
        ({"active_deadline_s": 2**31}, "--active-deadline 2147483648: Kubernetes takes at most 2147483647 s"),
        ({"active_deadline_s": 0}, "--active-deadline 0: too few; give 1 or more"),
    ],
)
def test_a_bad_option_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        render("kubernetes", preset("demo-math"), RenderOptions(**options))
    assert len(caught.value.lines) == 1
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", ["slurm", "compose"])
@pytest.mark.parametrize(
    "options",
    [
        {"node_selector": ("a=b",)},
        {"resources": ("rdma/ib=8",)},
        {"image_pull_secret": "x"},
        {"active_deadline_s": 60},
        {"storage_class": "nfs"},
        {"namespace": "team"},
        {"volume_claim": "team"},
        {"volume_size": "5Gi"},
    ],
)
def test_what_a_file_cannot_hold_is_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"is for Kubernetes, and a file for {kind} cannot hold it"):
        render(kind, preset("demo-math"), RenderOptions(**options))


@pytest.mark.parametrize(
    ("kind", "options", "flag"),
    [
        ("slurm", {"image": "dphrl:cuda"}, "--image"),
        ("slurm", {"hosts": ("10.0.0.1",)}, "--host"),
        ("compose", {"memory_gib_per_node": 5}, "--memory-per-node"),
    ],
)
def test_what_would_have_no_effect_is_refused(kind: str, options: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=rf"^{flag}: is for .*, and a file for {kind} cannot hold it; leave it out$"):
        render(kind, preset("demo-math"), RenderOptions(**options))


@pytest.mark.parametrize("kind", ["kubernetes", "compose", "ray"])
def test_a_file_of_variables_is_for_slurm(kind: str) -> None:
    with pytest.raises(InputError, match=rf"--env-file: is for Slurm; for {kind}"):
        render(kind, preset("demo-math"), RenderOptions(env_file="x.env", hosts=("10.0.0.1",) * (kind == "ray")))


def test_the_volume_is_of_the_storage_class_that_is_named() -> None:
    text = rendered(storage_class="shared-nfs")
    assert documents(text)["PersistentVolumeClaim"]["spec"]["storageClassName"] == "shared-nfs"
    assert "of the shared-nfs storage class" in header(text)
    text = rendered()
    assert "storageClassName" not in documents(text)["PersistentVolumeClaim"]["spec"], "the cluster's default"
    assert "of the default storage class, which must offer ReadWriteMany (--storage-class names another)" in header(
        text
    )


def test_variables_of_a_slurm_job_are_those_of_its_shell() -> None:
    with pytest.raises(InputError, match="--env: Slurm gives a job the variables of sbatch's shell"):
        render("slurm", preset("demo-math"), RenderOptions(env=("A=b",)))


# ------------------------------------------------------------------------------------------ deadlines
def test_deadlines() -> None:
    spec = documents(rendered())["RayJob"]["spec"]
    assert "activeDeadlineSeconds" not in spec
    assert spec["preRunningDeadlineSeconds"] == 1800
    assert spec["entrypoint"].endswith(f"--resume --retries {spec['backoffLimit']}")
    assert documents(rendered(active_deadline_s=3600))["RayJob"]["spec"]["activeDeadlineSeconds"] == 3600
    patient = render("kubernetes", changed(PAPER, "cluster.placement_timeout_s=7200.5"), RenderOptions())
    assert documents(patient)["RayJob"]["spec"]["preRunningDeadlineSeconds"] == 7201


# ------------------------------------------------------------------------------------------ the header
def test_the_volume_is_handled_apart_from_the_run() -> None:
    found = documents(rendered())
    by_component = {
        kind: document["metadata"]["labels"]["app.kubernetes.io/component"] for kind, document in found.items()
    }
    assert by_component == {"ConfigMap": "run", "PersistentVolumeClaim": "volume", "RayJob": "run"}
    for options, claims in (({}, True), ({"volume_claim": "team"}, False)):
        told = header(rendered(namespace="research", **options))
        assert "kubectl create -n research -f FILE -l app.kubernetes.io/component=run" in told
        assert "kubectl delete -n research -f FILE -l app.kubernetes.io/component=run" in told
        assert ("component=volume" in told) == claims
        assert "fsGroup has no effect on NFS" in told
        assert "user 10001" in told


KUBECTL = """#!/bin/bash
# Stands in for kubectl: notes what it is asked, and runs `exec` here, below a folder in the place of /shared.
printf '%s\\n' "$*" >>"$LOG"
if [ "$1" = exec ]; then
    while [ "$1" != -- ]; do shift; done
    shift
    words=()
    for word in "$@"; do words+=("${word//\\/shared/$SHARED}"); done
    exec "${words[@]}"
fi
"""


def test_the_commands_that_copy_data_work(tmp_path: Path) -> None:
    text = rendered(image="registry.example/dphrl:cuda", volume_claim="team")
    lines = header(text).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Data:"))
    commands = [line.strip() for line in lines[first + 1 : first + 5]]
    data, shared = tmp_path / "here", tmp_path / "there"
    (data / "bird" / "dev").mkdir(parents=True)
    (data / "bird" / "dev" / "dev.json").write_text("[]")
    shared.mkdir()
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DPHRL_DATA": str(data),
        "SHARED": str(shared),
        "LOG": str(tmp_path / "log"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (shared / "data" / "bird" / "dev" / "dev.json").read_text() == "[]"
    asked = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["run", "wait", "exec", "delete"]
    (overrides,) = (word for word in shlex.split(commands[0]) if word.startswith("--overrides="))
    pod = json.loads(overrides.removeprefix("--overrides="))
    jsonschema.validate(pod, schema_of("Pod"))
    assert pod["spec"]["volumes"][0] == {"name": "shared", "persistentVolumeClaim": {"claimName": "team"}}
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    assert pod["spec"]["containers"][0]["image"] == "registry.example/dphrl:cuda"


def test_a_run_without_data_says_nothing_of_data() -> None:
    assert "Data:" not in header(rendered("demo-math"))


def test_every_line_of_the_header_is_a_comment() -> None:
    text = render("kubernetes", changed("demo-math", AWKWARD), RenderOptions(command="dphrl render x\ny"))
    assert next(line for line in text.splitlines() if not line.startswith("#")) == "apiVersion: v1"


def test_the_rendered_configuration_is_one(tmp_path: Path) -> None:
    text = documents(rendered())["ConfigMap"]["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load_config(str(tmp_path / "config.yaml"), []).cluster.autoscaling == "gpu"
