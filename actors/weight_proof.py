"""The proof that engines hold the learner's weights: both give the same log-probs to what the engines sample."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence

from actors.waiting import Actor
from dphrl.config.runtime import SyncConfig
from dphrl.protocols import WeightPublisher
from dphrl.types import Completion, Prompt

# Largest |engine - learner| log-prob that is allowed after a sync, by the learner's dtype, if the config gives none.
DEFAULT_MAX_LOGPROB_GAP = {"float32": 1e-3, "bfloat16": 0.5}
# Enough to use prefill, cache and decode, but not more, because the whole cluster waits for the probes.
PROBE_TOKENS = 32


def max_logprob_gap(sync: SyncConfig, dtype: str) -> float:
    """The bound on the gap in nats: the config's, or the default for the learner's dtype."""
    return DEFAULT_MAX_LOGPROB_GAP[dtype] if sync.max_logprob_gap is None else sync.max_logprob_gap


class WeightProof:
    """Compares engines and learner on probes. Each proof has a new seed, so that no probe is answered from a cache."""

    def __init__(self, engines: Sequence[Actor], probes: Sequence[Prompt], max_gap: float) -> None:
        """probes: prompts of which every engine samples one completion each. max_gap: in nats."""
        self.engines, self.probes, self.max_gap = engines, probes, max_gap
        self._seeds = itertools.count()

    async def largest_gap(self, learner: WeightPublisher) -> float:
        """The largest |engine - learner| log-prob over all probe tokens of all engines, in nats.

        Raises RuntimeError, which names the engine, when the gap exceeds max_gap or is no number.
        """
        gaps = await self._gaps(learner)
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if not gaps[worst] <= self.max_gap:
            raise RuntimeError(
                f"after the sync to policy version {learner.policy_version}, log-probs of rollout engine {worst} are "
                f"off the learner's by {gaps[worst]:.3g} (sync.max_logprob_gap={self.max_gap:g}): it samples from "
                "another policy than the one trained. Check model.dtype and model.attention, or raise the bound if "
                "the difference is numerical"
            )
        return gaps[worst]

    async def _gaps(self, learner: WeightPublisher) -> list[float]:
        """Each engine's largest gap on probe completions that it samples now; one call of `score` scores them all."""
        seed = next(self._seeds)
        sampled = await asyncio.gather(*[self._sample(engine, seed) for engine in self.engines])
        prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in self.probes}
        flat = [completion for completions in sampled for completion in completions]
        scored = await learner.score(
            [((*prompt_ids[c.prompt_id], *c.token_ids), len(prompt_ids[c.prompt_id])) for c in flat]
        )
        logprobs = iter(scored)
        return [max(_gap(next(logprobs), c.logprobs) for c in completions) for completions in sampled]

    async def _sample(self, engine: Actor, seed: int) -> list[Completion]:
        stream = engine.generate.remote(self.probes, 1, seed, max_tokens=PROBE_TOKENS)
        return [completion async for ref in stream for completion in await ref]


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    # A NaN must not pass the comparison with the bound, nor be lost in max().
    return math.inf if any(math.isnan(gap) for gap in gaps) else max(gaps)
