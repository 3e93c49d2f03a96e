"""One queue of work before all engines: who gets what next, and whose completions come back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.asks import Answer, Ask
from actors.engine_lane import Lane
from actors.engine_load import EngineLoad
from actors.lengths import Lengths
from actors.waiting import Actor, limited
from dphrl.types import Completion, Prompt

# An engine is handed this many times what it decodes at once, so that it has the next completion there when one ends.
FILL = 1.5
# Parts into which a call's work is cut for each engine at least, where its prompts allow: small enough to even out.
PARTS_PER_ENGINE = 4
# While so many completions wait for their readers, no more are asked for, so that a slow reward does not fill the
# driver's memory.
MAX_UNREAD = 4096
# A completion may be late because a message was lost. An engine hangs when it returns nothing at all while so many are
# late, or for so many times the deadline.
MAX_LATE = 3
# Deadlines are looked at so often while one of them passes, and every so many seconds at least.
CHECKS_PER_DEADLINE = 10
MAX_CHECK_INTERVAL_S = 5.0
# An ask that was with more engines than this when they failed may be what breaks them, and would break the next.
MAX_LOSSES = 3

log = logging.getLogger(__name__)
OnFailure = Callable[[int, Actor, Exception], None]


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


class Dispatcher:
    """Hands work to the engines a little ahead of what they decode, and completions to the calls that they belong to.

    Calls of a lower priority number come first, those of one number in the order in which they came, and within a call
    those prompts whose completions may be expected to be long. What an engine that is lost was at, and a completion
    that an engine keeps for too long, is asked of another; what comes back twice is delivered once.
    """

    def __init__(
        self,
        concurrency: int,
        on_failure: OnFailure,
        *,
        deadline_s: float = math.inf,
        all_at_once: bool = False,
    ) -> None:
        """concurrency: completions that an engine decodes at once. on_failure: called with an engine's number, the
        engine and the error when it fails or hangs; it has to call `lose`. deadline_s: in which an engine must return a
        completion that it is at. all_at_once: hand over all of a call when it comes, whatever its priority, so that no
        engine's speed decides which completions it decodes side by side."""
        self._concurrency, self._on_failure, self.deadline_s = concurrency, on_failure, deadline_s
        self._ahead = max(concurrency + 1, int(FILL * concurrency))
        self._limit = math.inf if all_at_once else self._ahead
        self._owner = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._lengths = Lengths()
        self._queues: defaultdict[int, deque[Ask]] = defaultdict(deque)  # by priority
        self._calls: dict[int, Call] = {}
        self._lanes: dict[int, Lane] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._paused = False
        self._last_news = self._last_check = time.monotonic()
        # Deadlines do not run while weights change: since when they stand, and for how long they stood before.
        self._standing_since: float | None = None
        self._stood_s = 0.0
        self._idle: asyncio.Event | None = None
        self.num_resubmitted = 0  # completions that were asked of an engine again

    @property
    def num_waiting(self) -> int:
        """Prompts, or parts of them, that no engine has been handed yet."""
        return sum(map(len, list(self._queues.values())))

    @property
    def loads(self) -> dict[int, EngineLoad]:
        """Of the present engines, by number. Any thread may ask."""
        return {index: lane.load for index, lane in list(self._lanes.items())}

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

        Raises what ended the calls, and TimeoutError when for limit_s seconds no engine has finished anything. A call
        may wait for longer, because others are before it.
        """
        while not call.delivered:
            # Nobody finishes anything while weights change or an engine starts; these have limits of their own.
            since = time.monotonic() if self._paused or not self._lanes else self._last_news
            left_s = since + limit_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"waited {limit_s:g} s (rollout.timeout_s) for a completion")
            with contextlib.suppress(TimeoutError):
                await limited(call.arrived.wait(), min(left_s, self._check_interval_s))
            call.arrived.clear()
            self._check_deadlines()
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

    def end(self, error: Exception) -> None:
        """End all calls with this error."""
        for call in self._calls.values():
            call.deliver(error)

    def _take_from_engines(self, call: Call) -> None:
        self._queues[call.priority] = deque(ask for ask in self._queues[call.priority] if ask.call != call.number)
        for lane in self._lanes.values():
            if lane.drop_call(call.number):
                # Nobody waits for it: the call is over.
                lane.engine.abort.remote(self._owner, call.number)

    def _part_size(self, num_completions: int, num_samples: int) -> int:
        # An engine reads a prompt once for all completions that it makes of it, so a prompt's stay together.
        even = -(-num_completions // (PARTS_PER_ENGINE * max(1, len(self._lanes))))
        return max(1, min(num_samples, even, self._concurrency))

    # ---------------------------------------------------------------------------------- engines

    def add(self, index: int, engine: Actor) -> None:
        """An engine that gets work from now on."""
        self._lanes[index] = Lane(engine, self._ahead)
        self._hand_out()

    def lose(self, index: int, failure: str = "") -> int:
        """An engine that gets no more work; what it was at is handed out again, first of its priority.

        Returns the number of these completions. failure: why it failed, if it did: the work may be the cause, so an ask
        with which too many engines failed ends its call.
        """
        lane = self._lanes.pop(index, None)
        if lane is None:
            return 0
        if lane.listening is not None and lane.listening is not asyncio.current_task():
            lane.listening.cancel()
        asks = lane.take_back(failed=bool(failure))
        self._last_news = time.monotonic()
        self._ask_again(asks, failure)
        self._tell_if_idle()
        return sum(ask.num_completions for ask in asks)

    def pause(self) -> None:
        """Hand nothing out until `resume`. Engines go on with what they have."""
        self._paused, self._standing_since = True, time.monotonic()

    def resume(self) -> None:
        """Hand work out again."""
        self._run_deadlines()
        self._paused, self._last_news = False, time.monotonic()
        self._hand_out()

    async def drained(self) -> None:
        """Returns when engines have nothing left. While paused, that is when they end what they have been handed."""
        self._run_deadlines()
        while any(self._lanes.values()):
            self._idle = self._idle or asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await limited(self._idle.wait(), self._check_interval_s)
            self._check_deadlines()
        if self._paused:
            self._standing_since = time.monotonic()

    def _run_deadlines(self) -> None:
        if self._standing_since is not None:
            self._stood_s += time.monotonic() - self._standing_since
            self._standing_since = None

    @property
    def _now(self) -> float:
        return (time.monotonic() if self._standing_since is None else self._standing_since) - self._stood_s

    @property
    def _check_interval_s(self) -> float:
        return min(MAX_CHECK_INTERVAL_S, self.deadline_s / CHECKS_PER_DEADLINE)

    def _check_deadlines(self) -> None:
        now = self._now
        if now - self._last_check < self._check_interval_s / 2:
            return
        self._last_check = now
        for index, lane in list(self._lanes.items()):
            late = lane.take_late(now, self.deadline_s)
            if late:
                self._last_news = time.monotonic()
                self._tell_late(index, sum(ask.num_completions for ask in late))
            if lane.num_late >= MAX_LATE or lane.silent_s(now) > MAX_LATE * self.deadline_s:
                error = TimeoutError(f"it returned nothing for {self.deadline_s:g} s (rollout.completion_timeout_s)")
                self._on_failure(index, lane.engine, error)
            self._ask_again(late)

    def _tell_late(self, index: int, num_late: int) -> None:
        facts = {"engine": index, "num_resubmitted": num_late, "deadline_s": self.deadline_s}
        log.warning(
            "rollout engine %d did not return %d completion(s) within %g s (rollout.completion_timeout_s); they are "
            "asked for again",
            *(index, num_late, self.deadline_s),
            extra={"event": "completion_redispatched", "facts": facts},
        )

    # ---------------------------------------------------------------------------------- work

    def _ask_again(self, asks: Sequence[Ask], failure: str = "") -> None:
        for ask in reversed(asks):
            call = self._calls[ask.call]
            if ask.num_losses > MAX_LOSSES:
                told = f"{ask.num_losses} engines failed while they were at prompt {ask.prompt.prompt_id}"
                call.deliver(RuntimeError(f"{told}, so it may be the cause; the last one: {failure}"))
                continue
            self._queues[call.priority].appendleft(ask)
            self.num_resubmitted += ask.num_completions
        self._hand_out()

    def _hand_out(self) -> None:
        batches: dict[int, list[Ask]] = {}
        if self._paused or not self._lanes or sum(call.num_unread for call in self._calls.values()) >= MAX_UNREAD:
            return
        while queue := self._first_queue():
            # One that is late comes last: it may hang.
            index, lane = min(self._lanes.items(), key=lambda item: (item[1].num_late, item[1].load.num_pending))
            if lane.load.num_pending >= self._limit:
                break
            ask = queue.popleft()
            batches.setdefault(index, []).append(ask)
            lane.hand(ask, self._now)
        for index, asks in batches.items():
            sending = asyncio.create_task(self._send(index, self._lanes[index], asks))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    def _first_queue(self) -> deque[Ask] | None:
        """That of the lowest priority number; None when nothing waits."""
        for priority in sorted(self._queues):
            if self._queues[priority]:
                return self._queues[priority]
            del self._queues[priority]
        return None

    async def _send(self, index: int, lane: Lane, asks: list[Ask]) -> None:
        # A call that was closed meanwhile has told the engine so, and what comes after that would be decoded.
        asks = [ask for ask in asks if ask.call in self._calls]
        if not asks:
            return
        try:
            await lane.engine.submit.remote(self._owner, asks)
        except Exception as error:
            self._fail(index, lane, error)
            return
        # That of an event loop before is done: it ended with its loop.
        if self._lanes.get(index) is lane and (lane.listening is None or lane.listening.done()):
            lane.listening = asyncio.create_task(self._listen(index, lane))

    async def _listen(self, index: int, lane: Lane) -> None:
        try:
            while lane:
                answers: list[Answer] = await lane.engine.finished.remote(self._owner, lane.num_seen)
                lane.num_seen += len(answers)
                self._take(lane, answers)
        except Exception as error:
            self._fail(index, lane, error)

    def _take(self, lane: Lane, answers: Sequence[Answer]) -> None:
        self._last_news = time.monotonic()
        for number, completions in lane.receive(answers, self._now).items():
            call = self._calls[number]
            call.num_missing -= len(completions)
            call.num_unread += len(completions)
            call.deliver(completions)
            for completion in completions:
                self._lengths.see(completion)
        self._hand_out()
        self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if self._idle is not None and not any(self._lanes.values()):
            self._idle.set()
            self._idle = None

    def _fail(self, index: int, lane: Lane, error: Exception) -> None:
        # Unless it has a successor, or is nobody's any more.
        if self._lanes.get(index) is lane:
            self._on_failure(index, lane.engine, error)
