"""The files of a model: where they lie, which tensors they hold, and those that training leaves as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# What decides how text becomes tokens, the chat template included.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "tekken.json", "*.tiktoken"),
    *("*.model", "chat_template*", "*.jinja", "additional_chat_templates/*"),
)
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
        with path.open("rb") as file:
            # https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, then the header.
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
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
