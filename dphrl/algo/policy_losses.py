"""Policy losses: they take exploration tokens and return (loss, metrics).

A complete example of a user's own loss:

    @register_policy_loss("reinforce")
    def reinforce(scale: Annotated[float, Field(gt=0)] = 1.0) -> PolicyLoss:
        '''Policy gradient without a trust region.'''

        def loss(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
            weights_N = tokens.weights_N * importance(tokens, settings)
            value = -scale * (weights_N * tokens.advantages_N * tokens.logprobs_N).sum()
            return value, {"policy/scaled_loss": value.detach()}

        return loss
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dphrl.algo.ratios import bounded_ratio
from dphrl.algo.registry import METHODS, Registry

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class PolicyTokens:
    """The exploration tokens of one micro-batch along the axis N; there may be none.

    logprobs_N: log-probabilities by the policy in training, the only input with a gradient. old_logprobs_N: by the
    proximal policy, around which the trust region lies: the learner at the start of the step, or the policy that
    sampled (algorithm.proximal_policy). rollout_logprobs_N: by the engine that sampled. advantages_N: the advantage of
    the completion that each token belongs to. weights_N: each token's share of the loss, already divided by the
    denominator of the whole mini-batch. row_index_N: int64, the same number for all tokens of a completion. chosen_N:
    bool, the tokens that a `Choosing` loss has chosen from the whole mini-batch; None for other losses.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    row_index_N: Tensor
    chosen_N: Tensor | None = None


@dataclass(frozen=True)
class PolicyLossSettings:
    """The trust region as the configuration has it; every policy loss gets it and uses what it needs.

    clip_low, clip_high: how far the ratio may fall below 1 and rise above it. dual_clip: the largest ratio that counts
    when the advantage is negative. importance_cap: the largest engine-to-learner importance weight. ratio: "token" for
    a ratio of each token, "sequence" for one ratio of the whole completion (GSPO). importance: see `importance`.
    """

    clip_low: float
    clip_high: float
    dual_clip: float
    importance_cap: float
    ratio: str = "token"
    importance: str = "truncate"


# Returns the loss and metrics. The loss is a plain sum of terms that are each multiplied by weights_N, so that
# micro-batches and ranks add up. Metrics are summed in the same way; of those that end in _max the largest is taken.
# A metric is a number or a tensor of one number, and its name begins with policy/.
PolicyLoss = Callable[[PolicyTokens, PolicyLossSettings], tuple[Tensor, Metrics]]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
# Which exploration tokens of a whole mini-batch a policy loss treats in another way. Takes the log-probs by the
# policies that sampled and the advantages, both [N], and random numbers that belong to the mini-batch; returns [N].
TokenChoice = Callable[[Floats, Floats, np.random.Generator], Bools]


@dataclass(frozen=True)
class Choosing:
    """A policy loss that treats some tokens in another way, chosen by comparison with all others of the mini-batch.

    A loss is called with one micro-batch on one rank. What it would choose there would depend on how rows were dealt.
    `choose` is called once, where the batch is made, with every exploration token of the mini-batch, those of rows
    that are left out of the loss included; `loss` finds its choice in `PolicyTokens.chosen_N`.
    """

    loss: PolicyLoss
    choose: TokenChoice

    def __call__(self, tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
        if tokens.chosen_N is None:
            if len(tokens.logprobs_N):
                raise ValueError("this policy loss chooses tokens from a mini-batch, and nobody has asked it to")
            tokens = replace(tokens, chosen_N=torch.zeros_like(tokens.logprobs_N, dtype=torch.bool))
        return self.loss(tokens, settings)


def token_choice(policy_loss: PolicyLoss) -> TokenChoice | None:
    """How a policy loss of `get_policy_loss` chooses tokens; None where it treats all of them in the same way."""
    inner = getattr(policy_loss, "__wrapped__", policy_loss)
    return inner.choose if isinstance(inner, Choosing) else None


_POLICY_LOSSES: Registry[PolicyLoss] = METHODS["policy_loss"]

# Decorator: register_policy_loss("mine") makes `factory(**params) -> PolicyLoss` available to configurations.
register_policy_loss = _POLICY_LOSSES.register


def get_policy_loss(name: str, **params: Any) -> PolicyLoss:
    """The registered policy loss `name` with its parameters.

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return _POLICY_LOSSES.build(name, params)


# Policy losses to which tokens with an advantage of 0 that they did not choose add nothing, neither value nor gradient.
# Nobody knows that of a plugin's loss, so it gets them all.
ZERO_WITHOUT_ADVANTAGE = frozenset({"clipped", "gspo", "clip_cov", "kl_cov"})

# What every step's record says of a policy loss, so that no policy loss may say it otherwise.
OWN_METRICS = ("policy/loss", "policy/entropy")


def _checked(label: str, policy_loss: PolicyLoss) -> PolicyLoss:
    """`policy_loss`, which raises ValueError when it does not return what a policy loss has to."""

    @functools.wraps(policy_loss)
    def checked(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
        made: Any = policy_loss(tokens, settings)
        if not (isinstance(made, tuple | list) and len(made) == 2):
            raise ValueError(f"{label} returned {_shown(made)}; return its loss and its metrics: (loss, {{}})")
        loss, metrics = made
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point()):
            raise ValueError(
                f"{label} returned as its loss {_shown(loss)}; return a tensor of one number: sum the terms"
            )
        if tokens.logprobs_N.requires_grad and not loss.requires_grad:
            if len(tokens.logprobs_N):
                raise ValueError(
                    f"{label} returned a loss without a gradient; compute it from tokens.logprobs_N, not detached"
                )
            # Without any token a constant is right too, but an engine can run backward only from a gradient.
            loss = loss + 0 * tokens.logprobs_N.sum()
        if not isinstance(metrics, Mapping):
            raise ValueError(f"{label} returned as its metrics {_shown(metrics)}; return a dict, {{}} for none")
        return loss, {name: _metric(label, name, value, loss) for name, value in metrics.items()}

    return checked


def _metric(label: str, name: Any, value: Any, loss: Tensor) -> Tensor:
    if not (isinstance(name, str) and name.startswith("policy/") and name != "policy/"):
        raise ValueError(f"{label} returned a metric named {name!r}; begin its name with policy/")
    if name in OWN_METRICS:
        raise ValueError(f"{label} returned a metric named {name!r}, which every step has already; choose another name")
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.detach()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return loss.detach().new_tensor(value)
    raise ValueError(f"{label} returned the metric {name!r} as {_shown(value)}; return a number or a tensor of one")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with the shape {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


_POLICY_LOSSES.accept = _checked


def importance(tokens: PolicyTokens, settings: PolicyLossSettings) -> Tensor:
    """Importance weight [N] from the engine that sampled to the proximal policy, without a gradient.

    Where that is the learner at the start of the step (decoupled PPO, arXiv 2110.00641), it corrects for differences in
    numerics and for staleness, token by token, with each token's own version. With rho the ratio of a token, or of a
    completion the product over its tokens, and C = importance_cap:

    - truncate: min(rho, C). mask: rho within [1/C, C], else 0 (IcePop, arXiv 2510.18855).
    - sequence_truncate: min(rho of the completion, C). sequence_mask: rho of the completion up to C, else 0 (Liu et al.
      2025, "When Speed Kills Stability").

    What is masked stays in the denominators: it counts as a token without a gradient.
    """
    cap, log_rho_N = settings.importance_cap, log_rho(tokens, settings)
    rho_N = bounded_ratio(log_rho_N)
    if settings.importance.endswith("truncate"):
        return rho_N.clamp(max=cap)
    kept_N = rho_N <= cap
    if settings.importance == "mask":
        kept_N &= rho_N >= 1 / cap
    return torch.where(kept_N, rho_N, 0.0)


def log_rho(tokens: PolicyTokens, settings: PolicyLossSettings) -> Tensor:
    """The logarithm of rho in `importance`, [N]."""
    log_rho_N = (tokens.old_logprobs_N - tokens.rollout_logprobs_N).detach()
    if not settings.importance.startswith("sequence"):
        return log_rho_N
    return _sums(log_rho_N, tokens.row_index_N)


def clipped_surrogate(tokens: PolicyTokens, settings: PolicyLossSettings) -> tuple[Tensor, Metrics]:
    """Clipped surrogate with separate bounds (DAPO, arXiv 2503.14476, eq. 8) and dual clip (arXiv 1912.09729, eq. 5).

    The ratio is pi_theta / pi_old, where pi_old is the proximal policy.
    """
    log_ratio_N = tokens.logprobs_N - tokens.old_logprobs_N
    if settings.ratio == "sequence":
        log_ratio_N = sequence_log_ratio(log_ratio_N, tokens.row_index_N)
    ratio_N, advantages_N, weights_N = bounded_ratio(log_ratio_N), tokens.advantages_N, tokens.weights_N
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate_N = torch.maximum(unclipped_N, clipped_N)
    bounded_N = torch.minimum(surrogate_N, -advantages_N * settings.dual_clip)
    surrogate_N = torch.where(advantages_N < 0, bounded_N, surrogate_N)
    importance_N = importance(tokens, settings)
    loss = (weights_N * importance_N * surrogate_N).sum()
    with torch.no_grad():
        whole_N = bounded_ratio(log_rho(tokens, settings))
        metrics = {
            "policy/clip_fraction": (weights_N * (clipped_N > unclipped_N)).sum(),
            "policy/importance_mean": (weights_N * importance_N).sum(),
            "policy/importance_affected": (weights_N * (importance_N != whole_N)).sum(),
        }
    return loss, metrics


def sequence_log_ratio(log_ratio_N: Tensor, row_index_N: Tensor) -> Tensor:
    """At each token the mean log-ratio of its completion (GSPO, arXiv 2507.18071, eq. 7). Shape [N], as the inputs.

    The gradient goes to each token's own log-prob (GSPO-token, eq. 14). Its sum over a completion with equal weights is
    the gradient of the sequence's ratio.
    """
    if not len(log_ratio_N):
        return log_ratio_N
    detached = log_ratio_N.detach()
    mean = _sums(detached, row_index_N) / _sums(torch.ones_like(detached), row_index_N)
    return mean + log_ratio_N - detached


def _sums(values_N: Tensor, row_index_N: Tensor) -> Tensor:
    """At each token the sum over its completion."""
    if not len(values_N):
        return values_N
    return values_N.new_zeros(int(row_index_N.max()) + 1).index_add(0, row_index_N, values_N)[row_index_N]


@register_policy_loss("clipped")
def _clipped() -> PolicyLoss:
    """Clipped surrogate with separate bounds and dual clip (PPO, GRPO, DAPO); algorithm.ratio chooses the ratio."""
    return clipped_surrogate


@register_policy_loss("gspo")
def _gspo() -> PolicyLoss:
    """clipped with one ratio for each completion, whatever algorithm.ratio says (GSPO); wants bounds of about 3e-4."""
    return lambda tokens, settings: clipped_surrogate(tokens, replace(settings, ratio="sequence"))
