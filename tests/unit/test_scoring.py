"""`dphrl score`: order, statuses, bad rows, bounded memory."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app

MATH = [
    ({"completion": r"so \boxed{4}", "answer": "4"}, "correct", 1),
    ({"completion": "#### 5", "answer": 4}, "wrong", 0),
    ({"completion": "no idea", "answer": "4"}, "unparsable", 0),
    ({"completion": "\u00e9 \ud800 \\boxed{\\frac{1}{2}}", "answer": "0.5"}, "correct", 1),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def score(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["score", *arguments])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_row_has_its_verdict_in_order(tmp_path: Path, workers: int) -> None:
    source = write(tmp_path / "in.jsonl", [row for row, _, _ in MATH] * 50)
    done = score("math", str(source), "-o", str(tmp_path / "out.jsonl"), "--workers", str(workers))
    assert done.exit_code == 0, done.output
    records = read(tmp_path / "out.jsonl")
    assert [record["index"] for record in records] == list(range(200))
    assert [(r["status"], r["score"]) for r in records] == [(status, value) for _, status, value in MATH] * 50
    assert all(set(record) == {"index", "score", "status", "detail"} for record in records)


def test_the_fields_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"prediction": row["completion"], "gold": row["answer"], "answer": "not this"} for row, _, _ in MATH]
    source = write(tmp_path / "in.jsonl", rows)
    names = ("--completion-field", "prediction", "--answer-field", "gold")
    done = score("math", str(source), "-o", str(tmp_path / "out.jsonl"), *names)
    assert done.exit_code == 0, done.output
    assert [record["status"] for record in read(tmp_path / "out.jsonl")] == [status for _, status, _ in MATH]
    assert "prediction is missing, the row has" in score("math", str(write(source, [MATH[0][0]])), *names).output


def test_bad_rows_are_named_and_good_ones_graded(tmp_path: Path) -> None:
    good = MATH[0][0]
    rows = [good, "not json", "", '["a list"]', {"completion": "x"}, {"completion": 3, "answer": "1"}, good]
    rows += [{"completion": "4", "answer": " "}, good]
    source = write(tmp_path / "in.jsonl", rows)
    done = score("math", str(source), "-o", str(tmp_path / "out.jsonl"))
    assert done.exit_code == 2
    # Line 3 is blank: no row, but it counts as a line.
    assert [r["index"] for r in read(tmp_path / "out.jsonl")] == [0, 5, 7]
    for line, words in [(2, "JSON"), (4, "list"), (5, "'completion'"), (6, "must be text"), (8, "answer is empty")]:
        assert any(f"in.jsonl:{line}: " in said and words in said for said in done.output.splitlines()), (line, words)


def test_a_file_of_the_wrong_kind_is_not_repeated_line_by_line(tmp_path: Path) -> None:
    done = score("math", str(write(tmp_path / "in.jsonl", ["x"] * 1000)), "-o", str(tmp_path / "out.jsonl"))
    assert done.exit_code == 2
    assert "and 980 more bad rows" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["math", "absent.jsonl"], "cannot be read"),
        (["sql", "{folder}"], "cannot be read"),
        (["math", "{file}", "-o", "{file}"], "is the input too"),
        (["algebra", "{file}"], "algebra"),
        (["math", "{file}", "--workers", "0"], "workers"),
        (["sql", "{file}", "--answer-field", "gold"], "rows of sql hold gold_sql"),
        (["math", "{file}", "--timeout-s", "inf"], "without an end"),
        (["sql", "{file}", "--extraction", "boxed"], "is for math"),
        (["math", "{file}", "--thinking-mark", "<plan>"], "write two different marks"),
        (["math", "{file}", "--thinking-mark", "<a> <A>"], "write two different marks"),
        (["math", "{file}", "--in-thought", "<plan>"], "opens no thought; give one of <think> "),
    ],
)
def test_bad_arguments_are_exit_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    file = write(tmp_path / "in.jsonl", [MATH[0][0]])
    done = score(*[a.format(folder=tmp_path, file=file) for a in arguments])
    assert done.exit_code == 2
    assert words in done.output


@pytest.mark.parametrize(
    ("arguments", "statuses"),
    [
        ([], ["correct", "correct", "wrong"]),
        (["--in-thought", "<think>"], ["unparsable", "correct", "unparsable"]),
        (["--thinking-mark", "<plan> </plan>"], ["correct", "correct", "unparsable"]),
        (["--thinking-mark", "<plan> </plan>", "--in-thought", "<Plan>"], ["unparsable", "unparsable", "unparsable"]),
    ],
)
def test_marks_of_thoughts_may_be_given(tmp_path: Path, arguments: list[str], statuses: list[str]) -> None:
    texts = ["It is 4", "5</think> 4", "4 <plan> or 5"]
    source = write(tmp_path / "in.jsonl", [{"completion": text, "answer": "4"} for text in texts])
    done = score("math", str(source), "-o", str(tmp_path / "out.jsonl"), *arguments)
    assert done.exit_code == 0, done.output
    assert [record["status"] for record in read(tmp_path / "out.jsonl")] == statuses


def test_standard_input_and_output(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row, _, _ in MATH)
    done = subprocess.run(
        [sys.executable, "-m", "dphrl", "score", "math", "-"], input=lines, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == [status for _, status, _ in MATH]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Rows of 4 kB are read for as long as their verdicts are: a reader that ran ahead would hold them all."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from dphrl.config.data import RewardConfig\n"
        "from dphrl.rewards.score_file import score_file\n"
        "score_file(sys.argv[1], Path(sys.argv[2]), RewardConfig(name='math_answer', extraction='auto'), 1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )

    def peak_mib(num_rows: int) -> int:
        row = json.dumps({"completion": "x" * 4000 + r" \boxed{4}", "answer": "4"}) + "\n"
        source = tmp_path / "in.jsonl"
        source.write_text(row * num_rows)
        command = [sys.executable, "-c", script, str(source), str(tmp_path / "out.jsonl")]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    # 40,000 rows are 160 MB on disk, and more as Python strings.
    assert peak_mib(40_000) < peak_mib(1_000) + 60


def test_an_interrupt_ends_it_whatever_its_workers_are_at(tmp_path: Path, database: str) -> None:
    endless = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t"
    row = {"completion": endless, "db": database, "gold_sql": "SELECT 1", "convention": "bird"}
    source = write(tmp_path / "in.jsonl", [row] * 300)
    command = [sys.executable, "-m", "dphrl", "score", "sql", str(source), "-o", str(tmp_path / "out.jsonl")]
    # A test run in the background of a shell has interrupts ignored, and its children with it.
    process = subprocess.Popen(
        [*command, "--workers", "2", "--timeout-s", "5"],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        time.sleep(4)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_reader_that_has_enough_is_no_failure_to_shout_about(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [MATH[0][0]] * 20_000)
    done = subprocess.run(
        f"{sys.executable} -m dphrl score math {source} | head -n 1", shell=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["status"] == "correct"
    assert "BrokenPipe" not in done.stderr


def test_a_killed_worker_process_loses_no_row(tmp_path: Path) -> None:
    rows = [{"completion": rf"\boxed{{{i}}}", "answer": str(i)} for i in range(60_000)]
    source = write(tmp_path / "in.jsonl", rows)
    command = [sys.executable, "-m", "dphrl", "score", "math", str(source), "-o", str(tmp_path / "out.jsonl")]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)

    def kill_a_worker() -> None:
        out = tmp_path / "out.jsonl"
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        spawned = [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
        os.kill(spawned[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    _, errors = process.communicate(timeout=120)
    killer.join()
    assert process.returncode == 0, errors
    records = read(tmp_path / "out.jsonl")
    assert [r["index"] for r in records] == list(range(60_000))
    assert {r["status"] for r in records} == {"correct"}


@pytest.fixture
def database(tmp_path: Path) -> str:
    path = tmp_path / "zoo.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE animal (name TEXT, legs INT); INSERT INTO animal VALUES ('owl', 2)")
    return str(path)


def test_sql_rows_are_graded_by_their_convention(tmp_path: Path, database: str) -> None:
    gold = "SELECT name, legs FROM animal"
    rows = [
        ("```sql\nSELECT legs, name FROM animal;\n```", "spider", "correct"),
        ("SELECT legs, name FROM animal", "bird", "wrong"),
        ("DELETE FROM animal", "bird", "refused"),
        ("I do not know", "bird", "unparsable"),
        ("SELECT name FROM plant", "bird", "wrong"),
    ]
    lines = [{"completion": sql, "db": database, "gold_sql": gold, "convention": c} for sql, c, _ in rows]
    done = score("sql", str(write(tmp_path / "in.jsonl", lines)), "-o", str(tmp_path / "out.jsonl"))
    assert done.exit_code == 0, done.output
    assert [r["status"] for r in read(tmp_path / "out.jsonl")] == [status for *_, status in rows]


def test_a_missing_database_is_named_and_never_a_zero(tmp_path: Path, database: str) -> None:
    good = {"completion": "SELECT 1", "db": database, "gold_sql": "SELECT 1", "convention": "bird"}
    rows = [good, good | {"db": "absent.sqlite"}, good | {"convention": "strict"}, good]
    done = score("sql", str(write(tmp_path / "in.jsonl", rows)), "-o", str(tmp_path / "out.jsonl"))
    assert done.exit_code == 2
    assert "in.jsonl:2: db 'absent.sqlite' is no file" in done.output
    assert "in.jsonl:3: convention is 'strict'" in done.output
    verdicts = [(r["index"], r["score"], r["status"]) for r in read(tmp_path / "out.jsonl")]
    assert verdicts == [(0, 1, "correct"), (1, None, "infrastructure_error"), (3, 1, "correct")]
