"""The result of a check, and small helpers that most checks need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """status: ok; warning: a run works, but slower or smaller; missing: runs fail. remedy: empty when ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def read_text(path: Path) -> str:
    """The file's text; empty when it cannot be read, which for the system's files means the same."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def requirements(name: str) -> list[str]:
    """What an installed package says it requires, as its metadata words it; empty when it is not installed."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def numbers(version: str) -> tuple[int, ...]:
    """`580.95.05` as numbers that can be compared; it stops at the first part that is no number."""
    parts: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are, for one line of a table: a cluster may have hundreds of nodes."""
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
