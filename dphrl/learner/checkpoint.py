"""Checkpoints in a run's folder: which are whole, which is the newest, which stay.

`step_N/` holds `manifest.json` and `state/`, whose checksums are in `checksums.json`; with them it is complete. The
exported model, `hf/` and with adapters `adapter/`, comes after and has checksums of its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dphrl.config.loading import InputError
from dphrl.durable import SEAL, damage, put_in_place, seal, write_whole

MANIFEST = "manifest.json"
# Of what `state/` holds. A version that stores it otherwise counts on.
FORMAT = 2
_NAME = re.compile(r"step_[0-9]+")


class CheckpointError(RuntimeError):
    """A checkpoint, or the model in it, could not be written. One line: which, why, what is left, what to do."""


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint says about itself.

    step: number of steps completed. policy_version: version of the saved weights. layout, dtype: `Learner.layout` and
    `Learner.dtype` of the learner that saved them. settings: the configuration that it was trained with, as JSON.
    inputs: hashes of the model, the data and the code that the configuration names. format: see FORMAT.
    """

    step: int
    policy_version: int
    layout: str
    dtype: str = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is in the folder of checkpoints."""
    return folder / f"step_{step}"


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty place aside for the files of a checkpoint. What killed writers left in such places goes."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = folder / f".step_{step}.partial"
    staging.mkdir(parents=True)
    return staging


def complete_checkpoint(staging: Path, manifest: CheckpointManifest, digests: Mapping[str, str]) -> Path:
    """Give `staging`, which has all of the state, its manifest, checksums and name; returns the checkpoint.

    digests: SHA-256 of files that are known already.
    """
    write_whole(staging / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
    seal(staging, known=digests)
    target = checkpoint_path(staging.parent, manifest.step)
    put_in_place(staging, target)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, lowest first, damaged ones too. Folders with other names, such as a copy that somebody kept,
    are left alone."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as it was written; None when there is none at all.

    say: told of each newer one that is passed over, in a line. Raises InputError when none of several is whole.
    """
    passed: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = _problem(checkpoint)
        if problem is None:
            for line in passed:
                say(f"{line}; the checkpoint before it is used: {checkpoint.name}")
            return checkpoint
        passed.append(f"{checkpoint} cannot be used: {problem}")
    if passed:
        raise InputError(f"{passed[0]}; no whole checkpoint is left in {folder}: --overwrite starts anew")
    return None


def _problem(checkpoint: Path) -> str | None:
    """Why nothing can go on from a checkpoint; None when all of it can be read."""
    try:
        if json.loads((checkpoint / MANIFEST).read_bytes()).get("format", 1) < FORMAT:
            return "an earlier version of dphrl wrote it in another format"
    except (OSError, ValueError, AttributeError):
        pass  # the checksums tell what is wrong
    return damage(checkpoint) or (None if (checkpoint / MANIFEST).is_file() else f"{MANIFEST} is missing")


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename damaged checkpoints of later steps than a run goes on from, or they would count as its newest; returns
    where they are now."""
    aside = []
    for later in [path for path in list_checkpoints(folder) if step_of(path) > step]:
        renamed = later.with_name(f"{later.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        aside.append(later.rename(renamed))
    return aside


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a whole checkpoint, without what only another version knows."""
    found = json.loads((checkpoint / MANIFEST).read_text())
    return CheckpointManifest(
        **{each.name: found[each.name] for each in fields(CheckpointManifest) if each.name in found}
    )


def prune_checkpoints(folder: Path, newest: int, keep: int, protected: Collection[int]) -> None:
    """Delete the checkpoints before step `newest` but for the last `keep`, itself counted, and the protected steps.

    Those of later steps are another run's, and neither count nor go.
    """
    for old in [path for path in list_checkpoints(folder) if step_of(path) <= newest][:-keep]:
        if step_of(old) not in protected:
            # Without its checksums it is no checkpoint any more, should the deletion break off.
            (old / SEAL).unlink(missing_ok=True)
            shutil.rmtree(old)
