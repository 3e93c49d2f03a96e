"""A pool whose engines die at any time: work goes on, nothing is lost or doubled, and nobody serves old weights.

Stand-ins for engines, in virtual time. `tests/integration/test_dying_engines.py` has real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from actors import dispatcher
from actors.asks import Ask
from actors.device_turns import OwnDevices
from actors.engine_repair import CannotPlaceError
from actors.rollout_pool import RayRolloutPool
from actors.weight_transfer.failures import Place
from actors.weight_transfer.ledger import EngineRecord, WeightSummary
from dphrl.protocols import EnginesLostError
from dphrl.types import Completion, Prompt
from tests.benchmarks.idle_share import Clock
from tests.unit.fake_engine import FakeWork

PROBES = [Prompt("probe", "text", (1, 2, 3), "", "d")]
NUM_PROMPTS, NUM_SAMPLES = 12, 4
CONTENT = WeightSummary(1, 4, 5)
STEPS_OF_A_SYNC = ["ready", "start_weight_update", "update_weights", "finish_weight_update"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(dispatcher, "time", SimpleNamespace(monotonic=clock.time))
    with contextlib.closing(clock):
        yield clock


class Engine(FakeWork):
    """Serves as the version that it was last sent; dies when `error` is set, or when a call in `dies_at` comes."""

    def __init__(self, step_s: float = 0.1, dies_at: str = "") -> None:
        super().__init__(self._completion, step_s=step_s)
        self.version: int | None = None
        self.dies_at = dies_at
        for name in ("ready", "start_weight_update", "update_weights", "finish_weight_update"):
            setattr(self, name, SimpleNamespace(remote=self._method(name)))

    def _completion(self, ask: Ask, sample_index: int) -> Completion:
        assert self.version is not None
        return Completion(ask.prompt.prompt_id, sample_index, (5,), "", (-0.05,), "stop", self.version)

    def _method(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            await asyncio.sleep(0.05)
            if self.dies_at == name:
                self.error = RuntimeError(f"died at {name}")
            if self.error is not None:
                raise self.error
            if name == "ready":
                return Place("10.0.0.9", 77)
            if name == "finish_weight_update":
                (self.version,) = args
                return EngineRecord(self.version, (CONTENT,))
            return None

        return call

    async def _submit(self, owner: str, asks: Any) -> None:
        if self.error is None:
            assert self.version is not None, "a stale engine is asked for nothing"
        await super()._submit(owner, asks)


class Learner:
    """Its ranks do one thing at a time: they publish and score together, as they update together."""

    last_update = None

    def __init__(self, turns: OwnDevices) -> None:
        self.policy_version, self.updating, self.turns = 0, False, turns

    async def update(self, seconds: float) -> None:
        async with self.turns.update():
            self.updating = True
            await asyncio.sleep(seconds)
            self.policy_version += 1
            self.updating = False

    async def publish(self) -> Any:
        for chunk in ("chunk 0", "chunk 1"):
            assert not self.updating, "an update and a sync would wait for each other"
            await asyncio.sleep(0.05)
            assert not self.updating
            yield chunk

    async def sent(self) -> WeightSummary:
        return CONTENT

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        assert not self.updating
        await asyncio.sleep(0.05)
        assert not self.updating
        return [(-0.05,) * (len(ids) - num_prompt) for ids, num_prompt in sequences]


class Starter:
    """Starts engines that take `start_s` to come up; `next_error` says what hinders one, if anything does."""

    can_replace = True

    def __init__(self, start_s: float = 1.0) -> None:
        self.start_s, self.started, self.ended = start_s, [], []
        self.next_error: Callable[[], Exception | None] = lambda: None

    async def start(self, index: int) -> Engine:
        await asyncio.sleep(self.start_s)
        if (error := self.next_error()) is not None:
            raise error
        self.started.append(Engine())
        return self.started[-1]

    async def end(self, index: int) -> None:
        self.ended.append(index)


def world(make_config: Any, num_engines: int, **rollout: Any) -> tuple[RayRolloutPool, Learner, Starter]:
    turns, starter = OwnDevices(), Starter()
    config = make_config(rollout={"max_concurrent_sequences": 4, **rollout}, sync={"timeout_s": 30.0})
    pool = RayRolloutPool([Engine() for _ in range(num_engines)], config, PROBES, starter=starter, turns=turns)
    return pool, Learner(turns), starter


async def collect(pool: RayRolloutPool, name: str, num_prompts: int = NUM_PROMPTS) -> list[Completion]:
    prompts = [Prompt(f"{name}{i}", "text", (1, 2), "", "d") for i in range(num_prompts)]
    found = [c async for part in pool.generate(prompts, NUM_SAMPLES, seed=0) for c in part]
    keys = sorted((c.prompt_id, c.sample_index) for c in found)
    assert keys == sorted((p.prompt_id, i) for p in prompts for i in range(NUM_SAMPLES)), "each once"
    return found


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records if hasattr(record, "event")]


def test_the_step_goes_on_without_an_engine_that_dies_and_another_joins_at_the_next_sync(
    make_config: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 2)
        await pool.refit(learner)  # type: ignore[arg-type]
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(1.0)
        pool.engines[1].error = RuntimeError("killed")
        await step
        assert list(pool.engines) == [0]
        await asyncio.sleep(5.0)
        assert starter.started[0].version is None, "it has no weights before a sync"
        assert not starter.started[0].asked
        await learner.update(1.0)
        await pool.refit(learner)  # type: ignore[arg-type]
        assert pool.engines[1] is starter.started[0]
        assert pool.engines[1].version == 1
        await collect(pool, "b")
        assert pool.engines[1].asked
        metrics = pool.drain_metrics()
        assert (metrics["rollout/engines"], metrics["rollout/engines_replaced"]) == (2, 1)
        assert metrics["rollout/num_resubmitted"] == sum(
            record.facts["num_resubmitted"]
            for record in caplog.records
            if getattr(record, "event", "") == "engine_lost"
        )
        assert metrics["rollout/num_resubmitted"] > 0
        assert events(caplog) == ["engine_lost", "engine_replaced"]

    clock.run_until_complete(run())


def test_when_all_are_dead_the_first_that_is_up_gets_weights_at_once(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 2)
        await pool.refit(learner)  # type: ignore[arg-type]
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(1.0)
        for engine in pool.engines.values():
            engine.error = RuntimeError("the node is gone")
        found = await step
        assert {c.policy_version for c in found} == {0}
        assert all(engine.version == 0 for engine in starter.started)

    clock.run_until_complete(run())


def test_an_engine_that_comes_while_the_learner_updates_waits_for_it(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 1, max_staleness=1)
        await pool.refit(learner)  # type: ignore[arg-type]
        ahead = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(0.5)
        pool.engines[0].error = RuntimeError("killed")
        updating = asyncio.create_task(learner.update(20.0))
        await asyncio.sleep(10.0)
        assert starter.started, "it is up"
        assert starter.started[0].version is None
        await updating
        await pool.refit(learner)  # type: ignore[arg-type]
        found = await ahead
        assert {c.policy_version for c in found} <= {0, 1}

    clock.run_until_complete(run())


def test_engines_that_die_while_they_are_judged_are_not_the_last(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 1, max_staleness=1)
        await pool.refit(learner)  # type: ignore[arg-type]
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(0.5)
        score = learner.score

        async def slowly(sequences: Any) -> Any:
            pool.engines[0].error = RuntimeError("it died with the answer on its way")
            while pool.engines:
                await asyncio.sleep(0.1)
            learner.score = score  # type: ignore[method-assign]
            return await score(sequences)

        learner.score = slowly  # type: ignore[method-assign]
        await pool.refit(learner)  # type: ignore[arg-type]
        assert [*pool.engines.values()] == starter.started
        await step

    clock.run_until_complete(asyncio.wait_for(run(), 1e5))


def test_an_engine_that_leaves_has_others_do_its_work(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 2)
        await pool.refit(learner)  # type: ignore[arg-type]
        pool.add(2)
        await asyncio.sleep(5.0)
        assert pool.numbers == {0, 1, 2}
        assert pool.is_up(2)
        assert set(pool.engines) == {0, 1}, "it has no weights yet"
        await learner.update(1.0)
        await pool.refit(learner)  # type: ignore[arg-type]
        assert pool.engines[2].version == 1
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(0.5)
        left = pool.engines[0]
        await pool.remove(0)
        await pool.remove(1)
        await step
        assert starter.ended == [0, 1]
        assert left.asked
        assert pool.numbers == {2}
        assert pool.drain_metrics()["rollout/engines_replaced"] == 0, "a newcomer is no replacement"

    clock.run_until_complete(run())


def test_the_last_engine_may_leave_when_another_is_on_its_way(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 1)
        await pool.refit(learner)  # type: ignore[arg-type]
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(0.5)
        pool.add(1)
        await pool.remove(0)
        await step
        assert [*pool.engines.values()] == starter.started

    clock.run_until_complete(run())


def test_the_run_stops_when_the_last_engine_is_given_up(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, starter = world(make_config, 1)
        starter.next_error = lambda: CannotPlaceError("one more engine needs 1 CPUs on one node; free are none")
        await pool.refit(learner)  # type: ignore[arg-type]
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(1.0)
        pool.engines[0].error = RuntimeError("killed")
        with pytest.raises(EnginesLostError, match=r"^no rollout engine is left; .*needs 1 CPUs.*--resume"):
            await step
        assert starter.ended == [0]
        with pytest.raises(EnginesLostError, match=r"no rollout engine is left"):
            await collect(pool, "b")

    clock.run_until_complete(run())


def test_an_engine_that_dies_at_its_work_stops_the_run_when_it_is_to(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        pool, learner, _ = world(make_config, 2, on_failure="stop")
        await pool.refit(learner)  # type: ignore[arg-type]
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(1.0)
        pool.engines[1].error = RuntimeError("CUDA error")
        told = (
            r"^rollout engine 1 \(node 10\.0\.0\.9, process 77\) failed to return completions: CUDA error\. rollout\.on"
        )
        with pytest.raises(EnginesLostError, match=told):
            await step

    clock.run_until_complete(run())


def test_a_pool_that_cannot_start_engines_goes_on_with_the_rest(make_config: Any, clock: Clock) -> None:
    async def run() -> None:
        engines = [Engine(), Engine()]
        for engine in engines:
            engine.version = 0
        pool = RayRolloutPool(engines, make_config())
        step = asyncio.create_task(collect(pool, "a"))
        await asyncio.sleep(0.3)
        engines[1].error = RuntimeError("killed")
        await step
        engines[0].error = RuntimeError("killed too")
        with pytest.raises(EnginesLostError, match=r"no rollout engine is left.*killed too"):
            await collect(pool, "b")

    clock.run_until_complete(run())


@pytest.mark.parametrize("seed", range(40))
def test_whatever_dies_whenever_training_goes_on(
    seed: int, make_config: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps, some of them ahead of the learner, while engines die at work, in syncs, and while they start."""
    random = Random(seed)
    staleness = random.choice([0, 0, 1, 2])
    monkeypatch.setattr(dispatcher, "MAX_LOSSES", 1000)

    async def run() -> None:
        on_update = random.choice(["recompute", "finish"]) if staleness else "recompute"
        rollout = {"max_staleness": staleness, "on_update": on_update, "max_replacements": 1000}
        pool, learner, starter = world(make_config, random.randint(1, 3), **rollout)
        starter.next_error = lambda: RuntimeError("no luck") if random.random() < 0.2 else None

        async def kill_at_random() -> None:
            while True:
                await asyncio.sleep(random.expovariate(0.5))
                starter.start_s = random.choice([0.1, 1.0, 10.0])
                if everyone := [*pool.engines.values(), *pool._repair.up.values()]:
                    engine = random.choice(everyone)
                    if random.random() < 0.5:
                        engine.error = RuntimeError("killed")
                    else:
                        engine.dies_at = random.choice(
                            ["start_weight_update", "update_weights", "finish_weight_update"]
                        )

        async def one_step(step: int) -> list[Completion]:
            return await collect(pool, f"s{step}-", random.randint(1, NUM_PROMPTS))

        killing = asyncio.create_task(kill_at_random())
        await pool.refit(learner)  # type: ignore[arg-type]
        begun: dict[int, asyncio.Task[list[Completion]]] = {}
        for step in range(6):
            for ahead in range(step, step + staleness + 1):
                begun.setdefault(ahead, asyncio.create_task(one_step(ahead)))
            found = await begun[step]
            ages = {learner.policy_version - completion.policy_version for completion in found}
            assert ages <= set(range(staleness + 1)), "no older than allowed"
            await learner.update(random.choice([0.1, 3.0]))
            await pool.refit(learner)  # type: ignore[arg-type]
            serving = [engine for engine in pool.engines.values() if engine.error is None]
            assert {engine.version for engine in serving} <= {learner.policy_version}
        killing.cancel()
        for task in begun.values():
            await task

    clock.run_until_complete(asyncio.wait_for(run(), 1e5))
