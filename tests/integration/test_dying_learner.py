"""Processes of one run killed one after another, engines apart: it does all its steps, each once, as if nothing was.

SIGKILL of the reference stage while it samples, of a reward worker at its work, of the buffer actor, of a learner rank
in an update, and of another while it publishes its weights, with the engines in the midst of taking them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.launch import open_system
from dphrl.prepare import prepare
from dphrl.protocols import Parts
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.run import training_run
from dphrl.tracking.console import Console
from dphrl.tracking.metrics import step_problems
from dphrl.tracking.tracker import Tracker, read_metrics

pytestmark = pytest.mark.integration

# What a step that is taken again must give again.
SAME = ("reward/mean", "policy/loss", "policy/entropy", "divergence/loss", "learner/grad_norm", "rollout/num_tokens")


class Killer:
    """Kills the actors of a run by their names, and remembers whom."""

    def __init__(self, run_name: str) -> None:
        self.run_name, self.killed = run_name, dict[str, int]()

    async def kill(self, name: str, *, after_s: float = 0.0) -> None:
        """SIGKILL, once in the test; name: as in learner-0."""
        if name in self.killed:
            return
        place, _ = await asyncio.wait_for(ray.get_actor(f"{self.run_name}-{name}").stack.remote(), 20)
        self.killed[name] = int(place.split()[-1])
        await asyncio.sleep(after_s)
        os.kill(self.killed[name], signal.SIGKILL)


class DoomedLearner:
    """Loses rank 0 in the update that makes version 4, and rank 1 in the sync to version 6."""

    def __init__(self, learner: Any, killer: Killer) -> None:
        self.learner, self.killer = learner, killer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    async def update(self, batch: Any) -> Any:
        if self.learner.policy_version == 3:
            return (await asyncio.gather(self.learner.update(batch), self.killer.kill("learner-0", after_s=0.05)))[0]
        return await self.learner.update(batch)

    async def publish(self) -> AsyncIterator[Any]:
        if self.learner.policy_version == 6:
            await self.killer.kill("learner-1")
        async for chunk in self.learner.publish():
            yield chunk


class DoomedRewards:
    """Loses its worker before the first work after the reference stage."""

    def __init__(self, rewards: Any, killer: Killer) -> None:
        self.rewards, self.killer = rewards, killer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rewards, name)

    async def grade(self, items: Any) -> Any:
        await self.killer.kill("reward-0")
        return await self.rewards.grade(items)


class DoomedStore:
    """Loses the buffer actor before the rows of the second step."""

    def __init__(self, store: Any, killer: Killer) -> None:
        self.store, self.killer = store, killer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def sample(self, step: int, num_rows: int) -> Any:
        if step == 1:
            await self.killer.kill("buffer-0")
        return await self.store.sample(step, num_rows)


class DoomedSystem:
    """A system whose parts are killed; the reference stage as soon as it has graded something."""

    def __init__(self, system: Any, killer: Killer) -> None:
        self.system, self.killer = system, killer
        self.killing: list[asyncio.Task[None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    async def start(self, on_ready: Any) -> Parts:
        parts = await self.system.start(on_ready)
        learner: Any = DoomedLearner(parts.learner, self.killer)
        rewards: Any = DoomedRewards(parts.rewards, self.killer)
        return Parts(learner, parts.rollouts, rewards)

    async def fill_reference(self, prompts: Any, identity: Any, folder: Any, on_graded: Any) -> Any:
        def kill_when_graded(num_completions: int, num_tokens: int) -> None:
            on_graded(num_completions, num_tokens)
            if num_completions and not self.killing:
                self.killing.append(asyncio.ensure_future(self.killer.kill("reference-0")))

        store, counts = await self.system.fill_reference(prompts, identity, folder, kill_when_graded)
        return DoomedStore(store, self.killer), counts


@pytest.fixture(scope="module")
def run(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dying") / "run"
    config = make_config(
        run_name="dying",
        deterministic=True,
        data={"train": {"limit": 96}, "evaluation": []},
        algorithm={"num_minibatches": 1},
        rollout={"num_prompts": 8, "max_concurrent_sequences": 32},
        reference={"threshold": 2, "prompts_per_chunk": 8},
        reward={"num_workers": 1},
        learner={"num_steps": 6, "num_ranks": 2, "cpus_per_rank": 0.4, "threads_per_rank": 1, "timeout_s": 120.0},
        checkpoint={"every_steps": 2},
        evaluation={"num_samples": 0},
        cluster={"num_cpus": 2},
    )
    killer, console, records = Killer("dying"), Console(), list[logging.LogRecord]()
    prepared = prepare(config, console)
    seen: list[list[dict[str, Any]]] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "event", "").endswith("_restarted"):
                records.append(record)
                seen.append(read_metrics(folder))

    listening = Listening()
    logging.getLogger().addHandler(listening)
    try:
        with Tracker(folder, tensorboard=False) as tracker, open_system(config, prepared, inline=False) as system:
            doomed: Any = DoomedSystem(system, killer)
            asyncio.run(training_run(config, prepared, doomed, tracker, console, resume=False))
    finally:
        logging.getLogger().removeHandler(listening)
    return folder, killer.killed, records, seen


def test_all_that_were_to_die_died_and_it_was_told_in_a_line_each(run: Any) -> None:
    _, killed, records, _ = run
    assert set(killed) == {"reference-0", "reward-0", "buffer-0", "learner-0", "learner-1"}
    told = {record.event: record for record in records}
    assert [record.event for record in records] == [
        "reference_stage_restarted",
        "reward_worker_restarted",
        "buffer_restarted",
        "learner_restarted",
        "learner_restarted",
    ]
    for event, name in (("reference_stage_restarted", "reference-0"), ("buffer_restarted", "buffer-0")):
        assert (
            f"process {killed[name]}) died: its process was killed by a signal or crashed" in told[event].getMessage()
        )
    first, second = (record.getMessage() for record in records[-2:])
    assert f"learner rank 0 (node {ray_node(first)}, process {killed['learner-0']}) died: its process was" in first
    assert "goes on after step 2; rollouts under way are given up; restart 1 of 3 since" in first
    assert f"process {killed['learner-1']}) died: " in second
    assert "goes on after step 4; rollouts under way are given up; restart 1 of 3 since" in second
    assert all("\n" not in record.getMessage() for record in records)


def ray_node(line: str) -> str:
    return line.split("(node ")[1].split(",")[0]


def test_each_step_is_there_once(run: Any) -> None:
    folder, *_ = run
    metrics = read_metrics(folder)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    assert [record["policy_version"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    assert [problem for record in metrics for problem in step_problems(record)] == []
    assert [record.get("learner/restarts") for record in metrics] == [None, None, 1, 1, 2, 2]
    assert all(record["sync/logprob_gap_max"] <= 1e-3 for record in metrics), "after the sync that broke off, too"
    assert sum(record["reward/status/infrastructure_error"] for record in metrics) == 0, "no verdict is lost"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_4", "step_6"]


def test_steps_taken_again_are_those_of_an_undisturbed_run(run: Any) -> None:
    folder, _, _, seen = run
    metrics = read_metrics(folder)
    for before, step in ((seen[3], 3), (seen[4], 5)):
        first, again = before[step - 1], metrics[step - 1]
        assert first["step"] == again["step"] == step
        assert {name: again[name] for name in SAME} == pytest.approx({name: first[name] for name in SAME}, rel=1e-3)


def test_the_reference_stage_continued(run: Any) -> None:
    folder, *_ = run
    buffer = ReferenceBuffer.load(folder / "reference")
    assert len(buffer.verdicts) == 96
    assert {counts.num_graded for counts in buffer.verdicts.values()} == {4}
    assert buffer.samples


def test_nothing_of_the_dead_stays(run: Any) -> None:
    _, killed, *_ = run
    assert not [pid for pid in killed.values() if Path(f"/proc/{pid}").exists()]
