"""A small Ray cluster on one machine with Docker Compose: a head, workers, and the run as a node without resources.

It is for trying out a run on several nodes with only one machine. GPUs are divided among the workers by their numbers.
"""

from __future__ import annotations

import math
from typing import Any

from cluster.planning.memory import GIB, dtype_on
from cluster.planning.placement import Bundle, Node, PlacementError, plan_bundles, plan_placement
from cluster.planning.shapes import model_shape
from cluster.planning.sizes import node_size, object_store_gib, shared_beside
from cluster.render.missing import code_lines, needs_data, path_lines
from cluster.render.nodes import (
    DASHBOARD_PORT,
    HEALTH_PATH,
    HEALTH_PORT,
    HOME,
    RAY_PORT,
    USER_ID,
    Nodes,
    RenderOptions,
    check_max_nodes,
    image_for,
    made_by,
    nodes_for,
    object_name,
    to_yaml,
    wanted_gpus,
    with_settings,
)
from cluster.render.options import pairs
from dphrl.config.loading import config_to_yaml
from dphrl.config.schema import Config

MIN_WORKERS = 2
# The images have this folder, owned by their user, which a new volume inherits.
RUN_DIR = "/app/runs"
CACHE = f"{RUN_DIR}/.cache"
DATA_DIR = "/data"
# The configuration comes as a variable, and is written where the run reads it.
CONFIG, CONFIG_PATH = "DPHRL_RUN_CONFIG", f"{HOME}/config.yaml"
# Nothing else of a container's file system can be written. Both are in memory: Ray's sockets, logs and what it spills,
# and what programs keep at home. Docker's own choice for such a folder is noexec, with which compiled kernels could
# not be loaded.
WRITABLE = ("/tmp:exec,mode=1777", f"{HOME}:exec,mode=0700,uid={USER_ID},gid={USER_ID}")
# The object store of a node that holds no part of a run, and the largest one of a worker if the configuration gives no
# size: all nodes share one machine.
IDLE_STORE_GIB, MAX_STORE_GIB = 1, 32
HEALTH_CHECK = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{HEALTH_PORT}{HEALTH_PATH}', timeout=5)"


def render_compose(config: Config, options: RenderOptions) -> str:
    """The services of a run as YAML. Raises InputError when the workers cannot hold it."""
    workers = _workers(config, options)
    image = image_for(options, workers.shape)
    settings = config_to_yaml(with_settings(config, RUN_DIR, autoscaling="none"))
    with_data = needs_data(config, DATA_DIR)
    common = _common(image, options, with_data)
    store = _store_gib(config, workers)
    services = {"head": _head(common)}
    for i in range(workers.count):
        services[f"worker-{i + 1}"] = _worker(common, workers, i, store)
    services["train"] = _train(common, list(services), settings)
    document = {
        "name": object_name(config.run_name),
        "services": services,
        "volumes": {"runs": {}},
    }
    return to_yaml([document], _header(config, options, workers, image, with_data))


def _workers(config: Config, options: RenderOptions) -> Nodes:
    """At least two workers, so that something passes between nodes. Where the options say nothing, a worker is just
    large enough for two of them to hold the run."""
    gpus = options.gpus_per_node
    needed = wanted_gpus(config)
    # Each worker gets half of the GPUs, or more if the actors cannot be divided that way.
    guesses = [gpus] if gpus is not None else range(math.ceil(needed / MIN_WORKERS), needed + 1)
    given = options.cpus_per_node
    # CPUs are the same with and without GPUs.
    bundles = plan_bundles(config, with_gpus=True)
    total = math.ceil(sum(bundle.num_cpus for bundle in bundles))
    for guess in guesses:
        for cpus in [given] if given else range(1, total + 1):
            shape = Node("worker", float(cpus), float(guess))
            if _two_hold(config, shape):
                workers = Nodes(shape, MIN_WORKERS)
                check_max_nodes(workers, options)
                return workers
    shape = Node("worker", float(given or total), float(guesses[-1]))
    return nodes_for(config, options, shape, at_least=MIN_WORKERS)


def _two_hold(config: Config, shape: Node) -> bool:
    try:
        plan_placement(config, [Node(f"worker-{i}", shape.num_cpus, shape.num_gpus) for i in range(MIN_WORKERS)])
    except PlacementError:
        return False
    return True


def _store_gib(config: Config, workers: Nodes) -> int:
    """The object store of the fullest worker. Without a model's sizes, weights on their way have no part in it."""
    shape = model_shape(config.model.path, trust_remote_code=config.model.trust_remote_code)
    dtype = dtype_on(config, with_gpus=workers.gpus > 0)
    shapes = [Node(f"worker-{i}", workers.shape.num_cpus, workers.shape.num_gpus) for i in range(workers.count)]
    on_node: dict[str, list[Bundle]] = {}
    for bundle in plan_placement(config, shapes):
        on_node.setdefault(bundle.node, []).append(bundle)
    planned = [node_size(config, shape, dtype, on, workers.gpus).store_gib for on in on_node.values()] if shape else []
    store = max(planned, default=object_store_gib(config, 0.0))
    return store if config.cluster.object_store_gib else min(MAX_STORE_GIB, store)


# ------------------------------------------------------------------------------------------ services
def _common(image: str, options: RenderOptions, with_data: bool) -> dict[str, Any]:
    environment = {
        "RAY_AUTH_MODE": "token",
        # Compose cannot put a secret, nor a configuration that stands in the file, into a read-only container.
        "RAY_AUTH_TOKEN": "${RAY_AUTH_TOKEN:?export it first}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        # The caches lie beside the runs, where every container finds what another one has made.
        "HF_HOME": f"{CACHE}/huggingface",
        "DPHRL_CACHE": f"{CACHE}/dphrl",
        "XDG_CACHE_HOME": CACHE,
        "TRITON_CACHE_DIR": f"{CACHE}/triton",
        # Compose replaces $NAME itself, so each dollar sign is written twice.
        **{name: value.replace("$", "$$") for name, value in pairs("--env", options.env)},
    }
    volumes: list[dict[str, Any]] = [{"type": "volume", "source": "runs", "target": RUN_DIR}]
    if with_data:
        environment["DPHRL_DATA"] = DATA_DIR
        source = "${DPHRL_DATA:?the folder of the data}"
        volumes.append({"type": "bind", "source": source, "target": DATA_DIR, "read_only": True})
    return {
        "image": image,
        "init": True,
        **_secrets(options),
        "read_only": True,
        "tmpfs": list(WRITABLE),
        "environment": environment,
        "volumes": volumes,
    }


def _secrets(options: RenderOptions) -> dict[str, Any]:
    """A file beside this one with what is secret. It is optional: a run with a free model needs none."""
    return {"env_file": [{"path": f"{options.secret}.env", "required": False}]} if options.secret else {}


def _head(common: dict[str, Any]) -> dict[str, Any]:
    arguments = ["--head", f"--port={RAY_PORT}", "--dashboard-host=0.0.0.0", "--num-cpus=0", "--num-gpus=0"]
    check = ["CMD", "ray", "health-check", "--address", f"head:{RAY_PORT}"]
    return {
        **_ray_node(common, arguments, IDLE_STORE_GIB, 0),
        # The dashboard can be reached from this machine only.
        "ports": [f"127.0.0.1:{DASHBOARD_PORT}:{DASHBOARD_PORT}"],
        "healthcheck": _health(check),
    }


def _worker(common: dict[str, Any], workers: Nodes, index: int, store: int) -> dict[str, Any]:
    address = f"--address=head:{RAY_PORT}"
    arguments = [address, f"--num-cpus={workers.cpus}", f"--num-gpus={workers.gpus}"]
    service = _ray_node(common, arguments, store, workers.gpus)
    service["depends_on"] = {"head": {"condition": "service_healthy"}}
    # This asks whether this node is well; `ray health-check` would ask about the head.
    service["healthcheck"] = _health(["CMD", "python3", "-c", HEALTH_CHECK])
    if workers.gpus:
        mine = range(index * workers.gpus, (index + 1) * workers.gpus)
        # The GPUs are given by number, because `count` would give every worker the same ones.
        device = {"driver": "nvidia", "device_ids": [str(i) for i in mine], "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _train(common: dict[str, Any], others: list[str], settings: str) -> dict[str, Any]:
    """The driver. Ray wants it on a node of the cluster, so its container joins as a node without resources."""
    write = f'printf %s "$${CONFIG}" >{CONFIG_PATH}; unset {CONFIG}'
    join = f"ray start --address=head:{RAY_PORT} --num-cpus=0 --num-gpus=0 {_store_flag(IDLE_STORE_GIB)}"
    # Compose replaces $NAME itself, so each of our dollar signs is written twice.
    own = {"RAY_ADDRESS": f"head:{RAY_PORT}", CONFIG: settings.replace("$", "$$")}
    environment = {**common["environment"], **own}
    return {
        **common,
        "environment": environment,
        # RAY_ADDRESS is meant for the driver; `ray start` gets its address as an option.
        "entrypoint": ["bash", "-ec", f'{write}; env -u RAY_ADDRESS {join} >/dev/null; exec dphrl "$$@"', "dphrl"],
        "command": ["train", CONFIG_PATH],
        "shm_size": f"{_shared_gib(IDLE_STORE_GIB, 0)}g",
        "depends_on": {name: {"condition": "service_healthy"} for name in others},
    }


def _ray_node(common: dict[str, Any], arguments: list[str], store: int, gpus: int) -> dict[str, Any]:
    return {
        **common,
        "entrypoint": ["ray", "start"],
        "command": ["--block", *arguments, _store_flag(store)],
        "shm_size": f"{_shared_gib(store, gpus)}g",
    }


def _shared_gib(store: int, gpus: int) -> int:
    return store + math.ceil(shared_beside(gpus) / GIB)


def _store_flag(store: int) -> str:
    return f"--object-store-memory={store * 2**30}"


def _health(test: list[str]) -> dict[str, Any]:
    return {"test": test, "interval": "10s", "timeout": "15s", "retries": 12, "start_period": "30s"}


def _header(config: Config, options: RenderOptions, workers: Nodes, image: str, with_data: bool) -> list[str]:
    needs = path_lines(config, DATA_DIR)
    if with_data:
        needs.append("Data:     DPHRL_DATA names the folder on this machine")
    kept = (
        [f"Secrets:  {options.secret}.env beside this file, if it is there: HF_TOKEN=..., WANDB_API_KEY=..."]
        if options.secret
        else []
    )
    return [
        f"Run {config.run_name} with Docker Compose (2.24 or newer).",
        f"Cluster:  a head and {workers.count} workers of {workers.each}",
        *made_by(options),
        f"Image:    {image}; docker/cpu.Dockerfile and docker/cuda.Dockerfile say how to build theirs",
        *code_lines(config, image),
        *needs,
        *kept,
        "Start:    export RAY_AUTH_TOKEN=$(openssl rand -hex 32)",
        "          docker compose -f FILE up --exit-code-from train",
        f"Go on:    docker compose -f FILE run --rm train train {CONFIG_PATH} --resume",
        f"Results:  docker compose -f FILE cp train:{RUN_DIR}/{config.run_name} .   (they stay in the volume `runs`)",
        "Clean up: docker compose -f FILE down   (-v deletes the volume too)",
    ]
