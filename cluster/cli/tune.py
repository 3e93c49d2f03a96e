"""The command that runs the tuning grid of a suite."""

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


def add_tune_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        short_help="Choose settings by a suite's tuning grid.",
        help="""Run the tuning grid of a suite: for each arm the same number of settings, on seeds of their own.

SUITE is an embedded suite with a section `tuning` (passk-math, passk-sql) or a YAML file like theirs. Its rule
chooses one of the settings of each arm; nothing is changed, the table and the choice are written beside the runs.
Finished runs are kept, so that a grid can be run in pieces. `dphrl plan SUITE` counts the runs.

\b
Examples:
  dphrl tune passk-math
  dphrl tune passk-math --arms rkl,dph-f --run-dir /shared/runs --parallel 4""",
    )(tune)


def tune(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="Suite's name or YAML file.")],
    overrides: OverridesArgument = None,
    arms: Annotated[str | None, typer.Option("--arms", metavar="ARM,ARM,...", help="These arms' grids only.")] = None,
    run_dir: Annotated[str, typer.Option("--run-dir", help="Where the folder of runs, SUITE-tuning, goes.")] = "runs",
    parallel: ParallelOption = 1,
    retries: RetriesOption = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file for table and choice; else tuning.json beside the runs."),
    ] = None,
    inline: InlineOption = False,
) -> None:
    with exit_status(SAME_COMMAND):
        from cluster.tuning import run_tuning

        run_tuning(
            *(suite, run_dir, overrides or []),
            arms=arms,
            inline=inline,
            num_parallel=parallel,
            num_retries=retries,
            output=output,
        )
