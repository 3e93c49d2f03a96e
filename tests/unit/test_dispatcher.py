"""One queue before all engines: who is handed what, who gets what comes back, and what an engine's end costs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from actors import dispatcher
from actors.asks import Ask
from actors.dispatcher import FILL, Dispatcher
from actors.engine_load import EngineLoad
from actors.rollout_pool import RayRolloutPool
from dphrl.types import Completion, Prompt
from tests.benchmarks.idle_share import simulate
from tests.unit.fake_engine import FakeWork

CONCURRENCY = 8
LIMIT = int(FILL * CONCURRENCY)


def prompts_of(number: int, name: str = "p") -> list[Prompt]:
    return [Prompt(f"{name}{i}", "text", (1, 2), "", "d") for i in range(number)]


def complete(ask: Ask, sample_index: int) -> Completion:
    return Completion(ask.prompt.prompt_id, sample_index, (ask.seed,), "", (-1.0,), "stop", 0)


def engines_of(number: int, complete: Callable[[Ask, int], Completion] = complete) -> list[FakeWork]:
    return [FakeWork(complete) for _ in range(number)]


def over(engines: Sequence[Any]) -> tuple[Dispatcher, list[EngineLoad]]:
    loads = [EngineLoad() for _ in engines]
    return Dispatcher(engines, loads, CONCURRENCY), loads


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
        assert [load.num_pending for load in pool._loads] == [600] * 3
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
            work.replaced(0)
            work.resume()
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


def test_what_a_replaced_engine_was_at_is_handed_out_again() -> None:
    async def run() -> None:
        engines = engines_of(2)
        work, loads = over(engines)
        call = work.open(prompts_of(40), 2, 0, greedy=False)
        reading = asyncio.create_task(read(work, call))
        while call.num_missing > 70:
            await asyncio.sleep(0)
        work.pause()
        engines[1].error = RuntimeError("it died while weights changed")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not reading.done(), "the sync decides what becomes of it"
        engines[1] = FakeWork(complete)
        work.replaced(1)
        work.resume()
        found = await reading
        assert sampled(found) == expected(prompts_of(40), 2), "each once"
        assert engines[1].asked
        assert [load.num_pending for load in loads] == [0, 0]

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
        work.replaced(0)
        work.resume()
        assert sampled(await reading) == expected(prompts_of(6), 4), "each once"
        assert sum(ask.num_completions for ask in engines[0].asked) == num_missing
        assert loads[0].num_pending == 0

    asyncio.run(run())


@pytest.mark.parametrize("paused", [False, True])
def test_an_engine_that_is_not_replaced_ends_all_calls(paused: bool) -> None:
    async def run() -> None:
        engines = engines_of(2)
        work, loads = over(engines)
        calls = [work.open(prompts_of(40, name), 2, 0, greedy=False) for name in "ab"]
        reading = [asyncio.create_task(read(work, call)) for call in calls]
        if paused:
            work.pause()
        engines[0].error = RuntimeError("CUDA error")
        if paused:
            for _ in range(20):
                await asyncio.sleep(0)
            work.resume()
        for each in reading:
            with pytest.raises(RuntimeError, match="CUDA error"):
                await each
        assert [load.num_pending for load in loads] == [0, 0]

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


# ------------------------------------------------------------------------------------- a simulation


@pytest.mark.parametrize("num_engines", [2, 8])
def test_with_a_step_ahead_engines_are_seldom_idle(num_engines: int) -> None:
    idle, _ = simulate(num_engines, staleness=1, num_steps=6)
    assert idle <= 0.1
    on_policy, _ = simulate(num_engines, staleness=0, num_steps=6)
    assert on_policy >= 0.3, "the simulation sees what idle engines are"


def test_the_mean_of_what_is_known_stands_for_what_is_not() -> None:
    lengths = dispatcher.Lengths()
    assert lengths.of("a") == 0.0
    for size in (4, 8):
        lengths.see(Completion("a", 0, (1,) * size, "", (-1.0,) * size, "stop", 0))
    lengths.see(Completion("b", 0, (1,) * 30, "", (-1.0,) * 30, "stop", 0))
    assert lengths.of("a") == 6.0
    assert math.isclose(lengths.of("c"), 14.0)
