"""A thin client of Ray Jobs: it submits, lists, follows and stops jobs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.jobs.submission import Submission
from cluster.jobs.wheel import stand_alone
from dphrl.config.loading import InputError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# A client of Ray Jobs obeys these variables rather than the address that it was given.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Loggers of Ray's client, which write a line for every file that is not uploaded.
CHATTY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
# The exit status of this program when somebody stopped the job.
STOPPED_STATUS = 130
POLL_INTERVAL_S = 1.0
# A job's uploads and its environment take seconds; after this time the user is told what the job waits for.
PENDING_SILENCE_S = 10.0
# Ray writes a job's final state a moment after its log has ended.
SETTLE_S = 30.0
# What a job's metadata says of its run. Everybody who sees the dashboard reads them.
RUN_KEY, FOLDER_KEY = "dphrl_run", "dphrl_folder"


def next_id(run_name: str, taken: Sequence[str]) -> str:
    """`run_name`, then `run_name-2`, `run_name-3`: a resumed run keeps its name and gets a job of its own."""
    stem = re.sub(r"[^\w-]", "-", run_name)
    numbers = {1 if name == stem else int(name.removeprefix(f"{stem}-")) for name in taken if _is_job_of(name, stem)}
    return stem if not numbers else f"{stem}-{max(numbers) + 1}"


def _is_job_of(name: str, stem: str) -> bool:
    return name == stem or re.fullmatch(re.escape(stem) + r"-[1-9]\d*", name) is not None


# ------------------------------------------------------------------------------------------ the client
@dataclass(frozen=True)
class Job:
    """A job that was submitted. started_s, ended_s: seconds since 1970 (UTC). message: Ray's words about its state.
    run, folder: of its run, "" for a job that is none; the folder is as the nodes name it.
    """

    job_id: str
    status: str
    entrypoint: str
    started_s: float | None
    ended_s: float | None
    exit_status: int | None
    message: str
    run: str = ""
    folder: str = ""

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.status in ("PENDING", "RUNNING")


class JobClient:
    """Ray Jobs at an address: the URL of a dashboard; None stands for RAY_ADDRESS, else the cluster of this machine.

    Every method raises InputError when there is no cluster, no such job, or no right to see it (a token is read from
    RAY_AUTH_TOKEN or where `ray get-auth-token` keeps it).
    """

    def __init__(self, address: str | None) -> None:
        from ray.job_submission import JobSubmissionClient

        for name in CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        known = next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
        self.address = address or known or DEFAULT_ADDRESS
        if address:
            # Ray lets these override the address that it is given.
            for name in ADDRESS_VARIABLES:
                os.environ.pop(name, None)
        self._client = _asked(self.address, lambda: JobSubmissionClient(self.address))

    def submit(self, submission: Submission) -> str:
        """Returns the job's id. Raises InputError while a job of this run is active: two jobs would share a folder."""
        jobs = self.list()
        stem = next_id(submission.run_name, [])
        running = [job.job_id for job in jobs if _is_job_of(job.job_id, stem) and job.is_active]
        if running:
            raise InputError(
                f"{running[0]}: is still pending or running and writes to the same run folder; "
                f"`dphrl jobs stop {running[0]}`, or set another run_name"
            )
        job = {
            "entrypoint": submission.entrypoint,
            "submission_id": next_id(submission.run_name, [job.job_id for job in jobs]),
            "metadata": {RUN_KEY: submission.run_name, FOLDER_KEY: str(submission.folder)},
        }
        with tempfile.TemporaryDirectory() as folder:
            runtime_env = dict(submission.runtime_env)
            if submission.wheel is not None:
                runtime_env["py_modules"] = [str(stand_alone(submission.wheel, Path(folder)))]
            return str(self._ask(lambda: self._client.submit_job(runtime_env=runtime_env, **job)))

    def list(self) -> list[Job]:
        """Jobs that were submitted, oldest first."""
        found = [_job(details) for details in self._ask(self._client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda job: job.started_s or float("inf"))

    def get(self, job_id: str) -> Job:
        """The job with this id."""
        return _job(self._ask(lambda: self._client.get_job_info(job_id)), job_id)

    def stop(self, job_id: str) -> bool:
        """Stop a job, which may take STOP_WAIT to save what it did. Returns whether there was anything to stop."""
        return bool(self._ask(lambda: self._client.stop_job(job_id)))

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        return str(self._ask(lambda: self._client.get_job_logs(job_id)))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Write the job's log as it comes, until the job has ended. An interrupt ends the following, not the job.

        Raises RuntimeError when the cluster goes away meanwhile.
        """
        from aiohttp import ClientError

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                write(lines)

        job, said = self.get(job_id), False
        waiting_since = time.monotonic()
        try:
            while job.status == "PENDING":
                if not said and time.monotonic() - waiting_since > PENDING_SILENCE_S:
                    write(f"{job_id} waits: {job.message}\n")
                    said = True
                time.sleep(POLL_INTERVAL_S)
                job = self.get(job_id)
            # A broken connection does not mean a failed job: its state is asked below, and if it still runs, its log
            # is followed again. Ray then sends the log from its start.
            while True:
                with suppress(RuntimeError, OSError, ClientError):
                    asyncio.run(tail())
                settled = time.monotonic() + SETTLE_S
                while (job := self.get(job_id)).status == "RUNNING" and time.monotonic() < settled:
                    time.sleep(POLL_INTERVAL_S)
                if job.status != "RUNNING":
                    return job
        except InputError as error:
            raise RuntimeError(f"lost sight of {job_id}: {error}") from None

    def _ask(self, question: Callable[[], Any]) -> Any:
        return _asked(self.address, question)


def exit_status_of(job: Job) -> int:
    """The exit status for an ended job: that of its program, if the program ended by itself."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return STOPPED_STATUS
    return job.exit_status if job.exit_status and 0 < job.exit_status < 256 else 1


def _asked(address: str, question: Callable[[], Any]) -> Any:
    """Ray's answer, or an InputError with what it says in one line."""
    try:
        return question()
    except ConnectionError:
        raise InputError(
            f"{address}: no Ray cluster answers there; start one with `ray start --head`, or name its dashboard with "
            "--address http://HOST:8265"
        ) from None
    except InputError:
        raise
    except Exception as error:
        # Ray's own errors (such as that for a missing token) and the others that its client raises have no common base.
        if not (isinstance(error, RuntimeError | ValueError) or type(error).__module__.startswith("ray.")):
            raise
        text = " ".join(str(error).split())
        if "401" in text or "403" in text or "nauthorized" in text:
            raise InputError(
                f"{address}: the cluster wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put it where "
                "`ray get-auth-token` looks"
            ) from None
        if "does not exist" in text:
            raise InputError(f"{address}: no such job; `dphrl jobs list` names them") from None
        if "No available agent" in text:
            raise InputError(
                f"{address}: the head node's agent, which starts jobs, does not answer; try again in a moment, else "
                "see dashboard_agent.log there (of two clusters on one machine, the second needs a "
                "--dashboard-agent-listen-port of its own)"
            ) from None
        raise InputError(f"{address}: the cluster refused: {text[:300]}") from None


def _job(details: Any, job_id: str = "") -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1000

    metadata = getattr(details, "metadata", None) or {}
    return Job(
        details.submission_id or job_id,
        getattr(details.status, "value", str(details.status)),
        details.entrypoint,
        seconds(details.start_time),
        seconds(details.end_time),
        details.driver_exit_code,
        " ".join((details.message or "").split()),
        metadata.get(RUN_KEY, ""),
        metadata.get(FOLDER_KEY, ""),
    )
