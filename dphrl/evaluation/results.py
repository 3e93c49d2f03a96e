"""The results of evaluations as files: a list of JSON objects, one for each data set."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dphrl.durable import file_damage, whole_sealed_file
from dphrl.tracking.console import Console

log = logging.getLogger(__name__)

Summary = dict[str, Any]


def write_summaries(path: Path, summaries: Sequence[Summary]) -> None:
    """Write the result of an evaluation as JSON, whole or not at all, with its checksum beside it."""
    with whole_sealed_file(path) as aside:
        aside.write_text(as_json(summaries))


def as_json(summaries: Sequence[Summary]) -> str:
    """The file of a result."""
    return json.dumps(list(summaries), indent=2) + "\n"


def read_summaries(path: Path) -> list[Summary] | None:
    """What `write_summaries` wrote; None when the file is missing, or is not as it was written."""
    try:
        return list(json.loads(path.read_text())) if file_damage(path) is None else None
    except (OSError, ValueError, TypeError):
        return None


def say_damaged(path: Path, console: Console) -> None:
    """Say that the result in `path` cannot be used, and what is done about it."""
    console.info(f"{path} is not as it was written; the evaluation is made again")
    log.warning("%s is damaged", path, extra={"event": "evaluation_damaged", "facts": {"file": str(path)}})
