"""What the training loop needs from the world, and nothing more.

`dphrl.inline` implements these in one process; `actors.pools` implements them over Ray. The loop cannot tell.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, TrainBatch


class Learner(Protocol):
    """Owns the trainable policy. Every call is a collective over its ranks."""

    @property
    def policy_version(self) -> int:
        """Number of `update` calls behind the present weights; 0 is the initial policy."""
        ...

    @property
    def dtype(self) -> str:
        """Of the weights where they are, e.g. float32; part of the reference fingerprint."""
        ...

    @property
    def layout(self) -> str:
        """What a checkpoint must be restored into: kind, ranks, sharding."""
        ...

    async def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        """Log-probs of completion tokens of (token_ids, num_prompt_tokens) at the sampling temperature."""
        ...

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step per mini-batch; returns metrics and raises policy_version by one."""
        ...

    async def save(self, folder: Path) -> None:
        """Write model and optimizer state below `folder`, and a Hugging Face export in `folder/hf`."""
        ...

    async def load(self, folder: Path, policy_version: int) -> None:
        """Restore what `save` wrote."""
        ...


class RolloutPool(Protocol):
    """Engines that sample. An engine that was never refit, or was restarted, serves nothing until it is."""

    async def refit(self, learner: Learner) -> Mapping[str, float]:
        """Bring every engine to the learner's weights and version; returns sync metrics."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False
    ) -> AsyncIterator[Sequence[Completion]]:
        """Yield completions as they finish, in any order; `seed` decides them where the engine is deterministic."""
        ...

    def drain_metrics(self) -> Mapping[str, float]:
        """`rollout/engine/...` speeds since the last call, evaluations included; empty where there is one process."""
        ...


class RewardPool(Protocol):
    """Graders. Safe for any text; never raises for what a completion holds."""

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
        """The rows of a step: a pure function of (seed, step), so that a resumed run sees the same ones."""
        ...
