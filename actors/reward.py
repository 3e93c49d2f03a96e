"""One reward worker in one Ray actor."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from actors.watched import WATCH, Watched
from dphrl.config.data import RewardConfig
from dphrl.own_code import pin
from dphrl.rewards.base import build_grader
from dphrl.tracking.log import install_json_log
from dphrl.types import RewardResult


@ray.remote(concurrency_groups=WATCH)
class RewardWorker(Watched):
    """Grades batches of (completion text, answer), one result per item in order.

    It is synchronous on purpose: the pool relies on one batch at a time, and a grader's child process can only do one.
    """

    def __init__(self, config: RewardConfig) -> None:
        pin()
        install_json_log(ray.get_runtime_context().get_actor_name() or "reward")
        self._grader = build_grader(config)

    def ready(self) -> bool:
        """True, once the worker has started."""
        return True

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        return self._grader.grade(items)
