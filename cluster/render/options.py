"""What may be said to `dphrl render`, checked: one line for what is wrong, before anything is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cluster.render.nodes import MAX_WARNING_S, NODE_NAME, RenderOptions
from dphrl.config.loading import InputError
from dphrl.config.secrets import is_secret_variable, names_a_secret

# Names of Kubernetes objects: of most, and of those that may have dots.
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$){_DNS_LABEL.pattern}(\.{_DNS_LABEL.pattern})*")
# Names of labels and of resources: a domain may come first.
_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
# Of resources only the standard ones have no domain.
_RESOURCE = re.compile(rf"(?=.*/){_KEY.pattern}|ephemeral-storage|hugepages-[0-9]+[KMG]i")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_SIZE = re.compile(r"[1-9][0-9]*(Mi|Gi|Ti|Pi|M|G|T|P)")
_AMOUNT = re.compile(rf"[1-9][0-9]*|{_SIZE.pattern}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the options of these sizes are for.
_SIZED = {
    "cpu": "--cpus-per-node",
    "memory": "--memory-per-node",
    "nvidia.com/gpu": "--gpus-per-node",
}

_NAMES = {"kubernetes": "Kubernetes", "slurm": "Slurm", "compose": "Compose", "ray": "`ray up`"}
# Kubernetes keeps deadlines in 32 bits.
_MAX_DEADLINE_S = 2**31 - 1


def check_options(kind: str, options: RenderOptions) -> None:
    """Raises InputError for a value that is wrong in every kind of file, and for an option that this kind cannot
    follow."""
    for flag, number, least in (
        ("--gpus-per-node", options.gpus_per_node, 0),
        ("--cpus-per-node", options.cpus_per_node, 1),
        ("--memory-per-node", options.memory_gib_per_node, 1),
        ("--max-nodes", options.max_nodes, 1),
        ("--active-deadline", options.active_deadline_s, 1),
    ):
        if number is not None and number < least:
            raise InputError(f"{flag} {number}: too few; give {least} or more")
    if options.active_deadline_s is not None and options.active_deadline_s > _MAX_DEADLINE_S:
        raise InputError(f"--active-deadline {options.active_deadline_s}: Kubernetes takes at most {_MAX_DEADLINE_S} s")
    if not 2 <= options.warn_before_s <= MAX_WARNING_S:
        raise InputError(
            f"--warn-before {options.warn_before_s}: no time that Slurm takes; give 2 to {MAX_WARNING_S} s"
        )
    _check_names(options)
    if options.image and (options.image != options.image.strip() or re.search(r"\s", options.image)):
        raise InputError(f"--image {options.image!r}: has blanks; give one image, such as dphrl:cuda")
    if options.volume_size and not _SIZE.fullmatch(options.volume_size):
        raise InputError(f"--volume-size {options.volume_size}: no size; write 200Gi or 2Ti")
    for flag, given in (("--storage-class", options.storage_class), ("--volume-size", options.volume_size)):
        if given and options.volume_claim:
            raise InputError(f"{flag}: is for a volume that is made; --volume-claim names one that exists")
    _check_variables(options)
    for name, value in pairs("--node-selector", options.node_selector):
        if not (_KEY.fullmatch(name) and _LABEL_VALUE.fullmatch(value)):
            raise InputError(f"--node-selector {name}={value}: no label; `kubectl get nodes --show-labels` lists them")
    for name, value in pairs("--resource", options.resources):
        if name in _SIZED:
            raise InputError(f"--resource {name}={value}: {name} has an option of its own; use {_SIZED[name]}")
        if not (_RESOURCE.fullmatch(name) and _AMOUNT.fullmatch(value)):
            raise InputError(f"--resource {name}={value}: no amount of a resource; write rdma/ib=8")
    _check_kind(kind, options)


def pairs(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values of an option that is given as NAME=VALUE; of a name given twice, the last. Raises InputError."""
    found: dict[str, str] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not (name and given):
            raise InputError(f"{flag} {name or repr(name)}: write NAME=VALUE")
        found[name] = value
    return list(found.items())


def _check_names(options: RenderOptions) -> None:
    for flag, name in (("--namespace", options.namespace), ("--volume-claim", options.volume_claim)):
        if name and not _DNS_LABEL.fullmatch(name):
            raise InputError(
                f"{flag} {name}: no name for a Kubernetes object; use at most 63 lower-case letters, digits and hyphens"
            )
    if options.storage_class and not _DNS_NAME.fullmatch(options.storage_class):
        raise InputError(
            f"--storage-class {options.storage_class}: no storage class; `kubectl get storageclass` lists them"
        )
    for flag, name in (("--secret", options.secret), ("--image-pull-secret", options.image_pull_secret)):
        if name and not _DNS_NAME.fullmatch(name):
            raise InputError(
                f"{flag} {name}: no name of a Secret; use lower-case letters, digits, hyphens and dots, and put what "
                "is secret into the Secret itself"
            )


def _check_variables(options: RenderOptions) -> None:
    for name, value in pairs("--env", options.env):
        if not _VARIABLE.fullmatch(name):
            raise InputError(f"--env {name}: no name of a variable; use letters, digits and _")
        if name == NODE_NAME:
            raise InputError(f"--env {name}: each pod has a variable of that name; choose another")
        if names_a_secret(name) or is_secret_variable(name, value):
            where = options.secret or "dphrl"
            raise InputError(
                f"--env {name}: looks like a secret, and everybody who has the file reads it; put it into the Secret "
                f"(Compose: the file {where}.env) that --secret names, {where}"
            )


def _check_kind(kind: str, options: RenderOptions) -> None:
    """What would have no effect is refused, so that nobody relies on it."""
    for flag, given, kinds in (
        ("--node-selector", options.node_selector, ("kubernetes",)),
        ("--resource", options.resources, ("kubernetes",)),
        ("--image-pull-secret", options.image_pull_secret, ("kubernetes",)),
        ("--active-deadline", options.active_deadline_s, ("kubernetes",)),
        ("--namespace", options.namespace, ("kubernetes",)),
        ("--volume-claim", options.volume_claim, ("kubernetes",)),
        ("--volume-size", options.volume_size, ("kubernetes",)),
        ("--storage-class", options.storage_class, ("kubernetes",)),
        ("--memory-per-node", options.memory_gib_per_node, ("kubernetes", "slurm")),
        ("--image", options.image, ("kubernetes", "compose", "ray")),
        ("--warn-before", options.warn_before_s != RenderOptions.warn_before_s, ("slurm",)),
        ("--host", options.hosts, ("ray",)),
        ("--ssh-key", options.ssh_key, ("ray",)),
    ):
        if given and kind not in kinds:
            raise InputError(
                f"{flag}: is for {' and '.join(map(_NAMES.__getitem__, kinds))}, and a file for {kind} cannot hold it; "
                "leave it out"
            )
    if options.env and kind == "slurm":
        raise InputError(
            "--env: Slurm gives a job the variables of sbatch's shell, and of --env-file; put them there instead"
        )
    if options.env_file and kind != "slurm":
        raise InputError(f"--env-file: is for Slurm; for {kind} put what is secret where --secret says")
