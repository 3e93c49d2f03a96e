"""Named events: what a person should know of a run, in its events.jsonl, one JSON object a line.

Any part makes one through its logger, in the process that has the run's tracker, and needs nothing else for it:

    log.warning("engine 2 was started anew", extra={"event": "engine_replaced", "facts": {"engine": 2}})
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"

# The step that the running task works for, from 1; None outside the loop. Each task has its own value, because the
# rollouts of the next step run beside the update of this step.
current_step: ContextVar[int | None] = ContextVar("current_step", default=None)


class EventLog(logging.Handler):
    """Appends every log record that carries an `event` to a file; when the log call returns, the disk has the line.

    A record's `event` is the event's name, its `facts`, a dict, are what a program can read of it, and its `step` is
    that of the running task unless it says another. `counts` is by name, of the events since it was last taken.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        name = getattr(record, "event", None)
        if name is None:
            return
        try:
            self._append(event_of(record, str(name)))
        except Exception:
            self.handleError(record)
        self._counts[str(name)] += 1

    def take_counts(self) -> dict[str, int]:
        """How many events of each name came since the last call."""
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def _append(self, event: Mapping[str, Any]) -> None:
        # The log call must not fail for what the facts hold. ASCII, so that a lone surrogate cannot either.
        line = json.dumps(event, default=str) + "\n"
        with self.path.open("a+b") as file:
            # A kill may have cut off the last line; then the next one must not go on it.
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def event_of(record: logging.LogRecord, name: str) -> dict[str, Any]:
    """The object that stands in the file."""
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "time": time,
        "step": getattr(record, "step", current_step.get()),
        "event": name,
        "message": record.getMessage(),
        "facts": _jsonable(getattr(record, "facts", {})),
    }


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, in order, without lines that are none: a kill may have cut one off."""
    path = folder / EVENTS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [event for event in map(_read_line, lines) if event is not None]


def _read_line(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _jsonable(value: Any) -> Any:
    """JSON has no NaN, and readers other than Python's refuse it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_jsonable(inner) for inner in value]
    return value
