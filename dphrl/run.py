"""A whole run around the loop: reference stage, evaluation before and after, checkpoints, resume, the final table."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dphrl.config.schema import Config
from dphrl.evaluation.base import base_evaluation
from dphrl.evaluation.results import Summary, read_summaries, say_damaged, write_summaries
from dphrl.evaluation.stage import Evaluation, PartialResult, evaluate_sets
from dphrl.evaluation.table import report_evaluations
from dphrl.health import HealthChecks
from dphrl.learner.checkpoint import MANIFEST, checkpoint_path, newest_whole, read_manifest, set_aside_after
from dphrl.loop import train
from dphrl.prepare import Prepared
from dphrl.protocols import Parts, ReferenceStore, System
from dphrl.recovery import Recovery
from dphrl.reference.reuse import prepare_reference
from dphrl.replay import ReplayKeeper
from dphrl.resume import training_inputs
from dphrl.saving import CheckpointSaver
from dphrl.stopping import Stopped, StopRequest
from dphrl.tracking.console import Console
from dphrl.tracking.tracker import Tracker, read_metrics
from dphrl.types import RolloutGroup, TrainBatch

log = logging.getLogger(__name__)


async def training_run(
    config: Config,
    prepared: Prepared,
    system: System,
    tracker: Tracker,
    console: Console,
    *,
    resume: bool,
    stop: StopRequest | None = None,
) -> None:
    """Train to the last step, evaluate and export the model. `resume`: continue from the newest checkpoint, if any.

    A learner that is lost on the way is replaced: see `Recovery`. stop: raises Stopped when the run shall end. Of the
    steps, the last whole one is saved then; all else that takes long is kept on disk as it goes on. Raises InputError
    when no checkpoint is whole, and CheckpointError when one cannot be written. Whether the newest was trained with
    what is given now is checked before: `ResumeCheck`.
    """
    stop = stop or StopRequest()
    parts = await system.start(console.info)
    recovery = Recovery(config, system, tracker.folder, console, stop)

    async def of_initial_policy() -> tuple[ReferenceStore | None, list[Summary]]:
        console.info(f"first sync: {_gap(await parts.rollouts.refit(parts.learner))}")
        reference = await prepare_reference(config, prepared, system, parts, tracker.folder, console)
        return reference, await base_evaluation(config, prepared, parts, tracker.folder, console)

    reference, base = await recovery.repeat(of_initial_policy)
    tracker.log_evaluation(0, "base", base)
    inputs, begun = training_inputs(config, prepared), resume
    # The step whose moments checkpoint.restore=weights leaves: that of --resume. Later ones are this run's own.
    reset_step: int | None = None if resume else -1

    async def of_trained_policies() -> list[Summary]:
        nonlocal begun, reset_step
        start_step = await _restore(config, parts, tracker, console, reset_step) if begun else 0
        anew = begun and _begins_anew(config, start_step, reset_step)
        keeper = ReplayKeeper(config, tracker.folder, parts.learner, anew=anew)
        begun, reset_step = True, start_step if reset_step is None else reset_step
        saver = CheckpointSaver(config, parts.learner, tracker.folder, inputs)
        observer = _Observer(config, prepared, parts, tracker, console, base, saver, keeper, stop)
        try:
            await saver.catch_up(start_step)
            await observer.catch_up(start_step)
            with stop.held():
                try:
                    await train(config, prepared.prompts, parts, reference, observer, start_step=start_step, stop=stop)
                except Stopped as stopped:
                    if not stopped.at_once:
                        await observer.save_unsaved()
                    raise
            return await observer.finish()
        finally:
            if stop.lost:
                saver.cancel()  # the folder is another run's
            elif not stop.at_once:
                await saver.settle()

    trained = await recovery.repeat(of_trained_policies)
    report_evaluations(console, {"base": base, "trained": trained})
    console.info(f"model      {checkpoint_path(tracker.folder / 'checkpoints', config.learner.num_steps) / 'hf'}")
    console.info(f"run folder {tracker.folder}  (metrics.jsonl, samples/, reference/, eval/, tensorboard/, run.log)")


def _gap(synced: Mapping[str, float]) -> str:
    return f"engine and learner log-probs agree within {synced['sync/logprob_gap_max']:.2g}"


def _begins_anew(config: Config, step: int, reset_step: int | None) -> bool:
    """Whether the optimizer leaves its moments in the checkpoint of `step`."""
    return config.checkpoint.restore == "weights" and reset_step in (None, step)


async def _restore(config: Config, parts: Parts, tracker: Tracker, console: Console, reset_step: int | None) -> int:
    """Set learner, engines and metrics back to the newest checkpoint; returns the number of steps already done.

    Without a checkpoint that is the start: the learner then holds the initial policy.
    """
    found = await asyncio.to_thread(newest_whole, tracker.folder / "checkpoints", console.info)
    if found is None:
        console.info("resume: no checkpoint yet, starting at step 1")
        await parts.rollouts.refit(parts.learner)
        tracker.truncate_after(0)
        return 0
    manifest = read_manifest(found)
    weights_only = _begins_anew(config, manifest.step, reset_step)
    await parts.learner.load(found, manifest.policy_version, weights_only=weights_only)
    await parts.rollouts.refit(parts.learner)
    tracker.truncate_after(manifest.step)
    console.info(f"resume: {manifest.step} steps done, continuing from {found}")
    for damaged in set_aside_after(found.parent, manifest.step):
        console.info(f"resume: the damaged checkpoint is now {damaged}; delete it when nobody needs it")
    for note in _restored(config, manifest.layout, parts.learner.layout, weights_only):
        console.info(f"resume: {note}")
    told = {"event": "resumed", "step": manifest.step, "facts": {"checkpoint": str(found)}}
    log.info("the run goes on after step %d", manifest.step, extra=told)
    return manifest.step


def _restored(config: Config, before: str, now: str, weights_only: bool) -> Iterator[str]:
    """What the user should know of a run that goes on: a line each."""
    if before != now:
        yield f"the learner was {before} and is {now}; sums have another order, so losses agree up to rounding"
    if weights_only:
        yield "checkpoint.restore=weights: the optimizer begins anew"
    if (steps := config.rollout.max_staleness) > 0:
        yield (
            f"completions of up to {steps} steps that were sampled ahead (rollout.max_staleness) are not in a "
            "checkpoint; they are sampled again, from the weights of now"
        )


class _Observer:
    """Tracks, saves and evaluates after each step."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        parts: Parts,
        tracker: Tracker,
        console: Console,
        base: Sequence[Summary],
        saver: CheckpointSaver,
        keeper: ReplayKeeper,
        stop: StopRequest,
    ) -> None:
        self.config, self.prepared, self.parts, self.base = config, prepared, parts, base
        gap_bound = config.sync.mean_gap_bound(parts.learner.dtype)
        self.health = HealthChecks(config, gap_bound, read_metrics(tracker.folder))
        self.tracker, self.console, self.saver, self.keeper, self.stop = tracker, console, saver, keeper, stop
        self._unsaved_step = 0

    async def after_step(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup], batch: TrainBatch
    ) -> None:
        self.tracker.log_samples(step, groups, self.config.tracking.samples_per_step)
        why_stop = self.health.check(metrics)  # first, so that its events are counted in the step's record
        self.tracker.log_step(metrics)
        self.console.step_line(metrics, self.config.learner.num_steps)
        await self.keeper.keep(batch, metrics)
        if why_stop:
            raise RuntimeError(why_stop)
        self._unsaved_step, asked = step, self.stop.take_save()
        self.saver.check()
        if asked or self.saver.is_due(step):
            await self._save(step)
        if step < self.config.learner.num_steps and _is_due(step, self.config.evaluation.every_steps):
            await self.stop.unless_stopped(self._evaluate(step))

    async def _save(self, step: int) -> None:
        await self.saver.save(step)
        self._unsaved_step = 0

    async def save_unsaved(self) -> None:
        """Save the last whole step, because the run stops, unless that is begun. A failure is told and not raised."""
        try:
            if self._unsaved_step:
                await self._save(self._unsaved_step)
            await self.saver.whole()
        except Exception as error:  # the signal that stops the run may have ended the learner, too
            self.console.info(f"the last step could not be saved: {' '.join(str(error).split())}")

    async def catch_up(self, step: int) -> None:
        """Evaluate `step`, from which the run resumed, if a kill came between its checkpoint and its evaluation."""
        due = 0 < step < self.config.learner.num_steps and _is_due(step, self.config.evaluation.every_steps)
        path = self._result(step)
        if due and read_summaries(path) is None:
            if path.is_file():
                say_damaged(path, self.console)
            await self._evaluate(step)

    async def finish(self) -> list[Summary]:
        """The final evaluation, of the weights that the engines hold now; all that was saved is on the disk then."""
        summaries = await self._evaluate(self.config.learner.num_steps)
        await self.saver.finish()
        return summaries

    async def _evaluate(self, step: int) -> list[Summary]:
        await self.saver.whole()  # what fails from here on must not cost the training
        if not self.config.evaluation.num_samples:
            return []
        path, partial = self._result(step), self._partial(step)
        evaluation = Evaluation(self.config, self.prepared.evaluations, f"step {step}", self.base, partial)
        summaries = await evaluate_sets(evaluation, self.parts, self.console)
        write_summaries(path, summaries)
        self.tracker.log_evaluation(step, "current", summaries)
        if partial is not None:
            partial.remove()
        return summaries

    def _result(self, step: int) -> Path:
        return self.tracker.folder / "eval" / f"step_{step}.json"

    def _partial(self, step: int) -> PartialResult | None:
        """Where chunks go; None when no checkpoint holds the policy, as a resumed run would then evaluate another."""
        try:
            manifest = self.tracker.folder / "checkpoints" / f"step_{step}" / MANIFEST
            # A step that is taken again may give slightly different weights, so the time of saving is part of the name.
            saved = manifest.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        policy = f"step {step}, version {self.parts.learner.policy_version}, saved {saved}"
        return PartialResult.beside(self._result(step), self.prepared.model_dir, policy)


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
