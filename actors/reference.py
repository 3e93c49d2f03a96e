"""The one-time reference sampler as a Ray actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.learner_group import RayLearner
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from dphrl.config.schema import Config
from dphrl.reference.stage import fill_reference
from dphrl.tracking.log import install_json_log
from dphrl.types import Prompt


@ray.remote
class ReferenceSampler:
    """Runs the reference stage beside the actors it uses, then goes away.

    Async, so that `num_graded` answers while `fill` runs. The learner ranks and engines must be idle otherwise,
    and the engines refit to the initial policy.
    """

    def __init__(self, config: Config, engines: Sequence[Any], workers: Sequence[Any], ranks: Sequence[Any]) -> None:
        install_json_log("reference")
        self._config = config
        self._rollouts = RayRolloutPool(engines, config, probes=())
        self._rewards = RayRewardPool(workers, config)
        self._learner = RayLearner(ranks)
        self._num_graded = 0

    async def num_graded(self) -> int:
        """Completions graded so far by this actor, not those of a stage it continues."""
        return self._num_graded

    async def fill(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], buffer_actor: Any, folder: str
    ) -> tuple[frozenset[str], frozenset[str], dict[str, float]]:
        """Sample, grade, split and score; the buffer goes to disk in `folder` and into the buffer actor.

        Returns the prompt_ids of D_pef and of D_exp, and the split's counts.

        Continues what an earlier fill left beside `folder`, which must be a path that this actor's node shares
        with the next one's.
        """
        buffer = await fill_reference(
            self._config, prompts, self._rollouts, self._rewards, self._learner, identity, Path(folder), self._count
        )
        await buffer_actor.put.remote(buffer)
        return buffer.near_perfect, buffer.exploration, buffer.counts()

    def _count(self, num_completions: int) -> None:
        self._num_graded += num_completions
