"""When checkpoints are written, and how: beside the training, which waits for the copy only.

Each comes in two parts. What a run resumes from is on the disk and complete first. Then the model is exported into it;
where that fails, nothing of the training is lost, and `dphrl export` does it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from dphrl.background import in_background, one_of_many
from dphrl.config.schema import Config
from dphrl.durable import damage, put_in_place, seal
from dphrl.learner.checkpoint import (
    CheckpointError,
    CheckpointManifest,
    begin_checkpoint,
    checkpoint_path,
    complete_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    step_of,
)
from dphrl.protocols import Learner, LearnerLostError

log = logging.getLogger(__name__)

GIB = 2**30


class CheckpointSaver:
    """Saves one run's learner. At most one checkpoint is being written at a time.

    folder: the run's. inputs: see `CheckpointManifest`.
    """

    def __init__(self, config: Config, learner: Learner, folder: Path, inputs: Mapping[str, str]) -> None:
        self._config, self._learner = config, learner
        self._run, self._folder = folder, folder.absolute() / "checkpoints"
        self._settings, self._inputs = config.model_dump(mode="json"), inputs
        self._state: asyncio.Task[Path] | None = None
        self._export: asyncio.Task[None] | None = None
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of `step`, which is done, is asked for by the configuration."""
        settings = self._config.checkpoint
        every_s = 60 * settings.every_minutes
        return (
            step == self._config.learner.num_steps
            or bool(settings.every_steps and step % settings.every_steps == 0)
            or bool(every_s and time.monotonic() - self._saved_at >= every_s)
        )

    async def save(self, step: int) -> None:
        """Begin the checkpoint of `step`; returns when the learner may go on. Waits for the one before it.

        Raises CheckpointError when there is no room, or when the one before could not be written.
        """
        await self.whole()
        await self._exported()
        learner = self._learner
        told = (learner.policy_version, learner.layout, learner.dtype, self._settings, self._inputs)
        manifest = CheckpointManifest(step, *told)
        num_bytes = await learner.copy_state()
        self._check_room(step, num_bytes)
        self._saved_at = time.monotonic()
        self._state = one_of_many(asyncio.create_task(self._write_state(manifest)))
        self._export = one_of_many(asyncio.create_task(self._write_export(step, self._state)))

    async def catch_up(self, step: int) -> None:
        """Export the model of `step`, from whose checkpoint the run goes on, unless it is there as it was written."""
        if not step:
            return
        exported = checkpoint_path(self._folder, step) / "hf"
        problem = await asyncio.to_thread(damage, exported)
        if problem is not None:
            await self._learner.copy_state()
            self._export = one_of_many(asyncio.create_task(self._write_export(step)))

    def check(self) -> None:
        """Raises CheckpointError when what is being written has failed meanwhile."""
        if self._state is not None and self._state.done():
            self._state.result()

    async def whole(self) -> None:
        """Returns when a run could resume from the last checkpoint that was begun. Raises CheckpointError."""
        if self._state is not None:
            await asyncio.shield(self._state)  # who gives up waiting does not give up the checkpoint

    async def finish(self) -> None:
        """Returns when nothing is being written any more. Raises CheckpointError, also for a failed export."""
        await self.whole()
        if self._export is not None:
            await asyncio.shield(self._export)

    async def settle(self) -> None:
        """As `finish`, for a run that ends with another error: what fails now is not raised."""
        for task in (self._state, self._export):
            if task is not None:
                with contextlib.suppress(Exception):
                    await task

    def cancel(self) -> None:
        """Give up what is being written, because the folder is another run's now. What is there aside is left to it."""
        for task in (self._export, self._state):
            if task is not None:
                task.cancel()

    async def _exported(self) -> None:
        # The training is worth more than one export, which can be made again. The last one is not passed over.
        try:
            if self._export is not None:
                await self._export
        except CheckpointError as error:
            log.warning("%s", error, extra={"event": "export_failed", "facts": {}})
        self._export = None

    async def _write_state(self, manifest: CheckpointManifest) -> Path:
        staging: Path | None = None
        try:
            staging = begin_checkpoint(self._folder, manifest.step)
            digests = await self._learner.write_state(staging)
            path = await in_background(complete_checkpoint, staging, manifest, digests)
        except Exception as error:
            if staging is not None:  # its room may be what is missing
                shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, LearnerLostError):
                raise
            raise CheckpointError(
                f"the checkpoint of step {manifest.step} could not be written to {self._folder} "
                f"({_in_a_line(error)}); {self._left()}"
            ) from error
        log.info("checkpoint %s", path, extra={"event": "checkpoint", "facts": {"step": manifest.step}})
        try:
            await in_background(self._prune, manifest.step)
        except OSError as error:  # somebody reads it; it costs room, and no training
            log.warning("an older checkpoint could not be removed: %s", _in_a_line(error))
        return path

    def _prune(self, newest: int) -> None:
        prune_checkpoints(self._folder, newest, self._config.checkpoint.keep, self._best())

    async def _write_export(self, step: int, state: asyncio.Task[Path] | None = None) -> None:
        if state is not None:
            await asyncio.wait([state])
            if state.exception() is not None:
                return
        target = checkpoint_path(self._folder, step)
        staging = target / ".export.partial"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            await self._learner.write_export(staging)
            for part in sorted(staging.iterdir()):
                await in_background(seal, part)
                await in_background(put_in_place, part, target / part.name)
        except LearnerLostError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the model of step {step} could not be exported ({_in_a_line(error)}); its checkpoint is whole, and "
                f"`dphrl export {self._run} --step {step} -o DIR` exports it once that is mended"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _check_room(self, step: int, num_bytes: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < num_bytes:
            raise CheckpointError(
                f"the checkpoint of step {step} takes {num_bytes / GIB:.2f} GiB, and {self._folder} has "
                f"{free / GIB:.2f} GiB free beside {len(list_checkpoints(self._folder))} older ones; make room, or "
                f"lower checkpoint.keep={self._config.checkpoint.keep}; {self._left()}"
            )

    def _left(self) -> str:
        found = list_checkpoints(self._folder)
        return f"--resume goes on from step {step_of(found[-1])}" if found else "there is no earlier checkpoint"

    def _best(self) -> list[int]:
        """Steps of the checkpoints with the best evaluations, as many as are kept for that."""
        name = f"pass@{min(self._config.evaluation.k, default=1)}"
        scores = {step_of(path): _score(self._run, step_of(path), name) for path in list_checkpoints(self._folder)}
        known = {step: score for step, score in scores.items() if score is not None}
        best_first = sorted(known, key=lambda step: (known[step], step), reverse=True)
        return best_first[: self._config.checkpoint.keep_best]


def _score(run: Path, step: int, name: str) -> float | None:
    """The mean of Pass@k, by its name, in a step's evaluation over its data sets; None without an evaluation."""
    try:
        return fmean(each[name] for each in json.loads((run / "eval" / f"step_{step}.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_a_line(error: Exception) -> str:
    cause = getattr(error, "cause", None)  # what a remote call carried here
    told = cause if isinstance(cause, Exception) else error
    return f"{type(told).__name__}: {' '.join(str(told).split()):.300}"
