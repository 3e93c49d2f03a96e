"""The program's standard streams, made to fail in the right way: lost output ends the command, a lost message does not.

A stream that the shell has closed (`>&-`) is opened again here. Otherwise the next file that somebody opens would get
its number, and what is printed would go into that file.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO, cast


class OutputLostError(Exception):
    """Standard output cannot be written. The message says why; it is empty where the reader has gone by itself."""


class _Output(io.TextIOWrapper):
    """Standard output. Raises OutputLostError where others raise OSError, so that it is told from other files."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _lost(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _lost(error) from error


class _Messages(io.TextIOWrapper):
    """Standard error. What cannot be written is lost, because a message must not decide how the command ends."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _lost(error: OSError) -> OutputLostError:
    # Nothing can be written any more: not what waits in buffers either, which the interpreter tries at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    why = error.strerror or str(error)
    return OutputLostError("" if isinstance(error, BrokenPipeError) else f"standard output cannot be written: {why}")


def prepare_streams() -> None:
    """Open what is closed, and replace sys.stdout and sys.stderr. To be called once, first of all."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest free number, which is this one; output then fails as it should
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = cast(TextIO, _renewed(_Output, sys.stdout, 1))
    sys.stderr = cast(TextIO, _renewed(_Messages, sys.stderr, 2))


def _renewed(kind: type[io.TextIOWrapper], stream: TextIO | None, number: int) -> io.TextIOWrapper:
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", None)
    raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    # As Python has them: by the line on a terminal, and messages always.
    by_line = number == 2 or os.isatty(number)
    return kind(raw, encoding=encoding, errors=errors, line_buffering=by_line, write_through=number == 2)
