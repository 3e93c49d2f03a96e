"""Commands about jobs of a Ray cluster: submit a run, list what was submitted, follow it and stop it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.support import CONFIG_HELP, ConfigArgument, InsistOption, OverridesArgument, exit_status, say

if TYPE_CHECKING:
    from cluster.jobs.client import JobClient

AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="The cluster's dashboard; else RAY_ADDRESS, else this machine's."),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `dphrl jobs list` shows it.")]

jobs_app = typer.Typer(help="The jobs of a Ray cluster: list, logs, stop.", no_args_is_help=True, rich_markup_mode=None)


def add_job_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command(
        short_help="Send a run to a Ray cluster.",
        help=f"""Send a run to a Ray cluster as a job: `dphrl train` over there.

{CONFIG_HELP}

The configuration is checked here first. The present folder is uploaded, so that relative paths mean the same; results
go to run_dir, which every node must see. Not uploaded: what .gitignore names, runs, environments, secrets (.env,
private keys), and data and models that the configuration does not name by a relative path (--include PATTERN takes them
along).
The nodes need an environment with dphrl's requirements (docker/, or `make setup`).

While others hold what the run needs, it waits; its log and `dphrl jobs list` say for what.

With --wait the log is shown and the exit status is the job's own: 0 done, 1 failed, 2 bad input, 130 stopped. An
interrupt ends the watching, not the job.

\b
Examples:
  dphrl submit demo-math --wait
  dphrl submit my.yaml run_dir=/shared/runs --address http://head:8265
  dphrl submit my.yaml run_dir=/shared/runs --include 'vocabulary/*.bin'
  dphrl submit my.yaml run_dir=/shared/runs --resume       # the same run, from its last checkpoint""",
    )(submit)
    app.add_typer(jobs_app, name="jobs")


def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log; exit with the job's status.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    insist: InsistOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run of this run_name.")] = False,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", metavar="DIR", help="The folder to upload and start in.")
    ] = Path(),
    no_upload: Annotated[
        bool, typer.Option("--no-upload", help="Upload nothing: paths are those of the cluster's nodes.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Upload these data or models too, although the configuration does not name them; repeat it.",
        ),
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", metavar="FILE", help="Run this dphrl, not the one installed there.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME[=VALUE]", help="Environment of the job; repeat it. Visible to users of the cluster."
        ),
    ] = None,
) -> None:
    with exit_status() as run:
        run.check_start(resume=resume, insist=insist, overwrite=overwrite)
        from cluster.jobs.client import JobClient
        from cluster.jobs.submission import plan_submission
        from cluster.jobs.upload import size_text

        submission = plan_submission(
            *(config, overrides or []),
            resume=resume,
            insist=insist,
            overwrite=overwrite,
            working_dir=None if no_upload else working_dir,
            wheel=wheel,
            include=include or [],
            env=env or [],
        )
        client = JobClient(address)
        job_id = client.submit(submission)
        if submission.upload is not None:
            upload = submission.upload
            typer.echo(f"uploaded {len(upload.files)} files, {size_text(upload.num_bytes)}, of {upload.folder}")
        for note in submission.notes:
            typer.echo(note)
        typer.echo(f"submitted as {job_id} to {client.address}")
        if not wait:
            typer.echo(f"follow it with `dphrl jobs logs {job_id} --follow`, end it with `dphrl jobs stop {job_id}`")
            return
        _follow(client, job_id)


def _follow(client: JobClient, job_id: str) -> None:
    """Show the job's log, say how the job ended, and exit with its status."""
    from cluster.jobs.client import exit_status_of

    try:
        job = client.follow(job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        say(f"dphrl: {job_id} goes on without being watched; `dphrl jobs stop {job_id}` ends it")
        raise typer.Exit(130) from None
    status = exit_status_of(job)
    if job.exit_status is None and status == 1 and job.message:
        # The job never began to run, so its log says nothing.
        say(f"dphrl: {job.message[:300]}")
    if status:
        say(f"dphrl: job {job_id} {job.status.lower()}, exit status {status}")
    raise typer.Exit(status)


@jobs_app.command("list")
def list_jobs(
    address: AddressOption = None,
    json: Annotated[bool, typer.Option("--json", help="As a list of objects, for programs.")] = False,
) -> None:
    """What was submitted to the cluster, oldest first, and how far it is.

    step, reward, gap (engine to learner, in nats) and the time left are read from the run's folder if this machine sees
    it, else from the job's log while it runs. A run that waits for what others hold says for what.
    """
    with exit_status():
        from cluster.jobs.client import JobClient
        from cluster.jobs.progress import COLUMNS, as_json, progress_of, table_rows
        from dphrl.tracking.console import format_table

        client = JobClient(address)
        found = client.list()
        progress = progress_of(found, client.logs)
        if json:
            typer.echo(as_json(found, progress))
        elif not found:
            typer.echo("no jobs")
        else:
            typer.echo(format_table(COLUMNS, table_rows(found, progress)))


@jobs_app.command("logs")
def show_logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job has ended; then exit with its status.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """What a job has printed."""
    with exit_status():
        from cluster.jobs.client import JobClient

        client = JobClient(address)
        if follow:
            _follow(client, job)
        sys.stdout.write(client.logs(job))


@jobs_app.command("stop")
def stop(job: JobArgument, address: AddressOption = None) -> None:
    """End a job. Its run can be continued: `dphrl submit CONFIG --resume`."""
    with exit_status():
        from cluster.jobs.client import JobClient

        typer.echo(f"{job} {'is being stopped' if JobClient(address).stop(job) else 'had ended already'}")
