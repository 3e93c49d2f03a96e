"""What vLLM loads by name in every process of an engine: it makes our weight-transfer backends known there, and has
errors kept for the actor."""

from __future__ import annotations


def register() -> None:
    """Add our backends to vLLM's registry in this process. vLLM's workers call this as a plugin; repeating it is
    safe."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from actors.engine_errors import keep_errors
    from actors.weight_transfer import object_store

    keep_errors()
    if object_store.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(object_store.BACKEND, object_store.ObjectStoreWeightTransferEngine)
