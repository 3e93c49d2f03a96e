"""What the driver counts of its engines and graders, without any of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.engine_load import EngineLoad, Speed
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus
from tests.unit.fake_engine import FakeWork


def completion(prompt_id: str, num_tokens: int, sample_index: int = 0) -> Completion:
    return Completion(prompt_id, sample_index, (1,) * num_tokens, "text", (-0.1,) * num_tokens, "stop", 0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tokens_over_the_time_at_work() -> None:
    clock = Clock()
    load = EngineLoad(clock)
    assert load.drain() is None
    clock.now = 1.0
    load.take(3)
    assert load.num_pending == 3
    clock.now = 3.0
    load.deliver([completion("a", 10), completion("b", 20)])
    assert load.num_pending == 1
    # The third never came.
    load.drop(1)
    assert load.num_pending == 0
    clock.now = 4.0
    assert load.drain() == Speed(15.0, 0.5)
    assert load.drain() is None


def test_a_drain_in_the_middle_takes_the_time_so_far() -> None:
    clock = Clock()
    load = EngineLoad(clock)
    load.take(2)
    clock.now = 4.0
    load.deliver([completion("a", 20)])
    assert load.drain() == Speed(5.0, 1.0)
    clock.now = 5.0
    load.deliver([completion("b", 7)])
    clock.now = 6.0
    assert load.drain() == Speed(7.0, 0.5)


def test_time_of_work_that_overlaps_counts_once() -> None:
    clock = Clock()
    load = EngineLoad(clock)
    load.take(1)
    clock.now = 1.0
    load.take(1)
    clock.now = 2.0
    load.deliver([completion("b", 10)])
    clock.now = 4.0
    load.deliver([completion("a", 10)])
    assert load.drain() == Speed(5.0, 1.0)


def run_pool(make_config: Any, engines: list[FakeWork], seen: list[Any]) -> tuple[RayRolloutPool, int]:
    pool = RayRolloutPool(engines, make_config(rollout={"max_concurrent_sequences": 4}))
    prompts = [Prompt(str(i), "text", (1,), "", "d") for i in range(16)]

    def complete(ask: Any, sample_index: int) -> Completion:
        seen.append(dict(pool.live_metrics()))
        return completion(ask.prompt.prompt_id, 5, sample_index)

    for engine in engines:
        engine.complete = complete

    async def run() -> int:
        return sum([len(done) async for done in pool.generate(prompts, 2, seed=0)])

    return pool, asyncio.run(run())


def test_a_pool_tells_who_is_at_what(make_config: Any) -> None:
    seen: list[Any] = []
    pool, num_completions = run_pool(make_config, [FakeWork(None), FakeWork(None)], seen)  # type: ignore[arg-type]
    assert num_completions == 32
    # Each decodes four, and has half as many more at hand: three prompts of two.
    assert seen[0]["queue/prompts_waiting"] == 16 - 2 * 3
    assert seen[0]["queue/engine/0/completions_pending"] == 6
    assert max(look["queue/engine/0/completions_pending"] for look in seen) <= 7
    assert set(pool.live_metrics().values()) == {0}
    metrics = pool.drain_metrics()
    names = {f"rollout/engine/{i}/{name}" for i in range(2) for name in ("tokens_per_s", "busy_fraction")}
    always = {"rollout/engines": 2.0, "rollout/engines_replaced": 0.0, "rollout/num_resubmitted": 0.0}
    assert set(metrics) == {"rollout/busy_fraction"} | names | set(always)
    assert 0 < metrics["rollout/busy_fraction"] <= 1
    assert pool.drain_metrics() == always


def test_nothing_stays_counted_after_a_failure(make_config: Any) -> None:
    engines = [FakeWork(None), FakeWork(None)]  # type: ignore[arg-type]
    engines[1].error = RuntimeError("engine died")
    pool = RayRolloutPool(engines, make_config(rollout={"on_failure": "stop"}))
    engines[0].complete = lambda ask, i: completion(ask.prompt.prompt_id, 5, i)
    prompts = [Prompt(str(i), "text", (1,), "", "d") for i in range(8)]

    async def run() -> None:
        async for _ in pool.generate(prompts, 2, seed=0):
            pass

    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(run())
    assert set(pool.live_metrics().values()) == {0}
    assert engines[0].aborted == [0], "nobody decodes for a call that is over"


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
