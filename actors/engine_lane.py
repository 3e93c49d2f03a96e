"""What one engine has been handed and has not returned, and since when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

from actors.asks import Answer, Ask
from actors.engine_load import EngineLoad
from actors.waiting import Actor
from dphrl.types import Completion

Key = tuple[int, str, int]  # a call's number, a prompt_id, a sample_index


@dataclass(slots=True)
class Handed:
    """The ask that a completion belongs to. since: when the engine can have begun it, once that was seen."""

    ask: Ask
    since: float | None = None


class Lane:
    """One engine's part of the work.

    num_seen: answers that it has given. num_late: completions that passed their deadline while it returned nothing at
    all. listening: the task that waits for its answers.
    """

    def __init__(self, engine: Actor, num_at_once: int) -> None:
        """num_at_once: completions that it may be at; what it has been handed beyond that waits in it."""
        self.engine, self.load = engine, EngineLoad()
        self.num_seen = self.num_late = 0
        self.listening: asyncio.Task[None] | None = None
        self._num_at_once = num_at_once
        self._at: dict[Key, Handed] = {}  # in the order in which they were handed over
        self._silent_since = 0.0

    def __bool__(self) -> bool:
        """Whether anything is there that it has not returned."""
        return bool(self._at)

    def hand(self, ask: Ask, now: float) -> None:
        if not self._at and not self.num_late:
            self._silent_since = now
        self.load.take(ask.num_completions)
        self._at.update({(ask.call, ask.prompt.prompt_id, i): Handed(ask) for i in ask.sample_indices})

    def receive(self, answers: Iterable[Answer], now: float) -> dict[int, list[Completion]]:
        """The completions among `answers` that it owes, by call. Others are nobody's: their call is closed, or they
        were asked of another engine since."""
        self._silent_since, self.num_late = now, 0
        by_call: dict[int, list[Completion]] = {}
        for number, completion in answers:
            if self._at.pop((number, completion.prompt_id, completion.sample_index), None) is not None:
                by_call.setdefault(number, []).append(completion)
        for completions in by_call.values():
            self.load.deliver(completions)
        return by_call

    def drop_call(self, number: int) -> int:
        """Forget what it has of one call; returns how many completions that is."""
        gone = [key for key in self._at if key[0] == number]
        self._drop(gone)
        return len(gone)

    def take_back(self, *, failed: bool) -> list[Ask]:
        """All that it has not returned, to be asked of others. failed: whether it may be the work that broke it."""
        begun = set(list(self._at)[: self._num_at_once]) if failed else set()
        return self._drop(list(self._at), begun)

    def silent_s(self, now: float) -> float:
        """Seconds for which it had work and returned nothing."""
        return now - self._silent_since if self._at else 0.0

    def take_late(self, now: float, limit_s: float) -> list[Ask]:
        """What it had for longer than limit_s without returning it, although it can have been at it.

        The limit doubles each time: an engine that is only slower than the limit should not start anew for ever.
        """
        late: list[Key] = []
        for key, handed in list(self._at.items())[: self._num_at_once]:
            if handed.since is None:
                handed.since = now
            elif now - handed.since > limit_s * 2**handed.ask.num_late:
                late.append(key)
        if self.silent_s(now) > limit_s:
            self.num_late += len(late)
        return [replace(ask, num_late=ask.num_late + 1) for ask in self._drop(late)]

    def _drop(self, keys: Iterable[Key], begun: Iterable[Key] = ()) -> list[Ask]:
        """The asks for what is dropped: each with what is missing of it only."""
        left: dict[tuple[int, bool], tuple[Ask, list[int]]] = {}
        num_dropped = 0
        for key in keys:
            ask = self._at.pop(key).ask
            left.setdefault((id(ask), key in begun), (ask, []))[1].append(key[2])
            num_dropped += 1
        self.load.drop(num_dropped)
        return [
            replace(ask, sample_indices=tuple(missing), num_losses=ask.num_losses + lost)
            for (_, lost), (ask, missing) in left.items()
        ]
