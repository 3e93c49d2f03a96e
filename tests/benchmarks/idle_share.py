"""How much of their time engines idle, on clusters of 8, 64 and 512 engines that are simulated: the training loop, its
collector and the pool are the real ones, over stand-in engines and a learner that only take time.

Time is simulated: it stands still while any code can run. An engine makes a token of each completion that it decodes in
a unit of time, and as many completions at once as it may; lengths are log-normal. The learner takes a share of the
time in which engines that never idle would make a step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import selectors
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.asks import Answer, Ask
from actors.rollout_pool import RayRolloutPool
from dphrl.config.schema import Config
from dphrl.loop import train
from dphrl.protocols import Parts
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

NUM_SAMPLES = 8
MEAN_TOKENS, MAX_TOKENS, SIGMA = 20.0, 160, 0.8
MAX_IDLE_SHARE = 0.1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks idle_share", description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[8, 64, 512], help="default: 8 64 512")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1], help="rollout.max_staleness (default: 0 1)")
    parser.add_argument("--concurrency", type=int, default=16, help="completions that an engine decodes (default: 16)")
    parser.add_argument("--waves", type=float, default=8, help="how often a step fills all engines (default: 8)")
    parser.add_argument("--learn", type=float, default=0.5, help="the learner's share (default: 0.5)")
    parser.add_argument("--steps", type=int, default=8, help="steps (default: 8)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """idle_share/E/k: of the time of E engines, the share in which one has nothing to decode. empty_places/E/k: of
    their places for completions, over time, the share that is empty."""
    result: dict[str, Any] = {"benchmark": "idle_share", "waves": arguments.waves, "learn": arguments.learn}
    for num_engines in arguments.engines:
        for staleness in arguments.staleness:
            idle, empty = simulate(
                num_engines,
                staleness,
                concurrency=arguments.concurrency,
                waves=arguments.waves,
                learn=arguments.learn,
                num_steps=arguments.steps,
            )
            result |= {f"idle_share/{num_engines}/k={staleness}": idle}
            result |= {f"empty_places/{num_engines}/k={staleness}": empty}
    ahead = [value for name, value in result.items() if name.startswith("idle_share") and not name.endswith("k=0")]
    return {**result, "idle_share_bar": MAX_IDLE_SHARE, "within_bars": max(ahead) <= MAX_IDLE_SHARE if ahead else None}


def simulate(
    num_engines: int, staleness: int, *, concurrency: int = 16, waves: float = 8, learn: float = 0.5, num_steps: int = 8
) -> tuple[float, float]:
    """(idle share, empty places) from the end of the first step to that of the last one that has steps ahead."""
    num_prompts = int(waves * num_engines * concurrency / NUM_SAMPLES)
    config = config_of(num_prompts, staleness, concurrency, num_steps)
    clock = Clock()
    engines = [Engine(clock, concurrency, seed) for seed in range(num_engines)]
    pool = RayRolloutPool(engines, config)
    world = World(clock, engines, learn_s=learn * waves * MEAN_TOKENS)
    pool.refit = world.refit  # type: ignore[method-assign]
    prompts = [Prompt(f"p{i}", "", (1,), "", "d") for i in range(num_prompts * num_steps)]
    with contextlib.closing(clock):
        clock.run_until_complete(train(config, prompts, Parts(world, pool, world), None, world))  # type: ignore[arg-type]
    (began, before), (ended, after) = world.seen[0], world.seen[num_steps - staleness - 1]
    filled, at_work = (after - before) / ((ended - began) * num_engines)
    return 1 - float(at_work), 1 - float(filled) / concurrency


def config_of(num_prompts: int, staleness: int, concurrency: int, num_steps: int) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"train": {"name": "factor", "kind": "tiny"}, "max_prompt_tokens": 1},
            "reward": {"name": "factorization"},
            "rollout": {
                "num_prompts": num_prompts,
                "num_samples": NUM_SAMPLES,
                "max_tokens": MAX_TOKENS,
                "max_concurrent_sequences": concurrency,
                "max_staleness": staleness,
            },
            "algorithm": {"divergence": "none"},
            "learner": {"num_steps": num_steps},
        }
    )


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when nothing else is left to do."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self.now


class _NoWaiting(selectors.SelectSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits, and nobody for a time")
        self._clock.now += timeout
        return super().select(0)


class Engine:
    """Methods as a Ray handle has them."""

    def __init__(self, clock: Clock, concurrency: int, seed: int) -> None:
        self._clock, self._concurrency = clock, concurrency
        self._rng = np.random.default_rng(seed)
        self._waiting: deque[tuple[Ask, int]] = deque()
        self._ends: list[tuple[float, int, Ask, int]] = []  # a heap of completions in the making
        self._num_begun = 0
        self._done: deque[Answer] = deque()
        self._num_dropped = 0
        self._news = asyncio.Event()
        self._filled = self._at_work = self._since = 0.0
        for name in ("submit", "finished", "abort"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    def past(self) -> np.ndarray[Any, Any]:
        """Until now, in units of time: filled places times time, and time with any work."""
        now = self._clock.time()
        self._filled += len(self._ends) * (now - self._since)
        self._at_work += bool(self._ends) * (now - self._since)
        self._since = now
        return np.array([self._filled, self._at_work])

    async def _submit(self, owner: str, asks: Sequence[Ask]) -> None:
        self._waiting += [(ask, i) for ask in asks for i in ask.sample_indices]
        self._fill()

    async def _finished(self, owner: str, num_seen: int) -> list[Answer]:
        while self._num_dropped < num_seen:
            self._done.popleft()
            self._num_dropped += 1
        while not self._done:
            self._news.clear()
            await self._news.wait()
        return list(self._done)

    def _abort(self, owner: str, call: int) -> None:
        raise AssertionError("nothing is given up here")

    def _fill(self) -> None:
        self.past()
        while self._waiting and len(self._ends) < self._concurrency:
            ask, i = self._waiting.popleft()
            mu = np.log(MEAN_TOKENS) - SIGMA**2 / 2
            length = min(MAX_TOKENS, max(1, round(self._rng.lognormal(mu, SIGMA))))
            end = self._clock.time() + length
            heapq.heappush(self._ends, (end, self._num_begun, ask, i))
            self._num_begun += 1
            self._clock.call_at(end, self._end)

    def _end(self) -> None:
        self.past()
        _, _, ask, i = heapq.heappop(self._ends)
        self._done.append((ask.call, Completion(ask.prompt.prompt_id, i, (7,), "", (-1.0,), "stop", 0)))
        self._news.set()
        self._fill()


class World:
    """Learner, graders and observer. seen: after each step, the time, and what all engines have done until then."""

    policy_version = 0

    def __init__(self, clock: Clock, engines: Sequence[Engine], learn_s: float) -> None:
        self._clock, self._engines, self._learn_s = clock, engines, learn_s
        self.seen: list[tuple[float, Any]] = []

    async def update(self, batch: Any) -> dict[str, float]:
        await asyncio.sleep(self._learn_s)
        return {"learner/grad_norm": 1.0}

    async def refit(self, learner: Any) -> dict[str, float]:
        return {"sync/logprob_gap_max": 0.0}

    async def grade(self, items: Any) -> list[RewardResult]:
        return [RewardResult(RewardStatus.CORRECT if c.sample_index % 2 else RewardStatus.WRONG) for _, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def after_step(self, step: int, metrics: Any, groups: Any, batch: Any) -> None:
        self.seen.append((self._clock.time(), sum(engine.past() for engine in self._engines)))
