"""The reference buffer as a Ray actor, which owns the samples in the object store: they live as long as the actor."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from actors.waiting import Actor
from dphrl.data.schedule import step_indices
from dphrl.own_code import pin
from dphrl.protocols import WholeReference
from dphrl.types import ReferenceSample

# Samples per object. A step reads only a few objects, not the whole buffer.
SAMPLES_PER_OBJECT = 256


@ray.remote
class BufferActor:
    """Holds a filled buffer in the object store, in shards, for as long as the actor lives."""

    def __init__(self) -> None:
        pin()
        self._shards: list[ray.ObjectRef[list[ReferenceSample]]] = []
        self._num_samples = 0
        self._schedule = 0

    def put(self, buffer: WholeReference) -> None:
        """Take over a filled buffer."""
        samples = buffer.samples
        starts = range(0, len(samples), SAMPLES_PER_OBJECT)
        self._shards = [ray.put(list(samples[start : start + SAMPLES_PER_OBJECT])) for start in starts]
        self._num_samples, self._schedule = len(samples), buffer.schedule_seed

    def sample(self, step: int, num_rows: int) -> Sequence[ReferenceSample]:
        """The rows of `step` (from 0), the same as `ReferenceBuffer.sample` would choose."""
        indices = step_indices(self._num_samples, step, num_rows, self._schedule)
        wanted = sorted({i // SAMPLES_PER_OBJECT for i in indices})
        shards = dict(zip(wanted, ray.get([self._shards[shard] for shard in wanted]), strict=True))
        return [shards[i // SAMPLES_PER_OBJECT][i % SAMPLES_PER_OBJECT] for i in indices]


class RayReferenceStore:
    """`protocols.ReferenceStore` over the buffer actor."""

    def __init__(self, actor: Actor, near_perfect: frozenset[str], exploration: frozenset[str]) -> None:
        """near_perfect, exploration: prompt_ids of D_pef and D_exp."""
        self.actor, self.near_perfect, self.exploration = actor, near_perfect, exploration

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        return list(await self.actor.sample.remote(step, num_rows))
