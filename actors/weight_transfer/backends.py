"""Which way weights take to the engines: by the configuration, or by what the machine has."""

from __future__ import annotations

from typing import Literal

from dphrl.config.loading import InputError
from dphrl.config.runtime import SyncConfig
from dphrl.config.schema import Config

Backend = Literal["object_store", "nccl", "ipc"]


def choose_backend(config: Config, *, with_gpus: bool) -> Backend:
    """The backend that `config` names, or for `auto` the one that suits the plan.

    with_gpus: whether learner and engines run on GPUs. Raises InputError, with the reason, for a backend that cannot
    work there.
    """
    colocated = with_gpus and config.cluster.colocate
    asked = config.sync.backend
    suits: Backend = "object_store" if not with_gpus else "ipc" if colocated else "nccl"
    backend: Backend = suits if asked == "auto" else asked
    if backend != "object_store" and not with_gpus:
        raise InputError(
            f"sync.backend: {backend} moves weights between GPUs, and this run has none; set sync.backend=object_store "
            "(or auto)"
        )
    if backend == "nccl" and colocated:
        raise InputError(
            "sync.backend: nccl cannot join two processes on one GPU, and with cluster.colocate engines run on the "
            "learner's; set sync.backend=ipc (or auto), or cluster.colocate=false"
        )
    if backend == "ipc" and not colocated:
        raise InputError(
            "sync.backend: ipc hands weights over within a GPU, so every GPU of an engine must have a learner rank, "
            "and these have none; set sync.backend=nccl (or auto), or cluster.colocate=true"
        )
    return backend


def with_backend(config: Config, *, with_gpus: bool) -> Config:
    """The configuration with the chosen backend instead of `auto`: see `choose_backend`."""
    backend = choose_backend(config, with_gpus=with_gpus)
    return config.model_copy(update={"sync": config.sync.model_copy(update={"backend": backend})})


def engine_backend(sync: SyncConfig) -> Backend:
    """What an engine is started for. Whoever starts a whole system has resolved `auto` before."""
    return "object_store" if sync.backend == "auto" else sync.backend
