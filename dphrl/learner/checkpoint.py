"""Checkpoints that are whole or absent: all files are written aside, the manifest last, then one rename follows."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dphrl.config.loading import InputError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_[0-9]+")


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint says about itself.

    step: number of steps completed. policy_version: version of the saved weights. layout: `Learner.layout` of the
    learner that saved them. settings: the configuration that it was trained with, as JSON. inputs: hashes of the model,
    the data and the code that the configuration names. Both are empty in checkpoints of older versions.
    """

    step: int
    policy_version: int
    layout: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


async def save_checkpoint(
    folder: Path, manifest: CheckpointManifest, write: Callable[[Path], Awaitable[None]], *, keep: int
) -> Path:
    """Write `folder/step_N` through `write(staging)` and return it; then delete all but the newest `keep` of them."""
    target = folder / f"step_{manifest.step}"
    staging = folder / f".step_{manifest.step}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    await write(staging)
    (staging / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    # Only an older run can have left something here; os.replace needs an empty place.
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints by step, lowest first. Folders with other names, such as a copy that somebody kept, are
    left alone."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint, without what only another version knows. Raises InputError when it is
    damaged."""
    with refusing_damage(checkpoint, ValueError, TypeError, AttributeError):
        found = json.loads((checkpoint / MANIFEST).read_text())
        return CheckpointManifest(
            **{each.name: found[each.name] for each in fields(CheckpointManifest) if each.name in found}
        )


@contextmanager
def refusing_damage(checkpoint: Path, *errors: type[Exception]) -> Iterator[None]:
    """Within it, these errors mean that a file of the checkpoint is not what was written. Raises InputError."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{checkpoint}: the checkpoint is damaged ({reason}); a copy that broke off or a full disk does this; "
            "delete the folder, and --resume goes on from the checkpoint before it, if there is one"
        ) from error
