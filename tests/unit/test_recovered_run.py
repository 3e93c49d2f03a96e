"""A run that loses its learner at any moment ends as one that does not: each completion is trained on exactly once."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl.data.schedule import derive_seed
from dphrl.protocols import LearnerLostError, Parts
from dphrl.recovery import Recovery
from dphrl.replay import read_step
from dphrl.run import training_run
from dphrl.stopping import Stopped, StopRequest
from dphrl.tracking.console import Console
from dphrl.tracking.tracker import Tracker, read_metrics
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, TrainBatch

PROMPTS = [Prompt(f"p{i}", f"question {i}", (i, 2, 3), str(i), "d") for i in range(12)]
NUM_STEPS = 5


class World:
    """Learner, engines and graders of which nothing is random. The learner's weights are the list of what it learned.

    losses: at which calls, by method and version, the learner is lost; each comes once.
    """

    dtype, layout = "float32", "fake"

    def __init__(self, losses: Sequence[tuple[str, int]]) -> None:
        self.losses = list(losses)
        self.learned: list[Any] = []
        self.loaded: list[tuple[int, bool]] = []
        self.engines: tuple[int, int] | None = None  # version, and how much the weights had learned
        self.num_restarts = 0
        self.is_lost = False

    @property
    def policy_version(self) -> int:
        return self._version

    _version = 0

    def _meet(self, method: str, version: int | None = None) -> None:
        if (here := (method, self._version if version is None else version)) in self.losses:
            self.losses.remove(here)
            self.is_lost = True
        if self.is_lost:
            raise LearnerLostError(f"learner rank 0 died in {method}")

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        self._meet("update")
        rows = [(row.token_ids, row.advantage) for rows in batch.minibatches for row in rows]
        self.learned.append([batch.step, batch.learning_rate, repr(sorted(rows))])
        self._version += 1
        return {"learner/grad_norm": 1.0}

    async def copy_state(self) -> int:
        self._meet("copy_state")
        self._copy = json.dumps(self.learned)
        return 0

    async def write_state(self, folder: Path) -> dict[str, str]:
        self._meet("write_state", len(json.loads(self._copy)))
        (folder / "state.json").write_text(self._copy)
        return {}

    async def write_export(self, folder: Path) -> None:
        self._meet("write_export", len(json.loads(self._copy)))
        (folder / "hf").mkdir(parents=True)
        (folder / "hf" / "model").write_text(self._copy)

    async def load(self, folder: Path, policy_version: int, *, weights_only: bool = False) -> None:
        self._meet("load")
        self.loaded.append((policy_version, weights_only))
        self.learned, self._version = json.loads((folder / "state.json").read_text()), policy_version

    async def refit(self, learner: Any) -> dict[str, float]:
        self._meet("refit")
        self.engines = self._version, len(self.learned)
        return {"sync/logprob_gap_max": 0.0}

    async def restart_learner(self, on_ready: Any) -> None:
        self.is_lost = False
        self._meet("restart")
        self.num_restarts += 1
        self.is_lost, self._version, self.learned = False, 0, []

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncIterator[list[Completion]]:
        assert self.engines is not None
        version, num_learned = self.engines
        assert version == num_learned, "engines have the weights of their version"
        self._meet("generate")
        for prompt in prompts:
            await asyncio.sleep(0)
            for i in range(num_samples):
                ids = (1 + derive_seed(seed, version, prompt.prompt_id, i) % 50,)
                yield [Completion(prompt.prompt_id, i, ids, str(ids[0]), (-0.5,), "stop", version)]

    async def grade(self, items: Any) -> list[RewardResult]:
        return [RewardResult(RewardStatus.CORRECT if int(c.text) % 2 else RewardStatus.WRONG) for _, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def digest(self) -> str:
        return repr(self.learned)

    async def start(self, on_ready: Any) -> Parts:
        world: Any = self
        return Parts(world, world, world)


def run(
    make_config: Any,
    tiny_dir: str,
    folder: Path,
    *losses: tuple[str, int],
    num_steps: int = NUM_STEPS,
    restore: str = "all",
    resume: bool = False,
    **changes: Any,
) -> tuple[World, str]:
    config = make_config(
        algorithm={"divergence": "none", "num_minibatches": 1},
        learner={"num_steps": num_steps, "lr_schedule": "linear"},
        checkpoint={"every_steps": 2, "restore": restore},
        evaluation={"num_samples": 0},
        **changes,
    )
    world, said = World(losses), io.StringIO()
    prepared: Any = SimpleNamespace(model_dir=tiny_dir, prompts=PROMPTS, evaluations=[])
    system: Any = world
    with Tracker(folder, tensorboard=False) as tracker:
        console = Console(said, interactive=False)
        asyncio.run(training_run(config, prepared, system, tracker, console, resume=resume))
    return world, said.getvalue()


MOMENTS = [
    [("refit", 0)],  # the first sync
    [("update", 0)],  # nothing is trained
    [("refit", 1)],  # before there is a checkpoint
    [("copy_state", 2)],  # in the first checkpoint
    [("write_state", 2)],
    [("write_export", 2)],
    [("update", 3)],
    [("generate", 2)],  # the pool refits an engine by itself
    [("refit", 4)],
    [("copy_state", NUM_STEPS)],  # in the last
    [("write_state", NUM_STEPS)],
    [("write_export", NUM_STEPS)],
    [("update", 3), ("load", 0)],  # again, while it is being restored
    [("update", 1), ("update", 3), ("refit", NUM_STEPS)],
]


@pytest.mark.parametrize("losses", MOMENTS, ids=str)
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_that_lost_its_learner_ends_as_any_other(
    make_config: Any, tiny_dir: str, tmp_path: Path, losses: list[tuple[str, int]], max_staleness: int
) -> None:
    rollout = {"rollout": {"max_staleness": max_staleness}}
    lost, _ = run(make_config, tiny_dir, tmp_path / "lost", *losses, **rollout)
    whole, _ = run(make_config, tiny_dir, tmp_path / "whole", **rollout)
    assert lost.losses == []
    assert (lost.num_restarts, whole.num_restarts) == (len(losses), 0)
    assert [step for step, *_ in lost.learned] == list(range(NUM_STEPS))
    metrics, expected = read_metrics(tmp_path / "lost"), read_metrics(tmp_path / "whole")
    assert [record["step"] for record in metrics] == [record["step"] for record in expected]
    assert [record["policy_version"] for record in metrics] == list(range(1, NUM_STEPS + 1))
    exported = tmp_path / "lost" / "checkpoints" / f"step_{NUM_STEPS}" / "hf" / "model"
    assert len(json.loads(exported.read_text())) == NUM_STEPS
    assert len(list((tmp_path / "lost" / "samples").iterdir())) == NUM_STEPS
    if max_staleness == 0:  # else it decides how far ahead of the learner a sample was made
        assert lost.learned == whole.learned, "every completion, once, in its place"
        assert [r["reward/mean"] for r in metrics] == [r["reward/mean"] for r in expected]


def test_a_restart_that_fails_counts_and_is_tried_again(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    world, _ = run(make_config, tiny_dir, tmp_path / "twice", ("update", 3), ("restart", 3), ("restart", 3))
    assert (world.num_restarts, len(world.learned)) == (1, NUM_STEPS)
    with pytest.raises(LearnerLostError, match=r"did not start again: .*started again 3 times since .* step 2$"):
        run(make_config, tiny_dir, tmp_path / "thrice", ("update", 3), *[("restart", 3)] * 3)


def test_a_run_that_shall_end_starts_no_learner(make_config: Any, tmp_path: Path) -> None:
    world, stop = World([]), StopRequest()
    system: Any = world
    recovery = Recovery(make_config(), system, tmp_path, Console(io.StringIO(), interactive=False), stop)

    async def work() -> None:
        stop._number = signal.SIGTERM  # it went to all processes of the job
        raise LearnerLostError("learner rank 0 died in update")

    with pytest.raises(Stopped, match="SIGTERM"):
        asyncio.run(recovery.repeat(work))
    assert world.num_restarts == 0


def test_what_was_restored_is_told(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    _, said = run(make_config, tiny_dir, tmp_path, ("update", 1), ("update", 3))
    assert "resume: no checkpoint yet, starting at step 1" in said
    assert "resume: 2 steps done, continuing from" in said


def test_a_replay_knows_where_the_optimizer_began_anew(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    kept = {"replay_steps": 9}
    run(make_config, tiny_dir, tmp_path, num_steps=2, restore="weights", tracking=kept)
    run(make_config, tiny_dir, tmp_path, ("update", 4), restore="weights", resume=True, tracking=kept)
    # The last step is of a learner that was lost and has all of the checkpoint of step 4.
    anew = [read_step(tmp_path, step).anew for step in range(1, NUM_STEPS + 1)]
    assert anew == [False, False, True, False, False]


def test_moments_that_were_left_once_stay_away(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    run(make_config, tiny_dir, tmp_path, num_steps=2, restore="weights")
    losses = ("update", 3), ("update", 4)
    world, _ = run(make_config, tiny_dir, tmp_path, *losses, restore="weights", resume=True)
    # Step 2 is restored twice without its moments, and step 4 with those that the run has made since.
    assert world.loaded == [(2, True), (2, True), (4, False)]
    world, _ = run(make_config, tiny_dir, tmp_path / "new", ("update", 3), restore="weights")
    assert world.loaded == [(2, False)], "only --resume leaves moments"
