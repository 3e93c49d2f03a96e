"""All ranks of the learner as one learner."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import ray

from actors.device_turns import OwnDevices, Turns
from actors.waiting import Actor
from actors.weight_transfer.failures import SendOutcome
from actors.weight_transfer.ledger import WeightSummary
from dphrl.learner.update import combine_rank_metrics
from dphrl.learner.utilization import Compute, utilization
from dphrl.protocols import LastUpdate, WeightChunk
from dphrl.types import TrainBatch

T = TypeVar("T")
# An engine joins, starts, takes weights and finishes; the learner ends its own part.
MAX_SESSION_STEPS = 5
# Breaking off a session that failed takes some seconds.
SESSION_GRACE_S = 30.0


class RayLearner:
    """`protocols.Learner` over Ray actors: every call goes to all ranks at once.

    turns: whose turn it is on devices that the ranks share with engines, if they do. compute: what the ranks' GPUs can
    do, where it is known.
    """

    def __init__(
        self,
        ranks: Sequence[Actor],
        dtype: str = "",
        layout: str = "",
        turns: Turns | None = None,
        compute: Compute | None = None,
    ) -> None:
        self.ranks, self.dtype, self.layout, self._compute = ranks, dtype, layout, compute
        self._turns = turns or OwnDevices()
        self._policy_version = 0
        self._last_update: LastUpdate | None = None

    @property
    def last_update(self) -> LastUpdate | None:
        return self._last_update

    @property
    def policy_version(self) -> int:
        return self._policy_version

    async def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        if not sequences:
            return []
        shared = ray.put(sequences)
        parts = await asyncio.gather(*[rank.score.remote(shared) for rank in self.ranks])
        scored = {index: logprobs for part in parts for index, logprobs in part.items()}
        return [scored[i] for i in range(len(sequences))]

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        shared = ray.put(batch)
        async with self._turns.update():
            began = time.perf_counter()
            parts = await asyncio.gather(*[rank.update.remote(shared) for rank in self.ranks])
            seconds = time.perf_counter() - began
        metrics = combine_rank_metrics(parts) | utilization(self._compute, batch, seconds)
        self._policy_version += 1
        self._last_update = LastUpdate(metrics.get("learner/grad_norm", 0.0), batch.learning_rate)
        return metrics

    async def publish(self) -> AsyncIterator[WeightChunk]:
        """Ray references to the present weights in the object store. Each refers to a list of packed tensors.

        Raises the error of the rank that fails, whichever it is.
        """
        streams = [rank.publish.remote() for rank in self.ranks]
        # Rank 0 waits in a gather for a rank that failed, so what the others say is listened to as well.
        others = asyncio.gather(*[_end_of(stream) for stream in streams[1:]])
        try:
            while (chunk := await _unless_failed(_next_of(streams[0]), others)) is not None:
                yield chunk
                chunk = None  # whoever took it decides how long it stays in the store
            await others
        finally:
            others.cancel()

    async def sent(self) -> WeightSummary:
        """What the last sync sent, by the ranks' own count."""
        return cast(WeightSummary, await self.ranks[0].sent.remote())

    async def send_weights(self, engines: Sequence[Actor], width: int, limit_s: float) -> SendOutcome:
        """One session of vLLM's trainer side with all engines, each of `width` workers.

        limit_s: of each of its steps. Raises RuntimeError when the learner failed or cannot go on, and TimeoutError
        when a rank does not answer.
        """
        call = (list(engines), width, self._policy_version, limit_s)
        ranks = [asyncio.ensure_future(rank.send_weights.remote(*call)) for rank in self.ranks]
        # Ranks wait for each other, so the first that fails tells why. Each step has its limit, in rank 0.
        limit = MAX_SESSION_STEPS * limit_s + SESSION_GRACE_S
        done, late = await asyncio.wait(ranks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        for rank in done:
            rank.result()
        if late:
            silent = ", ".join(str(i) for i, rank in enumerate(ranks) if rank in late)
            raise TimeoutError(f"learner rank {silent} did not end a weight sync within {limit:g} s (sync.timeout_s)")
        return cast(SendOutcome, ranks[0].result())

    async def copy_state(self) -> int:
        async with self._turns.restore():
            return sum(await asyncio.gather(*[rank.copy_state.remote() for rank in self.ranks]))

    async def write_state(self, folder: Path) -> dict[str, str]:
        parts = await asyncio.gather(*[rank.write_state.remote(str(folder)) for rank in self.ranks])
        return {name: digest for part in parts for name, digest in part.items()}

    async def write_export(self, folder: Path) -> None:
        await self.ranks[0].write_export.remote(str(folder))

    async def load(self, folder: Path, policy_version: int, *, weights_only: bool = False) -> None:
        async with self._turns.restore():
            await asyncio.gather(*[rank.load.remote(str(folder), weights_only) for rank in self.ranks])
        self._policy_version, self._last_update = policy_version, None

    async def digest(self) -> str:
        parts = await asyncio.gather(*[rank.digest.remote() for rank in self.ranks])
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


async def _next_of(stream: Any) -> WeightChunk | None:
    """The reference to the next chunk. Each comes behind a value that tells that it is whole: see `publish` of a
    rank."""
    told = await anext(stream, None)
    if told is None:
        return None
    await told  # raises what the rank raised
    return cast(WeightChunk, await anext(stream))


async def _end_of(stream: Any) -> None:
    async for item in stream:
        await item  # raises what the rank raised


async def _unless_failed(waiting: Awaitable[T], others: asyncio.Future[Any]) -> T:
    """The result of `waiting`, or at once the error of `others`."""
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait([task, others], return_when=asyncio.FIRST_COMPLETED)
        if others.done():
            others.result()
        return await task
    finally:
        task.cancel()
