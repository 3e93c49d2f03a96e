"""Sampling and grading in one stream, and dynamic sampling, against fakes of the protocols."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dphrl import collect
from dphrl.collect import collect_groups, collect_step
from dphrl.protocols import Parts
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

CORRECT, WRONG = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG)


def prompt(name: str) -> Prompt:
    return Prompt(name, name, (1, 2, 3), "answer", "data")


def completion(name: str, index: int) -> Completion:
    return Completion(name, index, (7, 7), "text", (-0.5, -0.5), "stop", 0)


class SlowEngine:
    """Yields one completion at a time, later prompts first."""

    def __init__(self, missing: int = 0) -> None:
        self.missing, self.num_yielded = missing, 0

    async def generate(self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False) -> Any:
        jobs = [(p, i) for p in reversed(prompts) for i in reversed(range(num_samples))]
        for p, i in jobs[self.missing :]:
            self.num_yielded += 1
            yield [completion(p.prompt_id, i)]
            await asyncio.sleep(0)


class WatchingGrader:
    def __init__(self, engine: SlowEngine) -> None:
        self.engine, self.yielded_at_first_grade = engine, None

    async def grade(self, items: Any) -> list[RewardResult]:
        if self.yielded_at_first_grade is None:
            self.yielded_at_first_grade = self.engine.num_yielded
        return [CORRECT if c.sample_index else WRONG for _, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}


def test_grading_starts_while_others_still_decode_and_order_is_restored() -> None:
    engine = SlowEngine()
    grader = WatchingGrader(engine)
    prompts, counted = [prompt("a"), prompt("b")], []
    collected = asyncio.run(collect_groups(engine, grader, prompts, 3, seed=0, on_graded=counted.append))
    assert grader.yielded_at_first_grade < 6
    assert [g.prompt.prompt_id for g in collected.groups] == ["a", "b"]
    assert all([c.sample_index for c in g.completions] == [0, 1, 2] for g in collected.groups)
    assert all(g.results == (WRONG, CORRECT, CORRECT) for g in collected.groups)
    assert (sum(counted), collected.num_tokens) == (6, 12)


def test_a_lost_completion_stops_the_step() -> None:
    engine = SlowEngine(missing=1)
    with pytest.raises(RuntimeError, match="prompt b: 2 completions came back, 3 were asked"):
        asyncio.run(collect_groups(engine, WatchingGrader(engine), [prompt("a"), prompt("b")], 3, seed=0))


class ScriptedGrader:
    """Prompts whose name ends in an even digit are solved by every sample: no signal."""

    async def grade(self, items: Any) -> list[RewardResult]:
        return [CORRECT if int(p.prompt_id[-1]) % 2 == 0 or c.sample_index else WRONG for p, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}


def dynamic_step(make_config: Any, rounds: int, names: list[str]) -> Any:
    config = make_config(
        rollout={"num_prompts": 4, "num_samples": 2},
        algorithm={"dynamic_sampling_rounds": rounds},
    )
    parts = Parts(None, SlowEngine(), ScriptedGrader())  # type: ignore[arg-type]
    return asyncio.run(collect_step(config, [prompt(name) for name in names], parts, 0))


def test_dynamic_sampling_refills_until_enough_groups_have_signal(make_config: Any) -> None:
    names = [f"p{i}" for i in range(10)]
    plain = dynamic_step(make_config, 1, names)
    assert (len(plain.groups), len(plain.sampled), plain.metrics["rollout/num_rounds"]) == (4, 4, 1)
    refilled = dynamic_step(make_config, 5, names)
    assert len(refilled.groups) == 4
    assert all(int(g.prompt.prompt_id[-1]) % 2 for g in refilled.groups)
    assert 1 < refilled.metrics["rollout/num_rounds"] <= 5
    assert len(refilled.sampled) == 4 * refilled.metrics["rollout/num_rounds"]


def test_dynamic_sampling_stops_at_its_bound_with_what_it_has(make_config: Any) -> None:
    hopeless = dynamic_step(make_config, 3, [f"p{i}" for i in range(0, 20, 2)])
    assert (hopeless.metrics["rollout/num_rounds"], len(hopeless.sampled), len(hopeless.groups)) == (3, 12, 4)


class EndlessEngine:
    """Yields one completion at a time, as fast as it is asked."""

    num_yielded = 0

    async def generate(self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False) -> Any:
        for i in range(num_samples):
            self.num_yielded += 1
            yield [Completion(prompts[0].prompt_id, i, (1,), "x", (0.0,), "stop", 0)]


def test_a_slow_reward_holds_up_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_UNGRADED", 3)
    engine = EndlessEngine()
    ahead: list[int] = []

    class SlowGrader:
        num_graded = 0

        async def grade(self, items: Any) -> list[RewardResult]:
            await asyncio.sleep(0.001)
            ahead.append(engine.num_yielded - self.num_graded)
            self.num_graded += len(items)
            return [CORRECT] * len(items)

    collected = asyncio.run(collect_groups(engine, SlowGrader(), [prompt("p")], 50, seed=0))
    assert len(collected.groups[0].completions) == 50
    assert max(ahead) <= 4
