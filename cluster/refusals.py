"""What a run refused is not tried again: a note in its folder, for a scheduler that starts what failed once more.

Kubernetes starts a failed job again without asking why it failed, each time on a new cluster. A configuration that is
wrong would be prepared and refused every time. So the refusal is written down, and the next starts end with the same
lines at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dphrl.config.loading import InputError, config_to_yaml
from dphrl.config.schema import Config
from dphrl.config.secrets import names_a_secret
from dphrl.durable import write_whole
from dphrl.owner import OWNER_FILE

NOTE = ".refused.json"
# A retry comes within minutes, because the node of the job before is still there. Somebody who brings what was missing,
# such as data, and starts the job anew takes longer.
MAX_AGE_S = 900.0


@dataclass(frozen=True)
class Refusal:
    """lines: what was said. settings: of what, as a hash. num_retries: how many more starts are to be refused by it.
    at_s: when it was written, in seconds since 1970 (UTC)."""

    lines: Sequence[str]
    settings: str
    num_retries: int
    at_s: float


@contextmanager
def not_tried_again(
    config: Config, num_retries: int, lines_of: Callable[[BaseException], list[str] | None]
) -> Iterator[None]:
    """Around a run that a scheduler starts again num_retries times when it fails.

    lines_of: what is said of an error that the user has to correct; None for any other. Raises InputError with the
    lines of the start before, when that was refused with the same settings. A changed configuration is tried, and so is
    one for which a token was added.
    """
    if num_retries < 1:
        yield
        return
    note, settings = config.folder / NOTE, _hash(config, os.environ)
    if (before := _read(note)) and before.settings == settings and time.time() - before.at_s < MAX_AGE_S:
        _write(note, replace(before, num_retries=before.num_retries - 1, at_s=time.time()))
        raise InputError(
            *before.lines,
            f"{config.folder}: that was refused {max(0, time.time() - before.at_s) / 60:.0f} minutes ago, and the "
            f"configuration is the same; change it, or remove {note}",
        )
    with suppress(OSError):
        note.unlink()
    try:
        yield
    except Exception as error:
        # Where somebody else writes in the folder, waiting is the remedy.
        if (lines := lines_of(error)) and not (config.folder / OWNER_FILE).exists():
            _write(note, Refusal(lines, settings, num_retries, time.time()))
        raise


def _hash(config: Config, environ: Mapping[str, str]) -> str:
    """Of the settings, and of which secrets there are; what they are has no part in it."""
    names = sorted(name for name, value in environ.items() if value and names_a_secret(name))
    return hashlib.sha256("\n".join([config_to_yaml(config), *names]).encode()).hexdigest()


def _read(note: Path) -> Refusal | None:
    try:
        return Refusal(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(note: Path, refusal: Refusal) -> None:
    """The last retry leaves no note: after it, somebody starts the job by hand. A folder that cannot be written is the
    refusal itself, as often as not."""
    with suppress(OSError):
        if refusal.num_retries < 1:
            note.unlink()
        else:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps(asdict(refusal)))
