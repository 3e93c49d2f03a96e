"""Runs of a suite in processes of their own: which are started again, and when."""

from __future__ import annotations

import io
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import apart
from cluster.apart import Run, head_address, reasons, run_apart
from dphrl.config.loading import InputError
from dphrl.stopping import Stopped
from dphrl.tracking.console import Console

# Stands for `dphrl experiment`: notes its start, and ends as the n-th word of its run says.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, name, ends = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
starts = folder / name
number = len(starts.read_text().split()) if starts.exists() else 0
starts.write_text("started " * (number + 1))
end = ends[number]
if end == "sleep":
    time.sleep(60)
if end == "leaves":
    subprocess.Popen(["sleep", "30"])
    end = "1"
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stderr.buffer.write(b"a library's \\xff warning\\n" * 500)
words = "error: model.path: none" if end == "2" else f"failed: reason {number + 1}"
print(f"dphrl: {words}\\ndphrl: the traceback is in run.log", file=sys.stderr)
sys.exit(int(end))
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Any) -> Any:
    """Runs what is given by its statuses; returns how often each run was started."""
    monkeypatch.setattr(apart, "OWN_PROGRAM", PROGRAM)

    def run(
        statuses: dict[Run, str], num_retries: int, address: str = "local", num_parallel: int = 2, wait_s: float = 20.0
    ) -> str:
        config = make_config(cluster={"address": address, "placement_timeout_s": wait_s})
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
    said = starts({("grpo", 0): "1,killed,0", ("dph-f", 0): "0", ("dph-f", 1): "0"}, num_retries=2)
    assert (count(tmp_path, "grpo-s0"), count(tmp_path, "dph-f-s0"), count(tmp_path, "dph-f-s1")) == (3, 1, 1)
    assert "grpo, seed 0 failed and is tried again: reason 1\n" in said
    assert "grpo, seed 0 failed and is tried again: killed by SIGKILL\n" in said


@pytest.mark.parametrize(
    ("statuses", "num_retries", "num_starts", "said"),
    [
        ("1,1,1", 2, 3, "reason 3"),
        ("1", 0, 1, "reason 1"),
        ("killed,killed", 1, 2, "killed by SIGKILL"),
        # Somebody stopped it.
        ("143,0", 2, 1, "reason 1"),
        ("130,0", 2, 1, "reason 1"),
    ],
)
def test_a_run_fails_after_its_retries_or_when_it_was_stopped(
    statuses: str, num_retries: int, num_starts: int, said: str, starts: Any, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=rf"^1 of 2 runs failed; the first: grpo-s0: {said}$"):
        starts({("grpo", 0): statuses, ("dph-f", 0): "0"}, num_retries)
    assert count(tmp_path, "grpo-s0") == num_starts
    assert count(tmp_path, "dph-f-s0") == 1, "the others of its seed are tried all the same"


def test_what_was_refused_is_bad_input_said_once_and_not_tried_again(starts: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        starts({("grpo", 0): "2,0", ("dph-f", 0): "2,0", ("dph-f", 1): "0"}, num_retries=2)
    assert caught.value.lines == ("model.path: none",)
    assert (count(tmp_path, "grpo-s0"), count(tmp_path, "dph-f-s0")) == (1, 1)
    with pytest.raises(RuntimeError, match=r"^2 of 2 runs failed; the first: js-s1: reason 1$"):
        starts({("grpo", 1): "2", ("js", 1): "1"}, num_retries=0)


def test_a_run_is_over_when_its_process_is(starts: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(RuntimeError):
        starts({("grpo", 0): "leaves"}, num_retries=0)
    assert time.monotonic() - begun < 20, "it waited for what the run left behind"


def test_a_retry_waits_until_the_cluster_has_what_it_had(
    starts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head comes back first, and its workers later: a run that is started between the two is refused."""
    whole = {"CPU": 8.0, "GPU": 2.0}
    # First the state before anything failed. Later the cluster does not answer, then it is the head alone.
    answers = [whole, {}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 9.0, "GPU": 2.0}]
    asked: list[int] = []

    def resources_of(address: str) -> dict[str, float]:
        asked.append(count(tmp_path, "grpo-s0") if (tmp_path / "grpo-s0").exists() else 0)
        return answers[len(asked) - 1]

    monkeypatch.setattr(apart, "resources_of", resources_of)
    monkeypatch.setattr(apart, "_POLL_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as head:
        starts({("grpo", 0): "1,0"}, num_retries=1, address=f"127.0.0.1:{head.getsockname()[1]}")
    assert asked == [0, 1, 1, 1, 1]
    assert count(tmp_path, "grpo-s0") == 2


def test_a_cluster_that_stays_away_ends_the_wait(starts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "resources_of", lambda address: {"CPU": 1.0})
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        begun = time.monotonic()
        starts({("grpo", 0): "1,0"}, num_retries=1, address=f"127.0.0.1:{closed.getsockname()[1]}", wait_s=0.2)
    assert time.monotonic() - begun < 10
    assert count(tmp_path, "grpo-s0") == 2, "it is tried all the same"


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
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "auto", None),
        ("local", "10.0.0.1:6379", None),
        ("head:6380", "10.0.0.1:6379", "head:6380"),
        ("[::1]:6379", None, "[::1]:6379"),
        ("head:99999", None, None),
        ("ray://head:10001", None, "ray://head:10001"),
        ("auto", "local", None),
        ("http://head:8265", None, None),
    ],
)
def test_the_head_of_a_run(
    address: str,
    variable: str | None,
    expected: str | None,
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert head_address(make_config(cluster={"address": address})) == expected


@pytest.mark.parametrize(
    ("status", "said", "why"),
    [
        (1, "dphrl: failed: no room\ndphrl: failed: no disk\ndphrl: the traceback is in x\n", ("no room", "no disk")),
        (2, "warning\ndphrl: error: model.path: none\n", ("model.path: none",)),
        (1, "Killed by hand\n\n", ("exit status 1; it last said: Killed by hand",)),
        (-6, "GCS is gone\n", ("killed by SIGABRT; it last said: GCS is gone",)),
        (-9, "", ("killed by SIGKILL",)),
    ],
)
def test_why_a_run_ended(status: int, said: str, why: tuple[str, ...]) -> None:
    assert reasons(status, said) == why
