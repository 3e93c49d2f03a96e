"""What the driver counts of its engines and graders, without any of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.engine_load import EngineLoad
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus


def completion(prompt_id: str, num_tokens: int) -> Completion:
    return Completion(prompt_id, 0, (1,) * num_tokens, "text", (-0.1,) * num_tokens, "stop", 0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tokens_over_the_time_at_work() -> None:
    clock = Clock()
    load = EngineLoad(clock)
    assert load.drain() is None
    with load.helping(3) as deliver:
        assert load.num_pending == 3
        clock.now = 2.0
        deliver([completion("a", 10), completion("b", 20)])
        assert load.num_pending == 1
    # The third never came.
    assert load.num_pending == 0
    clock.now = 100.0
    assert load.drain() == 15.0
    assert load.drain() is None


def test_a_drain_in_the_middle_takes_the_time_so_far() -> None:
    clock = Clock()
    load = EngineLoad(clock)
    with load.helping(2) as deliver:
        clock.now = 4.0
        deliver([completion("a", 20)])
        assert load.drain() == 5.0
        clock.now = 5.0
        deliver([completion("b", 7)])
    assert load.drain() == 7.0


def test_time_of_helpings_that_overlap_counts_once() -> None:
    clock = Clock()
    load = EngineLoad(clock)
    with load.helping(1) as first:
        clock.now = 1.0
        with load.helping(1) as second:
            clock.now = 2.0
            second([completion("b", 10)])
        clock.now = 4.0
        first([completion("a", 10)])
    assert load.drain() == 5.0


class FakeEngine:
    """Answers as a Ray actor's streaming call does; looks at the pool whenever it is asked."""

    def __init__(self, seen: list[Any], fails: bool = False) -> None:
        self.seen, self.fails, self.pool = seen, fails, None
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, prompts: Any, num_samples: int, seed: int, greedy: bool) -> Any:
        for prompt in prompts:
            await asyncio.sleep(0.001)
            self.seen.append(dict(self.pool.live_metrics()))
            if self.fails:
                raise RuntimeError("engine died")
            done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            done.set_result([completion(prompt.prompt_id, 5) for _ in range(num_samples)])
            yield done


def run_pool(make_config: Any, engines: list[FakeEngine]) -> tuple[RayRolloutPool, int]:
    pool = RayRolloutPool(engines, make_config())
    for engine in engines:
        engine.pool = pool
    prompts = [Prompt(str(i), "text", (1,), "", "d") for i in range(8)]

    async def run() -> int:
        return sum([len(done) async for done in pool.generate(prompts, 2, seed=0)])

    return pool, asyncio.run(run())


def test_a_pool_tells_who_is_at_what(make_config: Any) -> None:
    seen: list[Any] = []
    pool, num_completions = run_pool(make_config, [FakeEngine(seen), FakeEngine(seen)])
    assert num_completions == 16
    # Two helpings each: four prompts lie in wait at first.
    assert seen[0]["queue/prompts_waiting"] == 4
    assert seen[0]["queue/engine/0/completions_pending"] == 4
    assert set(pool.live_metrics().values()) == {0}
    assert set(pool.drain_metrics()) == {"rollout/engine/0/tokens_per_s", "rollout/engine/1/tokens_per_s"}
    assert pool.drain_metrics() == {}


def test_nothing_stays_counted_after_a_failure(make_config: Any) -> None:
    seen: list[Any] = []
    engines = [FakeEngine(seen), FakeEngine(seen, fails=True)]
    with pytest.raises(BaseExceptionGroup):
        run_pool(make_config, engines)
    assert set(engines[0].pool.live_metrics().values()) == {0}


def test_a_reward_pool_tells_who_waits(make_config: Any) -> None:
    seen: list[Any] = []

    class FakeWorker:
        def __init__(self) -> None:
            self.grade = SimpleNamespace(remote=self._grade)

        async def _grade(self, pairs: Any) -> list[RewardResult]:
            await asyncio.sleep(0.001)
            seen.append(dict(pool.live_metrics()))
            return [RewardResult(RewardStatus.CORRECT)] * len(pairs)

    async def run() -> None:
        prompt = Prompt("a", "text", (1,), "", "d")
        await asyncio.gather(*[pool.grade([(prompt, completion("a", 1))] * 2) for _ in range(3)])

    pool = RayRewardPool([FakeWorker()], make_config())
    asyncio.run(run())
    assert [look["queue/completions_waiting"] for look in seen] == [4, 2, 0]
    assert {look["queue/reward_workers_busy"] for look in seen} == {1}
    assert set(pool.live_metrics().values()) == {0}
