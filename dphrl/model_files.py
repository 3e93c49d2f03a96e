"""The files of a model: where they lie, which tensors they hold, and those that training leaves as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dphrl.durable import SEAL, damage

# What decides how text becomes tokens, the chat template included.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "tekken.json", "*.tiktoken"),
    *("*.model", "chat_template*", "*.jinja", "additional_chat_templates/*"),
)
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
# What a clone of a repository holds in place of a large file, unless Git LFS fetched it.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# As the library itself has it.
_MAX_HEADER_BYTES = 100_000_000
# Neither weights nor the model's own configuration. The code is that of models with trust_remote_code.
_UNTRAINED = (*TOKENIZER_FILES, "generation_config.json", "*.py")


def find_file(model: Path | str, name: str) -> Path | None:
    """A file of a resolved model, which is in the cache when the model is a hub name; None when it has no such file."""
    from transformers.utils import cached_file

    found = cached_file(
        str(model),
        name,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def model_folder(model: Path | str) -> Path:
    """The folder with the files of a resolved model; of a hub name, those that were downloaded. Raises OSError when
    there is none."""
    config = find_file(model, "config.json")
    if config is None:
        raise FileNotFoundError(f"{model} has no config.json")
    return config.parent


def check_files(folder: Path) -> None:
    """Raises ValueError, one line that names the file, for a model folder in which a file that must be a JSON object is
    none, that holds no weights, or in which a file of weights is missing or cut off. Of weights it reads headers only,
    unless the folder has checksums, as models that dphrl exports have: then every file must be as it was written.
    """
    if (folder / SEAL).is_file() and (problem := damage(folder)):
        raise ValueError(f"model.path: {folder} is damaged: {problem}; bring it back, or export it again")
    for name in _JSON_FILES:
        if (folder / name).is_file():
            _read_object(folder / name)
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        _check_length(path)
    if not found and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"model.path: {folder} holds no weights (*.safetensors); name a folder with the whole model")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name in sorted({str(name) for name in dict(_read_object(index).get("weight_map") or {}).values()}):
            if not (folder / name).is_file():
                raise ValueError(f"model.path: {index.name} of {folder} names {name}, which is missing; add that file")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model.path: {path} is no JSON ({error}); replace it by a whole copy") from error
    if not isinstance(found, dict):
        raise ValueError(f"model.path: {path} holds a JSON {type(found).__name__}, not an object; replace it")
    return found


def _check_length(path: Path) -> None:
    size = path.stat().st_size
    try:
        header = _safetensors_header(path)
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
        told = _header_bytes(path) + max(ends, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        what = (
            "a pointer of Git LFS, not the weights; run `git lfs pull`"
            if is_pointer
            else ("no safetensors file, or cut off in its header; replace it by a whole copy")
        )
        raise ValueError(f"model.path: {path} is {what}") from error
    if told != size:
        raise ValueError(
            f"model.path: {path} has {size:,} bytes where its header tells of {told:,}; replace it by a whole copy"
        )


def _header_bytes(path: Path) -> int:
    """Length of a safetensors file's header, with the 8 bytes that tell it."""
    # https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, then the header.
    with path.open("rb") as file:
        told = file.read(8)
    length = int.from_bytes(told, "little")
    if len(told) < 8 or length > _MAX_HEADER_BYTES:
        raise ValueError(f"{path} is no safetensors file")
    return 8 + length


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found = json.loads(file.read(_header_bytes(path))[8:])
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no safetensors file")
    return found


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in a model folder's safetensors files, from their headers; none where there are no such."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the tensors of each number type (F32, BF16, ...) in a model folder's safetensors files."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in _safetensors_header(path).items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - start
    return sizes


def copy_untrained_files(model: Path | str, target: Path) -> None:
    """Copy what training leaves alone from a resolved model to the folder `target`, byte for byte: tokenizer, chat
    template, generation configuration, code. Raises OSError when a file cannot be read or written."""
    folder = model_folder(model)
    for pattern in _UNTRAINED:
        for file in folder.glob(pattern):
            if file.is_file():
                copy = target / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
