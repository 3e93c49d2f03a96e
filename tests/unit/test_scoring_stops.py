"""`dphrl score` stopped in the middle: what is graded is written, line by line, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dphrl.rewards.score_file import BATCH_ROWS

ROW = json.dumps({"completion": r"so \boxed{4}", "answer": "4"}) + "\n"
DEADLINE_S = 60.0
# A shell may have started the tests with Ctrl-C ignored.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cluster.cli import main; main()"
)


def descendants(pid: int) -> set[int]:
    """Process ids of the children, and theirs; zygotes are in sessions of their own, so the session tells nothing."""
    told = [(task / "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    children = {int(child) for of_task in told for child in of_task}
    return children.union(*(descendants(child) for child in children))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what: Any) -> None:
    until = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [
        (signal.SIGINT, 130, "2"),
        (signal.SIGTERM, 143, "2"),
        (signal.SIGKILL, -signal.SIGKILL, "2"),
        (signal.SIGKILL, -signal.SIGKILL, "1"),
    ],
)
def test_a_stopped_grading_leaves_whole_lines_and_no_process(
    tmp_path: Path, number: int, status: int, workers: str
) -> None:
    database, output = tmp_path / "zoo.sqlite", tmp_path / "out.jsonl"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE animal (name TEXT)")
    row = {"completion": "SELECT 1", "db": str(database), "gold_sql": "SELECT 1", "convention": "bird"}
    command = [sys.executable, "-c", PROGRAM, "score", "sql", "-", "-o", str(output), "--workers", workers]
    pipes = dict.fromkeys(("stdin", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdin is not None
        try:
            process.stdin.write((json.dumps(row) + "\n") * (30 * BATCH_ROWS))
            process.stdin.flush()
            # Its input stays open, so that it waits for more.
            wait_until(lambda: output.exists() and output.stat().st_size > 0)
            started = descendants(process.pid)
            assert len(started) >= 2 * int(workers), "workers, and the sandbox of each"
            process.send_signal(number)
            said = process.communicate()[1]
        finally:
            process.kill()
    assert process.returncode == status, said
    wait_until(lambda: not any(map(is_alive, started)))
    lines = output.read_text()
    assert lines.endswith("\n")
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["index"] for record in records] == list(range(len(records)))
    if number != signal.SIGKILL:
        assert f"stopped by {signal.Signals(number).name}; the rows graded so far are written" in said
        assert f"{len(records)} graded: {len(records)} correct" in said


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(ROW)
    command = [sys.executable, "-c", PROGRAM, "score", "math", str(source), "-o", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("dphrl:") and "traceback" not in line]
    assert errors == ["dphrl: failed: no space left on /dev/full; make room there, or write elsewhere"]
    assert "Traceback" not in done.stderr
    assert os.path.exists("/dev/full")
