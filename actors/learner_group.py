"""All ranks of the learner as one learner."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayError

from actors import last_words
from actors.device_turns import OwnDevices, Turns
from actors.waiting import Actor, limited, within
from actors.watched import STACK_TIMEOUT_S, StuckError, answer_of, log_stack
from actors.weight_transfer.failures import SendOutcome
from actors.weight_transfer.ledger import WeightSummary
from dphrl.background import one_of_many
from dphrl.learner.update import combine_rank_metrics
from dphrl.learner.utilization import Compute, utilization
from dphrl.protocols import LastUpdate, LearnerLostError, WeightChunk
from dphrl.types import TokenScores, TrainBatch

T = TypeVar("T")
# An engine joins, starts, takes weights and finishes; the learner ends its own part.
MAX_SESSION_STEPS = 5
# Breaking off a session that failed takes some seconds.
SESSION_GRACE_S = 30.0
SETTING = "learner.timeout_s"


class RayLearner:
    """`protocols.Learner` over Ray actors: every call goes to all ranks at once.

    Every wait has a limit. Work of any length, an update or scoring, may take longer as long as each rank gets on with
    it. A rank that is gone or stuck, or that lost its peers, is a LearnerLostError, which names it.
    """

    def __init__(
        self,
        ranks: Sequence[Actor],
        dtype: str = "",
        layout: str = "",
        turns: Turns | None = None,
        compute: Compute | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        """ranks: a list that may get others, see `begin_anew`. turns: whose turn it is on devices that the ranks share
        with engines, if they do. compute: what the ranks' GPUs can do, where it is known. timeout_s: learner.timeout_s.
        """
        self.ranks, self.dtype, self.layout, self._compute = ranks, dtype, layout, compute
        self._turns, self._timeout_s, self._num_restarts = turns or OwnDevices(), timeout_s, 0
        self._policy_version = 0
        self._last_update: LastUpdate | None = None

    @property
    def last_update(self) -> LastUpdate | None:
        return self._last_update

    @property
    def policy_version(self) -> int:
        return self._policy_version

    def begin_anew(self) -> None:
        """The ranks are others now, which hold the initial policy."""
        self._policy_version, self._last_update = 0, None
        self._num_restarts += 1

    async def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        return await self._of_sequences("score", lambda rank, shared: rank.score.remote(shared), sequences)

    async def measure(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[TokenScores]:
        return await self._of_sequences("measure", lambda rank, shared: rank.measure.remote(shared), sequences)

    async def _of_sequences(
        self, doing: str, call: Callable[[Actor, Any], Any], sequences: Sequence[tuple[Sequence[int], int]]
    ) -> list[Any]:
        """What the ranks say of each sequence, in order; each rank speaks of its own, by index."""
        if not sequences:
            return []
        shared = ray.put(sequences)
        parts = await self._all(doing, lambda rank: call(rank, shared), moves=True)
        said = {index: value for part in parts for index, value in part.items()}
        return [said[i] for i in range(len(sequences))]

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        shared = ray.put(batch)
        async with self._or_lost(), self._turns.update():
            began = time.perf_counter()
            parts = await self._all("update", lambda rank: rank.update.remote(shared), moves=True)
            seconds = time.perf_counter() - began
        metrics = combine_rank_metrics(parts) | utilization(self._compute, batch, seconds)
        self._policy_version += 1
        self._last_update = LastUpdate(metrics.get("learner/grad_norm", 0.0), batch.learning_rate)
        return metrics | ({"learner/restarts": float(self._num_restarts)} if self._num_restarts else {})

    async def publish(self) -> AsyncIterator[WeightChunk]:
        """Ray references to the present weights in the object store. Each refers to a list of packed tensors.

        Raises the error of the rank that fails, whichever it is.
        """
        streams = [rank.publish.remote() for rank in self.ranks]
        # Rank 0 waits in a gather for a rank that failed, so what the others say is listened to as well.
        others = one_of_many(asyncio.gather(*[_end_of(stream) for stream in streams[1:]]))
        try:
            async with self._or_lost():
                while (chunk := await _unless_failed(self._next_of(streams[0]), others)) is not None:
                    yield chunk
                    chunk = None  # whoever took it decides how long it stays in the store
                await within(others, self._timeout_s, SETTING, "the other learner ranks to end their part of a sync")
        finally:
            others.cancel()

    async def sent(self) -> WeightSummary:
        """What the last sync sent, by the ranks' own count."""
        async with self._or_lost():
            rank = self.ranks[0]
            return cast(WeightSummary, await self._answer(0, rank, "tell what it sent", rank.sent.remote()))

    async def send_weights(self, engines: Sequence[Actor], width: int, limit_s: float) -> SendOutcome:
        """One session of vLLM's trainer side with all engines, each of `width` workers.

        limit_s: of each of its steps. Raises RuntimeError when the learner failed or cannot go on; where it is lost, or
        a rank does not answer, that is a LearnerLostError.
        """
        async with self._or_lost():
            return await self._send_weights(engines, width, limit_s)

    async def _send_weights(self, engines: Sequence[Actor], width: int, limit_s: float) -> SendOutcome:
        call = (list(engines), width, self._policy_version, limit_s)
        ranks = [one_of_many(asyncio.ensure_future(rank.send_weights.remote(*call))) for rank in self.ranks]
        # Ranks wait for each other, so the first that fails tells why. Each step has its limit, in rank 0.
        limit = MAX_SESSION_STEPS * limit_s + SESSION_GRACE_S
        done, late = await asyncio.wait(ranks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        for rank in done:
            rank.result()
        if late:
            silent = ", ".join(str(i) for i, rank in enumerate(ranks) if rank in late)
            raise StuckError(f"learner rank {silent} did not end a weight sync within {limit:g} s (sync.timeout_s)")
        return cast(SendOutcome, ranks[0].result())

    async def copy_state(self) -> int:
        async with self._or_lost(), self._turns.restore():
            return sum(await self._all("copy its state", lambda rank: rank.copy_state.remote()))

    async def write_state(self, folder: Path) -> dict[str, str]:
        written = await self._all("write its state", lambda rank: rank.write_state.remote(str(folder)), moves=True)
        return {name: digest for part in written for name, digest in part.items()}

    async def write_export(self, folder: Path) -> None:
        rank = self.ranks[0]
        async with self._or_lost():
            await self._answer(0, rank, "export the model", rank.write_export.remote(str(folder)), moves=True)

    async def load(self, folder: Path, policy_version: int, *, weights_only: bool = False) -> None:
        async with self._or_lost(), self._turns.restore():
            await self._all("load", lambda rank: rank.load.remote(str(folder), weights_only))
        self._policy_version, self._last_update = policy_version, None

    async def digest(self) -> str:
        async with self._or_lost():
            parts = await self._all("tell its digest", lambda rank: rank.digest.remote())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    async def _next_of(self, stream: Any) -> WeightChunk | None:
        return await self._answer(0, self.ranks[0], "give the next chunk of its weights", _next_of(stream))

    async def _all(self, doing: str, call: Callable[[Actor], Awaitable[T]], *, moves: bool = False) -> list[T]:
        """The answers of all ranks to the same call. Raises the error of the first that fails."""
        answers = [
            asyncio.ensure_future(self._answer(i, rank, doing, call(rank), moves=moves))
            for i, rank in enumerate(self.ranks)
        ]
        try:
            async with self._or_lost():
                return await asyncio.gather(*answers)
        finally:
            for answer in answers:
                answer.cancel()

    async def _answer(self, index: int, rank: Actor, doing: str, call: Awaitable[T], *, moves: bool = False) -> T:
        return await answer_of(rank, _name(index), doing, call, self._timeout_s, SETTING, moves=moves)

    @asynccontextmanager
    async def _or_lost(self) -> AsyncIterator[None]:
        """Raises LearnerLostError for an error in this block with which the ranks, as they are, cannot go on."""
        try:
            yield
        except LearnerLostError:
            raise
        except Exception as error:
            if lost := await self._loss_behind(error):
                raise LearnerLostError(lost) from error
            raise

    async def _loss_behind(self, error: Exception) -> str | None:
        """Who is lost, if that is what the error comes from: one rank's end breaks the collectives of all others."""
        if not any(isinstance(e, StuckError) or _tells_of_loss(e) for e in _chain(error)):
            return None
        deaths = await asyncio.gather(*[self._death_of(i, rank) for i, rank in enumerate(self.ranks)])
        if dead := [death for death in deaths if death]:
            return "; ".join(dead)
        # A rank that hangs lets the others run into the limit of their collective operation.
        others = [(i, rank) for i, rank in enumerate(self.ranks) if not str(error).startswith(_name(i))]
        await asyncio.gather(*[log_stack(rank, _name(i)) for i, rank in others])
        if isinstance(error, StuckError):
            return str(error)
        # Otherwise an engine's end is behind it, which is not for the learner to tell.
        return last_words.last_words("the learner", error) if _tells_of_loss(error) else None

    async def _death_of(self, index: int, rank: Actor) -> str | None:
        try:
            await limited(rank.idle_s.remote(), STACK_TIMEOUT_S)
        except TimeoutError:
            return None
        except RayError as error:
            last_words.keep(_name(index), error)
            return last_words.last_words(_name(index), error)
        return None


def _name(index: int) -> str:
    return f"learner rank {index}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _tells_of_loss(error: BaseException) -> bool:
    told = (last_words.is_death, last_words.is_broken_link, last_words.is_device_failure, last_words.is_lost_object)
    return any(tells(error) for tells in told)


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
    task = one_of_many(asyncio.ensure_future(waiting))
    try:
        await asyncio.wait([task, others], return_when=asyncio.FIRST_COMPLETED)
        if others.done():
            others.result()
        return await task
    finally:
        task.cancel()
