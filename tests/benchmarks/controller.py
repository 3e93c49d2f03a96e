"""What the driver costs: the loop with 64 stand-in engines that answer at once, and 10,000 completions a step."""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.asks import Answer, Ask
from actors.rollout_pool import RayRolloutPool
from dphrl.config.schema import Config
from dphrl.loop import train
from dphrl.protocols import Parts
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

NUM_SAMPLES = 16
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 200


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks controller", description=__doc__)
    parser.add_argument("--engines", type=int, default=64, help="stand-in engines (default: 64)")
    parser.add_argument("--completions", type=int, default=10_000, help="of a step (default: 10,000)")
    parser.add_argument("--steps", type=int, default=20, help="steps (default: 20)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """us_per_completion: CPU time of this process over all completions, but for the first step's, with what the
    stand-ins themselves take. memory_growth: the process's resident memory after the last step over that after the
    third."""
    num_prompts = arguments.completions // NUM_SAMPLES
    config = config_of(num_prompts, arguments.steps)
    stand_in = StandIn()
    pool = RayRolloutPool([Engine() for _ in range(arguments.engines)], config)
    parts = Parts(stand_in, pool, stand_in)  # type: ignore[arg-type]
    pool.refit = stand_in.refit  # type: ignore[method-assign]
    prompts = [Prompt(f"p{i}", "text", (1,) * PROMPT_TOKENS, "", "d") for i in range(4 * num_prompts)]
    asyncio.run(train(config, prompts, parts, None, stand_in))
    counted = stand_in.seen[1:]
    cpu_s = counted[-1]["cpu_s"] - stand_in.seen[0]["cpu_s"]
    wall_s = counted[-1]["wall_s"] - stand_in.seen[0]["wall_s"]
    num_completions = len(counted) * num_prompts * NUM_SAMPLES
    return {
        "benchmark": "controller",
        "num_engines": arguments.engines,
        "completions_per_step": num_prompts * NUM_SAMPLES,
        "num_steps": arguments.steps,
        "us_per_completion": cpu_s / num_completions * 1e6,
        "wall_us_per_completion": wall_s / num_completions * 1e6,
        "resident_mib": counted[-1]["resident_mib"],
        "memory_growth": counted[-1]["resident_mib"] / stand_in.seen[min(2, len(stand_in.seen) - 1)]["resident_mib"],
    }


def config_of(num_prompts: int, num_steps: int) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "tiny"},
            "data": {"train": {"name": "factor", "kind": "tiny"}, "max_prompt_tokens": PROMPT_TOKENS},
            "reward": {"name": "factorization"},
            "rollout": {"num_prompts": num_prompts, "num_samples": NUM_SAMPLES, "max_tokens": COMPLETION_TOKENS},
            "algorithm": {"divergence": "none"},
            "learner": {"num_steps": num_steps},
        }
    )


class Engine:
    """Finishes what it is asked in the next turn of the event loop, a few at a time, as a step of decoding does."""

    PER_STEP = 8

    def __init__(self) -> None:
        self._lengths = itertools.cycle(np.random.default_rng(0).integers(1, COMPLETION_TOKENS, 997).tolist())
        self._waiting: list[tuple[Ask, int]] = []
        self._done: list[Answer] = []
        self._num_dropped = 0
        for name in ("submit", "finished", "abort"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _submit(self, owner: str, asks: Sequence[Ask]) -> None:
        self._waiting += [(ask, i) for ask in asks for i in ask.sample_indices]

    async def _finished(self, owner: str, num_seen: int) -> list[Answer]:
        del self._done[: num_seen - self._num_dropped]
        self._num_dropped = num_seen
        while not self._waiting:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        now, self._waiting = self._waiting[: self.PER_STEP], self._waiting[self.PER_STEP :]
        self._done += [(ask.call, self._complete(ask, i)) for ask, i in now]
        return list(self._done)

    def _complete(self, ask: Ask, sample_index: int) -> Completion:
        size = next(self._lengths)
        return Completion(ask.prompt.prompt_id, sample_index, (7,) * size, "text", (-1.0,) * size, "stop", 0)

    def _abort(self, owner: str, call: int) -> None:
        raise AssertionError("nothing is given up here")


class StandIn:
    """Learner, graders and observer that do nothing but count."""

    policy_version = 0

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    async def update(self, batch: Any) -> dict[str, float]:
        return {"learner/grad_norm": 1.0}

    async def refit(self, learner: Any) -> dict[str, float]:
        return {"sync/logprob_gap_max": 0.0}

    async def grade(self, items: Any) -> list[RewardResult]:
        await asyncio.sleep(0)
        return [RewardResult(RewardStatus.CORRECT if c.sample_index % 2 else RewardStatus.WRONG) for _, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def after_step(self, step: int, metrics: Any, groups: Any, batch: Any) -> None:
        gc.collect()
        used = resource.getrusage(resource.RUSAGE_SELF)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.seen.append(
            {
                "cpu_s": used.ru_utime + used.ru_stime,
                "wall_s": time.perf_counter(),
                "resident_mib": pages * resource.getpagesize() / 2**20,
            }
        )
