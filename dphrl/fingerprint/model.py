"""Hashes of a model: a Hugging Face directory by the content of its files, a hub model by its revision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dphrl.fingerprint.files import hash_files, hash_value
from dphrl.model_files import TOKENIZER_FILES

# What each part is read from. Code that comes with a model (trust_remote_code) decides what its weights mean. The end
# tokens of generation_config.json decide where completions end.
MODEL_PARTS: Mapping[str, tuple[str, ...]] = {
    "model weights": ("*.safetensors", "*.bin", "*.index.json", "config.json", "*.py"),
    "tokenizer": TOKENIZER_FILES,
    "generation settings": ("generation_config.json",),
}


def hash_model(model_dir: str) -> dict[str, str]:
    """One hash for each of MODEL_PARTS. model_dir: a directory, or a hub name."""
    folder = Path(model_dir)
    if folder.is_dir():
        return {part: hash_files(folder, patterns) for part, patterns in MODEL_PARTS.items()}
    return dict.fromkeys(MODEL_PARTS, hash_value([model_dir, hub_revision(model_dir)]))


def hub_revision(name: str) -> str | None:
    """The commit of the hub model `name` that this machine's cache holds; None when it holds none.

    transformers looks the model up before this is asked, so the cache holds the commit that it loads. Nothing is asked
    of the network.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    # The cache's layout: snapshots/COMMIT/config.json.
    return Path(found).parent.name if isinstance(found, str) else None
