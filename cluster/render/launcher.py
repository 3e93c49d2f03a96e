"""A Ray cluster on machines that one reaches by SSH: a file for Ray's own cluster launcher, `ray up`.

The launcher's `local` provider: it logs in on each machine, runs the commands below, and leaves a Ray cluster there.
The first machine is the head, and works too. The configuration is written on it, so that `ray exec` can start the run.
No secret is in the file: Ray's token is copied from the machine where `ray up` runs, and others are variables of the
login shells of the machines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from cluster.render.nodes import (
    RAY_PORT,
    Nodes,
    RenderOptions,
    made_by,
    node_shape,
    nodes_for,
    object_name,
    to_yaml,
    with_settings,
)
from dphrl.config.loading import InputError, config_to_yaml
from dphrl.config.schema import Config

TOKEN = "~/.ray/auth_token"
# Of the login shells, handed on into a container where they are set.
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD")
# The launcher sets both for every command it runs, and processes of the cluster would inherit them.
CLEAN = "unset OMP_NUM_THREADS PYTHONWARNINGS"
LIMITS = "ulimit -n $(ulimit -Hn)"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_-]*", re.IGNORECASE)


def render_ray(config: Config, options: RenderOptions) -> str:
    """The file for `ray up`. Raises InputError for machines that do not hold the run, or a relative run_dir."""
    nodes = _machines(config, options)
    head, *workers = options.hosts
    name = object_name(config.run_name)
    # The address is the head's as the machines see it: a run that starts there must join this cluster, not make one.
    settings = with_settings(config, config.run_dir, autoscaling="none", address=f"{head}:{RAY_PORT}")
    path = f"~/.dphrl/{name}.yaml"
    document: dict[str, Any] = {
        "cluster_name": name,
        "provider": {"type": "local", "head_ip": head, "worker_ips": workers},
        "auth": {"ssh_user": options.ssh_user} | ({"ssh_private_key": options.ssh_key} if options.ssh_key else {}),
        "file_mounts": {TOKEN: TOKEN},
        **({"docker": _docker(config, options)} if options.image else {}),
        "head_setup_commands": [_written(path, config_to_yaml(settings))],
        "head_start_ray_commands": _start(
            config,
            options,
            [f"--head --port={RAY_PORT}", "--autoscaling-config=~/ray_bootstrap_config.yaml"],
        ),
        "worker_start_ray_commands": _start(config, options, [f"--address=$RAY_HEAD_IP:{RAY_PORT}"]),
    }
    return to_yaml([document], _header(config, options, nodes, path))


def _machines(config: Config, options: RenderOptions) -> Nodes:
    if not options.hosts:
        raise InputError("--host: no machine; name each, the head first: --host 10.0.0.1 --host 10.0.0.2")
    for host in options.hosts:
        if not _HOST.fullmatch(host):
            raise InputError(f"--host {host}: no address; give a name or an IP address, without user or port")
        if options.hosts.count(host) > 1:
            raise InputError(f"--host {host}: is there twice; name each machine once")
    if not _USER.fullmatch(options.ssh_user):
        raise InputError(f"--ssh-user {options.ssh_user}: no name of a user; give the one to log in as")
    if not config.run_dir.startswith("/"):
        raise InputError(
            f"run_dir {config.run_dir}: is relative, and every machine must see it; give run_dir=/a/shared/folder"
        )
    nodes = nodes_for(config, options, node_shape(config, options))
    if len(options.hosts) < nodes.count:
        raise InputError(f"--host: {len(options.hosts)} given; this run needs {nodes}; name as many, or larger ones")
    return nodes


def _docker(config: Config, options: RenderOptions) -> dict[str, Any]:
    return {
        "image": options.image,
        "container_name": "dphrl_ray",
        "pull_before_run": False,
        # A variable without a value is taken from the shell that calls docker, and left out where it is not set.
        "run_options": [
            *("--ulimit nofile=65536:65536", f"-v {shlex.quote(config.run_dir)}:{shlex.quote(config.run_dir)}"),
            *(f"-e {name}" for name in SECRETS),
        ],
    }


def _written(path: str, text: str) -> str:
    """A command that writes the text on the machine."""
    folder = path.rpartition("/")[0]
    # No line of the YAML is the delimiter: each begins with a key, a dash or a blank. The launcher puts brackets around
    # a command, so the delimiter needs a line of its own.
    return f"mkdir -p {folder} && cat > {path} <<'END_OF_CONFIG'\n{text.rstrip()}\nEND_OF_CONFIG\n"


def _start(config: Config, options: RenderOptions, how: Sequence[str]) -> list[str]:
    words = [*how, "--disable-usage-stats"]
    # What is not said here Ray finds out on each machine.
    for flag, number in (("--num-gpus", options.gpus_per_node), ("--num-cpus", options.cpus_per_node)):
        words += [] if number is None else [f"{flag}={number}"]
    if store := config.cluster.object_store_gib:
        words.append(f"--object-store-memory={round(store * 2**30)}")
    variables = "RAY_AUTH_MODE=token RAY_worker_niceness=0"
    return ["ray stop", f"{CLEAN}; {LIMITS}; {variables} ray start {' '.join(words)}"]


def _header(config: Config, options: RenderOptions, nodes: Nodes, path: str) -> list[str]:
    return [
        f"Run {config.run_name} on machines by SSH: {len(options.hosts)} of them, of which it needs {nodes}.",
        *made_by(options),
        "Needs:    Ray here; there SSH for this user with one key, and the same Ray and dphrl on PATH of a login shell",
        "          (or --image and docker); run_dir below, which all of them see",
        f"Token:    ray get-auth-token --generate   (once, here; it is copied from {TOKEN})",
        f"Secrets:  {', '.join(SECRETS[:2])} in the login shell of each machine; none is in this file",
        "Start:    ray up FILE",
        f"          ray exec FILE --tmux 'RAY_AUTH_MODE=token dphrl train {path} --resume'",
        "Watch:    ray attach FILE --tmux",
        f"Results:  {config.run_dir}/{config.run_name}",
        "End:      ray down FILE",
    ]
