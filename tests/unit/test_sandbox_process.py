"""The sandbox: one test per attack, and what a batch keeps when one of its items goes wrong."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dphrl.sandbox import seccomp
from dphrl.sandbox.process import Limits, Outcome, Sandbox
from dphrl.sandbox.zygote import MAX_REPLY_BYTES
from dphrl.types import RewardStatus

HANDLERS = "tests.unit.sandbox_handlers:make"
LIMITS = Limits(memory_bytes=256 * 2**20)
TIMEOUT, RESOURCE_LIMIT = RewardStatus.TIMEOUT, RewardStatus.RESOURCE_LIMIT

needs_filter = pytest.mark.skipif(bool(seccomp.unsupported()), reason="no system-call filter for this architecture")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(HANDLERS, {}, LIMITS) as shared:
        yield shared


def said(outcomes: list[Outcome]) -> list[Any]:
    return [outcome.value and outcome.value["said"] for outcome in outcomes]


def among_neighbours(sandbox: Sandbox, item: dict[str, Any], deadline_s: float = 20.0) -> Outcome:
    """The outcome of an item between two others, which must get theirs."""
    before, outcome, after = sandbox.run([{"do": "echo", "text": 1}, item, {"do": "echo", "text": 2}], deadline_s)
    assert said([before, after]) == [1, 2]
    return outcome


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids: list[int], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, pids))


# ------------------------------------------------------------ a healthy batch


def test_order_and_text_survive(sandbox: Sandbox) -> None:
    texts = ["", "\0", "\ud800 alone", "\u202e\U0001f600", "megabytes " * 300_000, "last"]
    assert said(sandbox.run([{"do": "echo", "text": text} for text in texts], 20)) == texts


def test_large_batches_fill_no_pipe(sandbox: Sandbox) -> None:
    items = [{"do": "echo", "text": "x" * 20_000 + str(i)} for i in range(300)]
    assert said(sandbox.run(items, 20)) == [item["text"] for item in items]
    assert sandbox.run([], 1) == []


def test_threads_take_turns(sandbox: Sandbox) -> None:
    results: dict[int, list[Any]] = {}

    def grade(i: int) -> None:
        results[i] = said(sandbox.run([{"do": "echo", "text": i}] * 20, 20))

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [i] * 20 for i in range(4)}


def test_outlives_the_thread_that_made_it() -> None:
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(Sandbox(HANDLERS, {}, LIMITS)))
    thread.start()
    thread.join()
    with made[0] as sandbox:
        time.sleep(0.2)
        first = said(sandbox.run([{"do": "pid"}], 5))
        time.sleep(0.2)
        assert said(sandbox.run([{"do": "pid"}], 5)) == first


# ------------------------------------------------------------ time and crashes


@pytest.mark.parametrize("item", [{"do": "sleep", "s": 60}, {"do": "spin in C"}], ids=lambda item: item["do"])
def test_deadline_ends_one_item_alone(sandbox: Sandbox, item: dict[str, Any]) -> None:
    started = time.monotonic()
    outcome = among_neighbours(sandbox, item, deadline_s=0.5)
    assert outcome.failure is TIMEOUT
    assert "0.5 s" in outcome.detail
    assert time.monotonic() - started < 2


def test_deadline_counts_from_the_reply_before(sandbox: Sandbox) -> None:
    outcomes = sandbox.run([{"do": "sleep", "s": 0.3}] * 4, 0.8)
    assert said(outcomes) == ["awake"] * 4


def test_replacing_a_worker_is_quick(sandbox: Sandbox) -> None:
    started = time.monotonic()
    outcomes = sandbox.run([{"do": "sleep", "s": 60}, {"do": "echo"}] * 5, 0.05)
    assert [outcome.failure for outcome in outcomes] == [TIMEOUT, None] * 5
    assert time.monotonic() - started < 5 * 0.05 + 2


@pytest.mark.parametrize("action", ["segfault", "exit", "sys.exit"])
def test_death_costs_no_neighbour(sandbox: Sandbox, action: str) -> None:
    assert among_neighbours(sandbox, {"do": action}).failure is RESOURCE_LIMIT


def test_signal_is_named(sandbox: Sandbox) -> None:
    assert "SIGSEGV" in among_neighbours(sandbox, {"do": "segfault"}).detail


def test_victim_of_a_neighbour_is_tried_again_alone(sandbox: Sandbox) -> None:
    assert said(sandbox.run([{"do": "spoil"}, {"do": "die once"}], 10)) == ["spoilt", "alive"]


def test_exception_is_an_infrastructure_error_of_bounded_length(sandbox: Sandbox) -> None:
    outcome = among_neighbours(sandbox, {"do": "raise"})
    assert outcome.failure is RewardStatus.INFRASTRUCTURE_ERROR
    assert outcome.detail.startswith("KeyError: 'xxx")
    assert len(outcome.detail) <= 300
    assert "\n" not in outcome.detail
    assert among_neighbours(sandbox, {"do": "unserialisable"}).failure is RewardStatus.INFRASTRUCTURE_ERROR


# ------------------------------------------------------------ memory and CPU


def test_memory_of_python_objects(sandbox: Sandbox) -> None:
    outcome = among_neighbours(sandbox, {"do": "fill Python memory"})
    assert (outcome.failure, outcome.detail) == (RESOURCE_LIMIT, "MemoryError")


def test_memory_of_c_code(sandbox: Sandbox) -> None:
    (num_blocks,) = said(sandbox.run([{"do": "fill C memory"}], 20))
    assert 8 <= num_blocks <= 16  # of 16 MiB


def test_recursion(sandbox: Sandbox) -> None:
    assert among_neighbours(sandbox, {"do": "recurse"}).failure is RESOURCE_LIMIT


def test_cpu_time_is_bounded_and_renewed_between_items() -> None:
    with Sandbox(HANDLERS, {}, Limits(cpu_s=1)) as sandbox:
        assert said(sandbox.run([{"do": "burn CPU", "s": 0.6}] * 3, 20)) == ["burnt"] * 3
        assert among_neighbours(sandbox, {"do": "burn CPU", "s": 30}).failure is RESOURCE_LIMIT


# ------------------------------------------------------------ replies


@pytest.mark.parametrize(
    ("text", "framed"),
    [
        ("garbage that is no frame", False),
        ("\xff\xff\xff\xff", False),
        ("no JSON", True),
        ('{"index": 7, "value": {"said": "forged"}}', True),
        ('{"index": 1, "value": [1]}', True),
        ('{"index": 1, "failure": "correct?", "detail": ""}', True),
        ("[" * 200_000, True),
        ("1" * 20_000, True),
    ],
)
def test_nonsense_instead_of_a_reply(sandbox: Sandbox, text: str, framed: bool) -> None:
    outcome = among_neighbours(sandbox, {"do": "write raw", "text": text, "framed": framed})
    assert outcome.failure is RESOURCE_LIMIT


def test_a_trickle_of_bytes_does_not_extend_the_deadline(sandbox: Sandbox) -> None:
    started = time.monotonic()
    item = {"do": "write raw", "text": "\0\0\1\0 begins and never ends", "framed": False, "s": 60}
    assert among_neighbours(sandbox, item, deadline_s=0.5).failure is TIMEOUT
    assert time.monotonic() - started < 2


def test_gigabytes_instead_of_a_reply(sandbox: Sandbox) -> None:
    outcome = among_neighbours(sandbox, {"do": "huge reply"})
    assert outcome.failure is RESOURCE_LIMIT
    assert str(MAX_REPLY_BYTES)[:5] in outcome.detail


# ------------------------------------------------------------ reaching outside


@needs_filter
def test_files_cannot_be_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (refusals,) = said(sandbox.run([{"do": "files", "folder": str(tmp_path), "victim": str(victim)}], 10))
    assert [attempt for attempt, refusal in refusals.items() if not refusal] == []
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "whole"


@needs_filter
def test_network_is_out_of_reach(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        (refusals,) = said(sandbox.run([{"do": "network", "port": server.getsockname()[1]}], 10))
    assert refusals == dict.fromkeys(["tcp", "unix", "pair"], "PermissionError")


@needs_filter
def test_no_processes_threads_or_programs(sandbox: Sandbox) -> None:
    (refusals,) = said(sandbox.run([{"do": "processes"}], 10))
    assert [attempt for attempt, refusal in refusals.items() if not refusal] == []


@needs_filter
def test_other_processes_are_out_of_reach(sandbox: Sandbox) -> None:
    (refusals,) = said(sandbox.run([{"do": "others", "pid": os.getpid()}], 10))
    assert refusals.pop("ptrace") == "-1"
    assert [attempt for attempt, refusal in refusals.items() if not refusal] == []


@needs_filter
def test_no_signal_no_schedule_and_no_limit_of_another_process(sandbox: Sandbox) -> None:
    mine = {
        "pid": os.getpid(),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": sorted(os.sched_getaffinity(0)),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "machine": platform.machine(),
    }
    (found,) = said(sandbox.run([{"do": "meddling", **mine}], 10))
    assert {what for what, number in found.items() if number != errno.EPERM} == set()


@needs_filter
def test_limits_cannot_be_raised(sandbox: Sandbox) -> None:
    (found,) = said(sandbox.run([{"do": "limits"}], 10))
    assert all(found["refused"].values()), found
    assert found["values"]["RLIMIT_FSIZE"] == found["values"]["RLIMIT_CORE"] == [0, 0]
    assert found["values"]["RLIMIT_NOFILE"] == [LIMITS.num_files] * 2
    assert found["prctl"] == -1
    assert found["files"] == "OSError"


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPHRL_TEST_SECRET", "hunter2")
    with Sandbox(HANDLERS, {}, LIMITS) as sandbox:
        (found,) = said(sandbox.run([{"do": "environment"}], 10))
    assert found["environ"] == {}
    assert "hunter2" not in found["initial"]
    assert (found["stdin"], found["cwd"]) == ("", "/")


# ------------------------------------------------------------ life and death of the machinery


def kill_zygote(sandbox: Sandbox) -> None:
    """And wait until the worker has followed."""
    pids = said(sandbox.run([{"do": "pid"}], 5))
    assert sandbox._zygote is not None
    os.kill(sandbox._zygote._process.pid, signal.SIGKILL)
    wait_for_end(pids)


def test_a_killed_zygote_is_started_again(sandbox: Sandbox) -> None:
    kill_zygote(sandbox)
    assert said(sandbox.run([{"do": "echo", "text": 1}], 5)) == [1]


def test_a_zygote_that_stays_dead_is_an_infrastructure_error(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_zygote(sandbox)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_recipe", ("tests.unit.sandbox_handlers:make_nothing", *sandbox._recipe[1:]))
        outcomes = sandbox.run([{"do": "echo", "text": 1}] * 3, 5)
    assert [outcome.failure for outcome in outcomes] == [RewardStatus.INFRASTRUCTURE_ERROR] * 3
    assert "no licence" in outcomes[0].detail
    assert said(sandbox.run([{"do": "echo", "text": 1}], 5)) == [1]


def test_a_batch_given_up_leaves_no_replies_to_the_next(sandbox: Sandbox) -> None:
    with pytest.raises(TypeError):
        sandbox.run([*[{"do": "echo", "text": "old" * 9_000}] * 9, {"do": {"a", "set"}}], 5)
    assert said(sandbox.run([{"do": "echo", "text": "new"}], 5)) == ["new"]


def test_start_failures_say_why() -> None:
    with pytest.raises(RuntimeError, match=r"OSError: no licence$"):
        Sandbox("tests.unit.sandbox_handlers:make_nothing", {})
    with pytest.raises(RuntimeError, match=r"No module named 'tests.unit.nowhere'"):
        Sandbox("tests.unit.nowhere:make", {})
    with pytest.raises(ValueError, match=r"package.module:function"):
        Sandbox("tests.unit.sandbox_handlers", {})


def test_other_platforms_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="needs Linux"):
        Sandbox(HANDLERS, {})


def test_closing_ends_every_process() -> None:
    sandbox = Sandbox(HANDLERS, {})
    pids = said(sandbox.run([{"do": "pid"}], 5))
    assert sandbox._zygote is not None
    pids.append(sandbox._zygote._process.pid)
    assert all(map(alive, pids))
    sandbox.close()
    sandbox.close()
    wait_for_end(pids)
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run([{"do": "pid"}], 5)


def test_closing_does_not_wait_for_an_item() -> None:
    sandbox = Sandbox(HANDLERS, {})
    pids = said(sandbox.run([{"do": "pid"}], 5))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run, [{"do": "spin in C"}, {"do": "pid"}], 600)
        time.sleep(0.3)
        began = time.monotonic()
        sandbox.close()
        with pytest.raises(RuntimeError, match="closed"):
            running.result(60)
    assert time.monotonic() - began < 60
    wait_for_end(pids)


def test_no_orphans_when_the_parent_is_killed() -> None:
    program = (
        "import json, os, threading, time\n"
        "from dphrl.sandbox.process import Sandbox\n"
        f"sandbox = Sandbox({HANDLERS!r}, {{}})\n"
        "pid = sandbox.run([{'do': 'pid'}], 5)[0].value['said']\n"
        "print(json.dumps([pid, sandbox._zygote._process.pid]), flush=True)\n"
        "sandbox.run([{'do': 'spin in C'}], 600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert all(map(alive, pids))
        parent.kill()
        wait_for_end(pids)


def test_users_code_is_free_but_killable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPHRL_TEST_SETTING", "kept")
    victim = tmp_path / "victim"
    victim.write_text("whole")
    with Sandbox(HANDLERS, {}, Limits(restricted=False)) as sandbox:
        change = {"do": "files", "folder": str(tmp_path), "victim": str(victim)}
        found, _, pid = said(sandbox.run([{"do": "environment"}, change, {"do": "free child"}], 10))
        assert found["environ"]["DPHRL_TEST_SETTING"] == "kept"
        assert (tmp_path / "new").exists()
        assert alive(pid)
        assert sandbox.run([{"do": "sleep", "s": 60}], 0.2)[0].failure is TIMEOUT
        wait_for_end([pid])
