"""What went wrong in a sync: which engine, where, at which step, how, after how long, in whose words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from actors.weight_transfer.ledger import EngineRecord

# What Ray's and Python's texts start their telling lines with, and a reader does not need.
_LABELS = ("Worker exit detail: ", "The actor is dead because ")
_ADVICE = " Some common causes include"


@dataclass(frozen=True)
class Place:
    """Where an engine runs. node: its address. process: the number of its actor's process there."""

    node: str
    process: int

    def __str__(self) -> str:
        return f"node {self.node}, process {self.process}"


@dataclass(frozen=True)
class EngineFailure:
    """One engine's failure at one step of a sync, or at its work.

    doing: what it was asked for, as in "take weights". seconds: from the step's beginning, if it had one. place: where
    it ran, if that is known. limit_s, setting: the limit of a step that took too long. words: the engine's own, of one
    that did not.
    """

    index: int
    doing: str
    seconds: float | None
    how: Literal["hung", "died", "raised"]
    words: str = ""
    limit_s: float = 0.0
    setting: str = "sync.timeout_s"
    place: Place | None = None

    @classmethod
    def of(cls, index: int, doing: str, seconds: float | None, error: BaseException, limit_s: float) -> EngineFailure:
        """The failure that `error`, which came out of waiting for the engine, stands for."""
        # An error of the engine's own code may be a TimeoutError too; Ray hands it on as a RayTaskError.
        if isinstance(error, TimeoutError | GetTimeoutError) and not isinstance(error, RayTaskError):
            return cls(index, doing, seconds, "hung", limit_s=limit_s)
        dead = isinstance(error, ActorDiedError | ActorUnavailableError)
        return cls(index, doing, seconds, "died" if dead else "raised", last_words(error))

    def __str__(self) -> str:
        who = f"rollout engine {self.index}" + (f" ({self.place})" if self.place else "")
        if self.how == "hung":
            return f"{who} did not {self.doing} within {self.limit_s:g} s ({self.setting})"
        what = "died when it was to" if self.how == "died" else "failed to"
        after = "" if self.seconds is None else f", after {self.seconds:.1f} s"
        return f"{who} {what} {self.doing}{after}: {self.words}"

    @property
    def reason(self) -> str:
        """Why it failed, without who."""
        return self.words if self.how != "hung" else f"no answer within {self.limit_s:g} s ({self.setting})"

    def facts(self) -> dict[str, Any]:
        """What an event tells of it."""
        where = {"node": self.place.node, "pid": self.place.process} if self.place else {}
        return {"engine": self.index, **where, "doing": self.doing, "how": self.how, "reason": self.reason}


class SyncFailedError(RuntimeError):
    """Engines failed in a sync; those engines have no current weights.

    failures: of the engines that failed, one each. cut: other engines whose session broke off with theirs, so that
    they cannot begin another.
    """

    def __init__(self, failures: Iterable[EngineFailure], cut: Iterable[int] = (), advice: str = "") -> None:
        self.failures = tuple(failures)
        self.cut = frozenset(cut) - {failure.index for failure in self.failures}
        super().__init__("; ".join(map(str, self.failures)) + (f". {advice}" if advice else ""))


@dataclass(frozen=True)
class SendOutcome:
    """How a session that the learner ran itself ended: with a record of each engine, or with failures."""

    records: tuple[EngineRecord, ...] = ()
    failures: tuple[EngineFailure, ...] = ()
    cut: tuple[int, ...] = ()


def last_words(error: BaseException) -> str:
    """The line of an error that says most: the last of what the engine's own code raised, or how its process ended."""
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {_last_line(str(cause))}"
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line.partition(_ADVICE)[0] for line in lines]
    told = [line.removeprefix(label) for label in _LABELS for line in lines if line.startswith(label)]
    return told[-1] if told else _last_line(str(error)) or type(error).__name__


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
