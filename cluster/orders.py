"""Orders to a run that is under way, through files in its folder: a shared file system is all that both sides need.

`RUN/control/` is there while a training runs that takes orders. The order is one file, the answer another; each is
written whole. The last order counts.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dphrl.config.loading import InputError
from dphrl.durable import write_whole

FOLDER, ORDER, ANSWER = "control", "order.json", "answer.json"
# A run looks for orders so often, and a command for the answer.
POLL_S = 1.0
# A run that has not answered within this time does not live any more, or its folder is not the one it sees.
ANSWER_S = 60.0
State = Literal["working", "done", "refused", "failed"]


@dataclass(frozen=True)
class Order:
    """How many engines and reward workers a run is to have; None leaves their number."""

    id: str
    rollout: int | None = None
    reward: int | None = None


@dataclass(frozen=True)
class Answer:
    """What the run says of the order of this id: one line."""

    id: str
    state: State
    message: str


class Orders:
    """The run's side."""

    def __init__(self, folder: Path) -> None:
        """folder: the run's."""
        self._folder = folder / FOLDER
        self._last = ""

    def open(self) -> None:
        """Take orders from now on. Those of before were to another process."""
        self.close()
        self._folder.mkdir(parents=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def next(self) -> Order | None:
        """An order that was not there before, if any."""
        told = _read(self._folder / ORDER)
        if told is None or told["id"] == self._last:
            return None
        self._last = told["id"]
        return Order(**told)

    def answer(self, order: Order, state: State, message: str) -> None:
        write_whole(self._folder / ANSWER, json.dumps(asdict(Answer(order.id, state, message))) + "\n")


class RunSilentError(RuntimeError):
    """A run did not do what it was told within the time that it had."""


def give_order(
    folder: Path,
    rollout: int | None,
    reward: int | None,
    *,
    wait_s: float,
    on_message: Callable[[str], None],
    answer_s: float = ANSWER_S,
) -> Answer:
    """Tell the run in `folder` how many engines and reward workers it is to have; returns its last answer.

    wait_s: for the end of its work; 0 is content with the run's taking it up. on_message: called with each new line of
    the run. Raises InputError when no run takes orders there or when it refuses, and RunSilentError when the time is up
    or the run fails to do it.
    """
    control = folder / FOLDER
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run's folder, such as runs/NAME")
    if not control.is_dir():
        raise InputError(f"{folder}: no training runs there now that could be scaled (one that is --inline cannot)")
    order = Order(uuid.uuid4().hex, rollout, reward)
    write_whole(control / ORDER, json.dumps(asdict(order)) + "\n")
    given, last = time.monotonic(), Answer(order.id, "working", "")
    while True:
        told = _read(control / ANSWER)
        answer = Answer(**told) if told is not None and told["id"] == order.id else last
        if answer.message != last.message:
            on_message(answer.message)
        last = answer
        if answer.state == "refused":
            raise InputError(answer.message)
        if answer.state == "failed":
            raise RunSilentError(answer.message)
        if answer.state == "done" or (answer.message and wait_s == 0):
            return answer
        waited = time.monotonic() - given
        if not answer.message and (waited > answer_s or not control.is_dir()):
            (control / ORDER).unlink(missing_ok=True)
            raise InputError(f"{folder}: no training runs there now: nobody answered within {waited:.0f} s")
        if answer.message and waited > wait_s:
            raise RunSilentError(f"after {wait_s:g} s (--timeout) the run still says: {answer.message}")
        time.sleep(POLL_S / 2)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
