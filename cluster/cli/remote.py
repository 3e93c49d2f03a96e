"""Commands about clusters: plan a run, submit it, handle the jobs of a cluster, write files that start a cluster."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.cli.support import CONFIG_HELP, ConfigArgument, InsistOption, OverridesArgument, exit_status, say

if TYPE_CHECKING:
    from cluster.jobs import JobClient

AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="The cluster's dashboard; else RAY_ADDRESS, else this machine's."),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `dphrl jobs list` shows it.")]

jobs_app = typer.Typer(help="The jobs of a Ray cluster: list, logs, stop.", no_args_is_help=True, rich_markup_mode=None)


def add_cluster_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command(
        short_help="Show what a run would start.",
        help=f"""Resolve and check a configuration and show what it would start; start nothing.

{CONFIG_HELP}

A suite's name or YAML file (`dphrl experiment`) is shown with its arms and what each changes.

\b
Examples:
  dphrl plan demo-math
  dphrl plan demo-math rollout.num_engines=2 --yaml > mine.yaml
  dphrl plan passk-math
  dphrl plan paper/sql-dph-js --simulate nodes=1,gpus=8,gpu_gib=80 --tokens-per-s 2500,4000
  dphrl plan mine.yaml rollout.num_engines=8 --measured runs/mine""",
    )(plan)
    app.command(
        short_help="Send a run to a Ray cluster.",
        help=f"""Send a run to a Ray cluster as a job: `dphrl train` over there.

{CONFIG_HELP}

The configuration is checked here first. The present folder is uploaded (without runs, environments and what .gitignore
names), so that relative paths of data mean the same; results go to run_dir, which every node must see. The nodes need
an environment with dphrl's requirements (docker/, or `make setup`).

With --wait the log is shown and the exit status is the job's own: 0 done, 1 failed, 2 bad input, 130 stopped. An
interrupt ends the watching, not the job.

\b
Examples:
  dphrl submit demo-math --wait
  dphrl submit my.yaml run_dir=/shared/runs --address http://head:8265
  dphrl submit my.yaml run_dir=/shared/runs --resume       # the same run, from its last checkpoint""",
    )(submit)
    app.add_typer(jobs_app, name="jobs")
    app.command(
        short_help="Write a file that starts a run on a cluster.",
        help=f"""Write the file that starts a run on Kubernetes, Slurm, Docker Compose, or your own machines (`ray up`).

{CONFIG_HELP}

The file holds the configuration, makes as many nodes as the run needs, and says at its top how to use it.

\b
Examples:
  dphrl render kubernetes my.yaml --image registry/dphrl:cuda --gpus-per-node 8 -o run.yaml
  dphrl render slurm my.yaml run_dir=/shared/runs --gpus-per-node 8 | sbatch --partition gpu
  dphrl render compose demo-math -o compose.yaml
  dphrl render ray my.yaml run_dir=/shared/runs --host 10.0.0.1 --host 10.0.0.2 --ssh-key ~/.ssh/id -o cluster.yaml""",
    )(render)
    app.command(
        short_help="Change the number of engines while a run trains.",
        help="""Change how many engines and reward workers a run has, while it trains.

RUN is the run's folder, on storage that this machine and the run's driver share. New engines start beside the training
and join at the next weight sync. What an engine that leaves was at is sampled by others. Without --wait the command
returns when the run has taken the order up.

\b
Examples:
  dphrl scale runs/mine --rollout 4
  dphrl scale runs/mine --rollout 2 --reward 8 --wait""",
    )(scale)


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print every setting as YAML instead, with what it means.")
    ] = False,
    simulate: Annotated[
        list[str] | None,
        typer.Option(
            "--simulate",
            metavar="nodes=N,gpus=N,...",
            help="Place it on a cluster you need not have; also cpus=, gpu_gib=, accelerator=, host_gib=, disk_gib=. "
            "Repeat for nodes of another kind.",
        ),
    ] = None,
    tokens_per_s: Annotated[
        str | None,
        typer.Option("--tokens-per-s", metavar="ENGINE,RANK", help="Speeds from which to tell the time of a step."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--measured", metavar="RUN_DIR", help="Take speeds and lengths from that run.")
    ] = None,
) -> None:
    with exit_status() as run:
        from cluster.planning.suites import describe_suite, is_suite

        if is_suite(config):
            if as_yaml or simulate or tokens_per_s or measured:
                option = "--yaml" if as_yaml else "--simulate" if simulate else "--tokens-per-s, --measured"
                raise run.refuse(f"{option}: {config} is a suite, many configurations; name its base or a preset")
            typer.echo(describe_suite(config, overrides or []))
            return
        if tokens_per_s and measured:
            raise run.refuse("--tokens-per-s and --measured: both give the speed; choose one")
        loaded = run.load_with_reward(config, overrides)
        if as_yaml:
            from dphrl.config.explain import explained_yaml

            typer.echo(explained_yaml(loaded), nl=False)
            return
        from cluster.planning.describe import describe_plan, parse_cluster
        from cluster.planning.timing import given_speed, measured_speed

        speed = given_speed(loaded, tokens_per_s) if tokens_per_s else measured_speed(measured) if measured else None
        typer.echo(describe_plan(loaded, parse_cluster(simulate) if simulate else None, speed))


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
        from cluster.jobs import JobClient, plan_submission

        submission = plan_submission(
            *(config, overrides or []),
            resume=resume,
            insist=insist,
            overwrite=overwrite,
            working_dir=None if no_upload else working_dir,
            wheel=wheel,
            env=env or [],
        )
        client = JobClient(address)
        job_id = client.submit(submission)
        for note in submission.notes:
            typer.echo(note)
        typer.echo(f"submitted as {job_id} to {client.address}")
        if not wait:
            typer.echo(f"follow it with `dphrl jobs logs {job_id} --follow`, end it with `dphrl jobs stop {job_id}`")
            return
        _follow(client, job_id)


def _follow(client: JobClient, job_id: str) -> None:
    """Show the job's log, say how the job ended, and exit with its status."""
    from cluster.jobs import exit_status_of

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


def render(
    kind: Annotated[
        Literal["kubernetes", "slurm", "compose", "ray"],
        typer.Argument(metavar="kubernetes|slurm|compose|ray", help="What is to start the run."),
    ],
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; standard output if not given.")
    ] = None,
    image: Annotated[str, typer.Option("--image", help="Container image; else dphrl:cuda or dphrl:cpu.")] = "",
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=0, help="GPUs of a node; else what the run takes, up to 8.")
    ] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option("--cpus-per-node", min=1, help="CPUs of a node for Ray; else 12 a GPU, or 8.")
    ] = None,
    memory_per_node: Annotated[
        int | None, typer.Option("--memory-per-node", metavar="GIB", min=1, help="Kubernetes: memory of a node.")
    ] = None,
    max_nodes: Annotated[
        int | None, typer.Option("--max-nodes", min=1, help="How far the cluster may grow; else to what is needed.")
    ] = None,
    namespace: Annotated[str, typer.Option("--namespace", help="Kubernetes namespace.")] = "",
    volume_claim: Annotated[
        str, typer.Option("--volume-claim", metavar="NAME", help="Kubernetes: a shared volume that exists.")
    ] = "",
    volume_size: Annotated[
        str, typer.Option("--volume-size", metavar="SIZE", help="Kubernetes: of the volume made otherwise.")
    ] = "200Gi",
    hosts: Annotated[
        list[str] | None, typer.Option("--host", metavar="ADDRESS", help="ray: a machine; repeat it, the head first.")
    ] = None,
    ssh_user: Annotated[str, typer.Option("--ssh-user", help="ray: who logs in on the machines.")] = "ubuntu",
    ssh_key: Annotated[str, typer.Option("--ssh-key", metavar="PATH", help="ray: the private key for that.")] = "",
) -> None:
    with exit_status() as run:
        loaded = run.load(config, overrides)
        import cluster.render.nodes as rendering
        from dphrl.outputs import check_output, save_output

        if output is not None:
            check_output(output)
        options = rendering.RenderOptions(
            image=image,
            gpus_per_node=gpus_per_node,
            cpus_per_node=cpus_per_node,
            memory_gib_per_node=memory_per_node,
            max_nodes=max_nodes,
            namespace=namespace,
            volume_claim=volume_claim,
            volume_size=volume_size,
            hosts=tuple(hosts or ()),
            ssh_user=ssh_user,
            ssh_key=ssh_key,
            command=_command_line(),
        )
        text = rendering.render(kind, loaded, options)
        if output is None:
            sys.stdout.write(text)
            return
        save_output(output, text)
        say(f"written to {output}; its first lines say how to use it")


def scale(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    rollout: Annotated[int | None, typer.Option("--rollout", metavar="N", help="Engines that it is to have.")] = None,
    reward: Annotated[
        int | None, typer.Option("--reward", metavar="M", help="Reward workers that it is to have.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until new engines serve.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="With --wait: for how long at most.")
    ] = 1800.0,
) -> None:
    with exit_status() as command:
        from cluster.orders import give_order

        if rollout is None and reward is None:
            raise command.refuse("--rollout N, --reward M: give at least one")
        for option, number in (("--rollout", rollout), ("--reward", reward)):
            if number is not None and number < 1:
                raise command.refuse(f"{option} {number}: a run needs at least one; give a number from 1")
        give_order(run, rollout, reward, wait_s=timeout if wait else 0.0, on_message=typer.echo)


def _command_line() -> str:
    """The command that was typed, without --output: the text of a file should not depend on where the file goes."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word in ("-o", "--output"):
            skip = not skip
        elif not word.startswith(("--output=", "-o")):
            words.append(word)
    return shlex.join(["dphrl", *words])


@jobs_app.command("list")
def list_jobs(address: AddressOption = None) -> None:
    """What was submitted to the cluster, oldest first."""
    with exit_status():
        from cluster.jobs import JobClient
        from dphrl.tracking.console import format_table

        rows = []
        for job in JobClient(address).list():
            started = "-" if job.started_s is None else time.strftime("%m-%d %H:%M", time.localtime(job.started_s))
            seconds = None if job.started_s is None else round((job.ended_s or time.time()) - job.started_s)
            rows.append((job.job_id, job.status.lower(), job.exit_status, started, seconds, job.entrypoint))
        if not rows:
            typer.echo("no jobs")
            return
        typer.echo(format_table(["job", "status", "exit", "started", "seconds", "command"], rows))


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
        from cluster.jobs import JobClient

        client = JobClient(address)
        if follow:
            _follow(client, job)
        sys.stdout.write(client.logs(job))


@jobs_app.command("stop")
def stop(job: JobArgument, address: AddressOption = None) -> None:
    """End a job. Its run can be continued: `dphrl submit CONFIG --resume`."""
    with exit_status():
        from cluster.jobs import JobClient

        typer.echo(f"{job} {'is being stopped' if JobClient(address).stop(job) else 'had ended already'}")
