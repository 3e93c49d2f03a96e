"""Files that start a run on somebody's cluster: Kubernetes, Slurm, Docker Compose, machines that one reaches by SSH.

Pure: text in, text out. `render` is the front; each kind has its module. What they share is here: the options, the
size and number of nodes, and how YAML is written.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import yaml

from cluster.planning.placement import EPSILON, Node, PlacementError, num_nodes_needed, plan_bundles
from cluster.planning.sizes import CPUS_PER_GPU
from dphrl.config.loading import InputError
from dphrl.config.schema import Config

KINDS = ("kubernetes", "slurm", "compose", "ray")
# The user that the images make. It is a number, because Kubernetes can see only of a number that it is not root.
USER_ID = 10001
HOME = "/home/dphrl"
CONFIG_PATH = "/etc/dphrl/config.yaml"
RAY_PORT = 6379
DASHBOARD_PORT = 8265
# Where every Ray node answers whether it is well, without a token. Ray's default, stated because probes rely on it.
HEALTH_PORT, HEALTH_PATH = 52365, "/api/healthz"
# What nodes commonly have, used where the options say nothing: GPUs, and cores without GPUs.
GPUS_PER_NODE, CPUS_PER_NODE = 8, 8
# The longest name of a RayJob; KubeRay refuses longer ones.
MAX_NAME_CHARS = 47
# The Secret of Kubernetes, and the file NAME.env of Compose, in which a run looks for its tokens.
SECRET = "dphrl"
# The variable of Kubernetes' pods with the name of their node.
NODE_NAME = "NODE_NAME"
# The longest time before the end at which Slurm sends a signal.
MAX_WARNING_S = 65535


@dataclass(frozen=True)
class RenderOptions:
    """What a configuration does not say about the place where it runs. None and "" leave the choice to this package."""

    # Container image. "": dphrl:cuda where nodes have GPUs, else dphrl:cpu (docker/*.Dockerfile build them).
    image: str = ""
    # GPUs of one node. None: as many as the run takes, at most 8, for a model in bfloat16 (on CPUs that is emulated),
    # else 0. Compose: GPUs of one worker; None: half of what the run takes.
    gpus_per_node: int | None = None
    # CPUs of one node that Ray may use. On Kubernetes leave a few of the machine's to the system: a pod that asks for
    # all of them is never scheduled. None: 10 a GPU, or 8. Compose: of one worker; None: just enough.
    cpus_per_node: int | None = None
    # Memory of one node, object store and /dev/shm included. None: what `dphrl plan` says; Slurm: all that it has. Not
    # for Compose.
    memory_gib_per_node: int | None = None
    # How far the cluster may grow, in nodes. None: to what the run needs. A run that needs more is refused.
    max_nodes: int | None = None
    # Kubernetes namespace. "": that of whoever creates the objects.
    namespace: str = ""
    # An existing claim for the shared volume. "": one is made along with the run.
    volume_claim: str = ""
    # Size of the claim that is made. "": what `dphrl plan` says.
    volume_size: str = ""
    # Its storage class, which must offer ReadWriteMany. "": the cluster's default, which often does not.
    storage_class: str = ""
    # A Secret whose keys the pods have as variables, if it exists; Compose: the file NAME.env. "": none.
    secret: str = SECRET
    # Variables of the run's processes, each as NAME=VALUE. They are no secrets: the file holds them.
    env: tuple[str, ...] = ()
    # Kubernetes: labels, as NAME=VALUE, of the nodes for the workers with GPUs, or for all workers of a run without.
    node_selector: tuple[str, ...] = ()
    # Kubernetes: what each of these pods asks for besides, as NAME=AMOUNT.
    resources: tuple[str, ...] = ()
    # Kubernetes: the Secret by which images are pulled.
    image_pull_secret: str = ""
    # Kubernetes: seconds after which the job is ended, whatever it does. None: never.
    active_deadline_s: int | None = None
    # Slurm: a file of NAME=VALUE lines that the script reads when it starts, if it is there. "": none.
    env_file: str = ""
    # Slurm: how long before the time limit the run is told to save and end, in seconds.
    warn_before_s: int = 300
    # Machines for `ray up`, the head first.
    hosts: tuple[str, ...] = ()
    # Who logs in on them, and the private key, as a path on the machine where `ray up` runs. "": SSH's own choice.
    ssh_user: str = "ubuntu"
    ssh_key: str = ""
    # The command that asks for this file, for its header.
    command: str = ""


@dataclass(frozen=True)
class Nodes:
    """Equal machines that hold a run."""

    shape: Node
    count: int

    @property
    def cpus(self) -> int:
        """CPUs of one node."""
        return int(self.shape.num_cpus)

    @property
    def gpus(self) -> int:
        """GPUs of one node."""
        return int(self.shape.num_gpus)

    def __str__(self) -> str:
        return f"{_count(self.count, 'node')} of {self.each}"

    @property
    def each(self) -> str:
        """What one node has, in words."""
        gpus = f"{_count(self.gpus, 'GPU')} and " if self.gpus else ""
        return f"{gpus}{_count(self.cpus, 'CPU')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def render(kind: str, config: Config, options: RenderOptions) -> str:
    """The file of a kind, one of KINDS. The same arguments give the same text.

    Raises InputError, one line, for an option that is not valid, or nodes that cannot hold the run.
    """
    if kind not in KINDS:
        raise InputError(f"{kind}: nothing renders that; choose one of {', '.join(KINDS)}")
    # Imported here, not at the top, because these modules import this one.
    from cluster.render.options import check_options

    check_options(kind, options)
    module = import_module(f"cluster.render.{'launcher' if kind == 'ray' else kind}")
    renderer: Callable[[Config, RenderOptions], str] = getattr(module, f"render_{kind}")
    return renderer(config, options)


def wanted_gpus(config: Config) -> int:
    """How many GPUs the run takes where nothing else is said: none for a model that is not in bfloat16."""
    if config.model.dtype != "bfloat16":
        return 0
    return math.ceil(sum(bundle.num_gpus for bundle in plan_bundles(config, with_gpus=True)) - EPSILON)


def node_shape(config: Config, options: RenderOptions) -> Node:
    """What one node has, by the options or by what nodes commonly have."""
    gpus = options.gpus_per_node
    if gpus is None:
        gpus = min(GPUS_PER_NODE, wanted_gpus(config))
    cpus = options.cpus_per_node or max(CPUS_PER_NODE, CPUS_PER_GPU * gpus)
    return Node("node", float(cpus), float(gpus))


def nodes_for(config: Config, options: RenderOptions, shape: Node, *, at_least: int = 1) -> Nodes:
    """As many nodes of this shape as the run needs. Raises InputError when it needs more than are allowed, or when no
    number of them holds the run."""
    try:
        nodes = Nodes(shape, max(at_least, num_nodes_needed(config, shape)))
    except PlacementError as error:
        raise InputError(f"{flags_of(shape)}: this run {error}; give larger nodes, or lower its counts") from None
    check_max_nodes(nodes, options)
    return nodes


def check_max_nodes(nodes: Nodes, options: RenderOptions) -> None:
    """Raises InputError when the run needs more nodes than it may have."""
    if options.max_nodes is not None and nodes.count > options.max_nodes:
        raise InputError(f"--max-nodes {options.max_nodes}: this run needs {nodes}; allow as many, or larger nodes")


def flags_of(shape: Node) -> str:
    """The shape as options of the command line."""
    return f"--gpus-per-node {shape.num_gpus:g} --cpus-per-node {shape.num_cpus:g}"


def image_for(options: RenderOptions, shape: Node) -> str:
    """The container image: the one given, else that for nodes with or without GPUs."""
    return options.image or ("dphrl:cuda" if shape.num_gpus else "dphrl:cpu")


# ------------------------------------------------------------------------------------------ text
class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, and nothing as an alias, because people read and edit the file."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def to_yaml(documents: Sequence[Mapping[str, Any]], header: Sequence[str]) -> str:
    """YAML documents below comment lines."""
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return f"{as_comments(header)}\n{text}"


def as_comments(lines: Sequence[str]) -> str:
    """The lines as comments of YAML or a shell script."""
    return "\n".join(f"# {line}".rstrip() for line in lines)


def made_by(options: RenderOptions) -> list[str]:
    """The header's line about where the file comes from, where that is known."""
    # A line break in an override must not end the comment.
    return [f"Made by:  {' '.join(options.command.split())}"] if options.command else []


def object_name(run_name: str) -> str:
    """A name that Kubernetes, Slurm and Compose all accept."""
    name = re.sub(r"[^a-z0-9]+", "-", f"dphrl-{run_name.lower()}").strip("-")
    if len(name) > MAX_NAME_CHARS:
        # The checksum keeps apart runs whose names differ only near the end.
        name = f"{name[: MAX_NAME_CHARS - 9].rstrip('-')}-{zlib.crc32(run_name.encode()):08x}"
    return name


def with_settings(config: Config, run_dir: str, **cluster: Any) -> Config:
    """The configuration with another run_dir and other settings of `cluster`."""
    changed = config.cluster.model_copy(update={"address": "auto", **cluster})
    return config.model_copy(update={"run_dir": run_dir, "cluster": changed})
