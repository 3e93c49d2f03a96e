"""Files that are written past the system's cache."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dphrl import direct_file
from dphrl.direct_file import BUFFER_BYTES, DirectFile
from dphrl.learner.state import Piece, write_pieces


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On a file system that has direct writing, if that of the tests does, and on one that may have none."""
    if request.param == "disk":
        yield tmp_path
        return
    place = Path("/dev/shm") / f"dphrl-test-{os.getpid()}-{tmp_path.name}"
    place.mkdir()
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize(
    "sizes", [[], [1], [4096], [BUFFER_BYTES], [BUFFER_BYTES - 1, 2], [3, 2 * BUFFER_BYTES, 4095], [0, 5]], ids=str
)
def test_content_and_digest_are_right(folder: Path, sizes: list[int]) -> None:
    parts = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    with DirectFile(folder / "file") as file:
        for part in parts:
            file.write(memoryview(part))
    assert (folder / "file").read_bytes() == b"".join(parts)
    assert file.sha256 == hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_file_system_that_takes_the_flag_but_not_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, refused = os.write, []

    def picky(file: int, data: bytes) -> int:
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data[:5000])  # and never all at once

    monkeypatch.setattr(direct_file.os, "write", picky)
    monkeypatch.setattr(DirectFile, "_set_direct", lambda self, flag: flag == 0)
    content = os.urandom(BUFFER_BYTES + 10)
    with DirectFile(tmp_path / "file") as file:
        file.write(memoryview(content))
    assert (tmp_path / "file").read_bytes() == content
    assert refused == [BUFFER_BYTES]


def test_an_error_names_the_file_and_is_not_hidden_by_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised, DirectFile(tmp_path / "file") as file:
        file.write(memoryview(bytes(BUFFER_BYTES)))
    assert raised.value.filename == str(tmp_path / "file")
    with pytest.raises(FileExistsError), DirectFile(tmp_path / "file"):
        pass


def test_a_state_is_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "state" / "rank.safetensors"
    master, moment = torch.arange(5.0), torch.full((5,), 0.5)
    pieces = [
        Piece("a.weight", 10, 20, 3, {"master": master, "exp_avg": moment}),
        Piece("empty", 0, 4, 0, {"master": torch.empty(0)}),
    ]
    digest = write_pieces(path, pieces)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"parameters": '{"a.weight": [20, 3], "empty": [4, 0]}'}
        assert sorted(file.keys()) == ["exp_avg/10/a.weight", "master/0/empty", "master/10/a.weight"]
        assert torch.equal(file.get_tensor("master/10/a.weight"), master)
        assert torch.equal(file.get_tensor("exp_avg/10/a.weight"), moment)
        assert file.get_tensor("master/0/empty").shape == (0,)
