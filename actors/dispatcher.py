"""One queue of work before all engines: who gets what next, and whose completions come back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field, replace

from actors.asks import Answer, Ask
from actors.engine_load import EngineLoad
from actors.waiting import Actor
from dphrl.types import Completion, Prompt

# An engine is handed this many times what it decodes at once, so that it has the next completion there when one ends.
FILL = 1.5
# Parts into which a call's work is cut for each engine at least, where its prompts allow: small enough to even out.
PARTS_PER_ENGINE = 4
# While so many completions wait for their readers, no more are asked for, so that a slow reward does not fill the
# driver's memory.
MAX_UNREAD = 4096


@dataclass
class Call:
    """One call of the pool's `generate`. num_missing: completions that have not come back. priority: work of a lower
    number is handed out first. delivered: what has come back, or the error that ended the call. num_unread: completions
    in it."""

    number: int
    num_missing: int
    priority: int = 0
    num_unread: int = 0
    delivered: deque[list[Completion] | Exception] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def deliver(self, found: list[Completion] | Exception) -> None:
        self.delivered.append(found)
        self.arrived.set()


class Lengths:
    """How many tokens a prompt's completions may be expected to have, by those it had."""

    def __init__(self) -> None:
        self._mean: dict[str, float] = {}
        self._num_seen, self._total = 0, 0.0

    def see(self, completion: Completion) -> None:
        length = float(len(completion.token_ids))
        before = self._mean.get(completion.prompt_id, length)
        self._mean[completion.prompt_id] = (before + length) / 2  # later ones are of a policy closer to the present
        self._num_seen, self._total = self._num_seen + 1, self._total + length

    def of(self, prompt_id: str) -> float:
        """In tokens; the mean of all for a prompt without completions."""
        return self._mean.get(prompt_id, self._total / self._num_seen if self._num_seen else 0.0)


class Dispatcher:
    """Hands work to the engines a little ahead of what they decode, and completions to the calls that they belong to.

    Calls of a lower priority number come first, those of one number in the order in which they came, and within a call
    those prompts whose completions may be expected to be long. engines: the pool's own list, in which a replaced engine
    changes; loads: of the same engines. One that fails ends all calls, but for one that fails while it is being
    replaced.
    """

    def __init__(
        self,
        engines: Sequence[Actor],
        loads: MutableSequence[EngineLoad],
        concurrency: int,
        *,
        all_at_once: bool = False,
    ) -> None:
        """concurrency: completions that an engine decodes at once. all_at_once: hand over all of a call when it comes,
        whatever its priority, so that no engine's speed decides which completions it decodes side by side."""
        self._engines, self._loads = engines, loads
        self._concurrency = concurrency
        self._limit = math.inf if all_at_once else max(concurrency + 1, int(FILL * concurrency))
        self._owner = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._lengths = Lengths()
        self._queues: defaultdict[int, deque[Ask]] = defaultdict(deque)  # by priority
        self._calls: dict[int, Call] = {}
        self._at: list[dict[tuple[int, str, int], Ask]] = [{} for _ in engines]
        self._num_seen = [0] * len(engines)
        self._listening: list[asyncio.Task[None] | None] = [None] * len(engines)
        self._sending: set[asyncio.Task[None]] = set()
        self._paused = False
        self._last_news = time.monotonic()
        self._lost: dict[int, Exception] = {}
        self._idle: asyncio.Event | None = None

    @property
    def num_waiting(self) -> int:
        """Prompts, or parts of them, that no engine has been handed yet."""
        return sum(map(len, self._queues.values()))

    # ---------------------------------------------------------------------------------- calls

    def open(self, prompts: Sequence[Prompt], num_samples: int, seed: int, *, greedy: bool, priority: int = 0) -> Call:
        """Queue a call's work. Close the call in the end, also when all has come back."""
        call = Call(next(self._numbers), len(prompts) * num_samples, priority)
        if not self._calls:
            self._last_news = time.monotonic()
        self._calls[call.number] = call
        size = self._part_size(len(prompts) * num_samples, num_samples)
        longest_first = sorted(prompts, key=lambda prompt: -self._lengths.of(prompt.prompt_id))
        self._queues[priority] += [
            Ask(call.number, prompt, tuple(range(start, min(start + size, num_samples))), seed, greedy)
            for prompt in longest_first
            for start in range(0, num_samples, size)
        ]
        self._hand_out()
        return call

    async def read(self, call: Call, limit_s: float) -> list[Completion]:
        """The next completions of the call, as they finish.

        Raises what an engine raised, and TimeoutError when for limit_s seconds no engine has finished anything. A call
        may wait for longer, because others are before it.
        """
        while not call.delivered:
            # Nobody finishes anything while weights change; that has limits of its own.
            since = time.monotonic() if self._paused else self._last_news
            left_s = since + limit_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"waited {limit_s:g} s (rollout.timeout_s) for a completion")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.arrived.wait(), left_s)
            call.arrived.clear()
        completions = call.delivered.popleft()
        if isinstance(completions, Exception):
            raise completions
        call.num_unread -= len(completions)
        self._hand_out()
        return completions

    def close(self, call: Call) -> None:
        """Forget what has not come back."""
        del self._calls[call.number]
        if call.num_missing:
            self._take_from_engines(call)
        self._hand_out()

    def _take_from_engines(self, call: Call) -> None:
        self._queues[call.priority] = deque(ask for ask in self._queues[call.priority] if ask.call != call.number)
        for index, at in enumerate(self._at):
            gone = [key for key in at if key[0] == call.number]
            for key in gone:
                del at[key]
            self._loads[index].drop(len(gone))
            if gone and index not in self._lost:
                # Nobody waits for it: the call is over, perhaps because this engine is.
                self._engines[index].abort.remote(self._owner, call.number)

    def _part_size(self, num_completions: int, num_samples: int) -> int:
        # An engine reads a prompt once for all completions that it makes of it, so a prompt's stay together.
        even = -(-num_completions // (PARTS_PER_ENGINE * len(self._engines)))
        return max(1, min(num_samples, even, self._concurrency))

    # ---------------------------------------------------------------------------------- engines

    def pause(self) -> None:
        """Hand nothing out until `resume`. Engines go on with what they have."""
        self._paused = True

    def resume(self) -> None:
        """Hand work out again. Calls end when an engine was lost meanwhile and not replaced."""
        self._paused, self._last_news = False, time.monotonic()
        lost, self._lost = self._lost, {}
        for error in lost.values():
            self._end_calls(error)
        self._hand_out()

    async def drained(self) -> None:
        """Returns when engines have nothing left. While paused, that is when they end what they have been handed."""
        while any(self._at):
            self._idle = self._idle or asyncio.Event()
            await self._idle.wait()

    def replaced(self, index: int) -> None:
        """Another engine is in this place: what the one before was at is handed out again, first of its priority."""
        self._lost.pop(index, None)
        if (listening := self._listening[index]) is not None:
            listening.cancel()
        self._listening[index], self._num_seen[index] = None, 0
        for ask in reversed(self._take_back(index)):
            self._queues[self._calls[ask.call].priority].appendleft(ask)

    def _take_back(self, index: int) -> list[Ask]:
        at, self._at[index] = self._at[index], {}
        self._loads[index].drop(len(at))
        left: dict[int, tuple[Ask, list[int]]] = {}
        for (_, _, sample_index), ask in at.items():
            left.setdefault(id(ask), (ask, []))[1].append(sample_index)
        return [replace(ask, sample_indices=tuple(missing)) for ask, missing in left.values()]

    def _hand_out(self) -> None:
        batches: dict[int, list[Ask]] = {}
        if self._paused or sum(call.num_unread for call in self._calls.values()) >= MAX_UNREAD:
            return
        while queue := self._first_queue():
            index = min(range(len(self._engines)), key=lambda i: self._loads[i].num_pending)
            if self._loads[index].num_pending >= self._limit:
                break
            ask = queue.popleft()
            batches.setdefault(index, []).append(ask)
            self._loads[index].take(ask.num_completions)
            self._at[index].update({(ask.call, ask.prompt.prompt_id, i): ask for i in ask.sample_indices})
        for index, asks in batches.items():
            sending = asyncio.create_task(self._send(index, self._engines[index], asks))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    def _first_queue(self) -> deque[Ask] | None:
        """That of the lowest priority number; None when nothing waits."""
        for priority in sorted(self._queues):
            if self._queues[priority]:
                return self._queues[priority]
            del self._queues[priority]
        return None

    async def _send(self, index: int, engine: Actor, asks: list[Ask]) -> None:
        try:
            await engine.submit.remote(self._owner, asks)
        except Exception as error:
            self._lose(index, engine, error)
            return
        listening = self._listening[index]
        # That of an event loop before is done: it ended with its loop.
        if listening is None or listening.done():
            self._listening[index] = asyncio.create_task(self._listen(index))

    async def _listen(self, index: int) -> None:
        engine = self._engines[index]
        try:
            while self._at[index]:
                answers: list[Answer] = await engine.finished.remote(self._owner, self._num_seen[index])
                self._num_seen[index] += len(answers)
                self._take(index, answers)
        except Exception as error:
            self._lose(index, engine, error)

    def _take(self, index: int, answers: Iterable[Answer]) -> None:
        self._last_news = time.monotonic()
        by_call: dict[int, list[Completion]] = {}
        for number, completion in answers:
            key = number, completion.prompt_id, completion.sample_index
            # One of a closed call is nobody's.
            if self._at[index].pop(key, None) is not None:
                by_call.setdefault(number, []).append(completion)
                self._lengths.see(completion)
        for number, completions in by_call.items():
            self._loads[index].deliver(completions)
            call = self._calls[number]
            call.num_missing -= len(completions)
            call.num_unread += len(completions)
            call.deliver(completions)
        self._hand_out()
        if self._idle is not None and not any(self._at):
            self._idle.set()
            self._idle = None

    def _lose(self, index: int, engine: Actor, error: Exception) -> None:
        if engine is not self._engines[index]:
            return  # it has a successor already
        self._lost[index] = error
        if not self._paused:
            self._end_calls(error)

    def _end_calls(self, error: Exception) -> None:
        for call in self._calls.values():
            call.deliver(error)
