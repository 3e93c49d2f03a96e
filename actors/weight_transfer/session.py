"""One sync of weights, from the learner to all engines, as the driver runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.waiting import Actor, within
from dphrl.config.runtime import SyncConfig
from dphrl.protocols import WeightChunk, WeightPublisher


class ObjectStoreTransfer:
    """Weights go to Ray's object store in chunks, and every engine reads them there."""

    def __init__(self, engines: Sequence[Actor], config: SyncConfig) -> None:
        self.engines, self.config = engines, config

    async def send(self, learner: WeightPublisher) -> None:
        """Bring all engines to the learner's present weights and version.

        Raises TimeoutError after sync.timeout_s, RuntimeError when an engine acknowledges another version.
        """
        version = learner.policy_version
        chunks = await learner.publish()
        pushed = asyncio.gather(*[_push_weights(engine, chunks, version) for engine in self.engines])
        acknowledged = await within(pushed, self.config.timeout_s, "sync.timeout_s", "engines to take new weights")
        if set(acknowledged) != {version}:
            raise RuntimeError(f"engines acknowledged versions {sorted(set(acknowledged))} after a sync to {version}")


async def _push_weights(engine: Actor, chunks: Sequence[WeightChunk], version: int) -> int:
    # An engine runs its calls in order, so all are sent at once. If one fails, the acknowledgement fails too,
    # because a failed update leaves the session closed.
    calls = [engine.start_weight_update.remote()]
    calls += [engine.update_weights.remote(chunk) for chunk in chunks]
    calls += [engine.finish_weight_update.remote(version)]
    return int((await asyncio.gather(*calls))[-1])
