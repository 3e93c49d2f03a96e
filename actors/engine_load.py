"""How much work one engine has, and how fast it does it, as the driver sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dphrl.types import Completion


class EngineLoad:
    """Counts the completions that an engine has to return, and the tokens and working time since the last `drain`.

    A helping is work that is handed over in one call. Helpings may overlap, for example an evaluation and the next
    step's rollouts; time in which they overlap counts once. Only the event loop changes an object, but any thread may
    read `num_pending`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_pending = 0
        self._clock = clock
        self._num_open = self._num_tokens = 0
        self._busy_s = self._since = 0.0

    @contextmanager
    def helping(self, num_completions: int) -> Iterator[Callable[[Sequence[Completion]], None]]:
        """Count a helping until the block ends. Yields the function to call with every delivery."""
        left = num_completions
        self._take_time()
        self._num_open += 1
        self.num_pending += left

        def deliver(completions: Sequence[Completion]) -> None:
            nonlocal left
            left -= len(completions)
            self.num_pending -= len(completions)
            self._num_tokens += sum(len(completion.token_ids) for completion in completions)

        try:
            yield deliver
        finally:
            self._take_time()
            self._num_open -= 1
            self.num_pending -= left

    def drain(self) -> float | None:
        """Tokens per second of work since the last call; None when the engine had no work."""
        self._take_time()
        num_tokens, busy_s = self._num_tokens, self._busy_s
        self._num_tokens, self._busy_s = 0, 0.0
        return num_tokens / busy_s if busy_s > 0 else None

    def _take_time(self) -> None:
        now = self._clock()
        if self._num_open:
            self._busy_s += now - self._since
        self._since = now
