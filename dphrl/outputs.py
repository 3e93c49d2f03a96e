"""Files that the user asks for with -o: checked before hours of work, and never a traceback when they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dphrl.config.loading import InputError
from dphrl.durable import write_output


def check_output(path: Path) -> None:
    """Raises InputError when nothing can be written to `path`, as far as that can be told without writing."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file in it")
        # What is no regular file is written to. A regular file is replaced, which its folder must allow.
        is_written_to = path.exists() and not path.is_file()
        place = path if is_written_to else path.resolve().parent
        while not place.exists():
            place = place.parent
    except OSError as error:
        raise _cannot_write(path, error) from None
    if not is_written_to and not place.is_dir():
        raise InputError(f"{path}: cannot be written ({place} is no folder); name another file")
    if not os.access(place, os.W_OK):
        raise InputError(f"{path}: cannot be written ({place} may not be written to); name another file")


def save_output(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, whole or not at all where it is a file. Raises InputError when that fails."""
    with explained(path):
        write_output(path, content)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within it, an OSError means that `path` cannot be written, and becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}); name another file")
