"""The command that makes a model of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.support import exit_status


def add_export_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        name="export",
        short_help="Write a checkpoint's model as a Hugging Face directory.",
        help="""Write the model of a checkpoint as a Hugging Face directory, which vLLM and transformers load.

Training does it for each checkpoint (checkpoints/step_N/hf). This command needs the checkpoint alone, and the
model that the run began with. Adapters are merged into the weights. It runs on the CPU.

\b
Examples:
  dphrl export runs/demo-math -o exported
  dphrl export runs/demo-math --step 40 -o exported""",
    )(export)


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="The checkpoint's step; the newest whole one if not given.")
    ] = None,
) -> None:
    with exit_status():
        from cluster.launch import quiet_libraries
        from dphrl.exporting import export_checkpoint
        from dphrl.tracking.console import Console

        quiet_libraries()
        export_checkpoint(run_dir, step, output, Console())
