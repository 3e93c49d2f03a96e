"""Shared memory of an engine that was killed while it started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from actors.engine_processes import SHARED_MEMORY, names_of_shared_memory
from actors.leftovers import FOLDER, remembering_shared_memory, remove_remembered

STARTING = """
import sys, time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from actors import leftovers
leftovers.INTERVAL_S = 0.02
with leftovers.remembering_shared_memory(Path(sys.argv[1])):
    segment = shared_memory.SharedMemory(create=True, size=100)
    resource_tracker.unregister(segment._name, "shared_memory")  # which would be killed, too
    while not list(Path(sys.argv[1], leftovers.FOLDER).glob("*.json")):
        time.sleep(0.01)
    print(segment.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that is in the start of an engine, and the name of its shared memory."""
    command = [sys.executable, "-c", STARTING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        yield process, name
        process.kill()
    with suppress(FileNotFoundError):
        (SHARED_MEMORY / name).unlink()


def test_what_a_killed_engine_left_is_removed_at_the_next_start(
    tmp_path: Path, starting: tuple[subprocess.Popen[str], str]
) -> None:
    process, name = starting
    other = SHARED_MEMORY / f"psm_of_another_{process.pid}"
    other.touch()
    try:
        with remembering_shared_memory(tmp_path):
            assert {name, other.name} <= names_of_shared_memory(), "it is still starting"
        process.kill()
        process.wait()
        assert name in names_of_shared_memory()
        with remembering_shared_memory(tmp_path):
            assert name not in names_of_shared_memory()
            assert other.name in names_of_shared_memory(), "nobody uses it, but it is none of this run's"
    finally:
        other.unlink()
    assert not (tmp_path / FOLDER).exists()


def test_what_somebody_uses_still_stays(tmp_path: Path, starting: tuple[subprocess.Popen[str], str]) -> None:
    process, name = starting
    (record,) = (tmp_path / FOLDER).glob("*.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "started": 1}))
    assert remove_remembered(tmp_path / FOLDER) == []
    assert name in names_of_shared_memory()
    assert process.poll() is None
    assert not record.exists()
