"""One reward worker in one Ray actor."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import ray

from actors.watched import WATCH, Watched
from dphrl.config.data import RewardConfig
from dphrl.own_code import pin
from dphrl.rewards.base import build_grader
from dphrl.tracking.log import install_json_log
from dphrl.types import RewardResult

log = logging.getLogger(__name__)


@ray.remote(concurrency_groups=WATCH)
class RewardWorker(Watched):
    """Grades batches of (completion text, answer), one result per item in order.

    It is synchronous on purpose: the pool relies on one batch at a time, and a grader's child process can only do one.
    """

    def __init__(self, config: RewardConfig) -> None:
        pin()
        install_json_log(ray.get_runtime_context().get_actor_name() or "reward")
        try:
            self._grader = build_grader(config)
        except Exception:
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise  # at the start of a run it is told, and ends the run
            # It started before, so it may again. Ray gives up an actor whose constructor raises, but starts one again
            # whose process ended.
            log.exception("a reward worker does not start again; another try follows")
            os._exit(1)

    def ready(self) -> bool:
        """True, once the worker has started."""
        return True

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        return self._grader.grade(items)
