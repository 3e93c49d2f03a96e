"""Folders for temporary files, which a killed process leaves for the next one to remove."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import engine_processes
from dphrl import scratch
from dphrl.scratch import remove_left_folders, scratch_folder

WAITING = """
import sys
from dphrl.scratch import scratch_folder
folder = scratch_folder("engine")
(folder / "file").touch()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "PLACE", tmp_path)
    return tmp_path


@pytest.fixture
def waiting(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is at work, and its folder."""
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_the_folder_of_a_killed_process_is_removed_by_the_next(
    place: Path, waiting: tuple[subprocess.Popen[str], Path]
) -> None:
    process, folder = waiting
    assert folder.parent == place
    assert folder.stat().st_mode & 0o777 == 0o700
    assert remove_left_folders() == [], "it is at work"
    process.kill()
    process.wait()
    assert (folder / "file").exists()
    own = scratch_folder("export")
    assert list(place.iterdir()) == [own]
    own.rmdir()


def test_the_end_of_a_process_is_waited_for(waiting: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = waiting
    began = time.monotonic()
    assert remove_left_folders(of="engine", patience_s=0.3) == []
    assert 0.3 <= time.monotonic() - began < 5
    assert remove_left_folders(of="export", patience_s=60) == []
    # A killed child stays in the table of processes until somebody asks for its status; it counts as ended.
    threading.Timer(0.3, process.kill).start()
    assert remove_left_folders(of="engine", patience_s=60) == [folder.name]
    assert time.monotonic() - began < 30


def test_a_process_that_ends_by_itself_leaves_nothing(place: Path) -> None:
    subprocess.run([sys.executable, "-c", WAITING], input="", check=True, capture_output=True, text=True)
    assert not list(place.iterdir())


def test_what_may_be_of_somebody_else_stays(place: Path) -> None:
    own = scratch_folder("engine")
    namespace, pid, started = own.name.split("-")[2:]
    of_a_later_process = place / f"dphrl-engine-{namespace}-{pid}-{int(started) - 1}"
    of_another_container = place / f"dphrl-engine-{int(namespace) + 1}-{pid}-{int(started) - 1}"
    others = [of_another_container, place / "dphrl-engine-mine", place / "vllm_dist_0"]
    for folder in (of_a_later_process, *others):
        folder.mkdir()
    link = place / f"dphrl-export-{namespace}-{pid}-1"
    link.symlink_to(place / "vllm_dist_0")
    assert remove_left_folders() == [of_a_later_process.name]
    assert {path.name for path in place.iterdir()} == {path.name for path in (*others, own, link)}
    own.rmdir()


def test_an_engines_temporary_files_lie_together_and_compiled_code_does_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")
    run = place / "runs" / "mine"
    engine_processes.keep_temporary_files_together(run)
    folder = scratch_folder(engine_processes.scratch_of_engines(run))
    with tempfile.NamedTemporaryFile() as file:
        assert Path(file.name).parent == folder
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == place
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.rmdir()


@pytest.mark.parametrize(("long", "apart"), [(False, False), (True, True)])
def test_sockets_have_paths_that_the_kernel_takes(monkeypatch: pytest.MonkeyPatch, long: bool, apart: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="dq-", dir="/tmp") as name:
        place = Path(name) / ("x" * 30 if long else "x")
        place.mkdir()
        monkeypatch.setattr(scratch, "PLACE", place)
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", name)
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")
        monkeypatch.delenv("VLLM_RPC_BASE_PATH")
        engine_processes.keep_temporary_files_together(place / "run")
        folder = Path(os.environ.get("VLLM_RPC_BASE_PATH", tempfile.gettempdir()))
        assert (folder == place) is apart
        path = folder / str(uuid.uuid4())
        with socket.socket(socket.AF_UNIX) as ours:
            ours.bind(str(path))
            ours.listen()
            with socket.socket(socket.AF_UNIX) as theirs:
                theirs.connect(str(path))
                assert engine_processes.forget_names_of_sockets() == [str(path)]
        monkeypatch.undo()
