"""Commands about clusters: plan a run, write files that start a cluster, change how many engines a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.render import add_render_command
from cluster.cli.support import CONFIG_HELP, ConfigArgument, OverridesArgument, exit_status


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
    add_render_command(app)
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
