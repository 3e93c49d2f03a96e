"""A finished run that is asked to go on with something else: refused in a line, and continued when the user insists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import app
from dphrl.config.loading import load_config
from dphrl.tracking.tracker import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.inline]

REWARD = "def judge(completion, answer):\n    return len(completion) % 2 == 0\n"


@pytest.fixture
def config_file(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps on a user's reward."""
    (tmp_path / "a_users_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make_config(
        run_dir=str(tmp_path),
        reward={"name": "a_users_reward:judge"},
        data={"evaluation": []},
        tracking={"tensorboard": False},
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def train(config_file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", str(config_file), "--inline", *arguments])


def steps_and_rates(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["learner/lr"]) for record in read_metrics(folder)]


def test_a_run_goes_on_with_something_else_only_if_the_user_insists(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(config_file).exit_code == 0
    stored = (folder / "config.yaml").read_text()

    longer = "learner.num_steps=3"
    refused = train(config_file, "--resume", longer, "learner.lr=0.01")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "step_2 was trained with other settings: learner.lr: 0.001 -> 0.01; --insist goes on" in refused.stderr
    assert (folder / "config.yaml").read_text() == stored
    assert [step for step, _ in steps_and_rates(folder)] == [1, 2]

    done = train(config_file, "--resume", "--insist", longer, "learner.lr=0.01")
    assert done.exit_code == 0, done.output
    assert steps_and_rates(folder) == [(1, 0.001), (2, 0.001), (3, 0.01)]
    assert "--insist goes on although" in (folder / "run.log").read_text()
    assert load_config(str(folder / "config.yaml")).learner.lr == 0.01

    # The checkpoint is now of the new setting, so that it is the old one that differs.
    assert "learner.lr: 0.01 -> 0.001" in train(config_file, "--resume", "learner.num_steps=4").stderr
    (tmp_path / "a_users_reward.py").write_text(REWARD.replace("== 0", "== 1"))
    refused = train(config_file, "--resume", "learner.num_steps=4", "learner.lr=0.01")
    assert refused.exit_code == 2
    assert "step_3 was trained with another content of reward code (reward.name); --insist goes on" in refused.stderr
