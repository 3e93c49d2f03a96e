"""What every actor of a run tells about itself while it is at work: where it runs, its stacks, when it last moved."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError

from actors.waiting import Actor, limited
from dphrl.background import one_of_many

log = logging.getLogger(__name__)

T = TypeVar("T")
# For `ray.remote(concurrency_groups=...)` of a class that is `Watched`. All else of an actor stays in one thread.
WATCH = {"watch": 1}
# How long an actor that hangs has to say where.
STACK_TIMEOUT_S = 5.0


class Watched:
    """Answers beside the actor's work, in a thread of its own, also while the actor is stuck in a call.

    It costs a thread that sleeps. The thread needs the interpreter's lock, so an actor that never gives that back does
    not answer.
    """

    _moved_at = time.monotonic()

    def moved(self) -> None:
        """This actor began something, or got on with it."""
        self._moved_at = time.monotonic()

    @ray.method(concurrency_group="watch")
    def idle_s(self) -> float:
        """Seconds since this actor last moved."""
        return time.monotonic() - self._moved_at

    @ray.method(concurrency_group="watch")
    def stack(self) -> tuple[str, str]:
        """Where this actor runs, and where in the code each of its threads is."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        return place(), "\n".join(stacks)


def place() -> str:
    """Where this process runs, as messages name it."""
    return f"node {ray.util.get_node_ip_address()}, process {os.getpid()}"


class StuckError(TimeoutError):
    """An actor did not answer in time. One line: who, where, what it was asked, since when, the setting."""


async def answer_of(
    actor: Actor, who: str, doing: str, call: Awaitable[T], limit_s: float, setting: str, *, moves: bool = False
) -> T:
    """What `call` of this actor gives. doing: what it is asked for, as in "update". setting: that of the limit.

    moves: whether the limit counts from the actor's last move, for work of any length. Raises StuckError after the
    limit; the actor's stacks are then in the log.
    """
    asked_at = datetime.now(UTC)
    waiting = one_of_many(asyncio.ensure_future(call))
    left_s = limit_s
    try:
        while not (await asyncio.wait([waiting], timeout=left_s))[0]:
            idle_s = await _idle_s(actor) if moves else limit_s
            if idle_s >= limit_s:
                raise StuckError(
                    f"{who}{await log_stack(actor, who)} did not {doing} within {limit_s:g} s ({setting}"
                    f"{', counted from its last progress' if moves else ''}); asked at {asked_at:%H:%M:%S} UTC"
                )
            left_s = limit_s - idle_s
        return waiting.result()
    finally:
        waiting.cancel()


async def log_stack(actor: Actor, who: str) -> str:
    """Write where `actor` hangs to the log, and return its place as an insertion, " (node ..., process ...)", or ""."""
    try:
        where, stacks = await limited(actor.stack.remote(), STACK_TIMEOUT_S)
    except Exception as error:
        log.warning(
            "%s hangs, and does not tell where within %g s (%s): its node is gone, or its code keeps Python's lock; "
            "`py-spy dump --native` on its node looks into that",
            who,
            STACK_TIMEOUT_S,
            type(error).__name__,
        )
        return ""
    log.warning("%s (%s) hangs; its stacks are in run.log", who, where)
    log.info("stacks of %s (%s):\n%s", who, where, stacks)
    return f" ({where})"


async def settled(actor: Actor, limit_s: float = 60.0) -> None:
    """Returns when Ray knows whether the actor lives, or after the limit.

    Ray hears late of a node that is gone, and says until then that the actor cannot be reached.
    """
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            await limited(actor.idle_s.remote(), STACK_TIMEOUT_S)
        except ActorUnavailableError:
            await asyncio.sleep(0.5)
        except (RayError, TimeoutError):
            return
        else:
            return


async def _idle_s(actor: Actor) -> float:
    try:
        return float(await limited(actor.idle_s.remote(), STACK_TIMEOUT_S))
    except TimeoutError:
        return float("inf")
