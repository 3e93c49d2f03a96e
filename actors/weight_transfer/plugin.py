"""What vLLM loads by name in every process of an engine: it makes our weight-transfer backends known there, and has
errors kept for the actor."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys

PR_SET_PDEATHSIG = 1


def register() -> None:
    """Add our backends to vLLM's registry in this process. vLLM's workers call this as a plugin; repeating it is
    safe."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from actors.engine_errors import keep_errors
    from actors.weight_transfer import object_store

    keep_errors()
    _end_with_parent()
    if object_store.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(object_store.BACKEND, object_store.ObjectStoreWeightTransferEngine)


def _end_with_parent() -> None:
    """Have Linux end a worker process of vLLM with the engine's actor. One that waits in a collective does not notice
    that the actor was killed, and would keep its memory."""
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
