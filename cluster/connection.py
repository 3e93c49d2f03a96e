"""How a run comes to its Ray: the cluster that is named, or one that starts on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from cluster.address import is_dashboard, joined_cluster
from cluster.doctor.ray_setup import token_obstacle
from cluster.planning.queue import JOB_CONFIG_ENVIRONMENT
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.own_code import is_hidden_from_workers, worker_hook
from dphrl.processors import be_a_neighbour, whole_cpus
from dphrl.tracking.log import ENVIRONMENT as LOG_ENVIRONMENT


def connect(config: Config) -> None:
    """Join the cluster that the config or RAY_ADDRESS names, else start one on this machine.

    Raises InputError for the URL of a dashboard, and where a Ray started here would have no token.
    """
    debug = bool(os.environ.get("DPHRL_DEBUG"))
    address = joined_cluster(config.cluster.address, os.environ)
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    runtime_env: dict[str, Any] = {}
    # Set only where it is needed: with a runtime environment, Ray cannot use the workers that it starts beforehand.
    if is_hidden_from_workers():
        runtime_env["worker_process_setup_hook"] = worker_hook()
    log_format = os.environ.get(LOG_ENVIRONMENT)
    # The actors of a submitted job have its variables anyway, and Ray refuses a variable that it is told twice.
    if log_format and JOB_CONFIG_ENVIRONMENT not in os.environ:
        runtime_env["env_vars"] = {LOG_ENVIRONMENT: log_format}
    if runtime_env:
        options["runtime_env"] = runtime_env
    if address and is_dashboard(address):
        raise InputError(
            f"{address}: is a dashboard, to which jobs are sent (`dphrl submit`); for cluster.address and RAY_ADDRESS "
            "give HOST:6379, or unset them to run on this machine"
        )
    if address:
        ray.init(address=address, **options)
        return
    if obstacle := token_obstacle():
        raise InputError(obstacle)
    be_a_neighbour()
    num_cpus = config.cluster.num_cpus or whole_cpus()
    store_gib = config.cluster.object_store_gib
    store_bytes = None if store_gib is None else round(store_gib * 2**30)
    ray.init(address="local", num_cpus=num_cpus, object_store_memory=store_bytes, include_dashboard=False, **options)
