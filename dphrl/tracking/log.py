"""Log lines as JSON for a log collector: one object per line, with time, level, logger, message, step and actor.

DPHRL_LOG=json writes them to standard error in place of plain warnings. run.log stays text, for people.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import IO

from dphrl.config.loading import InputError
from dphrl.tracking.events import current_step
from dphrl.tracking.tracker import OWN_PACKAGES

ENVIRONMENT = "DPHRL_LOG"


class JsonFormatter(logging.Formatter):
    """Makes one JSON object of a record. actor: the process that logs, such as driver, learner-0 or rollout-1."""

    def __init__(self, actor: str) -> None:
        super().__init__()
        self.actor = actor

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry: dict[str, object] = {
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "step": current_step.get(),
            "actor": self.actor,
        }
        if event := getattr(record, "event", None):
            entry |= {"event": event, "facts": getattr(record, "facts", {})}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # The output is ASCII, so that a lone surrogate in a message cannot make writing the line fail.
        return json.dumps(entry, default=str)


def install_json_log(actor: str, stream: IO[str] | None = None) -> logging.Handler | None:
    """Write this process's log as JSON lines if DPHRL_LOG asks for it; returns the handler, or None if it does not.

    A second call renames the actor. Raises InputError for a value that is neither json nor text.
    """
    wanted = os.environ.get(ENVIRONMENT) or "text"
    if wanted not in ("json", "text"):
        raise InputError(f"{ENVIRONMENT}: {wanted!r} is no log format; use json or text")
    if wanted == "text":
        return None
    root = logging.getLogger()
    handler: logging.Handler | None = next((h for h in root.handlers if isinstance(h.formatter, JsonFormatter)), None)
    if handler is None:
        handler = logging.StreamHandler(stream or sys.stderr)
        root.addHandler(handler)
        for package in OWN_PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)
    handler.setFormatter(JsonFormatter(actor))
    return handler
