"""The command line. Heavy modules are imported only by the command that needs them: `dphrl --help` answers at once.

Exit status: 0 done, 1 the run failed, 2 bad input or configuration, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.experiment import add_experiment_command
from cluster.cli.export import add_export_command
from cluster.cli.jobs import add_job_commands
from cluster.cli.remote import add_cluster_commands
from cluster.cli.replay import add_replay_command
from cluster.cli.score import add_score_command
from cluster.cli.settings import add_settings_command
from cluster.cli.streams import OutputLostError, prepare_streams
from cluster.cli.support import (
    CONFIG_HELP,
    SAME_COMMAND,
    ConfigArgument,
    InlineOption,
    InsistOption,
    OverridesArgument,
    exit_status,
    lines_of_refusal,
    say,
)
from cluster.cli.tune import add_tune_command

# The exit status of what Ctrl-C or SIGTERM stopped.
STOPPED = (130, 143)

app = typer.Typer(
    help="Reinforcement learning with verifiable rewards that keeps a model's diversity (DPH-RL).",
    epilog="First steps:  dphrl doctor;  dphrl presets;  dphrl train demo-math",
    no_args_is_help=True,
    add_completion=False,
    # These would read [brackets] in a message as markup, and make a traceback fill the screen.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    short_help="Train a model.",
    help=f"""Train a model.

{CONFIG_HELP}

\b
Examples:
  dphrl train demo-math
  dphrl train demo-math learner.num_steps=10 'algorithm.divergence={{name: alpha, alpha: 0.5}}'
  dphrl train my.yaml --resume
  dphrl train demo-math learner.num_steps=2 --inline""",
)
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint instead of starting anew.")
    ] = False,
    insist: InsistOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run of this run_name left, and start anew.")
    ] = False,
    inline: InlineOption = False,
    retries: Annotated[
        int,
        typer.Option(
            "--retries", metavar="N", min=0, help="A scheduler starts this again N times: what is refused, only once."
        ),
    ] = 0,
) -> None:
    with exit_status() as run:
        run.check_start(resume=resume, insist=insist, overwrite=overwrite)
        loaded = run.load(config, overrides)
        from cluster.refusals import not_tried_again

        with not_tried_again(loaded, retries, lines_of_refusal):
            from cluster.launch import run_training

            run_training(loaded, resume=resume, insist=insist, inline=inline, overwrite=overwrite)


@app.command(
    short_help="Run the reference stage alone.",
    help=f"""Run the reference stage alone: sample the initial policy, grade, split, store.

`dphrl train` does this by itself when it finds no buffer it may reuse.

{CONFIG_HELP}

\b
Examples:
  dphrl sample demo-math
  dphrl sample demo-math reference.num_samples=16 reference.threshold=14""",
)
def sample(config: ConfigArgument, overrides: OverridesArgument = None, inline: InlineOption = False) -> None:
    with exit_status(SAME_COMMAND) as run:
        loaded = run.load(config, overrides)
        from cluster.launch import run_sampling

        run_sampling(loaded, inline=inline)


@app.command(
    name="eval",
    short_help="Evaluate a model: Pass@k, retention.",
    help=f"""Evaluate a model: greedy accuracy, unbiased Pass@k, retention against a base model.

{CONFIG_HELP}

\b
Examples:
  dphrl eval demo-math --model runs/demo-math/checkpoints/step_60/hf --base tiny-factor
  dphrl eval my.yaml --model org/name --samples 32 --k 1,8,16 -o result.json""",
)
def evaluate(
    config: ConfigArgument,
    model: Annotated[str, typer.Option("--model", help="Model directory or name to evaluate.")],
    overrides: OverridesArgument = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Model whose solved prompts the retention is measured on.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Samples per prompt; CONFIG's evaluation.num_samples if not given."),
    ] = None,
    k: Annotated[
        str | None, typer.Option("--k", metavar="K,K,...", help="The k of Pass@k; CONFIG's evaluation.k if not given.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the result; else one in RUN_DIR/NAME/eval/.")
    ] = None,
    inline: InlineOption = False,
) -> None:
    with exit_status(SAME_COMMAND) as run:
        # The options become overrides, so that they are checked like every other setting.
        settings = [*(overrides or [])]
        if samples is not None:
            settings.append(f"evaluation.num_samples={samples}")
        if k is not None:
            settings.append(f"evaluation.k=[{k}]")
        loaded = run.load(config, settings)
        num_samples = loaded.evaluation.num_samples
        if num_samples == 0:
            raise run.refuse("evaluation.num_samples: 0 evaluates nothing; give --samples 1 or more")
        from cluster.launch import run_evaluation

        run_evaluation(loaded, model, base, num_samples, loaded.evaluation.k, output, inline)


add_score_command(app)


add_experiment_command(app)


add_tune_command(app)


@app.command(short_help="Make an HTML report of runs.")
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, or a suite's folder: all runs in it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
) -> None:
    """Curves, tables, samples and settings of one or several runs in one HTML file that works offline.

    \b
    Examples:
      dphrl report runs/demo-math runs/demo-math-grpo
      dphrl report runs/passk-math -o passk-math.html
    """
    with exit_status():
        from dphrl.report import write_report

        write_report(run_dirs, output)
        typer.echo(f"written to {output}")


add_export_command(app)


# Added here, because --help lists the commands in this order.
add_replay_command(app)
add_cluster_commands(app)
add_job_commands(app)


@app.command(short_help="Examine this machine, or a cluster.")
def doctor(
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="A Ray cluster to ask too; else RAY_ADDRESS, if set."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where results will go: every node must see and write it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A hub model that runs will name: may the token here have it?")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=1, help="For the cluster's answers.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it. Exit status 1 if something needed is missing.

    With a cluster: the versions and clocks of its nodes, and whether each of them sees and writes --run-dir.

    \b
    Examples:
      dphrl doctor
      dphrl doctor --address head:6379 --run-dir /shared/runs
      dphrl doctor --model org/name
    """
    from cluster.doctor import examine, render

    checks = examine(address, run_dir, timeout_s, model)
    healthy = all(check.status != "missing" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": healthy, "checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        typer.echo(render(checks))
    raise typer.Exit(0 if healthy else 1)


@app.command(short_help="List the presets, or the algorithms.")
def presets(
    algorithms: Annotated[
        bool, typer.Option("--algorithms", help="The divergences, advantages and policy losses instead.")
    ] = False,
    plugins: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="MODULE", help="With --algorithms: your module's as well.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """List the configurations that come with dphrl, and what each one shows.

    \b
    Examples:
      dphrl presets
      dphrl presets --algorithms
      dphrl presets --algorithms --plugin my_module
    """
    with exit_status() as run:
        if algorithms:
            from dphrl.config.methods import list_methods, method_table

            found = list_methods(plugins or [])
            typer.echo(json.dumps(found, indent=2) if as_json else method_table(found))
            return
        if plugins:
            raise run.refuse("--plugin: lists a module's algorithms; add --algorithms")
        from dphrl.config.loading import list_presets

        texts = {name: text.partition("\n")[0] for name, text in list_presets().items()}
        lines = {
            name: first.removeprefix("#").strip() if first.startswith("#") else "" for name, first in texts.items()
        }
        width = max(map(len, lines), default=0)
        table = "\n".join(f"{name:<{width}}  {line}".rstrip() for name, line in lines.items())
        typer.echo(json.dumps(lines, indent=2) if as_json else table)


add_settings_command(app)


@app.command()
def version() -> None:
    """Print the version."""
    from dphrl import __version__

    typer.echo(__version__)


def main() -> None:
    """The `dphrl` program."""
    prepare_streams()
    status: int | str | None = 0
    try:
        try:
            app(prog_name="dphrl")
        except SystemExit as ending:
            status = ending.code
        sys.stdout.flush()  # what is left in its buffer may be what cannot be written
    except OutputLostError as lost:
        if str(lost):
            say(f"dphrl: failed: {lost}")
        status = status or 1
    if status in STOPPED:
        from dphrl.stopping import end_process

        end_process(int(status))
    sys.exit(status)
