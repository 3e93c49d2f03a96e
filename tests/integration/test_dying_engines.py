"""A training on the embedded model whose engine is killed at its work, and whose engines become two, and one again.

It is the demo's loop with real engines: nothing is lost or doubled, and every version is the one that it says.
`test_weight_session` kills a worker that takes weights.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.integration

LIMIT_S = 120.0
NUM_STEPS = 400  # more than it gets to: the story ends it


class StoryEndError(RuntimeError):
    """All that was to happen has happened."""


@contextmanager
def meanwhile(what: Callable[[], None]) -> Iterator[list[BaseException]]:
    """Run `what` in a thread beside the block; what it raises is in the list."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            what()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield errors
    thread.join(LIMIT_S)


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> SimpleNamespace:
    """What a training left during which its engine was killed, another came, and one left."""
    from actors.rollout_pool import RayRolloutPool
    from cluster.launch import open_system
    from cluster.orders import give_order
    from dphrl.loop import train
    from dphrl.prepare import prepare
    from dphrl.tracking.console import Console

    folder = tmp_path_factory.mktemp("runs")
    config = make_config(
        run_name="dying",
        run_dir=str(folder),
        algorithm={"divergence": "none"},
        rollout={"max_staleness": 1, "num_prompts": 8, "cpus_per_engine": 0.25, "threads_per_engine": 1},
        learner={"num_steps": NUM_STEPS, "lr": 1e-5, "cpus_per_rank": 0.5},
        reward={"cpus_per_worker": 0.25, "num_workers": 1},
        cluster={"num_cpus": 2},
        evaluation={"num_samples": 0},
        data={"evaluation": []},
    )
    prepared = prepare(config, Console())
    seen = SimpleNamespace(steps=[], versions=[], groups=[], messages=[], lost=[], killed=None)
    over = threading.Event()

    class Observer:
        async def after_step(self, step: int, metrics: Any, groups: Any, batch: Any) -> None:
            seen.steps.append(dict(metrics))
            seen.groups.append(list(groups))
            if over.is_set():
                raise StoryEndError

    def story(pool: RayRolloutPool) -> None:
        def say(message: str) -> None:
            seen.messages.append(message)

        until(lambda: len(seen.steps) >= 2, "two steps")
        # It works, since a step is always ahead of the learner.
        seen.killed = pool._steps.place_of(0)
        os.kill(seen.killed.process, signal.SIGKILL)
        until(lambda: any(step["rollout/engines_replaced"] for step in seen.steps), "another engine")
        give_order(config.folder, 2, 2, wait_s=LIMIT_S, on_message=say)
        until(lambda: seen.steps[-1]["rollout/engines"] == 2, "a step of two engines")
        seen.two = len(seen.steps)
        until(lambda: len(seen.steps) > seen.two + 2, "steps of two engines")
        give_order(config.folder, 1, 1, wait_s=LIMIT_S, on_message=say)
        until(lambda: seen.steps[-1]["rollout/engines"] == 1, "a step of one engine")
        until(lambda: len(seen.steps) > seen.two + 6, "steps of one engine")
        over.set()

    with open_system(config, prepared, inline=False) as system:

        async def run() -> None:
            async with system.listen(config.folder):
                parts = await system.start(lambda line: None)
                await parts.rollouts.refit(parts.learner)
                seen.resources = free_resources()
                with meanwhile(lambda: story(parts.rollouts)) as errors, suppress(StoryEndError):  # type: ignore[arg-type]
                    await train(config, prepared.prompts, parts, None, Observer())
                assert not errors, errors
                seen.resources_after = await asyncio.to_thread(
                    lambda: until(lambda: free_resources() == seen.resources and seen.resources, "what was held")
                )

        asyncio.run(run())
    return seen


def free_resources() -> float:
    import ray

    return round(ray.available_resources().get("CPU", 0.0), 3)


def test_every_step_has_all_of_its_completions_once(trained: SimpleNamespace) -> None:
    for groups in trained.groups:
        assert len(groups) == 8
        for group in groups:
            assert [c.sample_index for c in group.completions] == [0, 1, 2, 3]
            assert {c.prompt_id for c in group.completions} == {group.prompt.prompt_id}


def test_versions_are_right_whoever_sampled(trained: SimpleNamespace) -> None:
    for step, groups in enumerate(trained.groups):
        ages = Counter(step - c.policy_version for group in groups for c in group.completions)
        assert set(ages) <= {0, 1}, "rollout.max_staleness is 1"
    assert max(step["sync/logprob_gap_max"] for step in trained.steps) <= 1e-4


def test_the_killed_engine_was_replaced_within_the_run(trained: SimpleNamespace) -> None:
    assert sum(step["rollout/engines_replaced"] for step in trained.steps) == 1
    assert sum(step["rollout/num_resubmitted"] for step in trained.steps) > 0
    assert [step["rollout/engines"] for step in trained.steps].count(2) >= 2


def test_the_run_says_how_far_it_is(trained: SimpleNamespace) -> None:
    assert trained.messages[0] == "1 -> 2 engines, 1 -> 2 reward workers: begun"
    assert "1 -> 2 engines, 1 -> 2 reward workers: done" in trained.messages
    assert trained.messages[-1] == "2 -> 1 engines, 2 -> 1 reward workers: done"


def test_what_the_leavers_held_is_free_again(trained: SimpleNamespace) -> None:
    assert trained.resources_after == trained.resources
