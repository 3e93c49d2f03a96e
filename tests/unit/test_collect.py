"""Sampling and grading in one stream, and dynamic sampling, against fakes of the protocols."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dphrl import collect
from dphrl.collect import StepCollector, collect_groups, collect_step
from dphrl.data.schedule import replacement_indices
from dphrl.protocols import Parts
from dphrl.rewards.watch import MAX_FAILED_PROMPTS, RewardFailedError
from dphrl.tracking.log import current_step
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

    async def generate(
        self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
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
    prompts, counted = [prompt("a"), prompt("b")], [0, 0]

    def count(num_completions: int, num_tokens: int) -> None:
        counted[0] += num_completions
        counted[1] += num_tokens

    collected = asyncio.run(collect_groups(engine, grader, prompts, 3, seed=0, on_graded=count))
    assert grader.yielded_at_first_grade < 6
    assert [g.prompt.prompt_id for g in collected.groups] == ["a", "b"]
    assert all([c.sample_index for c in g.completions] == [0, 1, 2] for g in collected.groups)
    assert all(g.results == (WRONG, CORRECT, CORRECT) for g in collected.groups)
    assert (*counted, collected.num_tokens) == (6, 12, 12)


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


def dynamic_step(make_config: Any, rounds: int, names: list[str], step: int = 0) -> Any:
    config = make_config(
        rollout={"num_prompts": 4, "num_samples": 2},
        algorithm={"dynamic_sampling_rounds": rounds},
    )
    parts = Parts(None, SlowEngine(), ScriptedGrader())  # type: ignore[arg-type]
    return asyncio.run(collect_step(config, [prompt(name) for name in names], parts, step))


def names_of(groups: Any) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


def test_dynamic_sampling_asks_for_a_prompt_in_the_place_of_each_group_without_signal(make_config: Any) -> None:
    names = [f"p{i:02}" for i in range(20)]
    for step in range(5):
        plain = dynamic_step(make_config, 1, names, step)
        assert (len(plain.groups), len(plain.sampled), plain.metrics["rollout/num_rounds"]) == (4, 4, 1)
        refilled = dynamic_step(make_config, 5, names, step)
        assert len(refilled.groups) == 4
        assert all(int(name[-1]) % 2 for name in names_of(refilled.groups))
        sampled = names_of(refilled.sampled)
        assert sampled[:4] == names_of(plain.sampled), "the step's own prompts come first"
        assert len(set(sampled)) == len(sampled), "no prompt comes twice"
        flat = sum(int(name[-1]) % 2 == 0 for name in sampled)
        assert len(sampled) == 4 + flat, "one more for each that is flat, and none for nothing"
        assert refilled.metrics["rollout/num_rounds"] == len(sampled) / 4
        assert names_of(dynamic_step(make_config, 5, names, step).sampled) == sampled


def test_the_steps_of_an_epoch_pass_over_no_prompt_whatever_is_replaced(make_config: Any) -> None:
    names = [f"p{i:02}" for i in range(20)]
    own = [name for step in range(5) for name in names_of(dynamic_step(make_config, 5, names, step).sampled)[:4]]
    assert sorted(own) == names


def test_dynamic_sampling_stops_at_its_bound_with_what_it_has(make_config: Any) -> None:
    hopeless = dynamic_step(make_config, 3, [f"p{i}" for i in range(0, 40, 2)])
    assert (hopeless.metrics["rollout/num_rounds"], len(hopeless.sampled), len(hopeless.groups)) == (3, 12, 4)
    few = dynamic_step(make_config, 3, [f"p{i}" for i in range(0, 20, 2)])
    assert len(few.sampled) == 10, "there are no more"


def test_each_step_takes_other_prompts_in_the_place_of_its_own() -> None:
    first = replacement_indices(20, 0, [3, 5], seed=0)
    assert sorted(first) == [i for i in range(20) if i not in (3, 5)]
    assert first == replacement_indices(20, 0, [3, 5], seed=0)
    assert first != replacement_indices(20, 1, [3, 5], seed=0)
    assert first != replacement_indices(20, 0, [3, 5], seed=1)


class EndlessEngine:
    """Yields one completion at a time, as fast as it is asked."""

    num_yielded = 0

    async def generate(
        self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
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


def test_the_time_of_a_step_ahead_is_that_in_which_engines_worked_on_it(make_config: Any) -> None:
    class Engine(SlowEngine):
        """0.05 s for each call, one after the other."""

        lock = asyncio.Lock()

        async def generate(self, *arguments: Any, **options: Any) -> Any:
            async with self.lock:
                await asyncio.sleep(0.05)
                async for completions in super().generate(*arguments, **options):
                    yield completions

    class Grader(WatchingGrader):
        async def grade(self, items: Any) -> list[RewardResult]:
            return [WRONG] * len(items)

    config = make_config(rollout={"num_prompts": 2, "num_samples": 2, "max_staleness": 3}, learner={"num_steps": 6})
    engine = Engine()
    parts = Parts(None, engine, Grader(engine))  # type: ignore[arg-type]

    async def take() -> list[float]:
        collector = StepCollector(config, [prompt(f"p{i}") for i in range(12)], parts)
        return [(await collector.collect(step)).metrics["time/rollout_s"] for step in range(6)]

    began = time.perf_counter()
    times = asyncio.run(take())
    assert min(times) >= 0.02
    assert sum(times) <= time.perf_counter() - began, "and not the time in which they worked on those before"


class BrokenGrader:
    """Gives verdicts in the steps of `works_in`, counted from 1, and fails in all others."""

    def __init__(self, works_in: set[int]) -> None:
        self.works_in = works_in

    async def grade(self, items: Any) -> list[RewardResult]:
        works = current_step.get() in self.works_in
        return [WRONG if works else RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "no judge") for _ in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}


def steps_taken(make_config: Any, works_in: set[int], num_prompts: int = 4, **rollout: Any) -> tuple[int, str]:
    """(steps collected before the run stopped, what stopped it) of eight steps."""
    config = make_config(
        rollout={"num_prompts": num_prompts, "num_samples": 2} | rollout,
        algorithm={"num_minibatches": 1},
        learner={"num_steps": 8},
    )
    parts = Parts(None, SlowEngine(), BrokenGrader(works_in))  # type: ignore[arg-type]

    async def take() -> tuple[int, str]:
        collector = StepCollector(config, [prompt(f"p{i}") for i in range(80)], parts)
        for step in range(8):
            try:
                await collector.collect(step)
            except RewardFailedError as error:
                return step, str(error)
        return 8, ""

    return asyncio.run(take())


@pytest.mark.parametrize(
    ("works_in", "steps"),
    [
        (set(), 2),
        ({1}, 3),
        ({3}, 5),
        ({1, 4}, 6),
        ({1, 4, 7}, 8),
        (set(range(1, 9)), 8),
    ],
)
def test_a_run_survives_two_steps_without_a_verdict_but_not_three(
    make_config: Any, works_in: set[int], steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dphrl")
    taken, why = steps_taken(make_config, works_in)
    assert (taken, bool(why)) == (steps, steps < 8)
    if why:
        assert "gave no verdict on any of 8 completions of 4 prompts: no judge; mend the reward" in why
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    failed = [step for step in range(1, steps + 1) if step not in works_in]
    assert [message.partition(":")[0] for message in warned] == [f"step {step}" for step in failed]
    assert all("no completion of this step is trained on" in message for message in warned)
    in_full = [record.getMessage() for record in caplog.records if record.getMessage().startswith("The reward failed")]
    assert len(in_full) == (3 if failed else 0), "three in the whole run"


def test_a_reward_that_fails_everywhere_ends_a_large_step_early(make_config: Any) -> None:
    taken, why = steps_taken(make_config, set(), num_prompts=80)
    assert taken == 0
    assert f"completions of {MAX_FAILED_PROMPTS} prompts: no judge" in why
    # In the same step, a reward that is known to work is given until the end of it.
    taken, why = steps_taken(make_config, {1}, num_prompts=80)
    assert taken == 3
    assert "160 completions of 80 prompts" in why
    assert steps_taken(make_config, {1}, max_staleness=1)[0] == 3
