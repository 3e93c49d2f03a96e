"""Keeps the embedded models in a cache: each is a plain Hugging Face directory that is made once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dphrl.tiny.recipe import FACTOR_RECIPE, WarmStartRecipe
from dphrl.tiny.shipped import load_shipped
from dphrl.tiny.warm_start import Progress, warm_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "recipe.json",
)


def ensure_tiny_model(
    cache_dir: Path | None = None, progress: Progress | None = None, *, recipe: WarmStartRecipe | None = None
) -> Path:
    """The directory of the warm-started model, made now if it is not cached yet.

    The two recipes of this package come with their weights; any other is trained, in about a minute.

    cache_dir: where to keep it; else $DPHRL_CACHE, else ~/.cache/dphrl. The directory in it is
    ``tiny-<task>-<fingerprint>``.
    progress: called as (steps done, steps in all) after each step of training; not called when nothing is trained.
    Returns a plain Hugging Face directory (config, safetensors, tokenizer with chat template, generation
    config). Several processes may call this at once: each makes a directory, the first to finish publishes it, and
    nobody ever sees a half-written one. Raises OSError when the cache cannot be written.
    """
    recipe = recipe or FACTOR_RECIPE
    root = cache_dir or Path(os.environ.get("DPHRL_CACHE") or Path.home() / ".cache" / "dphrl")
    target = root.expanduser() / f"tiny-{recipe.task}-{recipe.fingerprint()}"
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # It lies beside the target, because os.replace is atomic only within one file system. It is made before the
    # training, so that a cache that cannot be written fails now and not a minute later.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model, tokenizer = load_shipped(recipe) or warm_start(recipe, progress)
        _write(scratch, model, tokenizer, recipe)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: WarmStartRecipe
) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    # mkdtemp made it private to this user; a cache may be shared.
    directory.chmod(0o755)


def _publish(scratch: Path, target: Path) -> None:
    """Move `scratch` to `target` in one step; a complete directory that is already there wins."""
    try:
        os.replace(scratch, target)
        return
    except OSError:
        if _is_complete(target):
            return
        if not target.exists():
            raise
    # An older entry is there, but something deleted part of it. The name is ours, so it may be replaced.
    shutil.rmtree(target)
    os.replace(scratch, target)


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in _REQUIRED_FILES)
