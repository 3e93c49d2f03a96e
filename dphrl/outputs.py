"""Files that the user asks for with -o: checked before hours of work, and never a traceback when they fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dphrl.config.loading import InputError
from dphrl.durable import DISK_FAULTS, write_obstacle, write_output


def check_output(path: Path) -> None:
    """Raises InputError when nothing can be written to `path`, as far as that can be told without writing to it."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file in it")
        # What is no regular file is written to. A regular file is replaced, which its folder must allow.
        is_written_to = path.exists() and not path.is_file()
        place = path.resolve().parent if path.is_symlink() else path.parent
        obstacle = "" if is_written_to else write_obstacle(place)
        if is_written_to and not os.access(path, os.W_OK):
            obstacle = "permission denied"
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from None
    if obstacle:
        raise _cannot_write(path, obstacle)


def save_output(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, whole or not at all where it is a file. Raises InputError when that fails."""
    with explained(path):
        write_output(path, content)


@contextmanager
def streamed_output(path: Path) -> Iterator[Callable[[str], None]]:
    """Yields what writes text to `path` at once, for those who watch it grow. What a file held before stays until the
    first text, which may be empty. Raises InputError when that fails."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    is_old = path.is_file()

    def write(text: str) -> None:
        nonlocal is_old
        with explained(path):
            if is_old:
                file.truncate(0)
                is_old = False
            file.write(text)
            file.flush()

    try:
        yield write
    finally:
        with explained(path):  # some file systems tell only now that the disk is full
            file.close()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within it, an OSError means that `path` cannot be written, and becomes an InputError. That a disk is full is no
    fault of the name, and passes."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise _cannot_write(path, error.strerror or str(error)) from None


def _cannot_write(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: cannot be written ({reason}); name another file")
