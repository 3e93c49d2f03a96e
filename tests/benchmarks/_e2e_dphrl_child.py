"""dphrl's side of `e2e_vs_trl`: the system that `dphrl train` starts, which takes one step each time that it is asked.

Run by path in a process of its own, with the checkout first on PYTHONPATH. Two loops share the system: one without and
one with rehearsal rows. Each stands still between its steps, and only one is at work at a time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.launch import open_system, quiet_libraries
from dphrl.config.schema import Config
from dphrl.loop import train
from dphrl.prepare import Prepared, prepare
from dphrl.protocols import Parts, ReferenceStore, System
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.reference.split import Split
from dphrl.tracking.console import Console
from dphrl.tracking.tracker import Tracker
from dphrl.types import Prompt, ReferenceSample, RolloutGroup

LAPS = ("rollout", "reward", "learn", "sync")


class InTurn:
    """A `StepObserver` that tracks a step as a run does, tells its seconds, and waits to be asked for the next."""

    def __init__(self, config: Config, tracker: Tracker) -> None:
        self._config, self._tracker = config, tracker
        self._orders: asyncio.Queue[None] = asyncio.Queue()
        self._answers: asyncio.Queue[dict[str, float]] = asyncio.Queue()

    async def step(self) -> dict[str, float]:
        self._orders.put_nowait(None)
        return await self._answers.get()

    async def begin(self) -> None:
        await self._orders.get()
        self._began = time.perf_counter()

    async def after_step(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup], batch: object
    ) -> None:
        self._tracker.log_samples(step, groups, self._config.tracking.samples_per_step)
        self._tracker.log_step(metrics)
        seconds = time.perf_counter() - self._began
        laps = {f"{name}_s": metrics[f"time/{name}_s"] for name in LAPS}
        num_tokens = metrics["rollout/num_tokens"]
        told = {"flat": metrics["reward/zero_variance_fraction"], "rows": metrics["divergence/num_rows"]}
        self._answers.put_nowait({"seconds": seconds, **laps, "num_tokens": num_tokens, **told})
        await self.begin()


async def make_reference(
    config: Config, explored: Sequence[Prompt], near_perfect: Sequence[Prompt], system: System, parts: Parts
) -> ReferenceStore:
    """A buffer with one answer of the initial policy to each of `near_perfect`, whatever it is worth."""
    samples = []
    async for completions in parts.rollouts.generate(near_perfect, 1, seed=1):
        for completion in completions:
            prompt = next(p for p in near_perfect if p.prompt_id == completion.prompt_id)
            (logprobs,) = await parts.learner.score(
                [((*prompt.token_ids, *completion.token_ids), len(prompt.token_ids))]
            )
            samples.append(ReferenceSample(prompt.prompt_id, prompt.token_ids, completion.token_ids, logprobs))
    split = Split(tuple(p.prompt_id for p in near_perfect), tuple(p.prompt_id for p in explored), ())
    return await system.adopt_reference(ReferenceBuffer(split, {}, samples, {}, config.seed), config.folder)


async def serve(config: Config, prepared: Prepared, system: System) -> None:
    parts = await system.start(lambda line: print(line, file=sys.stderr))
    await parts.rollouts.refit(parts.learner)
    explored = prepared.prompts[: config.rollout.num_prompts]
    store = await make_reference(config, explored, prepared.prompts[config.rollout.num_prompts :], system, parts)
    with Tracker(Path("plain")) as plain_files, Tracker(Path("rehearsing")) as rehearsing_files:
        loops = {"plain": InTurn(config, plain_files), "rehearsing": InTurn(config, rehearsing_files)}

        async def run(name: str, reference: ReferenceStore | None) -> None:
            await loops[name].begin()
            await train(config, explored, parts, reference, loops[name])

        tasks = [asyncio.create_task(run("plain", None)), asyncio.create_task(run("rehearsing", store))]
        print("answer {}", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            step = asyncio.create_task(loops[json.loads(line)["loop"]].step())
            done, _ = await asyncio.wait([step, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop that failed ends this side
            print("answer " + json.dumps(step.result()), flush=True)
        for task in tasks:
            task.cancel()


def main() -> None:
    import actors

    checkout, settings = sys.argv[1], json.loads(sys.argv[2])
    assert str(actors.__file__).startswith(checkout), actors.__file__
    config = Config.model_validate(settings)
    quiet_libraries()
    prepared = prepare(config, Console(sys.stderr))
    with open_system(config, prepared, inline=False) as system:
        asyncio.run(serve(config, prepared, system))


if __name__ == "__main__":
    main()
