"""How the actors of a run come up: in which order, how long they have, and what a start that fails says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError

from actors import last_words
from actors.device_turns import DeviceTurns
from actors.waiting import Actor, within
from dphrl.config.loading import InputError
from dphrl.own_code import foreign_code_told_by

# A learner worker may die at its start because of a short problem on its node. It holds nothing yet, so starting it
# again costs only seconds, while a failed run would lose its turn in a queue.
MAX_LEARNER_STARTS = 3
SETTING = "learner.timeout_s"


@dataclass(frozen=True)
class Start:
    """Actors whose processes exist, and how to bring them up.

    engines: by number. restart_engine: starts another in the place of one, and returns it once it is up; None where
    there are none. ranks: a list that `renew_ranks` fills anew. turns: of engines and learner on the same GPUs; None
    where they have devices of their own. timeout_s: for each actor.
    """

    engines: Mapping[int, Actor]
    restart_engine: Callable[[int], Awaitable[Actor]] | None
    ranks: Sequence[Actor]
    workers: Sequence[Actor]
    renew_ranks: Callable[[], Awaitable[None]]
    model_dir: str
    timeout_s: float
    turns: DeviceTurns | None
    on_ready: Callable[[str], None]

    async def run(self) -> dict[str, Any]:
        """Wait until all actors are up, and report each; returns what learner rank 0 says about the learner.

        Engines and learner start side by side. On shared GPUs engines come first, because vLLM measures free memory
        while it starts and refuses to go on when that changes. The first failure ends the start: nothing waits for
        actors that are still starting. It is raised in an exception group.
        """
        async with asyncio.TaskGroup() as group:
            engines = [group.create_task(self._engine(i, engine)) for i, engine in self.engines.items()]
            for i, worker in enumerate(self.workers):
                group.create_task(self._up(worker.ready.remote(), f"reward worker {i}"))
            learner = group.create_task(self._learner(engines))
        return learner.result()

    async def _engine(self, index: int, engine: Actor) -> None:
        what = f"rollout engine {index}"
        try:
            can_die = self.turns is None and self.restart_engine is not None
            where = await self._up(engine.ready.remote(), what, _is_gone if can_die else None)
        except RayError as error:
            if self.restart_engine is None or not _is_gone(error):
                raise
            self.on_ready(f"{what} died while it started: starting another")
            again = await self.restart_engine(index)
            where = await self._up(again.ready.remote(), what)
        self.on_ready(f"{what} up: {where}")

    async def _learner(self, engines: Sequence[asyncio.Task[None]]) -> dict[str, Any]:
        if self.turns is not None:
            # If one of them fails, the group cancels this too.
            if engines:
                await asyncio.wait(engines)
            await self.turns.make_room()
        facts = await self._connect(MAX_LEARNER_STARTS)
        size, device, dtype = (facts[key] for key in ("num_parameters", "device", "dtype"))
        self.on_ready(f"learner up: {len(self.ranks)} rank(s), {size / 1e6:.1f} M parameters, {dtype} on {device}")
        return facts

    async def _connect(self, num_starts: int) -> dict[str, Any]:
        leave = _may_pass if num_starts > 1 else None
        try:
            master = await self._up(self.ranks[0].address.remote(), "learner rank 0", leave)
            joining = [
                self._up(rank.connect.remote(master, self.model_dir), f"learner rank {i}", leave)
                for i, rank in enumerate(self.ranks)
            ]
            return dict((await asyncio.gather(*joining))[0])
        except RayError as error:
            if leave is None or not leave(error):
                raise
            self.on_ready("a learner worker died while starting: starting the learner again")
            await self.renew_ranks()
            return await self._connect(num_starts - 1)

    async def _up(self, answer: Awaitable[Any], what: str, leave: Callable[[RayError], bool] | None = None) -> Any:
        """The answer of an actor that is starting. leave: the errors that the caller answers, as Ray raises them."""
        try:
            return await within(answer, self.timeout_s, SETTING, f"{what} to start")
        except RayError as error:
            if _says_enough(error) or (leave is not None and leave(error)):
                raise
            last_words.keep(what, error)
            raise RuntimeError(f"{what} did not start: {_reason(error)}") from error


def _is_gone(error: RayError) -> bool:
    """Whether the actor died, or, as Ray says first when a node dies, cannot be reached. An exception of our own code,
    which would come again at the next start, is none of these."""
    return last_words.is_death(error) and not (isinstance(error, RayActorError) and error.actor_init_failed)


def _may_pass(error: RayError) -> bool:
    """Whether the learner may come up at another start. Of a rank that died, others may tell first, by a connection
    that broke."""
    return _is_gone(error) or (last_words.is_broken_link(error) and "imed out" not in str(error))


def _says_enough(error: RayError) -> bool:
    """Whether the command line shows the error in a line of its own: one of the user's, or one that names the actor."""
    cause = getattr(error, "cause", None)
    return isinstance(cause, InputError) or foreign_code_told_by(error) is not None or "did not start" in str(error)


def _reason(error: RayError) -> str:
    """One line: Ray puts an actor's whole traceback into the error's text, and what was raised at its end."""
    if _is_gone(error):
        return last_words.how_it_ended(error) + last_words.place_in(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
