"""What a run refused is not tried again by a scheduler, until something changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cluster.launch
from cluster.cli import app
from cluster.refusals import MAX_AGE_S, NOTE
from dphrl.config.loading import InputError

LINE = "data.train.path: /shared/data/bird: not found; bring it there"


class Trial:
    """`dphrl train --retries 2` of a run whose preparation ends as `ends` says; `tried` counts how often it came so
    far."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.tried = tmp_path, 0
        self.ends: BaseException | None = InputError(LINE)
        monkeypatch.setattr(cluster.launch, "run_training", self._train)

    @property
    def note(self) -> Path:
        return self.run_dir / "demo-math" / NOTE

    def _train(self, *args: Any, **kwargs: Any) -> None:
        self.tried += 1
        if self.ends:
            raise self.ends

    def start(self, *settings: str, retries: int = 2) -> tuple[int, list[str]]:
        """The exit status, and the errors that were told."""
        words = ["train", "demo-math", f"run_dir={self.run_dir}", *settings, "--resume"]
        ended = CliRunner().invoke(app, [*words, *(["--retries", str(retries)] if retries else [])])
        lines = [line.removeprefix("dphrl: error: ") for line in ended.output.splitlines() if "error: " in line]
        return ended.exit_code, lines


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return Trial(tmp_path, monkeypatch)


def test_a_retry_ends_at_once_with_the_same_line(trial: Trial) -> None:
    assert trial.start() == (2, [LINE])
    for _ in range(2):
        status, lines = trial.start()
        assert (status, lines[0], trial.tried) == (2, LINE, 1)
        assert "was refused 0 minutes ago, and the configuration is the same; change it, or remove" in lines[1]
    # The scheduler has no more retries: the next start is somebody's who has mended something.
    assert not trial.note.exists()
    assert trial.start() == (2, [LINE])
    assert trial.tried == 2


def test_a_changed_configuration_is_tried(trial: Trial) -> None:
    trial.start()
    assert trial.start("learner.lr=1e-5") == (2, [LINE])
    assert trial.tried == 2
    # The note is of the last one now.
    trial.start()
    assert trial.tried == 3


def test_a_run_that_begins_leaves_no_note(trial: Trial) -> None:
    trial.start()
    assert trial.note.exists()
    trial.ends = None
    assert trial.start("learner.lr=1e-5")[0] == 0
    assert not trial.note.exists()


def test_a_token_that_was_added_is_tried(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.start()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "aB1" * 9)
    trial.start()
    assert trial.tried == 2
    assert "aB1" not in trial.note.read_text()


def test_a_note_of_long_ago_does_not_count(trial: Trial) -> None:
    trial.start()
    refusal = json.loads(trial.note.read_text())
    trial.note.write_text(json.dumps(refusal | {"at_s": refusal["at_s"] - MAX_AGE_S - 1}))
    trial.start()
    assert trial.tried == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"lines": []}'])
def test_a_damaged_note_does_not_count(trial: Trial, content: str) -> None:
    trial.note.parent.mkdir()
    trial.note.write_text(content)
    assert trial.start() == (2, [LINE])


def test_a_failure_is_retried(trial: Trial) -> None:
    trial.ends = RuntimeError("a node went away")
    assert trial.start()[0] == trial.start()[0] == 1
    assert (trial.tried, trial.note.exists()) == (2, False)


def test_several_lines_are_kept(trial: Trial) -> None:
    trial.ends = InputError("first: wrong", "second: wrong")
    trial.start()
    assert trial.start()[1][:2] == ["first: wrong", "second: wrong"]


def test_without_retries_nothing_is_noted(trial: Trial) -> None:
    trial.start(retries=0)
    trial.start(retries=0)
    assert (trial.tried, trial.note.exists()) == (2, False)


def test_a_folder_that_somebody_writes_is_left_alone(trial: Trial) -> None:
    (trial.run_dir / "demo-math").mkdir()
    (trial.run_dir / "demo-math" / ".owner").write_text("")
    trial.start()
    assert not trial.note.exists()


def test_a_folder_that_cannot_be_written_is_no_other_error(trial: Trial) -> None:
    (trial.run_dir / "demo-math").write_text("a file")
    assert trial.start() == (2, [LINE])


def test_a_folder_with_a_note_alone_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / NOTE).write_text("{}")
    cluster.launch.check_run_folder(tmp_path, resume=False, overwrite=True)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds no run"):
        cluster.launch.check_run_folder(tmp_path, resume=False, overwrite=True)
