"""Checkpoints that are whole or absent: all files are written aside, the manifest last, then one rename follows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint says about itself.

    step: number of steps completed. policy_version: version of the saved weights. layout: `Learner.layout` of the
    learner that saved them. model: hash of the initial weights that the run started from.
    """

    step: int
    policy_version: int
    layout: str
    model: str


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
    """Complete checkpoints by step, lowest first."""
    found = [path for path in folder.glob("step_*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint."""
    return CheckpointManifest(**json.loads((checkpoint / MANIFEST).read_text()))
