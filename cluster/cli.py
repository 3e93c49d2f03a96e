"""The command line. Nothing heavy is imported before it is known what is asked: `dphrl --help` answers at once.

Exit status: 0 done, 1 the run failed, 2 bad input or configuration, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dphrl.config import Config

CONFIG_HELP = """CONFIG is a YAML file or the name of a preset (`dphrl presets` lists them). Settings follow as
section.key=value, the value in YAML; quote it where your shell would touch it."""

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a preset's name.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings that override CONFIG's.")
]
InlineOption = Annotated[
    bool, typer.Option("--inline", help="Everything in this one process, without Ray or vLLM: slow, for a debugger.")
]

app = typer.Typer(
    help="Reinforcement learning with verifiable rewards that keeps a model's diversity (DPH-RL).",
    epilog="First steps:  dphrl doctor;  dphrl presets;  dphrl train demo-math",
    no_args_is_help=True,
    add_completion=False,
    # Both would turn the [brackets] of a message into markup, and a traceback into a screenful.
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run of this run_name left, and start anew.")
    ] = False,
    inline: InlineOption = False,
) -> None:
    with _exit_status() as run:
        if resume and overwrite:
            raise run.refuse("--resume and --overwrite: one keeps the run's files, the other deletes them; choose one")
        loaded = run.load(config, overrides)
        from cluster.launch import run_training

        run_training(loaded, resume=resume, inline=inline, overwrite=overwrite)


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
    with _exit_status() as run:
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
    with _exit_status() as run:
        # As overrides, so that they are checked like every other setting.
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


@app.command(
    short_help="Show what a run would start.",
    help=f"""Resolve and check a configuration and show what it would start; start nothing.

{CONFIG_HELP}

\b
Examples:
  dphrl plan demo-math
  dphrl plan demo-math rollout.num_engines=2 --yaml > mine.yaml""",
)
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print every setting as YAML instead, defaults included.")
    ] = False,
) -> None:
    with _exit_status() as run:
        loaded = run.load(config, overrides)
        if as_yaml:
            from dphrl.config_loading import config_to_yaml

            typer.echo(config_to_yaml(loaded), nl=False)
            return
        from cluster.launch import describe_plan

        typer.echo(describe_plan(loaded))


@app.command(short_help="Examine this machine.")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it. Exit status 1 if something needed is missing."""
    from cluster.doctor import examine, render

    checks = examine()
    healthy = all(check.status != "missing" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": healthy, "checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        typer.echo(render(checks))
    raise typer.Exit(0 if healthy else 1)


@app.command(short_help="List the presets.")
def presets() -> None:
    """List the configurations that come with dphrl, and what each one shows."""
    from dphrl.config_loading import list_presets

    found = list_presets()
    width = max(map(len, found), default=0)
    for name, text in found.items():
        first = text.partition("\n")[0]
        typer.echo(f"{name:<{width}}  {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())


@app.command()
def version() -> None:
    """Print the version."""
    from dphrl import __version__

    typer.echo(__version__)


class _Run:
    """What a failing command needs to know for its last words."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def load(self, source: str, overrides: list[str] | None) -> Config:
        from dphrl.config_loading import load_config

        _show_warnings()
        config = load_config(source, overrides or [])
        self.folder = Path(config.run_dir).expanduser() / config.run_name
        return config

    def refuse(self, message: str) -> Exception:
        from dphrl.config_loading import InputError

        return InputError(message)


@contextmanager
def _exit_status() -> Iterator[_Run]:
    """Turns what a command raises into the exit status and a few lines on standard error."""
    run = _Run()
    try:
        yield run
    except KeyboardInterrupt:
        resumable = run.folder is not None and any(run.folder.glob("checkpoints/step_*"))
        _say(f"dphrl: interrupted{'; --resume goes on from the last checkpoint' if resumable else ''}")
        raise typer.Exit(130) from None
    except Exception as error:
        from dphrl.config_loading import InputError

        causes = _causes(error)
        if os.environ.get("DPHRL_DEBUG") == "1":
            traceback.print_exception(error)
        if all(isinstance(cause, InputError) for cause in causes):
            for line in "\n".join(map(str, causes)).splitlines():
                _say(f"dphrl: error: {line}")
            raise typer.Exit(2) from None
        for cause in causes:
            _say(f"dphrl: failed: {_in_a_line(cause)}")
        _say(_where_to_look(error, run.folder))
        raise typer.Exit(1) from None


def _causes(error: BaseException) -> list[BaseException]:
    """What really happened: the members of an exception group, the error that a remote call carried here."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for member in error.exceptions for cause in _causes(member)]
    carried = getattr(error, "cause", None)
    return _causes(carried) if isinstance(carried, BaseException) else [error]


def _in_a_line(error: BaseException) -> str:
    """`Type: message`; of a message that holds a whole traceback, its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if any(line.startswith("Traceback") for line in lines) or "ray::" in lines[0]:
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}"


def _where_to_look(error: BaseException, folder: Path | None) -> str:
    """Puts the traceback into run.log where there is a run, and says where it is."""
    if folder is not None and folder.is_dir():
        try:
            with (folder / "run.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(traceback.format_exception(error))
        except OSError:
            pass
        else:
            return f"dphrl: the traceback is in {folder / 'run.log'}"
    return "dphrl: DPHRL_DEBUG=1 shows the traceback"


def _show_warnings() -> None:
    """Our packages' warnings reach the terminal as they come, not only run.log."""
    import logging

    from dphrl.console import WarningHandler
    from dphrl.tracking import OWN_PACKAGES

    for package in OWN_PACKAGES:
        logger = logging.getLogger(package)
        if not any(isinstance(handler, WarningHandler) for handler in logger.handlers):
            logger.addHandler(WarningHandler())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The `dphrl` program."""
    app(prog_name="dphrl")


if __name__ == "__main__":
    main()
