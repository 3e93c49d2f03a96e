"""The reference buffer as a Ray actor, which owns the samples in the object store: they live as long as the actor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import ray

from actors.again import Again
from actors.waiting import Actor
from actors.watched import WATCH, Watched, answer_of
from dphrl.data.schedule import step_indices
from dphrl.own_code import pin
from dphrl.protocols import WholeReference
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.types import ReferenceSample

# Samples per object. A step reads only a few objects, not the whole buffer.
SAMPLES_PER_OBJECT = 256
# The objects are on the actor's own node, so that one which is not there soon is gone.
OBJECT_TIMEOUT_S = 60.0
# A buffer that is lost again and again, without rows between, has a cause that another start does not remove.
MAX_REVIVALS = 3
WHO = "the reference buffer"


@ray.remote(concurrency_groups=WATCH)
class BufferActor(Watched):
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

    def load(self, folder: str) -> None:
        """Take over a filled buffer from disk. Raises InputError when it is damaged."""
        self.put(ReferenceBuffer.load(Path(folder)))

    def sample(self, step: int, num_rows: int) -> Sequence[ReferenceSample]:
        """The rows of `step` (from 0), the same as `ReferenceBuffer.sample` would choose."""
        indices = step_indices(self._num_samples, step, num_rows, self._schedule)
        wanted = sorted({i // SAMPLES_PER_OBJECT for i in indices})
        found = ray.get([self._shards[shard] for shard in wanted], timeout=OBJECT_TIMEOUT_S)
        shards = dict(zip(wanted, found, strict=True))
        return [shards[i // SAMPLES_PER_OBJECT][i % SAMPLES_PER_OBJECT] for i in indices]


def refilled(facts: Mapping[str, int] | None = None) -> Again:
    """How a buffer that is lost is filled again."""
    return Again(
        WHO,
        "another is filled from disk",
        "buffer_restarted",
        MAX_REVIVALS,
        f"it was filled again {MAX_REVIVALS} times, without success",
        facts or {},
    )


class RayReferenceStore:
    """`protocols.ReferenceStore` over the buffer actor. One that dies is started again, and filled from disk."""

    def __init__(
        self,
        actor: Actor,
        near_perfect: frozenset[str],
        exploration: frozenset[str],
        revive: Callable[[], Awaitable[Actor]],
        timeout_s: float,
    ) -> None:
        """near_perfect, exploration: prompt_ids of D_pef and D_exp. revive: ends the actor, dead or alive, and gives
        another that holds the same buffer. timeout_s: for rows to come (learner.timeout_s)."""
        self.actor, self.near_perfect, self.exploration = actor, near_perfect, exploration
        self._revive, self._timeout_s = revive, timeout_s

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        """Raises RuntimeError when the buffer was lost MAX_REVIVALS times and is lost again."""

        async def ask(num_lost: int) -> list[ReferenceSample]:
            if num_lost:
                self.actor = await self._revive()
            return await self._ask(step, num_rows)

        return await refilled({"step": step + 1}).until_done(ask)

    async def _ask(self, step: int, num_rows: int) -> list[ReferenceSample]:
        call = self.actor.sample.remote(step, num_rows)
        doing = f"give the rows of step {step + 1}"
        return list(await answer_of(self.actor, WHO, doing, call, self._timeout_s, "learner.timeout_s"))
