"""Files that the user asks for: checked before the work, and never a traceback."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dphrl.config.loading import InputError
from dphrl.outputs import check_output, save_output, streamed_output


def test_an_output_is_written_whole(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deep" / "report.html")
    assert not (tmp_path / "new").exists(), "a check writes nothing"
    save_output(tmp_path / "new" / "report.html", "page \ud800")
    assert (tmp_path / "new" / "report.html").read_text() == "page \\ud800"
    save_output(tmp_path / "picture.png", b"\x89PNG")
    assert (tmp_path / "picture.png").read_bytes() == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "picture.png", "report.html"]


@pytest.mark.parametrize("place", ["", "file/out.json", "file/deeper/out.json", "/proc/out.json", "/proc/new/out.json"])
def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written \(|is a folder; name a file in it"):
        check_output(tmp_path / place)


def test_a_device_is_written_to_and_stays_one() -> None:
    before = os.stat("/dev/full")
    check_output(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device"):  # no fault of the name
        save_output(Path("/dev/full"), "page")
    assert os.stat("/dev/full").st_rdev == before.st_rdev


def test_a_streamed_output_grows_and_keeps_what_was_there_until_then(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with streamed_output(path) as write:
        write("1\n")
        assert path.read_text() == "1\n"
        write("2 ä\n")
        assert path.read_text() == "1\n2 ä\n"
    with streamed_output(path) as write:
        assert path.read_text() == "1\n2 ä\n"
    assert path.read_text() == "1\n2 ä\n", "nothing came"
    with streamed_output(path) as write:
        write("")
        assert path.read_text() == ""
    with streamed_output(Path("/dev/null")) as write:
        write("1\n")


def test_a_closed_pipe_is_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(pipe)
    reader = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_RDONLY)))
    reader.start()
    with pytest.raises(InputError, match=r"pipe: cannot be written \(Broken pipe\)"):
        save_output(pipe, "x" * 2**24)
    reader.join()
    assert pipe.is_fifo()
