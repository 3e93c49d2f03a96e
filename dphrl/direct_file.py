"""A large file, written past the system's cache: beside a training step, copies into the cache cost more than the disk.

Nobody reads a checkpoint soon, and what is read must be what the disk holds.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

BUFFER_BYTES = 2**23


class DirectFile:
    """A new file that is written from its begin to its end, and its SHA-256. Use it as a context manager.

    Where the file system has no direct writing (`O_DIRECT`), it is written as any other. Leaving it waits until the
    disk has the content. Raises OSError, as files do.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._path, self._file = path, os.open(path, flags, 0o666)
        # It begins at a page, as direct writes must.
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        self._used = 0
        self._sha256 = hashlib.sha256()
        self._set_direct(os.O_DIRECT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._set_direct(0)  # the rest is no whole number of blocks
                self._flush()
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            part = data[: BUFFER_BYTES - self._used]
            self._buffer[self._used : self._used + len(part)] = part
            self._used += len(part)
            if self._used == BUFFER_BYTES:
                self._flush()
            data = data[len(part) :]

    @property
    def sha256(self) -> str:
        """Of the whole file, once it is left; hexadecimal digits."""
        return self._sha256.hexdigest()

    def _flush(self) -> None:
        with memoryview(self._buffer) as whole, whole[: self._used] as filled:
            self._sha256.update(filled)
            num_written = 0
            while num_written < self._used:
                num_written += self._write_some(filled[num_written:])
        self._used = 0

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._file, data)
        except OSError as error:
            # The file system takes the flag and not the write, or a write broke off within a block.
            if error.errno != errno.EINVAL or not self._set_direct(0):
                error.filename = str(self._path)  # a write knows no name
                raise
            return self._write_some(data)

    def _set_direct(self, flag: int) -> bool:
        """Returns whether that changed anything."""
        before = fcntl.fcntl(self._file, fcntl.F_GETFL)
        wanted = before & ~os.O_DIRECT | flag
        if wanted != before:
            with suppress(OSError):  # without it the file is as good
                fcntl.fcntl(self._file, fcntl.F_SETFL, wanted)
        return fcntl.fcntl(self._file, fcntl.F_GETFL) != before
