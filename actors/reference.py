"""The reference stage, which runs once, as a Ray actor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.again import Again
from actors.learner_group import RayLearner
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from actors.waiting import Actor
from actors.watched import WATCH, Watched, answer_of
from dphrl.background import one_of_many
from dphrl.config.schema import Config
from dphrl.own_code import pin
from dphrl.protocols import LearnerLostError, OnGraded
from dphrl.reference.stage import fill_reference
from dphrl.tracking.log import install_json_log
from dphrl.types import Prompt

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.5
# A stage that dies again and again has a cause that another start does not remove.
MAX_STARTS = 3
WHO = "the reference stage"
Filled = tuple[frozenset[str], frozenset[str], dict[str, float]]


@ray.remote(concurrency_groups=WATCH)
class ReferenceSampler(Watched):
    """Runs the reference stage with the actors that it is given; it is not needed afterwards.

    Its methods are async, so that `newly_graded` answers while `fill` runs. Meanwhile the learner ranks and engines
    must have no other work. The engines must be refit to the initial policy before.
    """

    def __init__(
        self, config: Config, engines: Mapping[int, Any], workers: Sequence[Any], ranks: Sequence[Any]
    ) -> None:
        pin()
        install_json_log("reference")
        self._config = config
        self._rollouts = RayRolloutPool(engines, config, probes=())
        self._rewards = RayRewardPool(workers, config)
        self._learner = _NotedLearner(ranks, timeout_s=config.learner.timeout_s)
        self._learner.on_scored = self.moved
        self._num_graded = self._num_tokens = 0

    async def newly_graded(self) -> tuple[int, int]:
        """Completions, and their tokens, that this actor has graded since it was asked before."""
        new = self._num_graded, self._num_tokens
        self._num_graded = self._num_tokens = 0
        return new

    async def fill(self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: str) -> Filled:
        """Sample, grade, split and score; the buffer goes to disk in `folder`.

        Returns the prompt_ids of D_pef and of D_exp, and the split's counts.

        It continues what an earlier fill left beside `folder`. A later actor may run on another node, so `folder` must
        be on storage that the nodes share.
        """
        self.moved()
        buffer = await fill_reference(
            self._config, prompts, self._rollouts, self._rewards, self._learner, identity, Path(folder), self._count
        )
        return buffer.near_perfect, buffer.exploration, buffer.counts()

    def _count(self, num_completions: int, num_tokens: int) -> None:
        self.moved()
        self._num_graded += num_completions
        self._num_tokens += num_tokens


class _NotedLearner(RayLearner):
    """Tells of each batch that it has scored."""

    on_scored: Callable[[], None]

    async def _of_sequences(self, *asked: Any) -> list[Any]:
        said = await super()._of_sequences(*asked)
        self.on_scored()
        return said


async def run_stage(
    start: Callable[[], Actor], fill: Callable[[Actor], Any], on_graded: OnGraded, limit_s: float
) -> Filled:
    """What `fill` of a sampler gives, which `start` starts; one that dies or hangs gets a successor, which continues.

    limit_s: how long a stage may go without a graded completion or a scored batch. Raises LearnerLostError when the
    learner is lost meanwhile, RuntimeError when the stage is lost MAX_STARTS times, and what the stage itself raises.
    """
    again = Again(
        WHO,
        "another continues where it was",
        "reference_stage_restarted",
        MAX_STARTS - 1,
        f"it was started {MAX_STARTS} times. --resume continues it",
    )

    async def run(_: int) -> Filled:
        sampler = start()
        try:
            return await _follow(sampler, fill(sampler), on_graded, limit_s)
        except RayTaskError as error:
            if isinstance(error.cause, LearnerLostError):
                raise LearnerLostError(str(error.cause)) from error
            raise
        finally:
            ray.kill(sampler)

    return await again.until_done(run)


async def _follow(sampler: Actor, filling: Any, on_graded: OnGraded, limit_s: float) -> Filled:
    """The end of a stage; on_graded hears of its completions as they are graded."""
    setting = "rollout.timeout_s + learner.timeout_s"

    async def tell() -> None:
        call = sampler.newly_graded.remote()
        on_graded(*await answer_of(sampler, WHO, "tell what it has graded", call, limit_s, setting))

    ending: asyncio.Future[Filled] = one_of_many(
        asyncio.ensure_future(answer_of(sampler, WHO, "grade or score anything", filling, limit_s, setting, moves=True))
    )
    try:
        while not (await asyncio.wait([ending], timeout=PROGRESS_INTERVAL_S))[0]:
            await tell()
        filled = ending.result()
        await tell()
        return filled
    finally:
        ending.cancel()
