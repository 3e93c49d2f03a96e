"""A learner's checkpoint as tests make one: all of it, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any


async def save(learner: Any, folder: Path) -> None:
    """State and exported model of a `protocols.Learner` below `folder`."""
    await learner.copy_state()
    await learner.write_state(folder)
    await learner.write_export(folder)
