"""A policy as a plain Hugging Face directory: the trained weights, and everything else as the model came."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dphrl.config.loading import InputError
from dphrl.learner.lora import has_adapters, save_adapter
from dphrl.model_files import copy_untrained_files
from dphrl.scratch import scratch_folder


def export_model(lm: Any, source: Path | str, target: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `lm` to the folder `target`, with the tokenizer and generation configuration of the model it came from.

    These are copied byte for byte: what transformers loads is not always what it would save. source: that model, as
    resolved. state: the weights by name, full tensors, where `lm` itself does not hold them (ZeRO-3); tied ones once.
    Raises OSError when a file cannot be copied or written.
    """
    from transformers import GenerationConfig

    own = lm.generation_config
    # transformers refuses to save a generation configuration with settings that it would not use, such as a temperature
    # without do_sample. Models ship such files, and the original is copied below.
    lm.generation_config = GenerationConfig()
    try:
        lm.save_pretrained(target, state_dict=None if state is None else dict(state))
    finally:
        lm.generation_config = own
    (target / "generation_config.json").unlink(missing_ok=True)
    copy_untrained_files(source, target)


def check_exportable(lm: Any, source: Path | str) -> None:
    """Export everything but the weights to a folder that is deleted again. Raises InputError when that fails: better
    now than after the training."""
    folder = scratch_folder("export")
    try:
        export_model(lm, source, folder, {})
        if has_adapters(lm):
            save_adapter(lm, source, folder / "adapter", {})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.path: {str(source)!r} could not be saved after training ({reason}); correct its files, and "
            "begin with config.json"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
