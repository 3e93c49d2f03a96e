"""What a run needs of the disk: checkpoints, exported models, the reference buffer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.planning.memory import BYTES_PER_PARAMETER, GIB, STATE_BYTES
from cluster.planning.shapes import ModelShape
from dphrl.config.schema import Config


@dataclass(frozen=True)
class DiskNeed:
    """Bytes in a run's folder. checkpoint: the state of one checkpoint, from which a run resumes. export: the model
    directory in it. number: how many there are at once. buffer: the most that the reference buffer takes."""

    checkpoint: float
    export: float
    number: int
    buffer: float

    @property
    def checkpoints(self) -> str:
        """How many there are, in words."""
        return f"{self.number} checkpoint{'s' if self.number > 1 else ''}"

    @property
    def total(self) -> float:
        """All at their largest, in bytes."""
        return self.number * (self.checkpoint + self.export) + self.buffer


def disk_need(config: Config, shape: ModelShape, dtype: str) -> DiskNeed:
    """Masters and moments of what is trained; a new checkpoint is complete before the oldest goes."""
    settings, steps = config.checkpoint, config.learner.num_steps
    # Nobody knows how long a step takes, so by the clock there may be one after each.
    every = 1 if settings.every_minutes else settings.every_steps
    written = -(-steps // every) if every else 1
    best = settings.keep_best if config.evaluation.num_samples and config.evaluation.every_steps else 0
    return DiskNeed(
        checkpoint=shape.num_trained(config.model.lora) * STATE_BYTES,
        export=shape.num_parameters * BYTES_PER_PARAMETER[dtype],
        number=min(written, settings.keep + best + 1),
        buffer=buffer_bytes(config),
    )


def buffer_bytes(config: Config) -> float:
    """The most that the reference buffer takes, on disk or in memory."""
    return float(config.reference.max_bytes) if config.uses_reference_stage else 0.0


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is or would be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def disk_warning(config: Config, shape: ModelShape | None, dtype: str) -> str | None:
    """A line for a run whose checkpoints would fill the disk; None if there is room."""
    if shape is None:
        return None
    need, free = disk_need(config, shape, dtype), free_disk(config.folder)
    if (checkpoints := need.total - need.buffer) <= free:
        return None
    return (
        f"disk: {need.checkpoints} of {(need.checkpoint + need.export) / GIB:.1f} GiB = {checkpoints / GIB:.1f} "
        f"GiB, and {config.folder} has {free / GIB:.1f} GiB free; lower checkpoint.keep, or choose another run_dir"
    )
