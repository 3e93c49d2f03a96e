"""What Ray's errors about actors say, in one line: who, where, how it ended and why likely, and what helps.

Ray's own text is a paragraph of causes that it cannot tell apart; `keep` writes it to the log.
"""

from __future__ import annotations

import logging
import re

from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

log = logging.getLogger(__name__)

MAX_CHARS = 300
# Read in this order in Ray's text, which has all that applies.
_ENDS = (
    ("NODE_OUT_OF_MEMORY|memory monitor|running low on memory", "the memory of its node was full, and Ray killed it; "
     "give the node more, or put fewer processes on it"),
    ("node (has|was|is) (died|dead|terminated|removed)|its node|node failure|[Hh]ealth check",
     "its node is gone: it stopped, was taken away, or lost the network"),
    ("killed by `?ray.kill", "it was ended on purpose"),
    ("placement group", "its place in the cluster was given up"),
    ("INTENDED_(USER|SYSTEM)_EXIT|exit_actor", "its process ended by itself"),
    ("connection error|SYSTEM_ERROR|unexpected", "its process was killed by a signal or crashed: often by SIGKILL of "
     "the kernel's out-of-memory killer, which `dmesg` on that node tells"),
)  # fmt: skip
# A rank that meets these in a collective operation only tells of the end of another, or of the network.
_PEER = re.compile(r"Connection closed by peer|Connection reset|Broken pipe|gloo|NCCL|ProcessGroup|Timed out waiting")
_PEER_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "DistError"}
# After these a process cannot use its GPU any more, and another may.
_DEVICE = re.compile(r"CUDA error|device-side assert|CUDNN_STATUS|CUBLAS_STATUS|uncorrectable|AcceleratorError")


def is_death(error: BaseException) -> bool:
    """Whether the error says that an actor is gone, rather than that its code raised something."""
    return isinstance(error, RayActorError | WorkerCrashedError | NodeDiedError | OutOfMemoryError)


def is_broken_link(error: BaseException) -> bool:
    """Whether an actor's code raised this because a peer of its collective operation is gone."""
    cause = _cause(error)
    return type(cause).__name__ in _PEER_TYPES or (isinstance(cause, RuntimeError) and bool(_PEER.search(str(cause))))


def is_device_failure(error: BaseException) -> bool:
    """Whether an actor's GPU failed under it. One without room is not: it would be so again."""
    text = f"{type(_cause(error)).__name__}: {_cause(error)}"
    return bool(_DEVICE.search(text)) and "out of memory" not in text


def is_lost_object(error: BaseException) -> bool:
    """Whether something was gone from Ray's object store, or cannot be had from there."""
    return isinstance(_cause(error), ObjectLostError | GetTimeoutError)


def is_loss(error: BaseException) -> bool:
    """Whether an actor is gone or does not answer in time, or what it kept is gone. Another may do its work."""
    if isinstance(error, RayTaskError):  # its code goes on, and has its own reasons to wait no longer
        return is_lost_object(error)
    return isinstance(error, TimeoutError) or is_death(error)


def last_words(who: str, error: BaseException) -> str:
    """One line about an actor's error, as in "learner rank 1 (node 10.0.0.7, process 123) died: ..."."""
    if is_death(error):
        failed_start = isinstance(error, RayActorError) and error.actor_init_failed
        end = _last_line(str(error)) if failed_start else how_it_ended(error)
        away = "cannot be reached" if isinstance(error, ActorUnavailableError) else "died"
        return f"{who}{place_in(error)} {'did not start' if failed_start else away}: {end}"
    cause = _cause(error)
    if isinstance(cause, TimeoutError):
        return _last_line(str(cause)) or f"{who} did not answer in time"
    what = "has a failing device" if is_device_failure(error) else "failed"
    return f"{who} {what}: {type(cause).__name__}: {_last_line(str(cause))}"[: MAX_CHARS + len(who)]


def place_in(error: BaseException) -> str:
    """ " (node ..., process ...)" as far as Ray's text names them; "" where it does not."""
    text = str(error)
    found = [
        (label, re.search(rf"^\s*{field}: (\S+)", text, re.M)) for label, field in (("node", "ip"), ("process", "pid"))
    ]
    told = ", ".join(f"{label} {match[1]}" for label, match in found if match)
    return f" ({told})" if told else ""


def how_it_ended(error: BaseException) -> str:
    """Why the process of an actor is gone, as far as Ray knows."""
    if isinstance(error, OutOfMemoryError):
        return _ENDS[0][1]
    if isinstance(error, ActorUnavailableError):
        return "its process restarts, or the network to its node is down"
    text = str(error)
    return next((end for pattern, end in _ENDS if re.search(pattern, text)), _last_line(text))


def keep(who: str, error: BaseException) -> None:
    """Write Ray's own words to the log, in full."""
    log.info("%s, in Ray's words: %s", who, error)


def _cause(error: BaseException) -> BaseException:
    cause = getattr(error, "cause", None)
    return cause if isinstance(error, RayTaskError) and isinstance(cause, BaseException) else error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MAX_CHARS] if lines else ""
