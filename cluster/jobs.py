"""Runs as jobs of a Ray cluster: what to submit, and a thin client that submits, lists, follows and stops jobs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dphrl.config.loading import InputError, list_presets, load_config
from dphrl.config.secrets import is_secret_variable
from dphrl.own_code import hides_program

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# A client of Ray Jobs obeys these variables rather than the address that it was given.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Left out of the upload besides what .gitignore names: results, environments, history.
NOT_UPLOADED = [
    ".git",
    ".env",
    ".netrc",
    ".venv",
    "venv",
    "runs",
    "**/__pycache__",
    "*.sqlite-journal",
    ".pytest_cache",
    ".mypy_cache",
]
# Variables that a run needs to find the same things on the cluster. What --env names is added to them.
PASSED_ON = ("DPHRL_DATA", "DPHRL_LOG", "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE")
# Variables of trackers that are secrets or hold them, so that they must be in the nodes' own environment.
LEFT_HERE = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_URI"}
# Loggers of Ray's client, which write a line for every file that is not uploaded.
CHATTY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
# How a job starts the program: as a module, because a --wheel brings no command `dphrl` to a node. With -P
# no module is imported from the folder that Ray was started in.
PROGRAM = ("python", "-P", "-m", "dphrl")
# What Ray waits for a job that it stops before it kills it, in seconds, as the job's variable: a run takes its step to
# the end and saves it. Ray's own is 3.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
# The exit status of this program when somebody stopped the job.
STOPPED_STATUS = 130
POLL_INTERVAL_S = 1.0
# A job's uploads and its environment take seconds; after this time the user is told what the job waits for.
PENDING_SILENCE_S = 10.0
# Ray writes a job's final state a moment after its log has ended.
SETTLE_S = 30.0


@dataclass(frozen=True)
class Submission:
    """A job before it has an id. The id is made from `run_name`."""

    run_name: str
    entrypoint: str
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_submission(
    source: str,
    overrides: Sequence[str],
    *,
    resume: bool = False,
    insist: bool = False,
    overwrite: bool = False,
    working_dir: Path | None = None,
    wheel: Path | None = None,
    env: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Submission:
    """What `dphrl submit` hands to the cluster. The configuration is checked here first; the job checks it again
    where it runs, with the data, the models and the user's own reward that are there.

    working_dir: uploaded, and the job starts in it, so that relative paths mean the same; None uploads nothing.
    wheel: a dphrl to run instead of the one installed on the nodes.

    Raises InputError, one line each, for what is wrong with the configuration or the paths.
    """
    config = load_config(source, overrides)
    if working_dir is not None and not working_dir.is_dir():
        raise InputError(f"--working-dir {working_dir}: no such folder; name the one the job should start in")
    # Python looks in the wheel first, then in the uploaded folder, then in what is installed on the nodes.
    if working_dir is not None and wheel is None and (hiding := hides_program(working_dir)):
        raise InputError(
            f"{hiding}: would be uploaded and hide the program on the nodes, which is found by the same name; rename "
            "it, choose another --working-dir, or give --wheel or --no-upload"
        )
    if wheel is not None and not (wheel.is_file() and wheel.suffix == ".whl"):
        raise InputError(f"--wheel {wheel}: no such wheel; make one with `pip wheel --no-deps -w dist .`")
    arguments, notes = [_config_argument(source, working_dir), *overrides], []
    run_dir = Path(config.run_dir).expanduser()
    if not run_dir.is_absolute():
        # The job's own folder is deleted with the job, so the results must not go there.
        run_dir = Path.cwd() / run_dir
        arguments.append(f"run_dir={run_dir}")
        notes.append(f"results go to {run_dir / config.run_name}: every node must see that path (run_dir sets it)")
    for tracker, name in LEFT_HERE.items():
        if getattr(config.tracking, tracker) and environ.get(name):
            notes.append(f"{name} stays here, where others cannot read it: the nodes' own environment must hold it")
    flags = {"--resume": resume, "--insist": insist, "--overwrite": overwrite}
    words = [*PROGRAM, "train", *arguments, *(flag for flag, wanted in flags.items() if wanted)]
    runtime_env: dict[str, Any] = {"env_vars": _variables(env, environ)}
    if working_dir is not None:
        runtime_env |= {"working_dir": str(working_dir.resolve()), "excludes": NOT_UPLOADED}
    if wheel is not None:
        runtime_env["py_modules"] = [str(wheel.resolve())]
    return Submission(config.run_name, shlex.join(words), runtime_env, tuple(notes))


def _config_argument(source: str, working_dir: Path | None) -> str:
    """The configuration as the job will find it: a preset's name, or the file's path there."""
    if source in list_presets():
        return source
    path = Path(source).expanduser().resolve()
    if working_dir is None:
        return str(path)
    try:
        return str(path.relative_to(working_dir.resolve()))
    except ValueError:
        raise InputError(
            f"{source}: lies outside the uploaded folder {working_dir}, so the job could not read it; move it there, "
            "or choose another --working-dir"
        ) from None


def _variables(env: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The job's variables: NAME=VALUE as given, NAME with the value it has here. Everybody who sees the dashboard reads
    them, so secrets are not among them. Raises InputError for a name that is not set here, and for a secret."""
    # A job's output goes to a file, and a line should be in it as soon as it is written.
    known = {name: environ[name] for name in PASSED_ON if environ.get(name)}
    variables = {"PYTHONUNBUFFERED": "1", **STOP_WAIT} | {
        name: value for name, value in known.items() if not is_secret_variable(name, value)
    }
    for text in env:
        name, given, value = text.partition("=")
        if not name.isidentifier():
            raise InputError(f"--env {name}: write NAME=VALUE, or NAME for the value it has here")
        if not given and name not in environ:
            raise InputError(f"--env {name}: not set here; write {name}=VALUE")
        variables[name] = value if given else environ[name]
        if is_secret_variable(name, variables[name]):
            raise InputError(
                f"--env {name}: looks like a secret, and everybody who sees the cluster's dashboard reads a job's "
                "variables; set it in the environment of the cluster's nodes"
            )
    return variables


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
    """A job that was submitted. started_s, ended_s: seconds since 1970 (UTC). message: Ray's words about its state."""

    job_id: str
    status: str
    entrypoint: str
    started_s: float | None
    ended_s: float | None
    exit_status: int | None
    message: str


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
        running = [job.job_id for job in jobs if _is_job_of(job.job_id, stem) and job.status in ("PENDING", "RUNNING")]
        if running:
            raise InputError(
                f"{running[0]}: is still pending or running and writes to the same run folder; "
                f"`dphrl jobs stop {running[0]}`, or set another run_name"
            )
        return str(
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=next_id(submission.run_name, [job.job_id for job in jobs]),
                    runtime_env=dict(submission.runtime_env),
                    metadata={"dphrl_run": submission.run_name},
                )
            )
        )

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

    return Job(
        details.submission_id or job_id,
        getattr(details.status, "value", str(details.status)),
        details.entrypoint,
        seconds(details.start_time),
        seconds(details.end_time),
        details.driver_exit_code,
        " ".join((details.message or "").split()),
    )
