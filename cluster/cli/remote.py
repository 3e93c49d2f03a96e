"""Commands about clusters: plan a run, write files that start a cluster, change how many engines a run has."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.support import CONFIG_HELP, ConfigArgument, OverridesArgument, exit_status, say


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
        short_help="Write a file that starts a run on a cluster.",
        help=f"""Write the file that starts a run on Kubernetes (KubeRay), Slurm or Docker Compose.

{CONFIG_HELP}

The file holds the configuration, makes as many nodes as the run needs, and says at its top how to use it.

\b
Examples:
  dphrl render kubernetes my.yaml --image registry/dphrl:cuda --gpus-per-node 8 -o run.yaml
  dphrl render slurm my.yaml run_dir=/shared/runs --gpus-per-node 8 | sbatch --partition gpu
  dphrl render compose demo-math -o compose.yaml""",
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


def render(
    kind: Annotated[
        Literal["kubernetes", "slurm", "compose"],
        typer.Argument(metavar="kubernetes|slurm|compose", help="What is to start the run."),
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
