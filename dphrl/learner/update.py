"""One learner step on one rank: the same code under plain torch and under DeepSpeed.

Only the `TrainEngine` differs: it runs backward and steps the optimizer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dphrl.algo.divergences import get_divergence
from dphrl.algo.losses import DivergenceTerm, hybrid_loss
from dphrl.algo.policy_losses import Metrics, PolicyLoss, PolicyLossSettings, get_policy_loss
from dphrl.algo.ratios import bounded_ratio
from dphrl.config.algorithm import import_plugins
from dphrl.config.schema import Config
from dphrl.learner.attention import use_packing
from dphrl.learner.batching import MicroBatch, collate_bundles
from dphrl.learner.bundles import APART, Bundle, Sharing, plan_micro_batches
from dphrl.types import RowKind, TokenScores, TrainBatch, TrainRow

# Means over the exploration tokens that are computed: of rows that were left out nobody knows these.
OVER_COMPUTED_ROWS = ("policy/entropy", "policy/importance_mean", "policy/importance_affected")


class TrainEngine(Protocol):
    """Forward, backward and step over one replica of the policy."""

    device: torch.device

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) of the trained policy."""
        ...

    def reference_forward(self, batch: MicroBatch) -> Tensor:
        """logprobs_N of the resident reference model; only called when the config asks for one."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of this rank's loss. last: the next call is `step`."""
        ...

    def step(self, learning_rate: float) -> float:
        """Average gradients over ranks, clip, update, clear; returns the gradient norm before clipping.

        A norm that is not finite is that of a step which every rank skips: weights and optimizer stay as they are, and
        the next step is the one that it would have been.
        """
        ...


@dataclass(frozen=True)
class UpdateSettings:
    """What an update needs from the config, resolved once.

    max_tokens: positions in a micro-batch. ranks_per_row: those that share each row, learner.sequence_parallel.
    sharing: how completions share prompts, as far as the configuration decides it;
    `dphrl.learner.prefixes.fit_to_model` knows the model too. around_behavior: the trust region lies around the policy
    that sampled each token, and not around the learner at the start of the step.
    """

    policy: PolicyLossSettings
    policy_loss: PolicyLoss
    term: DivergenceTerm | None
    entropy_bonus: float
    max_tokens: int
    packed: bool
    ranks_per_row: int = 1
    sharing: Sharing = APART
    around_behavior: bool = False

    @classmethod
    def from_config(cls, config: Config) -> UpdateSettings:
        """Raises ValueError when a plugin cannot be imported, or a registry refuses a method or its parameters."""
        algorithm = config.algorithm
        # An actor's process did not validate the config, so it has not imported the user's modules yet.
        import_plugins(algorithm.plugins)
        term = None
        if config.uses_divergence:
            divergence = get_divergence(algorithm.divergence.name, **algorithm.divergence.params)
            term = DivergenceTerm(divergence, algorithm.eta, algorithm.estimator, algorithm.kl_estimator)
        return cls(
            policy=PolicyLossSettings(
                algorithm.clip_low,
                algorithm.clip_high,
                algorithm.dual_clip,
                algorithm.importance_cap,
                algorithm.ratio,
                algorithm.importance,
            ),
            policy_loss=get_policy_loss(algorithm.policy_loss.name, **algorithm.policy_loss.params),
            term=term,
            entropy_bonus=algorithm.entropy_bonus,
            max_tokens=config.learner.micro_batch_tokens,
            packed=use_packing(config.learner.packing, config.model.attention),
            ranks_per_row=config.learner.sequence_parallel,
            sharing=Sharing(config.share_prefix),
            around_behavior=config.proximal_policy == "behavior",
        )


def run_update(
    batch: TrainBatch, engine: TrainEngine, settings: UpdateSettings, *, rank: int = 0, num_ranks: int = 1
) -> dict[str, float]:
    """All optimizer steps of `batch`. Returns this rank's share of the metrics: see `combine_rank_metrics`."""
    planned = [_plan(rows, settings, rank, num_ranks) for rows in batch.minibatches]
    # The first mini-batch is trained with the same weights that define pi_old, so it needs no separate pass.
    old_logprobs: list[Sequence[Tensor | None]] = [[None] * len(groups) for groups in planned]
    if not settings.around_behavior:
        old_logprobs[1:] = [[found[0] for found in _forward_only(one, engine, settings)] for one in planned[1:]]
    totals: dict[str, float] = defaultdict(float)
    own_share = 1 / len(planned) / (num_ranks // settings.ranks_per_row)
    for number, (groups, old) in enumerate(zip(planned, old_logprobs, strict=True)):
        for i, group in enumerate(groups):
            metrics, gap = _train_micro_batch(group, old[i], engine, settings, num_ranks, last=i == len(groups) - 1)
            _accumulate(totals, metrics, 1 / len(planned))
            if number == 0:  # later the weights are others than at the start of the step
                _accumulate(totals, gap)
        norm = engine.step(batch.learning_rate)
        totals["learner/grad_norm"] += norm * own_share
        totals["learner/skipped_steps"] += (not math.isfinite(norm)) * own_share * len(planned)
    # A plain sum counts rows that were left out as zeros.
    if batch.policy_shares and (share := sum(batch.policy_shares) / len(planned)):
        totals.update({name: totals[name] / share for name in OVER_COMPUTED_ROWS if name in totals})
    if rank % settings.ranks_per_row:  # ranks that share rows compute the same: the first of them tells
        return {name: value for name, value in totals.items() if name.endswith("_max")}
    return dict(totals)


def _plan(rows: Sequence[TrainRow], settings: UpdateSettings, rank: int, num_ranks: int) -> list[list[Bundle]]:
    return plan_micro_batches(
        rows,
        rank=rank,
        num_ranks=num_ranks,
        max_tokens=settings.max_tokens,
        packed=settings.packed,
        ranks_per_row=settings.ranks_per_row,
        sharing=settings.sharing,
    )


def _forward_only(
    planned: Sequence[Sequence[Bundle]], engine: TrainEngine, settings: UpdateSettings
) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [engine.forward(_collate(bundles, engine, settings)) for bundles in planned]


def _collate(bundles: Sequence[Bundle], engine: TrainEngine, settings: UpdateSettings) -> MicroBatch:
    return collate_bundles(bundles, packed=settings.packed).to(engine.device)


def _train_micro_batch(
    bundles: Sequence[Bundle],
    old_logprobs_N: Tensor | None,
    engine: TrainEngine,
    settings: UpdateSettings,
    num_ranks: int,
    *,
    last: bool,
) -> tuple[Metrics, Metrics]:
    """Metrics of the loss, and the largest gap in log-probs between learner and engine."""
    batch = _collate(bundles, engine, settings)
    logprobs_N, entropy_N = engine.forward(batch)
    old_N = logprobs_N.detach() if old_logprobs_N is None else old_logprobs_N
    if settings.around_behavior:
        old_N = torch.where(batch.is_policy_N, batch.stored_logprobs_N, old_N)
    loss, metrics = hybrid_loss(
        logprobs_N,
        old_N,
        batch.stored_logprobs_N,
        batch.advantages_N,
        batch.weights_N,
        batch.is_policy_N,
        batch.row_index_N,
        policy=settings.policy,
        policy_loss=settings.policy_loss,
        term=settings.term,
        reference_logprobs_N=_reference_logprobs(batch, engine, settings),
        chosen_N=batch.chosen_N,
    )
    entropy = (batch.weights_N * entropy_N * batch.is_policy_N).sum()
    metrics["policy/entropy"] = entropy.detach()
    if settings.entropy_bonus:
        loss = loss - settings.entropy_bonus * entropy
    # A loss that is not finite can have finite gradients. It spoils them here, so that their norm, which all ranks have
    # in common, tells every engine to skip the step.
    spoiled = torch.where(loss.detach().isfinite(), 1.0, math.nan)
    # Engines average gradients over ranks, but the loss is already this rank's share of a global sum.
    engine.backward(loss * num_ranks * spoiled, last=last)
    log_rho_N = logprobs_N.detach() - batch.stored_logprobs_N
    if settings.around_behavior and metrics.pop("policy/importance_affected", None) is not None:
        # Nothing is weighted, but what the weight would be still tells how far the engine's policy is from the learner.
        rho_N = bounded_ratio(log_rho_N).clamp(max=settings.policy.importance_cap)
        metrics["policy/importance_mean"] = (batch.weights_N * rho_N)[batch.is_policy_N].sum()
    gap_N = log_rho_N[batch.is_policy_N & (batch.weights_N > 0)].abs()
    gap = {"rollout/logprob_gap_max": gap_N.max()} if len(gap_N) else {}
    return metrics, gap


def _reference_logprobs(batch: MicroBatch, engine: TrainEngine, settings: UpdateSettings) -> Tensor | None:
    if settings.term is None or not settings.term.needs_reference_model:
        return None
    with torch.no_grad():
        return engine.reference_forward(batch)


def _accumulate(totals: dict[str, float], metrics: Mapping[str, float | Tensor], share: float = 1.0) -> None:
    """Add `metrics` to `totals`: of names that end in _max the largest is kept, the others add up."""
    for name, value in metrics.items():
        if name.endswith("_max"):
            # max would drop a NaN that comes second.
            found = totals.get(name, -math.inf), float(value)
            totals[name] = math.nan if any(map(math.isnan, found)) else max(found)
        else:
            totals[name] += float(value) * share


def combine_rank_metrics(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The metrics of the step, from the shares of all ranks."""
    totals: dict[str, float] = defaultdict(float)
    for part in parts:
        _accumulate(totals, part)
    return dict(totals)


def score_sequences(
    sequences: Sequence[tuple[Sequence[int], int]],
    engine: TrainEngine,
    settings: UpdateSettings,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[int, tuple[float, ...]]:
    """Log-probs of the completion tokens of each (token_ids, num_prompt_tokens) that this rank scored, by index: see
    `measure_sequences`."""
    measured = measure_sequences(sequences, engine, settings, rank=rank, num_ranks=num_ranks)
    return {i: logprobs for i, (logprobs, _) in measured.items()}


def measure_sequences(
    sequences: Sequence[tuple[Sequence[int], int]],
    engine: TrainEngine,
    settings: UpdateSettings,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[int, TokenScores]:
    """Log-probs and entropies of the completion tokens of each (token_ids, num_prompt_tokens) that this rank measured,
    by index.

    It uses the same forward pass, batching and kernels as training, so that a reference log-prob equals that of the
    first training step up to rounding. `sequences` must not be empty.
    """
    rows = [
        TrainRow(RowKind.REFERENCE, tuple(ids), num_prompt, (0.0,) * (len(ids) - num_prompt), 1.0)
        for ids, num_prompt in sequences
    ]
    # Rows are found by identity. A filler row is a copy, so it is not in `place`, and its score is dropped.
    place = {id(row): i for i, row in enumerate(rows)}
    plan = _plan(rows, settings, rank, num_ranks)
    measured: dict[int, TokenScores] = {}
    for group, values in zip(plan, _forward_only(plan, engine, settings), strict=True):
        own = [row for bundle in group for row in bundle.rows]
        lengths = [row.num_completion_tokens for row in own]
        logprobs, entropies = ([tuple(part.tolist()) for part in v.float().cpu().split(lengths)] for v in values)
        for row, of_row in zip(own, zip(logprobs, entropies, strict=True), strict=True):
            if id(row) in place:
                measured[place[id(row)]] = of_row
    return measured
