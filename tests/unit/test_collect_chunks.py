"""Chunks of a long collection: engines always have work, not too much of it, and one error ends all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl import collect
from dphrl.collect import collect_chunks
from dphrl.config.loading import InputError
from dphrl.data.schedule import derive_seed
from dphrl.evaluation import stage as evaluation_stage
from dphrl.evaluation.stage import Evaluation, evaluate_sets
from dphrl.prepare import EvaluationSet
from dphrl.protocols import Parts
from dphrl.reference.stage import fill_reference
from dphrl.rewards.watch import RewardFailedError
from dphrl.tracking.console import Console
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus


class OneEngine:
    """Decodes one completion at a time, call after call, and notes how many are left when one is done.

    left: after each completion, those that it has been asked for and has not returned. The last of each call takes
    many turns of the event loop, as the longest of a batch does.
    """

    def __init__(self) -> None:
        self.left: list[int] = []
        self.calls: list[tuple[int, bool, int]] = []
        self._num_left = 0
        self._turn = asyncio.Lock()

    async def generate(
        self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
        jobs = [(prompt, i) for prompt in prompts for i in range(num_samples)]
        self.calls.append((seed, greedy, len(jobs)))
        self._num_left += len(jobs)
        async with self._turn:
            for prompt, i in jobs:
                for _ in range(20 if (prompt, i) == jobs[-1] else 1):
                    await asyncio.sleep(0)
                self._num_left -= 1
                self.left.append(self._num_left)
                yield [Completion(prompt.prompt_id, i, (1, 2), "x", (-1.0, -1.0), "stop", 0)]


class Rewards:
    """Every completion is right; those of prompts in `fails_on` get no verdict."""

    def __init__(self, fails_on: str = "") -> None:
        self.fails_on = fails_on

    async def grade(self, items: Any) -> list[RewardResult]:
        failed = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "no judge")
        return [failed if p.prompt_id in self.fails_on else RewardResult(RewardStatus.CORRECT) for p, _ in items]


class Learner:
    dtype = "float32"

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        return [tuple(-1.0 for _ in ids[num_prompt:]) for ids, num_prompt in sequences]


def prompts_of(names: str) -> list[Prompt]:
    return [Prompt(name, name, (1,), "", "data") for name in names]


def reference(make_config: Any, folder: Path, names: str, rewards: Any = None, **settings: Any) -> OneEngine:
    settings = {"num_samples": 3, "threshold": 1, "prompts_per_chunk": 2} | settings
    engine, config = OneEngine(), make_config(reference=settings)

    async def run() -> None:
        await fill_reference(config, prompts_of(names), engine, rewards or Rewards(), Learner(), {}, folder)

    asyncio.run(run())
    return engine


def test_engines_never_run_empty_between_two_chunks_of_the_reference(make_config: Any, tmp_path: Path) -> None:
    engine = reference(make_config, tmp_path / "r", "abcdefg")
    assert [count for _, _, count in engine.calls] == [6, 6, 6, 3]
    assert engine.left.index(0) == len(engine.left) - 1 == 20, "the next chunk is asked for before the last of one"
    engine = reference(make_config, tmp_path / "c", "abcdefg", num_samples=1, confirm=True)
    assert engine.left.count(0) == 2, "confirmation needs the whole first sampling, and is in chunks itself"


def test_engines_never_run_empty_between_two_chunks_of_an_evaluation(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_stage, "PROMPTS_PER_CHUNK", 2)
    config, engine = make_config(evaluation={"num_samples": 3, "k": [1]}, seed=4), OneEngine()
    evaluation = Evaluation(config, [EvaluationSet("d", "test", prompts_of("abcde"))], "model")
    learner: Any = Learner()
    rewards: Any = Rewards()
    asyncio.run(evaluate_sets(evaluation, Parts(learner, engine, rewards), Console(interactive=False)))
    seed = derive_seed(4, "evaluation")
    assert engine.calls == [
        *((seed, greedy, count) for count in (2, 2) for greedy, count in ((False, 3 * count), (True, count))),
        (seed, False, 3),
        (seed, True, 1),
    ], "greedy completions are asked for with the others of their chunk"
    assert engine.left.index(0) == len(engine.left) - 1 == 19


def run_chunks(*chunks: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(collect_chunks(chunks))


def test_no_more_chunks_are_open_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_OPEN_CHUNKS", 3)
    now = SimpleNamespace(open=0, most=0, begun=[])

    def chunk(number: int) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            now.begun.append(number)
            now.open += 1
            now.most = max(now.most, now.open)
            # The first ones take longest.
            for _ in range(30 - number):
                await asyncio.sleep(0)
            now.open -= 1

        return work

    run_chunks(*map(chunk, range(10)))
    assert (now.most, now.open) == (3, 0)
    assert now.begun == list(range(10)), "each in its turn"


@pytest.mark.parametrize("error", [RewardFailedError("no judge"), InputError("a setting")])
def test_one_chunk_that_fails_ends_all_with_its_own_error(error: Exception) -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(type(error)) as raised:
        run_chunks(endless, fails, endless)
    assert raised.value is error
    assert ended == ["cancelled"] * 2


def test_of_errors_that_come_together_the_rewards_own_is_raised() -> None:
    async def other() -> None:
        raise ConnectionError

    async def fails() -> None:
        raise ExceptionGroup("inner", [RewardFailedError("no judge")])

    with pytest.raises(RewardFailedError, match="no judge"):
        run_chunks(other, fails)
    with pytest.raises(ExceptionGroup) as raised:
        run_chunks(other)
    assert raised.group_contains(ConnectionError)


def test_a_chunk_without_a_verdict_ends_the_stage_as_itself(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(RewardFailedError, match="no judge"):
        reference(make_config, tmp_path / "r", "abcdef", Rewards(fails_on="abcdef"))
