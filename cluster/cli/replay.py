"""The command that takes one step of a run's learner again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.support import exit_status


def add_replay_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        short_help="Take one learner step of a run again.",
        help="""Take one learner step of a run again, and compare it with what it was, to the bit.

The learner starts from the newest checkpoint before the step and takes the steps between again, from the batches that
tracking.replay_steps has kept in RUN/replay, with the settings of then. It runs as the run's did, inline or on Ray; no
engine starts. A difference on the machine that trained means a learner that is not repeatable (try deterministic=true),
or memory or files that are not what they were. Exit status 0: identical; 1: different; 2: the step cannot be
replayed.

\b
Examples:
  dphrl train demo-math tracking.replay_steps=40
  dphrl replay runs/demo-math --step 100""",
    )(replay)


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, RUN_DIR/NAME.")],
    step: Annotated[int, typer.Option("--step", min=1, help="The step to take again.")],
) -> None:
    with exit_status():
        from cluster.launch import quiet_libraries
        from cluster.replay import replay_step

        quiet_libraries()
        if not replay_step(run, step):
            raise typer.Exit(1)
