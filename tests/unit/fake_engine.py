"""The working side of a stand-in for an engine: what it is asked for is finished at once, or when the test says so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from actors.asks import Answer, Ask
from dphrl.types import Completion, Prompt

Complete = Callable[[Ask, int], Completion]


class FakeWork:
    """Methods as a Ray handle has them: `submit`, `finished`, `abort` and `probe`.

    complete: makes the completion of an ask's sample. at_once: how many it decodes at a time; between two of them it
    gives others their turn, for step_s seconds. forgets: (prompt_id, sample_index) of answers that are lost on their
    way, once. error: it is dead, and all calls raise this. hangs: it decodes nothing.
    """

    def __init__(self, complete: Complete, at_once: int = 1, step_s: float = 0.0) -> None:
        self.complete, self.at_once, self.step_s = complete, at_once, step_s
        self.hangs = False
        self.asked: list[Ask] = []
        self.aborted: list[int] = []
        self.error: Exception | None = None
        self.forgets: set[tuple[str, int]] = set()
        self._waiting: deque[tuple[str, Ask, int]] = deque()
        self.done: dict[str, list[Answer]] = {}
        self._decoding: asyncio.Task[None] | None = None
        for name in ("submit", "finished", "abort", "probe"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _submit(self, owner: str, asks: Sequence[Ask]) -> None:
        if self.error is not None:
            raise self.error
        self.asked += asks
        self._waiting += [(owner, ask, i) for ask in asks for i in ask.sample_indices]
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode())

    async def _decode(self) -> None:
        while self._waiting and self.error is None:
            await asyncio.sleep(self.step_s)
            if self.hangs:
                return
            for _ in range(min(self.at_once, len(self._waiting))):
                owner, ask, i = self._waiting.popleft()
                if (ask.prompt.prompt_id, i) in self.forgets:
                    self.forgets.remove((ask.prompt.prompt_id, i))
                    continue
                self.done.setdefault(owner, []).append((ask.call, self.complete(ask, i)))

    async def _finished(self, owner: str, num_seen: int) -> list[Answer]:
        while not (found := self.done.get(owner, [])[num_seen:]):
            if self.error is not None:
                raise self.error
            await asyncio.sleep(min(self.step_s, 0.1))
        return found

    def _abort(self, owner: str, call: int) -> None:
        # At once, as Ray sends a call that nobody waits for.
        self.aborted.append(call)
        self._waiting = deque(job for job in self._waiting if job[1].call != call)

    async def _probe(self, prompts: Sequence[Prompt], seed: int, max_tokens: int) -> list[Completion]:
        await asyncio.sleep(0)
        return [self.complete(Ask(-1, prompt, (0,), seed), 0) for prompt in prompts]
