"""A training run that signals stop: which steps it finishes, and what it saves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl.learner.checkpoint import list_checkpoints
from dphrl.prepare import EvaluationSet
from dphrl.protocols import Parts
from dphrl.run import training_run
from dphrl.stopping import ECHO_S, Stopped, StopRequest
from dphrl.tracking.console import Console
from dphrl.tracking.tracker import Tracker, read_metrics
from tests.unit.test_evaluation_stage import FakeLearner, FakeRewards, FakeRollouts, make_prompts


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(ECHO_S if len(numbers) > 1 else 0)


class SignalledLearner(FakeLearner):
    """Sends this process signals while it updates from `version`, or fails to save after that."""

    def __init__(self, *numbers: int, version: int = 0, saves: bool = True) -> None:
        self.numbers, self.version, self.saves = numbers, version, saves

    async def update(self, batch: Any) -> dict[str, float]:
        if self.policy_version == self.version:
            send(*self.numbers)
        return await super().update(batch)

    async def write_state(self, folder: Path) -> dict[str, str]:
        if not self.saves:
            raise RuntimeError("the actor died")
        return await super().write_state(folder)


class SignalledRollouts(FakeRollouts):
    """Sends a signal while it samples what begins with `prompt_id`, of a version, and goes on."""

    def __init__(self, number: int, prompt_id: str, version: int) -> None:
        super().__init__()
        self.number, self.place = number, (prompt_id[0], version)

    async def generate(self, prompts: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
        if (prompts[0].prompt_id[0], self.version) == self.place:
            send(self.number)
            self.number = signal.SIGUSR1  # a request that is harmless when it comes again
        async for completions in super().generate(prompts, *args, **options):
            yield completions


Run = Callable[..., tuple[Stopped | None, list[int], int, str]]


@pytest.fixture
def run(make_config: Any, tiny_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Trains four steps, or goes on to them; gives what stopped it, the steps saved, the number of steps in
    metrics.jsonl and what was said."""
    config = make_config(
        algorithm={"divergence": "none", "num_minibatches": 1},
        learner={"num_steps": 4},
        checkpoint={"every_steps": 0, "keep": 4},
        evaluation={"num_samples": 3, "k": [1], "every_steps": 3},
    )
    evaluations = [EvaluationSet("e", "test", make_prompts(5, "e"))]
    prepared: Any = SimpleNamespace(model_dir=tiny_dir, prompts=make_prompts(6), evaluations=evaluations)

    def go(learner: Any = None, rollouts: Any = None) -> tuple[Stopped | None, list[int], int, str]:
        parts: Any = Parts(learner or FakeLearner(), rollouts or FakeRollouts(), FakeRewards())  # type: ignore[arg-type]

        class System:
            async def start(self, on_ready: Any) -> Parts:
                return parts

        system: Any = System()
        ended: Stopped | None = None
        try:
            with StopRequest(saves=True).listening() as stop, Tracker(tmp_path, tensorboard=False) as tracker:
                console = Console(interactive=False)
                stop.run(training_run(config, prepared, system, tracker, console, resume=True, stop=stop))
        except Stopped as stopped:
            ended = stopped
        saved = [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path / "checkpoints")]
        return ended, saved, len(read_metrics(tmp_path)), capsys.readouterr().out

    return go


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_update_is_finished_and_its_step_saved(run: Run, number: int, status: int) -> None:
    ended, saved, num_steps, _ = run(SignalledLearner(number))
    assert ended is not None
    assert (ended.status, ended.at_once) == (status, False)
    assert (saved, num_steps) == ([1], 1)
    ended, saved, num_steps, said = run()
    assert (ended, saved, num_steps) == (None, [1, 4], 4)
    assert "resume: 1 steps done" in said


@pytest.mark.parametrize(("number", "last"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_step_that_is_collected_is_finished_for_a_person_only(run: Run, number: int, last: int) -> None:
    ended, saved, num_steps, _ = run(rollouts=SignalledRollouts(number, "d", 1))
    assert ended is not None
    assert (saved, num_steps) == ([last], last)


def test_an_evaluation_is_given_up_and_its_step_saved(run: Run) -> None:
    ended, saved, num_steps, _ = run(rollouts=SignalledRollouts(signal.SIGINT, "e", 3))
    assert ended is not None
    assert (saved, num_steps) == ([3], 3)
    ended, saved, _, said = run()
    assert (ended, saved) == (None, [3, 4])
    assert "evaluating step 3" in said


@pytest.mark.parametrize(("prompt_id", "version"), [("e", 0), ("e", 4)])
def test_an_evaluation_before_or_after_the_steps_ends_at_once(run: Run, prompt_id: str, version: int) -> None:
    ended, saved, _, said = run(rollouts=SignalledRollouts(signal.SIGINT, prompt_id, version))
    assert ended is not None
    assert saved == ([4] if version else [])
    assert f"evaluating {'step 4' if version else 'base'} on e" in said


def test_a_second_ctrl_c_saves_nothing(run: Run) -> None:
    ended, saved, num_steps, _ = run(SignalledLearner(signal.SIGINT, signal.SIGINT, version=1))
    assert ended is not None
    assert (ended.at_once, saved, num_steps) == (True, [], 1)


def test_a_checkpoint_may_be_asked_for(run: Run) -> None:
    ended, saved, num_steps, _ = run(SignalledLearner(signal.SIGUSR1))
    assert (ended, saved, num_steps) == (None, [1, 4], 4)


def test_a_learner_that_went_with_the_signal_is_told(run: Run) -> None:
    ended, saved, _, said = run(SignalledLearner(signal.SIGTERM, saves=False))
    assert ended is not None
    assert (ended.status, saved) == (143, [])
    assert "the last step could not be saved: the checkpoint of step 1 could not be written" in said
    assert "the actor died" in said
