"""How far jobs are: from their run's folder where it can be read here, else from what they print."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.jobs.client import Job
from cluster.planning.queue import WAITS
from dphrl.config.loading import InputError, parse_yaml
from dphrl.tracking.console import read_step
from dphrl.tracking.tracker import METRICS_FILE, read_metrics

# The time that is left is told from so many steps, the newest.
NUM_TIMED = 10
NUM_MESSAGE_CHARACTERS = 100
# A command as Ray shows it, to where the program's own words begin.
_PROGRAM = re.compile(r"python -P (?:-m dphrl|-c '.*main\(\)'(?=\s)) ")


@dataclass(frozen=True)
class Progress:
    """How far a run is. step: the newest; num_steps: of how many. reward, gap (nats): of that step. left_s: seconds
    that the other steps take at the pace of the last. waits: what it waits for, before it has begun. None: not known.
    """

    step: int | None = None
    num_steps: int | None = None
    reward: float | None = None
    gap: float | None = None
    left_s: float | None = None
    waits: str | None = None


def progress_of(jobs: Sequence[Job], log_of: Callable[[str], str]) -> list[Progress]:
    """Of each job. log_of: what the job with this id has printed; asked of those that run."""
    # A resumed run goes on in the folder of the jobs before, whose steps are no longer told from its own.
    newest = {job.folder: job.job_id for job in jobs if job.folder}
    found = []
    for job in jobs:
        mine = newest.get(job.folder) == job.job_id
        progress = (from_folder(Path(job.folder), job.started_s) if mine else None) or Progress()
        if job.status == "PENDING":
            progress = Progress(waits=job.message[:NUM_MESSAGE_CHARACTERS] or None)
        elif job.status == "RUNNING" and job.run:
            printed = Progress()
            with suppress(InputError):  # its node may be gone, and the others are shown all the same
                printed = from_log(log_of(job.job_id))
            progress = printed if printed.waits or progress.step is None else progress
        found.append(progress if job.is_active else replace(progress, left_s=None))
    return found


def from_folder(folder: Path, since_s: float | None) -> Progress | None:
    """From a run's folder; None where it cannot be read, or was not written to since then (seconds since 1970)."""
    try:
        path = folder / METRICS_FILE
        if not path.is_file() or path.stat().st_mtime < (since_s or 0.0):
            return None
        records = read_metrics(folder)
        settings = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
        return _progress(records, settings["learner"]["num_steps"])
    except (OSError, UnicodeDecodeError, InputError, KeyError, TypeError):
        return None


def from_log(text: str) -> Progress:
    """From what a job has printed: its step lines, or the line that says what it waits for, if that is the last."""
    # With DPHRL_LOG=json there are objects between the lines.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("{")]
    if lines and lines[-1].startswith(WAITS):
        return Progress(waits=lines[-1])
    records = [record for line in lines if (record := read_step(line))]
    return (_progress(records, int(records[-1]["num_steps"])) if records else None) or Progress()


def _progress(records: Sequence[Mapping[str, Any]], num_steps: int) -> Progress | None:
    if not records:
        return None
    last, timed = records[-1], [record["time/step_s"] for record in records[-NUM_TIMED:] if record.get("time/step_s")]
    step = int(last["step"])
    left_s = (num_steps - step) * sum(timed) / len(timed) if timed else None
    return Progress(step, num_steps, last.get("reward/mean"), last.get("sync/logprob_gap_max"), left_s)


# ------------------------------------------------------------------------------------------ what is shown
COLUMNS = ("job", "status", "step", "reward", "gap", "left", "started", "took", "exit", "command, or what it waits for")


def table_rows(jobs: Sequence[Job], progress: Sequence[Progress]) -> list[tuple[object, ...]]:
    """A row of COLUMNS for each job."""
    rows: list[tuple[object, ...]] = []
    for job, at in zip(jobs, progress, strict=True):
        started = None if job.started_s is None else time.strftime("%m-%d %H:%M", time.localtime(job.started_s))
        took = None if job.started_s is None else duration((job.ended_s or time.time()) - job.started_s)
        rows.append(
            (
                job.job_id,
                "waiting" if at.waits and job.status == "RUNNING" else job.status.lower(),
                None if at.step is None else f"{at.step}/{at.num_steps}",
                at.reward,
                None if at.gap is None else f"{at.gap:.0e}",
                None if at.left_s is None else duration(at.left_s),
                started,
                took,
                job.exit_status,
                at.waits or short_command(job.entrypoint),
            )
        )
    return rows


def as_json(jobs: Sequence[Job], progress: Sequence[Progress]) -> str:
    """A list with an object for each job. Times in seconds, moments in seconds since 1970; null is not known."""
    objects = [
        {
            "job": job.job_id,
            "run": job.run or None,
            "status": "waiting" if at.waits and job.status == "RUNNING" else job.status.lower(),
            "waits_for": at.waits,
            "step": at.step,
            "num_steps": at.num_steps,
            "reward": at.reward,
            "gap": at.gap,
            "left_s": at.left_s,
            "started": job.started_s,
            "ended": job.ended_s,
            "exit_status": job.exit_status,
            "folder": job.folder or None,
            "command": job.entrypoint,
        }
        for job, at in zip(jobs, progress, strict=True)
    ]
    return json.dumps(objects, indent=2)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `2.1 d`."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < limit * size:
            number = seconds / size
            return f"{number:.0f} {unit}" if unit != "h" else f"{number:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def short_command(entrypoint: str) -> str:
    """The program's words, without how Python is started."""
    return _PROGRAM.sub("dphrl ", entrypoint, count=1)
