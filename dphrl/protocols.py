"""What the training loop needs from its surroundings, and nothing more.

`dphrl.inline` implements these protocols in one process; `actors` and `cluster.ray_system` implement them over Ray. The
loop cannot tell which of the two it runs on.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dphrl.config.schema import Config
from dphrl.tracking.sinks import Sink
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RolloutGroup, TokenScores, TrainBatch

# Some of a learner's weights, in a form that only the engines of the same system can read.
WeightChunk = object
# What a sync sent, in a form that only the engines of the same system can compare with what they received.
SentWeights = object


@dataclass(frozen=True)
class LastUpdate:
    """grad_norm: before clipping, mean over the update's optimizer steps. learning_rate: of all of them."""

    grad_norm: float
    learning_rate: float

    @property
    def must_change_weights(self) -> bool:
        """False for an update that was skipped for its gradient, or had none, or no rate."""
        return math.isfinite(self.grad_norm) and self.grad_norm > 0 and self.learning_rate > 0


class LearnerLostError(RuntimeError):
    """The learner cannot go on as it is: a part of it died, hangs or lost the others. One line: which, where, why.

    `System.restart_learner` brings up another in its place.
    """


class EnginesLostError(RuntimeError):
    """Rollout engines failed, and the run cannot or may not go on without them. One line: the last one, and why."""


class OnGraded(Protocol):
    """Called with the number of completions that were graded, and of their tokens."""

    def __call__(self, num_completions: int, num_tokens: int, /) -> None: ...


class WeightPublisher(Protocol):
    """What a refit needs from a learner: its weights, their version, and its log-probs of what the engines sample."""

    @property
    def policy_version(self) -> int:
        """Number of `update` calls behind the present weights; 0 is the initial policy."""
        ...

    @property
    def last_update(self) -> LastUpdate | None:
        """The update that made the present weights; None for weights of the start or of a checkpoint."""
        ...

    def publish(self) -> AsyncIterator[WeightChunk]:
        """The present weights in chunks, each as soon as it is ready and as long as somebody holds it.

        No chunks when engines share the weights.
        """
        ...

    async def sent(self) -> SentWeights:
        """What the last sync sent, by the learner's own count."""
        ...

    async def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        """Log-probs of the completion tokens of each (token_ids, num_prompt_tokens), at the sampling temperature."""
        ...


class Learner(WeightPublisher, Protocol):
    """Owns the trainable policy. Every call is a collective over its ranks, and may raise LearnerLostError."""

    @property
    def dtype(self) -> str:
        """dtype of the weights in the process that holds them, e.g. float32; part of the reference fingerprint."""
        ...

    @property
    def layout(self) -> str:
        """Kind, ranks, sharding. A learner of another layout goes on from a checkpoint up to rounding, of the same one
        to the bit."""
        ...

    async def measure(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[TokenScores]:
        """What `score` gives, and with it the entropies of the distributions that the tokens were drawn from."""
        ...

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step per mini-batch; returns metrics and increases policy_version by one."""
        ...

    async def copy_state(self) -> int:
        """Copy what a checkpoint holds, so that it can be written while the training goes on.

        Returns its bytes on disk. A copy is let go of as it is written; the next one takes its place.
        """
        ...

    async def write_state(self, folder: Path) -> dict[str, str]:
        """Write the copied masters and moments below `folder`, through to the disk.

        Returns the SHA-256 of each file by its path in `folder`. It and `write_export` may run beside all other calls.
        """
        ...

    async def write_export(self, folder: Path) -> None:
        """Write the copied weights as a Hugging Face directory, `folder/hf`; call it after `write_state`."""
        ...

    async def load(self, folder: Path, policy_version: int, *, weights_only: bool = False) -> None:
        """Restore what `write_state` wrote, by this learner or one of another layout. policy_version: of the weights.

        weights_only: the optimizer starts anew. Raises InputError when the state is another model's.
        """
        ...

    async def digest(self) -> str:
        """A hash of weights and optimizer state as the ranks hold them; learners of one layout can be compared."""
        ...


class RolloutPool(Protocol):
    """Engines that sample. A new or restarted engine serves nothing until it is refit."""

    async def refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        """Bring every engine to the learner's weights and version; returns sync metrics.

        Raises RuntimeError when an engine does not agree with the learner afterwards.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncGenerator[Sequence[Completion], None]:
        """Yield completions as they finish, in any order; calls may overlap. Closing it gives up what is not finished.

        Of calls that wait for engines, those of a lower `priority` come first. Each completion is a function of the
        weights, its prompt, its sample_index and `seed`, up to rounding, whatever else is asked for with it.
        """
        ...

    def drain_metrics(self) -> Mapping[str, float]:
        """`rollout/engine/...` speeds since the last call, evaluations included. Empty in inline mode."""
        ...


class RewardPool(Protocol):
    """Graders. They are safe for any text: no completion's content makes them raise."""

    async def grade(self, items: Sequence[tuple[Prompt, Completion]]) -> list[RewardResult]:
        """One result per item, same order. Retries infrastructure errors before it reports them."""
        ...

    def drain_metrics(self) -> Mapping[str, float]:
        """`reward/...` latencies and retries since the last call; empty when nothing was graded."""
        ...


class ReferenceStore(Protocol):
    """The reference buffer: filled once, read every step."""

    @property
    def near_perfect(self) -> frozenset[str]:
        """prompt_ids of D_pef, known once filled."""
        ...

    @property
    def exploration(self) -> frozenset[str]:
        """prompt_ids of D_exp, known once filled."""
        ...

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        """The rows of `step` (from 0): a pure function of (seed, step), so that a resumed run sees the same rows."""
        ...


class WholeReference(ReferenceStore, Protocol):
    """A reference buffer in this process's memory, from which another store can be filled."""

    @property
    def samples(self) -> Sequence[ReferenceSample]:
        """Every stored sample, in the order that `schedule_seed` permutes."""
        ...

    @property
    def schedule_seed(self) -> int:
        """The seed of the order in which steps see the samples."""
        ...


@dataclass(frozen=True)
class Parts:
    """The parts of a running system, as protocols."""

    learner: Learner
    rollouts: RolloutPool
    rewards: RewardPool

    def drain_metrics(self) -> dict[str, float]:
        """The learner's present version, and what engines and graders measured since the last call."""
        version = {"policy_version": self.learner.policy_version}
        return {**version, **self.rollouts.drain_metrics(), **self.rewards.drain_metrics()}


class System(Protocol):
    """A place to run: one process, or a Ray cluster. All methods but `sinks` need the parts that `start` brings up."""

    async def start(self, on_ready: Callable[[str], None]) -> Parts:
        """Wait until every part is up, and call on_ready with a line about each. The engines are not refit yet."""
        ...

    def listen(self, folder: Path) -> AbstractAsyncContextManager[None]:
        """While a training runs in this block, it takes orders through its folder, such as for more engines."""
        ...

    async def fill_reference(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, on_graded: OnGraded
    ) -> tuple[ReferenceStore, Mapping[str, float]]:
        """Run the reference stage, or what is left of it, into `folder`; returns the store and the split's counts.

        The engines must hold the initial policy. on_graded: of completions newly graded; with reference.confirm, a
        confirming answer that is not needed counts as one, of no tokens.
        """
        ...

    async def adopt_reference(self, buffer: WholeReference, folder: Path) -> ReferenceStore:
        """Make a store of a buffer that an earlier reference stage filled. folder: where it is on disk."""
        ...

    def sinks(self) -> list[Sink]:
        """Sinks that this place of running adds, such as Prometheus on a Ray cluster."""
        ...

    async def restart_learner(self, on_ready: Callable[[str], None]) -> None:
        """End what is left of the learner and bring up another, which holds the initial policy at version 0.

        The parts that `start` returned go on with it; the engines are not refit yet. on_ready: as in `start`, and for
        what is waited for. Raises when no other comes up.
        """
        ...

    def renew_learner(self, config: Config) -> bool:
        """Go on with another configuration: make a fresh learner, keep the engines and graders.

        Returns False, and changes nothing, when the new configuration needs other engines or graders, or when the
        system has none that it could keep.
        """
        ...


class StepObserver(Protocol):
    """What happens around the steps: tracking, checkpoints, evaluation."""

    async def after_step(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup], batch: TrainBatch
    ) -> None:
        """step: from 1. metrics: the step's record. groups: every group that the step sampled. batch: what the learner
        was given, and has made its present weights of."""
        ...
