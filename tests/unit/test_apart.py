"""Runs of a suite in processes of their own: which are started again, and when."""

from __future__ import annotations

import io
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import apart
from cluster.apart import Run, head_address, run_apart
from dphrl.stopping import Stopped
from dphrl.tracking.console import Console

# Stands for `dphrl experiment`: notes its start, and ends as the n-th word of its run says.
PROGRAM = """
import sys, time
from pathlib import Path
folder, name, ends = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
starts = folder / name
number = len(starts.read_text().split()) if starts.exists() else 0
starts.write_text("started " * (number + 1))
end = ends[number]
if end == "sleep":
    time.sleep(60)
print(f"reason {number + 1}", file=sys.stderr)
sys.exit(int(end))
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Any) -> Any:
    """Runs what is given by its statuses; returns how often each run was started."""
    monkeypatch.setattr(apart, "OWN_PROGRAM", PROGRAM)

    def run(statuses: dict[Run, str], num_retries: int, address: str = "local", num_parallel: int = 2) -> str:
        config = make_config(cluster={"address": address, "placement_timeout_s": 20.0})
        said = io.StringIO()
        run_apart(
            dict.fromkeys(statuses, config),
            lambda run: [str(tmp_path), f"{run[0]}-s{run[1]}", statuses[run]],
            num_parallel,
            num_retries,
            Console(said),
        )
        return said.getvalue()

    return run


def count(folder: Path, name: str) -> int:
    return len((folder / name).read_text().split())


def test_a_run_that_failed_is_started_again_until_it_succeeds(starts: Any, tmp_path: Path) -> None:
    said = starts({("grpo", 0): "1,9,0", ("dph-f", 0): "0", ("dph-f", 1): "0"}, num_retries=2)
    assert (count(tmp_path, "grpo-s0"), count(tmp_path, "dph-f-s0"), count(tmp_path, "dph-f-s1")) == (3, 1, 1)
    assert "grpo, seed 0 failed and is tried again: reason 1" in said


@pytest.mark.parametrize(
    ("statuses", "num_retries", "num_starts", "said"),
    [
        ("1,1,1", 2, 3, "reason 3"),
        ("1", 0, 1, "reason 1"),
        # Bad input is bad a second time, too.
        ("2,0", 2, 1, "reason 1"),
        ("1,2,0", 2, 2, "reason 2"),
    ],
)
def test_a_run_fails_after_its_retries_or_when_it_is_refused(
    statuses: str, num_retries: int, num_starts: int, said: str, starts: Any, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=rf"^1 of 2 runs failed; the first: grpo-s0: {said}$"):
        starts({("grpo", 0): statuses, ("dph-f", 0): "0"}, num_retries)
    assert count(tmp_path, "grpo-s0") == num_starts
    assert count(tmp_path, "dph-f-s0") == 1, "the others of its seed are tried all the same"


def test_a_retry_waits_until_the_head_takes_connections(starts: Any, tmp_path: Path) -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        port = head.getsockname()[1]

        def restart() -> None:
            while not (tmp_path / "grpo-s0").exists():
                time.sleep(0.05)
            time.sleep(1.5)
            came_back.append(count(tmp_path, "grpo-s0"))
            head.listen()

        came_back: list[int] = []
        thread = threading.Thread(target=restart)
        thread.start()
        starts({("grpo", 0): "1,0"}, num_retries=1, address=f"127.0.0.1:{port}")
        thread.join()
    assert came_back == [1], "started again before the head was there"
    assert count(tmp_path, "grpo-s0") == 2


def test_a_head_that_stays_away_ends_the_wait(starts: Any, tmp_path: Path, make_config: Any) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        processes = apart._Processes(1, Console())
        config = make_config(cluster={"address": f"127.0.0.1:{closed.getsockname()[1]}", "placement_timeout_s": 0.2})
        begun = time.monotonic()
        said = processes.train(("grpo", 0), config, [str(tmp_path), "grpo-s0", "1,0"])
    assert said == "reason 1"
    assert time.monotonic() - begun < 10
    assert count(tmp_path, "grpo-s0") == 1


def test_a_signal_ends_what_runs_and_starts_nothing_again(
    starts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_then_stop(*args: Any, **kwargs: Any) -> Any:
        while not (tmp_path / "grpo-s0").exists():
            time.sleep(0.05)
        raise Stopped(15)

    monkeypatch.setattr(apart, "wait", wait_then_stop)
    begun = time.monotonic()
    with pytest.raises(Stopped):
        starts({("grpo", 0): "sleep,0", ("dph-f", 0): "0"}, num_retries=3, num_parallel=1)
    assert time.monotonic() - begun < 30, "it was not told"
    assert (count(tmp_path, "grpo-s0"), (tmp_path / "dph-f-s0").exists()) == (1, False)


@pytest.mark.parametrize(
    ("address", "variable", "expected"),
    [
        ("auto", None, None),
        ("auto", "10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("auto", "auto", None),
        ("local", "10.0.0.1:6379", None),
        ("head:6380", "10.0.0.1:6379", ("head", 6380)),
        ("ray://head:10001", None, ("head", 10001)),
        ("[::1]:6379", None, ("::1", 6379)),
    ],
)
def test_the_head_of_a_run(
    address: str,
    variable: str | None,
    expected: tuple[str, int] | None,
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert head_address(make_config(cluster={"address": address})) == expected
