"""What a pool asks of an engine, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass

from dphrl.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Ask:
    """Completions of one prompt, for one call of the pool.

    call: the call's number, by which a pool tells its calls apart. seed: the call's; an engine makes of it one for each
    completion. num_losses: engines that failed while they were at it. num_late:
    deadlines that passed without it.
    """

    call: int
    prompt: Prompt
    sample_indices: tuple[int, ...]
    seed: int
    greedy: bool = False
    num_losses: int = 0
    num_late: int = 0

    @property
    def num_completions(self) -> int:
        return len(self.sample_indices)


# A completion, with the number of the call that asked for it.
Answer = tuple[int, Completion]
