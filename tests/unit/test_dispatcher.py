"""One queue before all engines: who is handed what, who gets what comes back, and what an engine's end costs."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from actors import dispatcher
from actors.asks import Ask
from actors.dispatcher import FILL, Dispatcher
from actors.engine_load import EngineLoad
from actors.lengths import Lengths
from actors.rollout_pool import RayRolloutPool
from dphrl.types import Completion, Prompt
from tests.benchmarks.idle_share import Clock, simulate
from tests.unit.fake_engine import FakeWork

CONCURRENCY = 8
LIMIT = int(FILL * CONCURRENCY)


def prompts_of(number: int, name: str = "p") -> list[Prompt]:
    return [Prompt(f"{name}{i}", "text", (1, 2), "", "d") for i in range(number)]


def complete(ask: Ask, sample_index: int) -> Completion:
    return Completion(ask.prompt.prompt_id, sample_index, (ask.seed,), "", (-1.0,), "stop", 0)


def engines_of(number: int, complete: Callable[[Ask, int], Completion] = complete) -> list[FakeWork]:
    return [FakeWork(complete) for _ in range(number)]


def over(engines: Sequence[Any], deadline_s: float = math.inf) -> tuple[Dispatcher, list[EngineLoad]]:
    """A dispatcher that loses every engine that fails, and goes on with the others."""
    work = Dispatcher(CONCURRENCY, lambda index, _, error: work.lose(index, str(error)) and None, deadline_s=deadline_s)
    for index, engine in enumerate(engines):
        work.add(index, engine)
    return work, list(work.loads.values())


async def read(work: Dispatcher, call: Any) -> list[Completion]:
    try:
        found: list[Completion] = []
        while call.num_missing or call.num_unread:
            found += await work.read(call, 5.0)
        return found
    finally:
        work.close(call)


def sampled(completions: list[Completion]) -> list[tuple[str, int]]:
    return sorted((c.prompt_id, c.sample_index) for c in completions)


def expected(prompts: list[Prompt], num_samples: int) -> list[tuple[str, int]]:
    return sorted((p.prompt_id, i) for p in prompts for i in range(num_samples))


@pytest.mark.parametrize("num_engines", [1, 2, 5])
@pytest.mark.parametrize("num_samples", [1, 4, 50])
def test_each_call_gets_all_of_its_own(num_engines: int, num_samples: int) -> None:
    async def run() -> None:
        engines = engines_of(num_engines)
        work, loads = over(engines)
        # The same prompts in both, as an evaluation and a step may have.
        first, second = (work.open(prompts_of(9), num_samples, seed, greedy=False) for seed in (1, 2))
        found = await asyncio.gather(read(work, first), read(work, second))
        for completions, seed in zip(found, (1, 2), strict=True):
            assert sampled(completions) == expected(prompts_of(9), num_samples)
            assert {c.token_ids for c in completions} == {(seed,)}
        assert [load.num_pending for load in loads] == [0] * num_engines
        assert work.num_waiting == 0

    asyncio.run(run())


def test_engines_are_evenly_loaded_and_a_little_over_what_they_decode() -> None:
    async def run() -> None:
        engines = engines_of(3)
        work, loads = over(engines)
        call = work.open(prompts_of(100), 2, 0, greedy=False)
        assert [load.num_pending for load in loads] == [LIMIT] * 3
        assert work.num_waiting == 100 - 3 * LIMIT // 2
        most = 0
        while call.num_missing:
            await work.read(call, 5.0)
            most = max(most, *(load.num_pending for load in loads))
            if work.num_waiting:
                assert min(load.num_pending for load in loads) >= CONCURRENCY, "none waits for another"
        assert most <= LIMIT + 1
        work.close(call)
        few = work.open(prompts_of(6), 1, 0, greedy=False)
        assert [load.num_pending for load in loads] == [2, 2, 2]
        await read(work, few)

    asyncio.run(run())


def test_where_runs_must_be_repeatable_no_engine_s_speed_decides_what_it_gets(make_config: Any) -> None:
    async def run() -> None:
        pool = RayRolloutPool(engines_of(3), make_config(deterministic=True))
        call = pool._work.open(prompts_of(900), 2, 0, greedy=False)
        assert [load.num_pending for load in pool._work.loads.values()] == [600] * 3
        pool._work.close(call)

    asyncio.run(run())


def test_a_prompts_completions_stay_together_unless_engines_would_be_idle() -> None:
    async def run(num_prompts: int, num_samples: int) -> set[int]:
        engines = engines_of(2)
        work, _ = over(engines)
        await read(work, work.open(prompts_of(num_prompts), num_samples, 0, greedy=False))
        return {ask.num_completions for engine in engines for ask in engine.asked}

    assert asyncio.run(run(32, 4)) == {4}
    assert asyncio.run(run(1, 32)) == {4}, "four parts for each engine"
    assert max(asyncio.run(run(20, 50))) == CONCURRENCY


def test_calls_come_in_turn_and_prompts_with_long_completions_first() -> None:
    def long(ask: Ask, sample_index: int) -> Completion:
        size = int(ask.prompt.prompt_id[1:]) + 1
        return Completion(ask.prompt.prompt_id, sample_index, (1,) * size, "", (-1.0,) * size, "stop", 0)

    async def run() -> None:
        engines = engines_of(1, long)
        work, _ = over(engines)
        prompts = prompts_of(30)
        await read(work, work.open(prompts, 1, 0, greedy=False))
        assert [ask.prompt for ask in engines[0].asked] == prompts, "nothing is known of them"
        engines[0].asked.clear()
        calls = [work.open(part, 1, 0, greedy=False) for part in (prompts[:20], prompts[20:])]
        await asyncio.gather(*[read(work, call) for call in calls])
        order = [int(ask.prompt.prompt_id[1:]) for ask in engines[0].asked]
        assert order == [*range(19, -1, -1), *range(29, 19, -1)]

    asyncio.run(run())


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lower_turn_comes_before_what_waits(replaced: bool) -> None:
    async def run() -> None:
        engines = engines_of(1)
        work, _ = over(engines)
        ahead = work.open(prompts_of(40, "a"), 1, 0, greedy=False, priority=4)
        own = work.open(prompts_of(6, "b"), 1, 0, greedy=False, priority=3)
        assert work.num_waiting == 40 - LIMIT + 6
        at_once = LIMIT
        await asyncio.sleep(0)  # now the engine has them
        if replaced:
            engines[0] = FakeWork(complete)
            work.lose(0)
            work.add(0, engines[0])
            at_once = 0
        found = await asyncio.gather(read(work, ahead), read(work, own))
        assert [sampled(each) for each in found] == [expected(prompts_of(40, "a"), 1), expected(prompts_of(6, "b"), 1)]
        order = [ask.prompt.prompt_id for ask in engines[0].asked]
        names = [f"a{i}" for i in range(40)]
        assert order == [*names[:at_once], *(f"b{i}" for i in range(6)), *names[at_once:]]
        assert work.num_waiting == 0

    asyncio.run(run())


def test_a_call_that_is_given_up_costs_nothing_more() -> None:
    async def run() -> None:
        engines = engines_of(2)
        work, loads = over(engines)
        gone, stays = (work.open(prompts_of(40, name), 2, 0, greedy=False) for name in "ab")
        await work.read(gone, 5.0)
        work.close(gone)
        assert [engine.aborted for engine in engines] == [[gone.number]] * 2
        found = await read(work, stays)
        assert sampled(found) == expected(prompts_of(40, "b"), 2), "and none of the other's"
        assert [load.num_pending for load in loads] == [0, 0]
        assert work.num_waiting == 0

    asyncio.run(run())


def test_what_is_given_up_before_it_was_sent_is_not_decoded() -> None:
    async def run() -> None:
        engines = engines_of(2)
        work, _ = over(engines)
        for call in [work.open(prompts_of(4, name), 2, 0, greedy=False) for name in "ab"]:
            work.close(call)
        found = await read(work, work.open(prompts_of(4, "c"), 2, 0, greedy=False))
        assert sampled(found) == expected(prompts_of(4, "c"), 2)
        assert {ask.prompt.prompt_id[0] for engine in engines for ask in engine.asked} == {"c"}

    asyncio.run(run())


def test_while_paused_engines_end_what_they_have_and_get_no_more() -> None:
    async def run() -> None:
        engines = engines_of(2)
        work, loads = over(engines)
        call = work.open(prompts_of(40), 2, 0, greedy=False)
        reading = asyncio.create_task(read(work, call))
        work.pause()
        await asyncio.wait_for(work.drained(), 5)
        assert sum(len(engine.asked) for engine in engines) == LIMIT
        assert [load.num_pending for load in loads] == [0, 0]
        await asyncio.wait_for(work.drained(), 5)
        work.resume()
        assert sampled(await reading) == expected(prompts_of(40), 2)

    asyncio.run(run())


@pytest.mark.parametrize("paused", [False, True])
def test_what_a_lost_engine_was_at_is_asked_of_the_others_at_once(paused: bool) -> None:
    async def run() -> None:
        engines = engines_of(3)
        work, loads = over(engines)
        call = work.open(prompts_of(40), 2, 0, greedy=False)
        reading = asyncio.create_task(read(work, call))
        while call.num_missing > 70:
            await asyncio.sleep(0)
        if paused:
            work.pause()
        engines[1].error = RuntimeError("it died while weights changed")
        while 1 in work.loads:
            await asyncio.sleep(0)
        assert not reading.done()
        assert 0 < work.num_resubmitted <= LIMIT + 1
        assert loads[1].num_pending == 0
        if paused:
            while any(load.num_pending for load in loads):
                await asyncio.sleep(0)
            assert not reading.done(), "nobody gets work while weights change"
            work.resume()
        assert sampled(await reading) == expected(prompts_of(40), 2), "each once"
        assert [load.num_pending for load in loads] == [0, 0, 0]

    asyncio.run(run())


def test_of_an_ask_half_done_only_the_rest_is_asked_of_the_next_engine() -> None:
    async def run() -> None:
        engines = engines_of(1)
        work, loads = over(engines)
        call = work.open(prompts_of(6), 4, 0, greedy=False)
        reading = asyncio.create_task(read(work, call))
        while call.num_missing == 24 or call.num_missing % 4 == 0:
            await asyncio.sleep(0)
        num_missing = call.num_missing
        work.pause()
        engines[0] = FakeWork(complete)
        work.lose(0)
        work.add(0, engines[0])
        loads[0] = work.loads[0]
        work.resume()
        assert sampled(await reading) == expected(prompts_of(6), 4), "each once"
        assert sum(ask.num_completions for ask in engines[0].asked) == num_missing
        assert loads[0].num_pending == 0

    asyncio.run(run())


def test_what_ends_the_work_ends_all_calls() -> None:
    async def run() -> None:
        engines = engines_of(2)
        work, loads = over(engines)
        calls = [work.open(prompts_of(40, name), 2, 0, greedy=False) for name in "ab"]
        reading = [asyncio.create_task(read(work, call)) for call in calls]
        await asyncio.sleep(0)
        work.end(RuntimeError("no engine is left"))
        for each in reading:
            with pytest.raises(RuntimeError, match="no engine is left"):
                await each
        assert [load.num_pending for load in loads] == [0, 0]

    asyncio.run(run())


def test_an_engine_that_fails_in_the_hands_of_its_successor_costs_nothing() -> None:
    async def run() -> None:
        engines = engines_of(1)
        work, _ = over(engines)
        call = work.open(prompts_of(6), 1, 0, greedy=False)
        work.lose(0)
        work.add(0, FakeWork(complete))
        # What was sent to the first one fails only now.
        engines[0].error = RuntimeError("dead")
        assert sampled(await read(work, call)) == expected(prompts_of(6), 1)
        assert 0 in work.loads

    asyncio.run(run())


def test_work_that_breaks_one_engine_after_the_other_ends_its_call() -> None:
    def broken() -> FakeWork:
        engine = FakeWork(complete)
        engine.error = RuntimeError("CUDA error")
        return engine

    async def run() -> None:
        num_started = 1

        def replace(index: int, engine: Any, error: Exception) -> None:
            nonlocal num_started
            num_started += 1
            assert num_started < 9, "it goes on for ever"
            work.lose(index, str(error))
            work.add(index, broken())

        work = Dispatcher(CONCURRENCY, replace)
        work.add(0, broken())
        call = work.open([Prompt("poison", "text", (1,), "", "d")], 1, 0, greedy=False)
        with pytest.raises(RuntimeError, match=r"^4 engines failed while they were at prompt poison.*CUDA error$"):
            await work.read(call, 5.0)
        assert num_started == 5
        work.close(call)

    asyncio.run(run())


def test_no_news_from_any_engine_ends_the_wait_and_a_turn_behind_others_does_not() -> None:
    async def run() -> None:
        silent = FakeWork(complete)
        silent._decode = lambda: asyncio.sleep(60)  # type: ignore[method-assign]
        work, _ = over([silent])
        call = work.open(prompts_of(2), 2, 0, greedy=False)
        with pytest.raises(TimeoutError, match=r"^waited 0\.05 s \(rollout\.timeout_s\) for a completion$"):
            await work.read(call, 0.05)

        async def slow() -> None:
            while steady._waiting:
                await asyncio.sleep(0.03)
                owner, ask, i = steady._waiting.popleft()
                steady.done.setdefault(owner, []).append((ask.call, complete(ask, i)))

        steady = FakeWork(complete)
        steady._decode = slow  # type: ignore[method-assign]
        work, _ = over([steady])
        first, last = (work.open(prompts_of(number), 1, 0, greedy=False) for number in (6, 1))
        reading = asyncio.create_task(read(work, first))
        # It is last of seven, each of which takes 0.03 s.
        (completion,) = await work.read(last, 0.15)
        assert completion.prompt_id == "p0"
        await reading

    asyncio.run(run())


def test_time_in_which_weights_change_or_the_reader_was_away_is_no_silence_of_engines() -> None:
    async def run() -> None:
        work, _ = over(engines_of(1))
        call = work.open(prompts_of(1), 1, 0, greedy=False)
        await asyncio.sleep(0.1)
        assert len(await work.read(call, 0.05)) == 1, "it was there long before"
        work.close(call)
        work.pause()
        call = work.open(prompts_of(1), 1, 0, greedy=False)
        reading = asyncio.create_task(work.read(call, 0.05))
        await asyncio.sleep(0.2)
        assert not reading.done()
        work.resume()
        assert len(await reading) == 1
        work.close(call)

    asyncio.run(run())


def test_a_slow_reader_holds_up_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "MAX_UNREAD", 20)

    async def run() -> None:
        engines = engines_of(1)
        work, _ = over(engines)
        call = work.open(prompts_of(500), 1, 0, greedy=False)
        for _ in range(2000):
            await asyncio.sleep(0)
        assert len(engines[0].asked) <= 20 + LIMIT
        assert sampled(await read(work, call)) == expected(prompts_of(500), 1)

    asyncio.run(run())


def test_a_later_event_loop_goes_on_with_the_same_engines() -> None:
    engines = engines_of(2)
    work, _ = over(engines)

    async def run() -> list[Completion]:
        return await read(work, work.open(prompts_of(9), 2, 0, greedy=False))

    assert [sampled(asyncio.run(run())) for _ in range(3)] == [expected(prompts_of(9), 2)] * 3


# ------------------------------------------------------------------------------------- deadlines

DEADLINE_S = 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """An event loop in which nobody waits: its time is the dispatcher's."""
    clock = Clock()
    monkeypatch.setattr(dispatcher, "time", SimpleNamespace(monotonic=clock.time))
    with contextlib.closing(clock):
        yield clock


def timed(step_s: float, **facts: Any) -> FakeWork:
    engine = FakeWork(complete, step_s=step_s)
    for name, value in facts.items():
        setattr(engine, name, value)
    return engine


async def read_slowly(work: Dispatcher, call: Any) -> list[Completion]:
    """With a limit of its own, which no deadline of a completion comes near."""
    found: list[Completion] = []
    while call.num_missing or call.num_unread:
        found += await work.read(call, 1000 * DEADLINE_S)
    work.close(call)
    return found


def test_a_completion_that_is_lost_on_its_way_is_asked_for_again_and_no_other(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        engines = [timed(0.1, forgets={("p0", 1), ("p7", 0)}), timed(0.1)]
        work, loads = over(engines, DEADLINE_S)
        call = work.open(prompts_of(20), 2, 0, greedy=False)
        assert sampled(await read_slowly(work, call)) == expected(prompts_of(20), 2)
        asked = [(ask.prompt.prompt_id, i) for engine in engines for ask in engine.asked for i in ask.sample_indices]
        again = sorted(key for key in set(asked) if asked.count(key) > 1)
        assert len(asked) == 40 + len(again) == 40 + work.num_resubmitted
        assert set(again) <= {("p0", 1), ("p7", 0)}
        assert again, "engine 0 got one of them at least"
        assert [load.num_pending for load in loads] == [0, 0]
        events = [record.__dict__ for record in caplog.records if hasattr(record, "event")]
        assert {event["event"] for event in events} == {"completion_redispatched"}
        assert sum(event["facts"]["num_resubmitted"] for event in events) == len(again)
        assert clock.now < 2.5 * DEADLINE_S

    clock.run_until_complete(run())


def test_one_lost_completion_in_a_steady_stream_is_late_all_the_same(clock: Clock) -> None:
    async def run() -> None:
        work, _ = over([timed(0.1, forgets={("p0", 0)})], DEADLINE_S)
        first, last = (work.open(prompts_of(n, name), 1, 0, greedy=False) for n, name in ((6, "p"), (300, "q")))
        reading = asyncio.create_task(read_slowly(work, last))
        assert sampled(await read_slowly(work, first)) == expected(prompts_of(6), 1)
        assert not reading.done(), "the engine was never silent"
        assert sampled(await reading) == expected(prompts_of(300, "q"), 1)
        assert work.num_resubmitted == 1
        assert work.loads, "nor does it count as dead"

    clock.run_until_complete(run())


@pytest.mark.parametrize("num_prompts", [1, 20])
def test_an_engine_that_returns_nothing_is_lost_in_the_end(clock: Clock, num_prompts: int) -> None:
    async def run() -> None:
        hung = timed(0.1, hangs=True)
        errors: list[str] = []

        def lose(index: int, engine: Any, error: Exception) -> None:
            assert (index, engine) == (0, hung)
            errors.append(str(error))
            work.lose(index)
            work.add(1, timed(0.1))

        work = Dispatcher(CONCURRENCY, lose, deadline_s=DEADLINE_S)
        work.add(0, hung)
        call = work.open(prompts_of(num_prompts), 1, 0, greedy=False)
        assert sampled(await read_slowly(work, call)) == expected(prompts_of(num_prompts), 1)
        assert errors == ["it returned nothing for 10 s (rollout.completion_timeout_s)"]
        # Several that are late at once tell enough; a single one may be a lost message.
        assert clock.now < (1.5 if num_prompts > 1 else dispatcher.MAX_LATE + 1) * DEADLINE_S

    clock.run_until_complete(run())


def test_an_engine_that_is_late_gets_work_after_the_others(clock: Clock) -> None:
    async def run() -> None:
        hung, other = timed(0.1, hangs=True), timed(0.1)
        work, loads = over([hung, other], DEADLINE_S)
        first = work.open(prompts_of(2), 1, 0, greedy=False)
        await read_slowly(work, first)
        hung.asked.clear()
        await read_slowly(work, work.open(prompts_of(8, "q"), 1, 0, greedy=False))
        assert not hung.asked
        assert [load.num_pending for load in loads] == [0, 0]

    clock.run_until_complete(run())


def test_what_waits_in_an_engine_behind_others_is_not_late(clock: Clock) -> None:
    async def run() -> None:
        work = Dispatcher(4, lambda *_: None, deadline_s=DEADLINE_S, all_at_once=True)
        work.add(0, timed(DEADLINE_S / 12))
        await read_slowly(work, work.open(prompts_of(100), 1, 0, greedy=False))
        assert work.num_resubmitted == 0, "all together they took longer than the deadline of one"
        assert clock.now > 8 * DEADLINE_S

    clock.run_until_complete(run())


def test_deadlines_stand_while_weights_change_but_not_while_engines_end_what_they_have(clock: Clock) -> None:
    async def run() -> None:
        engine = timed(0.1, hangs=True)
        work, _ = over([engine], DEADLINE_S)
        call = work.open(prompts_of(1), 1, 0, greedy=False)
        reading = asyncio.create_task(read_slowly(work, call))
        await asyncio.sleep(DEADLINE_S / 2)
        work.pause()
        await asyncio.sleep(3 * DEADLINE_S)
        assert work.num_resubmitted == 0
        draining = asyncio.create_task(work.drained())
        await asyncio.sleep(DEADLINE_S)
        assert draining.done()
        assert work.num_resubmitted == 1, "it waits for the end of the pause now"
        engine.hangs = False
        work.resume()
        assert sampled(await reading) == [("p0", 0)]

    clock.run_until_complete(run())


def test_a_deadline_below_what_a_completion_takes_costs_time_but_not_the_run(clock: Clock) -> None:
    async def run() -> None:
        work, _ = over([timed(2.5 * DEADLINE_S) for _ in range(3)], DEADLINE_S)
        reading = read_slowly(work, work.open(prompts_of(1), 1, 0, greedy=False))
        assert sampled(await asyncio.wait_for(reading, 50 * DEADLINE_S)) == [("p0", 0)]

    clock.run_until_complete(run())


# ------------------------------------------------------------------------------------- anything at any time


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_every_completion_is_delivered_once(
    seed: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deaths, hangs, lost answers, late replacements, pauses, calls given up, at random: each (prompt, sample) once."""
    random = Random(seed)
    monkeypatch.setattr(dispatcher, "MAX_LOSSES", 1000)
    monkeypatch.setattr(dispatcher, "MAX_UNREAD", random.choice([30, 4096]))

    async def run() -> None:
        engines: dict[int, FakeWork] = {}
        lost: list[int] = []

        def lose(index: int, engine: Any, error: Exception) -> None:
            assert engine is engines[index], "only the present engine of a number is lost"
            num_pending = work.loads[index].num_pending
            assert work.lose(index, str(error)) == num_pending
            lost.append(index)

        work = Dispatcher(CONCURRENCY, lose, deadline_s=DEADLINE_S, all_at_once=random.random() < 0.2)

        def start(index: int) -> None:
            engines[index] = FakeWork(complete, random.randint(1, 4), random.choice([0.1, 1.0]))
            engines[index].forgets = {(f"{name}{i}", 0) for name in "abc" for i in range(40) if random.random() < 0.02}
            work.add(index, engines[index])

        for index in range(random.randint(1, 4)):
            start(index)
        sizes = [(name, random.randint(1, 40), random.randint(1, 12)) for name in "abc"]
        calls = [
            work.open(prompts_of(number, name), num_samples, 0, greedy=False, priority=random.randint(0, 2))
            for name, number, num_samples in sizes
        ]
        given_up = work.open(prompts_of(30, "z"), 3, 0, greedy=False)
        reading = [asyncio.create_task(read_slowly(work, call)) for call in calls]
        num_events = 0
        while not all(task.done() for task in reading):
            await asyncio.sleep(random.expovariate(2.0))
            num_events += 1
            if num_events == 5:
                work.close(given_up)
            alive = [i for i in work.loads if engines[i].error is None]
            happens = random.random() if num_events < 100 else 1.0
            if happens < 0.15 and alive:
                engines[random.choice(alive)].error = RuntimeError("killed")
            elif happens < 0.20 and alive:
                engines[random.choice(alive)].hangs = True
            elif happens < 0.25 and alive:
                engines[random.choice(alive)]._waiting.clear()  # it forgets all that it was asked
            elif happens < 0.40:
                work.pause()
                await asyncio.sleep(random.choice([0.0, 1.0, 2 * DEADLINE_S]))
                if random.random() < 0.3 and all(not engines[i].hangs for i in work.loads):
                    await work.drained()
                work.resume()
            elif happens < 0.45:
                start(max(engines) + 1)
            elif happens < 0.50 and len(alive) > 1:
                work.lose(alive[0])  # by intention
            if lost and (random.random() < 0.3 or not work.loads):
                start(lost.pop())
        for task, (name, number, num_samples) in zip(reading, sizes, strict=True):
            assert sampled(await task) == expected(prompts_of(number, name), num_samples), "each once"
        assert all(load.num_pending == 0 for load in work.loads.values())
        assert work.num_waiting == 0

    clock.run_until_complete(asyncio.wait_for(run(), 1e5))


# ------------------------------------------------------------------------------------- a simulation


@pytest.mark.parametrize("num_engines", [2, 8])
def test_with_a_step_ahead_engines_are_seldom_idle(num_engines: int) -> None:
    idle, _ = simulate(num_engines, staleness=1, num_steps=6)
    assert idle <= 0.1
    on_policy, _ = simulate(num_engines, staleness=0, num_steps=6)
    assert on_policy >= 0.3, "the simulation sees what idle engines are"


def test_the_mean_of_what_is_known_stands_for_what_is_not() -> None:
    known = Lengths()
    assert known.of("a") == 0.0
    for size in (4, 8):
        known.see(Completion("a", 0, (1,) * size, "", (-1.0,) * size, "stop", 0))
    known.see(Completion("b", 0, (1,) * 30, "", (-1.0,) * 30, "stop", 0))
    assert known.of("a") == 6.0
    assert math.isclose(known.of("c"), 14.0)
