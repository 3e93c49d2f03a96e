"""The command that compares algorithms over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.support import (
    SAME_COMMAND,
    InlineOption,
    OverridesArgument,
    ParallelOption,
    RetriesOption,
    exit_status,
)


def add_experiment_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        name="experiment",
        short_help="Compare algorithms over seeds.",
        help="""Run a suite: the same task under several algorithms (arms) and seeds, with one table of results.

SUITE is an embedded suite (passk-math, passk-even, ...) or a YAML file like theirs. Finished runs are kept, so
that a suite can be run in pieces; arms of one seed share the base evaluation and the reference buffer.

\b
Examples:
  dphrl experiment passk-math --quick
  dphrl experiment passk-math --seeds 0,1 --arms grpo,dph-f learner.num_steps=60
  dphrl experiment --show passk-math --picture passk-math.svg --pareto pareto.svg
  dphrl experiment --show runs/mine/results.json --json""",
    )(experiment)


def experiment(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="Suite's name or YAML file.")],
    overrides: OverridesArgument = None,
    quick: Annotated[bool, typer.Option("--quick", help="The part of it that shows the same in minutes.")] = False,
    arms: Annotated[str | None, typer.Option("--arms", metavar="ARM,ARM,...", help="These arms only.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="N,N,...", help="These seeds only.")] = None,
    run_dir: Annotated[str, typer.Option("--run-dir", help="Where the suite's folder of runs goes.")] = "runs",
    parallel: ParallelOption = 1,
    retries: RetriesOption = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file for the results; else results.json beside the runs."),
    ] = None,
    others: Annotated[
        Path | None, typer.Option("--with", metavar="FILE", help="Results of further runs, made elsewhere, to add.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="The results that come with dphrl, or of a results.json; runs nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --show: JSON instead of the table.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="With --show: draw Pass@k over k to this .svg, .png or .pdf.")
    ] = None,
    pareto: Annotated[
        Path | None,
        typer.Option("--pareto", help="With --show: draw Pass@1 against Pass@k, seed by seed, to this .svg."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=2, help="With --pareto: which k; else 16, or the largest.")
    ] = None,
    inline: InlineOption = False,
    part: Annotated[bool, typer.Option("--part", hidden=True)] = False,
) -> None:
    with exit_status(SAME_COMMAND) as run:
        if show:
            from dphrl.experiments.show import show_results

            if pareto is not None:
                from dphrl.experiments.suite import committed_results
                from dphrl.report.pareto import write_pareto

                write_pareto(committed_results(suite), pareto, k)
            elif k is not None:
                raise run.refuse("--k: goes with --pareto; add it")
            show_results(suite, as_json=as_json, picture=picture)
            return
        for option, given in (("--json", as_json), ("--picture", picture), ("--pareto", pareto), ("--k", k)):
            if given:
                raise run.refuse(f"{option}: goes with --show; add it")
        from dphrl.experiments.suite import choose_runs, load_suite

        loaded = load_suite(suite)
        runs = choose_runs(loaded, quick=quick, arms=arms, seeds=seeds)
        if part:
            # It is one run, whose log gets the traceback of a failure.
            run.folder = loaded.config(*runs[0], run_dir, overrides or []).folder
        from cluster.experiments import run_experiment

        run_experiment(
            *(suite, runs, run_dir, overrides or []),
            inline=inline,
            num_parallel=parallel,
            num_retries=retries,
            is_part=part,
            output=output,
            others=others,
        )
