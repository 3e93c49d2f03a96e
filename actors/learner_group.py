"""All ranks of the learner as one learner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import ray

from actors.device_turns import OwnDevices, Turns
from actors.waiting import Actor
from dphrl.learner.update import combine_rank_metrics
from dphrl.protocols import WeightChunk
from dphrl.types import TrainBatch


class RayLearner:
    """`protocols.Learner` over Ray actors: every call goes to all ranks at once.

    turns: whose turn it is on devices that the ranks share with engines, if they do.
    """

    def __init__(self, ranks: Sequence[Actor], dtype: str = "", layout: str = "", turns: Turns | None = None) -> None:
        self.ranks, self.dtype, self.layout = ranks, dtype, layout
        self._turns = turns or OwnDevices()
        self._policy_version = 0

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
            parts = await asyncio.gather(*[rank.update.remote(shared) for rank in self.ranks])
        self._policy_version += 1
        return combine_rank_metrics(parts)

    async def publish(self) -> Sequence[WeightChunk]:
        """Ray references to the present weights in the object store. Each refers to a list of packed tensors."""
        return (await asyncio.gather(*[rank.publish.remote() for rank in self.ranks]))[0]

    async def save(self, folder: Path) -> None:
        async with self._turns.restore():
            await asyncio.gather(*[rank.save.remote(str(folder)) for rank in self.ranks])

    async def load(self, folder: Path, policy_version: int) -> None:
        async with self._turns.restore():
            await asyncio.gather(*[rank.load.remote(str(folder)) for rank in self.ranks])
        self._policy_version = policy_version
