"""Files that are whole or absent, and folders that know their content."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from dphrl.durable import (
    SEAL,
    damage,
    put_in_place,
    read_seal,
    seal,
    whole_file,
    write_obstacle,
    write_output,
    write_whole,
)


def _sealed(folder: Path) -> Path:
    (folder / "part").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "part" / "config.json").write_text('{"a": 1}')
    seal(folder, {"step": 4})
    return folder


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "old")

    def write_half() -> None:
        with whole_file(tmp_path / "a.json") as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_what_gets_its_name_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("dphrl.durable.os.fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr("dphrl.durable.os.replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write_whole(tmp_path / "a.json", "new")
    assert done == ["fsync", "rename", "fsync"]  # the file; its name; the folder that has the name
    done.clear()
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "file").write_text("x")
    put_in_place(tmp_path / "staging", tmp_path / "folder")
    assert done == ["fsync", "fsync", "rename", "fsync"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("folder", "staging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of-{name}").touch()
    put_in_place(tmp_path / "staging", tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "of-staging"]


def test_an_output_replaces_only_a_regular_file(tmp_path: Path) -> None:
    write_output(tmp_path / "report.html", "page")
    assert (tmp_path / "report.html").read_text() == "page"
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "report.html")
    write_output(link, "other page")
    assert link.is_symlink()
    assert (tmp_path / "report.html").read_text() == "other page"
    before = os.stat("/dev/null")
    write_output(Path("/dev/null"), "page")
    assert os.stat("/dev/null").st_ino == before.st_ino


def test_a_seal_tells_of_its_folder(tmp_path: Path) -> None:
    folder = _sealed(tmp_path / "step_4")
    assert damage(folder) is None
    told = read_seal(folder)
    assert told["step"] == 4
    assert told["files"]["part/config.json"]["bytes"] == 8
    (folder / "note.txt").write_text("a file of the user is no damage")
    assert damage(folder) is None


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    folder = _sealed(tmp_path / "a")
    os.truncate(folder / "weights.bin", 100)
    assert damage(folder) == "weights.bin has 100 bytes, 2048 were written"
    (folder / "weights.bin").unlink()
    assert damage(folder) == "weights.bin is missing"
    folder = _sealed(tmp_path / "b")
    (folder / "part" / "config.json").write_text('{"a": 2}')
    assert damage(folder) == "part/config.json has another content than was written"
    (folder / SEAL).unlink()
    assert damage(folder) == f"{SEAL} is missing"


def test_no_flipped_bit_and_no_cut_is_taken_for_whole(tmp_path: Path) -> None:
    folder = _sealed(tmp_path / "a")
    files = [path for path in folder.rglob("*") if path.is_file()]
    choose = random.Random(0)
    for _ in range(300):
        path = choose.choice(files)
        content = path.read_bytes()
        at = choose.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]
        for broken in (flipped, content[:at]):
            path.write_bytes(broken)
            assert damage(folder) is not None, (path, at)
        path.write_bytes(content)
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file/runs", "/file is no folder"),
        ("file", "/file is no folder"),
        ("x" * 300, "File name too long"),
        ("/".join(["d" * 200] * 30), "File name too long"),
    ],
)
def test_an_obstacle_to_writing_is_told(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    assert write_obstacle(tmp_path / place).endswith(why)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_nothing_prevents_writing_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert write_obstacle(tmp_path / "there") == write_obstacle(tmp_path / "a" / "b") == ""
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]


def test_a_place_that_only_seems_to_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dphrl.durable.os.fsync", full)
    assert write_obstacle(tmp_path / "runs") == "No space left on device"
    assert [*tmp_path.iterdir()] == []
    assert write_obstacle(Path("/proc/no/runs")) != ""


def test_a_file_that_the_disk_does_not_give_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _sealed(tmp_path / "a")

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("dphrl.durable.file_digest", fail)
    assert damage(folder) == "part/config.json cannot be read (Input/output error)"
