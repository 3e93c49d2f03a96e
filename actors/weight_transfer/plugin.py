"""What vLLM loads by name in every process of an engine: it makes our weight-transfer backends known there, has errors
kept for the actor, and on a CPU has freed memory kept."""

from __future__ import annotations


def register() -> None:
    """Add our backends to vLLM's registry in this process. vLLM's workers call this as a plugin; repeating it is
    safe."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    from actors.engine_errors import keep_errors
    from actors.weight_transfer import object_store
    from actors.weight_transfer.memory import keep_freed_memory

    keep_errors()
    if current_platform.is_cpu():
        keep_freed_memory()
    if object_store.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(object_store.BACKEND, object_store.ObjectStoreWeightTransferEngine)
