"""A folder has one owner at a time, whatever way the one before ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.launch import check_run_folder
from dphrl import owner
from dphrl.config.loading import InputError
from dphrl.owner import OWNER_FILE, Claim, owned

HOLDER = """
import sys, time
from pathlib import Path
from dphrl.owner import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns `folder` until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        try:
            yield process
        finally:
            process.kill()


def left_behind(folder: Path, **changes: object) -> Claim:
    """A claim that a killed process left, and no lock."""
    claim = {
        "host": "elsewhere",
        "pid": 4194999,
        "boot": "another",
        "started": 17,
        "since": "2026-01-02 03:04:05 UTC",
        "command": "dphrl train x",
    }
    folder.mkdir(exist_ok=True)
    (folder / OWNER_FILE).write_text(json.dumps(claim | changes))
    return Claim(**json.loads((folder / OWNER_FILE).read_text()))


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with another_process(folder) as first:
        with pytest.raises(InputError) as refused, owned(folder):
            pass
        (line,) = str(refused.value).splitlines()
        assert line.startswith(f"{folder} is being written by process {first.pid} on {os.uname().nodename} since 20")
        assert "choose another run_name" in line
        first.communicate("")
    assert not folder.exists(), "what is empty is not left behind"
    with owned(folder) as mine:
        assert mine.note == ""


def test_a_lock_counts_more_than_what_the_file_says(tmp_path: Path) -> None:
    with another_process(tmp_path):
        left_behind(tmp_path)
        os.utime(tmp_path / OWNER_FILE, (0, 0))
        with pytest.raises(InputError, match="is being written by process 4194999 on elsewhere"), owned(tmp_path):
            pass


def test_a_killed_owner_is_followed_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with another_process(folder) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        with owned(folder) as mine:
            assert f"taken over from process {first.pid} on" in mine.note
            assert "has ended" in mine.note


def test_a_later_process_of_the_same_number_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    started = owner.process_start(os.getpid())
    assert started
    left_behind(tmp_path, boot=owner.boot_id(), pid=os.getpid(), started=started - 1)
    with owned(tmp_path) as mine:
        assert "has ended" in mine.note


def test_where_there_are_no_locks_a_living_process_stays_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("dphrl.owner.fcntl.flock", no_locks)
    with owned(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), owned(tmp_path):
        pass
    with owned(tmp_path) as mine:
        assert mine.note == ""


def test_an_owner_on_another_machine_is_waited_for_until_it_was_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left_behind(tmp_path)
    file = tmp_path / OWNER_FILE
    heard_s = file.stat().st_mtime - 100
    os.utime(file, (heard_s, heard_s))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert file.stat().st_mtime == heard_s, "who asks is no sign of life"

    monkeypatch.setattr(owner, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=sleep))
    with owned(tmp_path) as mine:
        assert "on elsewhere since 2026-01-02 03:04:05 UTC (dphrl train x), which was not heard of for 3" in mine.note
        assert Claim(**json.loads(file.read_text())).pid == os.getpid()
    assert 79 <= sum(slept) <= 81
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"dphrl: {tmp_path} was being written by process 4194999 on elsewhere since 2026")
    assert line.endswith("; waiting 80 s for a sign of life from it")
    assert not file.exists()
    left_behind(tmp_path)
    os.utime(file, (heard_s - 200, heard_s - 200))
    slept.clear()
    with owned(tmp_path):
        assert not slept


@pytest.mark.parametrize("alive", ["it gives a sign of life", "it ends", "it ends and another begins"])
def test_an_owner_on_another_machine_that_lives_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: str
) -> None:
    claim = left_behind(tmp_path)
    file = tmp_path / OWNER_FILE

    def first_sleep(seconds: float) -> None:
        clock.sleep = lambda seconds: os.utime(file)
        if alive == "it gives a sign of life":
            os.utime(file)
            return
        file.unlink()
        if alive == "it ends and another begins":
            left_behind(tmp_path, host="third")

    clock = SimpleNamespace(monotonic=count(0, 10).__next__, sleep=first_sleep)
    monkeypatch.setattr(owner, "time", clock)
    if alive == "it ends":
        with owned(tmp_path) as mine:
            assert mine.note == ""
            assert Claim(**json.loads(file.read_text())).pid == os.getpid()
        return
    host = "elsewhere" if alive == "it gives a sign of life" else "third"
    with (
        pytest.raises(InputError, match=rf"process 4194999 on {host} since 2026-01-02 .* choose another"),
        owned(tmp_path),
    ):
        pass
    assert Claim(**json.loads(file.read_text())) == replace(claim, host=host)


def test_an_owner_gives_signs_of_life_and_hears_when_it_lost_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.02)
    lost, reasons = threading.Event(), []
    file = tmp_path / OWNER_FILE

    def on_loss(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    with owned(tmp_path, on_loss):
        os.utime(file, (0, 0))
        for _ in range(500):
            if file.stat().st_mtime > 0:
                break
            threading.Event().wait(0.01)
        assert file.stat().st_mtime > 0
        left_behind(tmp_path)
        assert lost.wait(5)
    assert "taken over by process 4194999 on elsewhere" in reasons[0]
    assert file.exists(), "it is the other's"


def test_emptying_the_folder_keeps_it(tmp_path: Path) -> None:
    with owned(tmp_path) as mine:
        (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
        (tmp_path / "config.yaml").touch()
        (tmp_path / "link").symlink_to(Path(__file__).parent)
        mine.empty_folder()
        assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]
        with pytest.raises(InputError), owned(tmp_path):
            pass
    assert Path(__file__).exists()


@pytest.mark.parametrize("broken", [1, 2])
def test_emptying_that_is_broken_off_leaves_a_run_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    for name in ("checkpoints/step_1", "checkpoints/step_2", "eval/x", "config.yaml", "metrics.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    removed: list[str] = []

    def rmtree(path: Path) -> None:
        removed.append(path.name)
        if len(removed) == broken:
            raise KeyboardInterrupt
        shutil.rmtree(path)

    monkeypatch.setattr(owner, "shutil", SimpleNamespace(rmtree=rmtree))
    with owned(tmp_path) as mine:
        with pytest.raises(KeyboardInterrupt):
            mine.empty_folder()
        assert not (tmp_path / "checkpoints").exists()
        with pytest.raises(InputError, match="already holds a run"):
            check_run_folder(tmp_path, resume=False, overwrite=False)
        check_run_folder(tmp_path, resume=False, overwrite=True)
        mine.empty_folder()
        assert [path.name for path in tmp_path.iterdir()] == [OWNER_FILE]


def test_what_cannot_be_deleted_is_named_and_the_folder_stays_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")

    def rmtree(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "events"))

    monkeypatch.setattr(owner, "shutil", SimpleNamespace(rmtree=rmtree))
    with owned(tmp_path) as mine:
        with pytest.raises(InputError, match=r"tensorboard/events: cannot be deleted \(Permission denied\); delete it"):
            mine.empty_folder()
        assert (tmp_path / "metrics.jsonl").exists()


def test_a_folder_with_checkpoints_holds_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_7").mkdir(parents=True)
    with pytest.raises(InputError, match="already holds a run"):
        check_run_folder(tmp_path, resume=False, overwrite=False)
    check_run_folder(tmp_path, resume=True, overwrite=False)


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    of_the_living = f".config.yaml.{os.getppid()}.partial"
    removed = [
        ".config.yaml.4194999.partial",
        "checkpoints/.step_3.partial/state",
        "checkpoints/.step_3.partial/.hf.4194999.old",
        "checkpoints/step_2/.export.partial/hf/config.json",
        f".metrics.{os.getpid()}.partial",
    ]
    restored = [".reference.4194999.old/manifest.json", f".reference.graded.{os.getpid()}.old/chunk"]
    of_users = [".vimrc.old", ".config.old/theirs", ".notes.partial", "eval/step_1.json.partial/chunk", of_the_living]
    for name in (*removed, *restored, *of_users):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with owned(tmp_path) as mine:
        assert (tmp_path / removed[0]).exists(), "it may turn out to be no run's folder"
        mine.remove_leftovers()
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} - {OWNER_FILE}
    assert left == {"reference/manifest.json", "reference.graded/chunk", *of_users}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/run: cannot be written \(Not a directory\)"),
        owned(tmp_path / "file/run"),
    ):
        pass
