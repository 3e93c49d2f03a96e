"""Folders of models that are not whole: each is told with its file, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dphrl.durable import seal
from dphrl.model_files import check_files

WEIGHTS = "model.safetensors"


def halve(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def add_a_shard_that_is_not_there(folder: Path) -> None:
    index = {"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "half of the weights": (
        halve,
        f"{WEIGHTS} has 7.* bytes where its header tells of 1.*; replace it",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"holds no weights \(\*.safetensors\); name a folder"),
    "empty weights": (put(WEIGHTS, ""), f"{WEIGHTS} is no safetensors file, or cut off in its header"),
    "a header too long": (put(WEIGHTS, b"\xff" * 100), f"{WEIGHTS} is no safetensors file"),
    "a header of nonsense": (put(WEIGHTS, b"\2" + bytes(7) + b"[]"), f"{WEIGHTS} is no safetensors file"),
    "a pointer": (put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\nsize 5\n"), "a pointer of Git LFS"),
    "a shard too few": (add_a_shard_that_is_not_there, "names model-2.safetensors, which is missing; add that file"),
    "no JSON": (put("config.json", "{"), r"config.json is no JSON \(Expecting .*\); replace it"),
    "a deep config": (put("config.json", "[" * 100_000), r"config.json is no JSON \(maximum recursion"),
    "a list": (put("config.json", "[]"), "config.json holds a JSON list, not an object"),
    "a broken tokenizer": (put("tokenizer.json", "{"), "tokenizer.json is no JSON"),
    "a broken generation config": (put("generation_config.json", ""), "generation_config.json is no JSON"),
}


@pytest.mark.parametrize(("damage", "wanted"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_told_by_its_file(
    tiny_dir: str, tmp_path: Path, damage: Callable[[Path], object], wanted: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    check_files(folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"^model.path: .*{wanted}") as caught:
        check_files(folder)
    assert str(folder) in str(caught.value)


def test_a_model_of_torch_s_own_files_passes(tmp_path: Path) -> None:
    put("config.json", "{}")(tmp_path)
    put("pytorch_model.bin", b"x")(tmp_path)
    check_files(tmp_path)


def test_an_exported_model_must_be_as_it_was_written(tiny_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_dir, folder)
    seal(folder)
    check_files(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=f"hf is damaged: {WEIGHTS} has another content than was written; bring it ba"):
        check_files(folder)
