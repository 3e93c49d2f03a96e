"""How much work one engine has, and how fast it does it, as the driver sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dphrl.types import Completion


@dataclass(frozen=True)
class Speed:
    """Of one engine, since it was asked before. tokens_per_s: while it had work. busy_fraction: of the time, in which
    it had work."""

    tokens_per_s: float
    busy_fraction: float


class EngineLoad:
    """Counts the completions that an engine has to return, and the tokens and working time since the last `drain`.

    Only the event loop changes an object, but any thread may read `num_pending`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_pending = 0
        self._clock = clock
        self._num_tokens, self._busy_s = 0, 0.0
        self._since = self._drained = clock()

    def take(self, num_completions: int) -> None:
        """The engine was handed this much work."""
        self._take_time()
        self.num_pending += num_completions

    def deliver(self, completions: Sequence[Completion]) -> None:
        """These came back."""
        self._num_tokens += sum(len(completion.token_ids) for completion in completions)
        self.drop(len(completions))

    def drop(self, num_completions: int) -> None:
        """So much work is the engine's no longer."""
        self._take_time()
        self.num_pending -= num_completions

    def drain(self) -> Speed | None:
        """The engine's speed since the last call; None when it had no work."""
        self._take_time()
        num_tokens, busy_s, began = self._num_tokens, self._busy_s, self._drained
        self._num_tokens, self._busy_s, self._drained = 0, 0.0, self._since
        return Speed(num_tokens / busy_s, busy_s / (self._since - began)) if busy_s > 0 else None

    def _take_time(self) -> None:
        now = self._clock()
        if self.num_pending:
            self._busy_s += now - self._since
        self._since = now
