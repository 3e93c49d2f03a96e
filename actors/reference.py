"""The reference stage, which runs once, as a Ray actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.learner_group import RayLearner
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from dphrl.config.schema import Config
from dphrl.own_code import pin
from dphrl.reference.stage import fill_reference
from dphrl.tracking.log import install_json_log
from dphrl.types import Prompt


@ray.remote
class ReferenceSampler:
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
        self._learner = RayLearner(ranks)
        self._num_graded = self._num_tokens = 0

    async def newly_graded(self) -> tuple[int, int]:
        """Completions, and their tokens, that this actor has graded since it was asked before."""
        new = self._num_graded, self._num_tokens
        self._num_graded = self._num_tokens = 0
        return new

    async def fill(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], buffer_actor: Any, folder: str
    ) -> tuple[frozenset[str], frozenset[str], dict[str, float]]:
        """Sample, grade, split and score; the buffer goes to disk in `folder` and into the buffer actor.

        Returns the prompt_ids of D_pef and of D_exp, and the split's counts.

        It continues what an earlier fill left beside `folder`. A later actor may run on another node, so `folder` must
        be on storage that the nodes share.
        """
        buffer = await fill_reference(
            self._config, prompts, self._rollouts, self._rewards, self._learner, identity, Path(folder), self._count
        )
        await buffer_actor.put.remote(buffer)
        return buffer.near_perfect, buffer.exploration, buffer.counts()

    def _count(self, num_completions: int, num_tokens: int) -> None:
        self._num_graded += num_completions
        self._num_tokens += num_tokens
