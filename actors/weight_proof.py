"""The proof that engines hold the learner's weights, after every sync.

Three checks, from exact to broad. Every parameter of every worker was loaded. What each worker received, and what its
head multiplies by, equals what the learner sent. Both give nearly the same log-probs to what the engines sample: this
sees the whole path, but in bfloat16 not weights that are one update old.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.weight_transfer.ledger import EngineRecord, WeightSummary
from actors.weight_transfer.session import EngineSteps
from dphrl.data.schedule import derive_seed
from dphrl.protocols import WeightPublisher
from dphrl.types import Completion, Prompt

log = logging.getLogger(__name__)

# Enough to use prefill, cache and decode, but not more, because the whole cluster waits for the probes.
PROBE_TOKENS = 32
# Names that an error lists in full.
MAX_NAMES = 6


@dataclass(frozen=True)
class Gap:
    """|engine - learner| log-prob over the tokens of one engine's probes, in nats; inf where any is no number."""

    mean: float
    largest: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Gap:
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        # A NaN must not pass the comparison with the bound, nor be lost in max().
        if any(math.isnan(gap) for gap in gaps):
            return cls(math.inf, math.inf)
        return cls(math.fsum(gaps) / len(gaps), max(gaps))


class WeightProof:
    """Proves each sync. Each set of probes has a new seed, so that no probe is answered from a cache."""

    def __init__(self, steps: EngineSteps, probes: Sequence[Prompt], max_mean_gap: float, *, seed: int = 0) -> None:
        """steps: of the engines of each sync, with the limit for each answer. probes: prompts of which every engine
        samples one completion each. max_mean_gap: in nats. seed: the run's, so that a resumed run has the probes of an
        uninterrupted one."""
        self._steps, self.probes, self.max_mean_gap = steps, probes, max_mean_gap
        self._seed = seed
        self._before: tuple[int, WeightSummary] | None = None  # version and content of the sync before

    async def check(
        self, records: Mapping[int, EngineRecord], sent: WeightSummary, learner: WeightPublisher
    ) -> dict[str, float]:
        """The gaps in log-probs, as metrics, of engines that all hold what the learner sent, and the bytes of that.

        records: of each engine, by number. Raises RuntimeError, which names engines and parameters, when an engine
        lacks a part of the weights, when the learner sent the same as before although an update changed it, or when an
        engine's mean gap is beyond the bound for two sets of probes.
        """
        if found := [*record_problems(records, sent)]:
            raise RuntimeError(f"after the sync to policy version {learner.policy_version}, {'; '.join(found)}")
        self._check_changed(sent, learner)
        gaps = await self._gaps(learner, attempt=0)
        if not _worst(gaps).mean <= self.max_mean_gap:
            log.warning("%s; sampling other probes", self._beyond(gaps, learner))
            gaps = await self._gaps(learner, attempt=1)
        if not _worst(gaps).mean <= self.max_mean_gap:
            raise RuntimeError(
                f"{self._beyond(gaps, learner)}, and so they were for other probes: it samples from another policy "
                "than the one trained. Check model.dtype and model.attention, or raise the bound if the difference is "
                "numerical"
            )
        return {
            "sync/logprob_gap_mean": _worst(gaps).mean,
            "sync/logprob_gap_max": max(gap.largest for gap in gaps),
            "sync/num_bytes": float(sent.num_bytes),
        }

    def _check_changed(self, sent: WeightSummary, learner: WeightPublisher) -> None:
        before, self._before = self._before, (learner.policy_version, sent)
        update = learner.last_update
        if before is None or update is None or before[0] == learner.policy_version or before[1] != sent:
            return
        if update.must_change_weights:
            raise RuntimeError(
                f"the update to policy version {learner.policy_version} changed no weight, although its gradient norm "
                f"was {update.grad_norm:.3g} and its learning rate {update.learning_rate:.3g}: what the learner sent "
                f"equals what it sent for version {before[0]}. Either the rate is too small for what engines hold (a "
                "bfloat16 weight moves by steps of 1/256 of its size; raise learner.lr, or set model.dtype=float32), "
                "or the optimizer did not step"
            )

    def _beyond(self, gaps: Sequence[Gap], learner: WeightPublisher) -> str:
        worst = _worst(gaps)
        return (
            f"after the sync to policy version {learner.policy_version}, log-probs of rollout engine "
            f"{list(self._steps.engines)[gaps.index(worst)]} are off the learner's by {worst.mean:.3g} on average "
            f"(sync.max_mean_logprob_gap={self.max_mean_gap:g}) and by {worst.largest:.3g} at most"
        )

    async def _gaps(self, learner: WeightPublisher, attempt: int) -> list[Gap]:
        """Each engine's gap on probe completions that it samples now; one call of `score` scores them all."""
        seed = derive_seed(self._seed, "probes", learner.policy_version, attempt)
        step = self._steps.step
        sampled: list[list[Completion]] = await self._steps.all(
            [
                step(i, "answer the probes", engine.probe.remote(self.probes, seed, PROBE_TOKENS))
                for i, engine in self._steps.engines.items()
            ]
        )
        prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in self.probes}
        flat = [completion for completions in sampled for completion in completions]
        sequences = [((*prompt_ids[c.prompt_id], *c.token_ids), len(prompt_ids[c.prompt_id])) for c in flat]
        # The learner has a limit of its own, and only it can tell whether it is lost.
        logprobs = iter(await learner.score(sequences))
        return [
            Gap.of([p for _ in completions for p in next(logprobs)], [p for c in completions for p in c.logprobs])
            for completions in sampled
        ]


def record_problems(records: Mapping[int, EngineRecord], sent: WeightSummary) -> Iterator[str]:
    """What is wrong with an engine's weights by its own record: a line each."""
    for index, record in records.items():
        engine = f"rollout engine {index}"
        if record.unloaded:
            yield (
                f"{engine} misses new values of {_names(record.unloaded)}, in whole or in part, and would sample from "
                "a mix of old and new weights: the sync did not bring them, or its model has other names for them"
            )
        if record.stale:
            yield f"{engine} holds the new {_names(record.stale)} but multiplies by an older copy"
        if not record.received:
            yield f"{engine} has no record of what it received"
        for worker, received in enumerate(record.received):
            if received != sent:
                yield (
                    f"worker {worker} of {engine} received {_content(received)}, but the learner sent {_content(sent)}"
                )


def _worst(gaps: Sequence[Gap]) -> Gap:
    return max(gaps, key=lambda gap: gap.mean)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _content(summary: WeightSummary) -> str:
    return f"{summary.num_tensors} tensors of {summary.num_bytes} bytes with checksum {summary.checksum:016x}"
