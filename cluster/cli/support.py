"""How every command starts and ends: a loaded configuration, an exit status, a few lines on standard error."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.streams import OutputLostError

if TYPE_CHECKING:
    from dphrl.config.schema import Config

CONFIG_HELP = """CONFIG is a YAML file or the name of a preset (`dphrl presets` lists them). Settings follow as
section.key=value, the value in YAML; quote it where your shell would touch it."""

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a preset's name.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings that override the configuration's.")
]

InlineOption = Annotated[
    bool, typer.Option("--inline", help="Everything in this one process, without Ray or vLLM: slow, for a debugger.")
]
ParallelOption = Annotated[int, typer.Option("--parallel", min=1, help="Runs at a time, on a cluster with room.")]
RetriesOption = Annotated[
    int,
    typer.Option(
        "--retries", min=0, help="With --parallel: start a run that failed again N times, once its cluster answers."
    ),
]
InsistOption = Annotated[
    bool, typer.Option("--insist", help="With --resume: go on although the run was trained with something else.")
]


SAME_COMMAND = "the same command goes on with what is done"


class Command:
    """A running command: it loads the configuration, and remembers the run's folder for the message of a failure.

    goes_on: how the command goes on after it was stopped; "" for one that does not, or that trains in the folder.
    """

    def __init__(self, goes_on: str = "") -> None:
        self.goes_on = goes_on
        self.folder: Path | None = None

    def load(self, source: str, overrides: list[str] | None) -> Config:
        """The checked configuration. Raises InputError for what is wrong in it.

        The user's reward is not loaded: a run does that when it prepares. Its module may be on the cluster alone.
        """
        from dphrl.config.loading import load_config

        _show_warnings()
        config = load_config(source, overrides or [])
        self.folder = config.folder
        return config

    def load_with_reward(self, source: str, overrides: list[str] | None) -> Config:
        """As `load`, for `plan`, which prepares no run. Raises InputError for a reward that cannot be loaded, too."""
        from dphrl.rewards.base import check_reward

        config = self.load(source, overrides)
        check_reward(config.reward)
        return config

    def check_start(self, *, resume: bool, insist: bool, overwrite: bool) -> None:
        """Raises InputError when the ways to treat an earlier run that are asked for do not go together."""
        if resume and overwrite:
            raise self.refuse("--resume and --overwrite: one keeps the run's files, the other deletes them; choose one")
        if insist and not resume:
            raise self.refuse("--insist: is about a run that goes on; add --resume")

    def refuse(self, message: str) -> Exception:
        """The error for bad input; raised, it ends the command with exit status 2."""
        from dphrl.config.loading import InputError

        return InputError(message)


@contextmanager
def exit_status(goes_on: str = "") -> Iterator[Command]:
    """Turns what a command raises into the exit status and a few lines on standard error. goes_on: as `Command` has."""
    run = Command(goes_on)
    try:
        yield run
    except typer.Exit:
        raise  # a status that the command chose itself
    except OutputLostError:
        raise  # the program's end deals with it, whatever was printing
    except KeyboardInterrupt as error:
        say(f"dphrl: {_stopped(error, run)}")
        raise typer.Exit(getattr(error, "status", 130)) from None
    except Exception as error:
        if os.environ.get("DPHRL_DEBUG") == "1":
            traceback.print_exception(error)
        if (lines := lines_of_refusal(error)) is not None:
            for line in lines:
                say(f"dphrl: error: {line}")
            raise typer.Exit(2) from None
        for cause in _causes(error):
            say(f"dphrl: failed: {_of_a_disk(cause, run.folder) or _in_a_line(cause)}")
        say(_where_to_look(error, run.folder))
        raise typer.Exit(1) from None


def lines_of_refusal(error: BaseException) -> list[str] | None:
    """What the user has to correct, for an error that says nothing else; None for the failure of a run."""
    from dphrl.config.loading import InputError
    from dphrl.own_code import ForeignCodeError

    causes = _causes(error)
    if not all(isinstance(cause, InputError | ForeignCodeError) for cause in causes):
        return None
    # All actors of one node say the same, so each line is shown once.
    return list(dict.fromkeys("\n".join(map(str, causes)).splitlines()))


def _stopped(error: KeyboardInterrupt, run: Command) -> str:
    """What stopped the command, and how to go on."""
    reason = f"stopped by {error}" if str(error) else "interrupted"
    if run.goes_on:
        return f"{reason}; {run.goes_on}"
    if run.folder is None or not run.folder.is_dir():
        return reason
    if not (run.folder / "metrics.jsonl").is_file():
        return f"{reason}; {SAME_COMMAND}"
    saved = [int(path.name.removeprefix("step_")) for path in run.folder.glob("checkpoints/step_*[0-9]")]
    place = f"after step {max(saved)}" if saved else "with what is done"
    return f"{reason}; the same command with --resume goes on {place}"


def _causes(error: BaseException) -> list[BaseException]:
    """The real errors: those in an exception group, or the error that a remote call carried here."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for member in error.exceptions for cause in _causes(member)]
    carried = getattr(error, "cause", None)
    if isinstance(carried, BaseException):
        return _causes(carried)
    from dphrl.own_code import foreign_code_told_by

    return [foreign_code_told_by(error) or error]


# What the system says of a disk or a folder, in words of its own; the others are told with their type.
_DISK_WORDS = {
    errno.ENOSPC: "no space left on {}; make room there, or write elsewhere",
    errno.EDQUOT: "the quota is used up on {}; make room there, or write elsewhere",
    errno.EROFS: "{} is on a read-only file system; write elsewhere",
    errno.EACCES: "{}: permission denied; change its rights, or write elsewhere",
    errno.ENAMETOOLONG: "{}: the name is too long; choose a shorter one",
}
# With less than this, a place without a name in the error may be the one that is full.
_FULL_BYTES = 2**24


def _of_a_disk(error: BaseException, folder: Path | None) -> str:
    """A fault of a disk or a folder: which one, and what to do. "" for any other error."""
    words = _DISK_WORDS.get(error.errno or 0) if isinstance(error, OSError) else None
    if words is None:
        return ""
    name = getattr(error, "filename", None)
    # An error of writing, as opposed to opening, does not tell the file.
    return words.format(name or " and ".join(_full_places(folder)) or "a disk or folder of this run")


def _full_places(folder: Path | None) -> list[str]:
    caches = [os.environ.get(name) for name in ("DPHRL_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")]
    places = [str(folder or "."), tempfile.gettempdir(), *filter(None, caches)]
    return [place for place in dict.fromkeys(places) if _free_bytes(place) < _FULL_BYTES]


def _free_bytes(place: str) -> int:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return _FULL_BYTES


def _in_a_line(error: BaseException) -> str:
    """`Type: message`; if the message holds a whole traceback, the last line of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if any(line.startswith("Traceback") for line in lines) or "ray::" in lines[0]:
        return _MODULE.sub("", lines[-1])
    return f"{type(error).__name__}: {lines[0]}"


# What a traceback writes before the name of an error.
_MODULE = re.compile(r"^(\w+\.)+(?=\w+(:|$))")


def _where_to_look(error: BaseException, folder: Path | None) -> str:
    """Write the traceback to run.log if there is a run, and say where to find the traceback."""
    if folder is not None and os.path.isdir(folder):
        try:
            with (folder / "run.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(traceback.format_exception(error))
        except OSError:
            pass
        else:
            return f"dphrl: the traceback is in {folder / 'run.log'}"
    return "dphrl: DPHRL_DEBUG=1 shows the traceback"


def _show_warnings() -> None:
    """Show warnings of our packages on the terminal as they come, not only in run.log."""
    import logging

    from dphrl.tracking.console import WarningHandler
    from dphrl.tracking.log import install_json_log
    from dphrl.tracking.tracker import OWN_PACKAGES

    if install_json_log("driver") is not None:
        return  # warnings are among its lines
    for package in OWN_PACKAGES:
        logger = logging.getLogger(package)
        if not any(isinstance(handler, WarningHandler) for handler in logger.handlers):
            logger.addHandler(WarningHandler())


def say(line: str) -> None:
    """Print a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)
