"""Engines that failed in a sync, and the new ones in their place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableSequence
from dataclasses import replace

from actors.waiting import Actor
from actors.weight_transfer.failures import EngineFailure, SyncFailedError
from dphrl.config.schema import Config

log = logging.getLogger(__name__)

# An engine that fails again and again has a cause that another start does not remove.
MAX_REPLACEMENTS = 3
STOPPED = (
    "No engine may serve without proven weights, so the run stops. sync.on_failure=replace starts another engine "
    "instead; --resume goes on from the last checkpoint"
)


class EngineRepair:
    """Starts engines anew in the places of those that failed, in the pool's own list.

    start: ends the actor of that index, dead or alive, and returns another in its place once that is up; None where
    nobody can.
    """

    def __init__(
        self, engines: MutableSequence[Actor], config: Config, start: Callable[[int], Awaitable[Actor]] | None = None
    ) -> None:
        self._engines, self._config, self._start = engines, config, start
        self._num_replaced: Counter[int] = Counter()

    async def replace(self, failed: SyncFailedError) -> int:
        """New engines, up but without weights, for all that `failed` names; returns how many.

        Raises SyncFailedError when sync.on_failure is stop, or when an engine failed more than MAX_REPLACEMENTS times.
        """
        if self._config.sync.on_failure == "stop" or self._start is None:
            raise SyncFailedError(failed.failures, failed.cut, STOPPED) from failed
        for failure in failed.failures:
            if self._num_replaced[failure.index] == MAX_REPLACEMENTS:
                advice = f"It was replaced {MAX_REPLACEMENTS} times already, so another start would not help"
                raise SyncFailedError([failure], failed.cut, advice) from failed
            self._num_replaced[failure.index] += 1
            log.warning("%s; starting another in its place", failure)
        affected = sorted({failure.index for failure in failed.failures} | failed.cut)
        for index in failed.cut:
            log.warning("rollout engine %d was in the middle of the same sync; starting another in its place", index)
        results = await asyncio.gather(*[self._restart(index) for index in affected], return_exceptions=True)
        not_started: list[EngineFailure] = []
        for result in results:
            if isinstance(result, SyncFailedError):
                not_started += result.failures
            elif isinstance(result, BaseException):
                raise result
        more = await self.replace(SyncFailedError(not_started)) if not_started else 0
        return len(affected) + more

    async def _restart(self, index: int) -> None:
        assert self._start is not None
        limit, began = self._config.learner.timeout_s, time.monotonic()
        try:
            self._engines[index] = await self._start(index)
        except Exception as error:
            failure = EngineFailure.of(index, "start again", time.monotonic() - began, error, limit)
            raise SyncFailedError([replace(failure, setting="learner.timeout_s")]) from error
        log.info("rollout engine %d is up again", index)
