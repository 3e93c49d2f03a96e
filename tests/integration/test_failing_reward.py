"""A user's reward that fails on every completion, in the real reference stage: the run says so, and says why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app

pytestmark = [pytest.mark.integration, pytest.mark.inline]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "unit"))
    yield
    sys.modules.pop("user_rewards", None)


@pytest.mark.parametrize(
    ("name", "words", "traced"),
    [
        ("raises", "the reward raised KeyError: 'final_answer'", True),
        ("returns_nan", "the reward returned nan, not a bool, a finite number or a RewardResult", False),
        ("returns_none", "the reward returned None, not a bool, a finite number or a RewardResult", False),
    ],
)
@pytest.mark.parametrize("command", ["sample", "train"])
def test_the_stage_stops_in_its_first_chunk_with_the_rewards_own_message(
    tmp_path: Path, command: str, name: str, words: str, traced: bool
) -> None:
    settings = [f"run_dir={tmp_path}", "run_name=failing", f"reward.name=user_rewards:{name}"]
    small = ["data.train.limit=12", "reference.prompts_per_chunk=4", "reward.num_retries=0"]
    done = CliRunner().invoke(app, [command, "demo-math", "--inline", *settings, *small])
    assert done.exit_code == 1
    failed, where = done.stderr.splitlines()
    assert failed == (
        f"dphrl: failed: RewardFailedError: reward.name='user_rewards:{name}' gave no verdict on any of 32 completions "
        f"of 4 prompts: {words}; mend the reward or what it needs (run.log has the first failures in full)"
    )
    folder = tmp_path / "failing"
    assert where == f"dphrl: the traceback is in {folder / 'run.log'}"
    assert "stronger model" not in done.stdout
    assert not (folder / "reference").exists()
    assert list((folder / "reference.graded").glob("*.parquet")) == []
    text = (folder / "run.log").read_text()
    assert text.count("The reward failed on prompt factor-0: ") == 3
    assert text.count("the completion begins: '") == text.count("the answer: 'factor:") == 3
    assert text.count('return float({"answer": answer}["final_answer"])') == 3 * traced
