"""How far jobs are, as `dphrl jobs list` tells it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.client import Job
from cluster.jobs.progress import COLUMNS, Progress, as_json, duration, from_log, progress_of, short_command, table_rows
from cluster.jobs.submission import PROGRAM, PROGRAM_BESIDE_ANOTHER
from dphrl.config.loading import InputError
from dphrl.tracking.console import format_step, read_step

WAITS = "waits for 2 of 4 GPUs; job-1 holds them; first in the queue"


def job(job_id: str, status: str = "RUNNING", started_s: float = 1000.0, folder: str = "", message: str = "") -> Job:
    ended = None if status in ("PENDING", "RUNNING") else started_s + 90
    return Job(job_id, status, "python -P -m dphrl train x", started_s, ended, None, message, "run", folder)


def record(step: int, seconds: float = 2.0) -> dict[str, Any]:
    return {"step": step, "reward/mean": step / 10, "sync/logprob_gap_max": 2e-7, "time/step_s": seconds}


def write_run(folder: Path, *records: dict[str, Any], written_s: float = 2000.0) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("run_name: x\nlearner:\n  num_steps: 60\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    os.utime(folder / "metrics.jsonl", (written_s, written_s))
    return str(folder)


def no_log(job_id: str) -> str:
    return pytest.fail(f"the log of {job_id} was asked for")


def test_progress_comes_from_the_runs_folder(tmp_path: Path) -> None:
    # 20 slow steps at first: only the newest ten tell the pace.
    folder = write_run(tmp_path, *(record(i, 100.0) for i in range(1, 21)), *(record(i, 3.0) for i in range(21, 31)))
    (found,) = progress_of([job("a", folder=folder)], lambda _: "learner up\n")
    assert found == Progress(30, 60, 3.0, 2e-7, 90.0)
    (ended,) = progress_of([job("a", "SUCCEEDED", folder=folder)], no_log)
    assert ended == Progress(30, 60, 3.0, 2e-7, None), "nothing is left of what has ended"


def test_a_folder_that_the_job_has_not_written_to_tells_nothing_of_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", record(5), written_s=999.0)
    nowhere = str(tmp_path / "nowhere")
    broken = write_run(tmp_path / "broken", record(5))
    (tmp_path / "broken" / "config.yaml").write_text("learner: [")
    for place in (folder, nowhere, broken, ""):
        assert progress_of([job("a", "FAILED", folder=place)], no_log) == [Progress()]


def test_of_the_jobs_of_one_run_the_newest_owns_the_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path, record(5))
    found = progress_of([job("a", "FAILED", folder=folder), job("a-2", "STOPPED", folder=folder)], no_log)
    assert [progress.step for progress in found] == [None, 5]


def test_a_running_job_whose_folder_is_elsewhere_is_told_from_its_log() -> None:
    lines = [format_step(record(step), 60) for step in (1, 2, 3)]
    log = "\n".join(["learner up", *lines, '{"message": "step 9/60", "step": 9}', "checkpoint saved", ""])
    (found,) = progress_of([job("a", folder="/no/such")], lambda _: log)
    assert found == Progress(3, 60, 0.3, 2e-7, pytest.approx(114.0))

    def lost(job_id: str) -> str:
        raise InputError("the cluster refused")

    assert progress_of([job("a"), job("b", "FAILED")], lost) == [Progress(), Progress()]


def test_a_waiting_job_says_for_what(tmp_path: Path) -> None:
    # The folder is of the job before, which went on for a moment after this one had started.
    folder = write_run(tmp_path, record(5))
    (found,) = progress_of([job("a", folder=folder)], lambda _: f"data\n{WAITS}\n" + '{"message": "waits"}\n')
    assert found == Progress(waits=WAITS)
    assert from_log(f"{WAITS}\nfound its places after 35 s\n") == Progress()
    (pending,) = progress_of([job("a", "PENDING", message="It may be waiting for the environment")], no_log)
    assert pending.waits == "It may be waiting for the environment"


def test_a_step_line_is_read_as_it_was_written() -> None:
    whole = {**record(12), "policy/loss": 0.01, "rollout/num_tokens": 100, "time/waiting_share": 0.41}
    told = {"step": 12.0, "num_steps": 60.0, "reward/mean": 1.2, "sync/logprob_gap_max": 2e-7, "time/step_s": 2.0}
    assert read_step(format_step(whole, 60)) == told
    assert read_step(format_step({"step": 3}, 60)) == {"step": 3.0, "num_steps": 60.0}
    mean_gap = {"step": 3, "sync/logprob_gap_mean": 1e-8}
    assert read_step(format_step(mean_gap, 60)) == {"step": 3.0, "num_steps": 60.0}
    for other in ("step 3: reward fell", "steps 3/4", "", "a step 3/4", "step 3/4 more"):
        assert read_step(other) is None


def test_the_table_and_the_json_show_it() -> None:
    jobs = [job("a"), job("b"), job("c", "FAILED")]
    progress = [Progress(12, 60, 0.5, 2e-7, 5400.0), Progress(waits=WAITS), Progress()]
    first, second, third = (dict(zip(COLUMNS, row, strict=True)) for row in table_rows(jobs, progress))
    assert [first[key] for key in ("job", "status", "step", "reward", "gap", "left")] == [
        *("a", "running", "12/60", 0.5, "2e-07", "90 min"),
    ]
    assert (second["status"], second[COLUMNS[-1]], second["step"]) == ("waiting", WAITS, None)
    assert (third["status"], third["took"], third[COLUMNS[-1]]) == ("failed", "90 s", "dphrl train x")
    shown = json.loads(as_json(jobs, progress))
    assert [one["status"] for one in shown] == ["running", "waiting", "failed"]
    assert [shown[0][key] for key in ("run", "step", "num_steps", "reward", "gap", "left_s")] == [
        *("run", 12, 60, 0.5, 2e-7, 5400.0),
    ]
    assert shown[1]["waits_for"] == WAITS
    assert shown[2]["ended"] == 1090.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99.0, "99 s"), (120.0, "2 min"), (5400.0, "90 min"), (7200.0, "2.0 h"), (180_000.0, "2.1 d")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_command_is_shown_without_how_python_is_started() -> None:
    for program in (PROGRAM, PROGRAM_BESIDE_ANOTHER):
        assert short_command(shlex.join([*program, "train", "x", "a=main() "])) == "dphrl train x 'a=main() '"
    assert short_command("python mine.py") == "python mine.py"
