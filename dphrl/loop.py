"""The training loop. It knows only the protocols: Ray and the inline mode run this same code.

A step collects graded rollouts of the exploration prompts, adds rehearsal rows of the reference buffer, makes one
hybrid update, refits every engine and proves that it agrees with the learner, and gives its figures to the observer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from signal import SIGTERM

from dphrl.batch import make_batch
from dphrl.collect import StepCollector
from dphrl.config.schema import Config
from dphrl.protocols import Parts, ReferenceStore, StepObserver
from dphrl.stopping import StopRequest
from dphrl.tracking.events import current_step
from dphrl.tracking.step_metrics import StepClock, step_metrics
from dphrl.types import Prompt, ReferenceSample


async def train(
    config: Config,
    prompts: Sequence[Prompt],
    parts: Parts,
    reference: ReferenceStore | None,
    observer: StepObserver,
    *,
    start_step: int = 0,
    stop: StopRequest | None = None,
) -> None:
    """Run steps start_step .. num_steps - 1. Engines must be refit before. reference: None to rehearse nothing.

    stop: raises Stopped after a step, or while a step is collected, when the run shall end.
    """
    stop = stop or StopRequest()
    exploration = prompts if reference is None else [p for p in prompts if p.prompt_id in reference.exploration]
    mastered = frozenset[str]() if reference is None or not config.num_replayed else reference.near_perfect
    replayed = [p for p in prompts if p.prompt_id in mastered]
    with closing(StepCollector(config, exploration, parts, replayed)) as collector:
        for step in range(start_step, config.learner.num_steps):
            current_step.set(step + 1)
            clock = StepClock()
            # Completions that are given up are sampled again by the run that goes on. An update is never cut off.
            rollouts = await stop.unless_stopped(collector.collect(step), by=[SIGTERM])
            rehearsal = await rehearse(config, reference, step)
            batch = make_batch(config, step, parts.learner.policy_version, rollouts.groups, rehearsal)
            with clock.lap("learn"):
                learned = await parts.learner.update(batch)
            with clock.lap("sync"):
                synced = await parts.rollouts.refit(parts.learner)
            told = (rollouts.metrics, learned, synced, clock.stop(), parts.drain_metrics())
            await observer.after_step(step + 1, step_metrics(batch, rollouts.sampled, *told), rollouts.sampled, batch)
            stop.check()


async def rehearse(config: Config, reference: ReferenceStore | None, step: int) -> Sequence[ReferenceSample]:
    """The stored answers of the initial policy that this step rehearses; none without `reference`, nor where its split
    is all that the run uses."""
    if reference is None or not config.uses_reference_samples:
        return []
    return await reference.sample(step, config.reference.rows_per_step)
