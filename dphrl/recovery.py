"""What a run does when its learner is lost: another starts, and the run goes on from the newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from dphrl.config.schema import Config
from dphrl.learner.checkpoint import list_checkpoints, step_of
from dphrl.protocols import LearnerLostError, System
from dphrl.stopping import StopRequest
from dphrl.tracking.console import Console

log = logging.getLogger(__name__)

T = TypeVar("T")


class Recovery:
    """Repeats parts of a run in which the learner was lost, each time with a new learner.

    What dies for a cause that stays would die for ever, so that learner.max_restarts bounds the restarts between two
    checkpoints.
    """

    def __init__(
        self, config: Config, system: System, run_folder: Path, console: Console, stop: StopRequest | None = None
    ) -> None:
        """stop: what the user asked of the run; a run that shall end starts no learner."""
        self._max, self._system, self._console = config.learner.max_restarts, system, console
        self._stop = stop or StopRequest()
        self._checkpoints = run_folder / "checkpoints"
        self._num_restarts = 0
        self._step_before = -1

    async def repeat(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of `work`, which is done from its begin again whenever it loses the learner.

        It finds the learner with the initial policy, and engines that must be refit. Raises LearnerLostError, with the
        reason, when there were enough restarts, and Stopped when the run shall end.
        """
        while True:
            try:
                return await work()
            except LearnerLostError as error:
                lost: Exception | None = error
            while lost is not None:
                self._stop.check()  # the signal may have ended the learner, too
                lost = await self._restart(lost)
            self._stop.check()

    async def _restart(self, lost: Exception) -> Exception | None:
        """None when another learner is up, or why it is not. Raises LearnerLostError after enough restarts."""
        step = self._newest_step()
        if step != self._step_before:
            self._num_restarts, self._step_before = 0, step
        resume = (
            f"--resume goes on from step {step}" if step else "--resume starts at step 1, there is no checkpoint yet"
        )
        if self._num_restarts == self._max:
            times = f"was started again {self._max} times since" if self._max else "is not started again"
            raise LearnerLostError(
                f"{lost}. The learner {times} (learner.max_restarts={self._max}); {resume}"
            ) from lost
        self._num_restarts += 1
        told = f"restart {self._num_restarts} of {self._max} since the last checkpoint (learner.max_restarts)"
        log.warning(
            "%s. The learner starts again and goes on %s; rollouts under way are given up; %s",
            lost,
            f"after step {step}" if step else "from the start",
            told,
            extra={"event": "learner_restarted", "facts": {"step": step, "reason": str(lost)}},
        )
        try:
            await self._system.restart_learner(self._console.info)
        except Exception as error:
            return LearnerLostError(f"the learner did not start again: {_reason(error)}")
        return None

    def _newest_step(self) -> int:
        found = list_checkpoints(self._checkpoints)
        return step_of(found[-1]) if found else 0


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
