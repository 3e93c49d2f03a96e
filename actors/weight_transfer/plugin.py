"""What vLLM loads by name in every process of an engine: it makes our weight-transfer backends known there, and has
errors kept for the actor."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys

PR_SET_PDEATHSIG = 1
# For so long a process of an engine of several workers looks for the next message without a pause, before it sleeps
# until one comes. vLLM's second is meant for GPUs; on a CPU it takes the cores from those that compute.
BUSY_S = 0.0005


def register() -> None:
    """Add our backends to vLLM's registry in this process. vLLM's workers call this as a plugin; repeating it is
    safe."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from actors.engine_errors import keep_errors
    from actors.weight_transfer import object_store

    keep_errors()
    _end_with_parent()
    _wait_asleep()
    if object_store.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(object_store.BACKEND, object_store.ObjectStoreWeightTransferEngine)


def _end_with_parent() -> None:
    """Have Linux end a worker process of vLLM with the engine's actor. One that waits in a collective does not notice
    that the actor was killed, and would keep its memory."""
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_asleep() -> None:
    """On a CPU, have the processes of an engine sleep while they wait for each other."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and SpinCondition.__init__.__defaults__ == (1,):
        SpinCondition.__init__.__defaults__ = (BUSY_S,)
