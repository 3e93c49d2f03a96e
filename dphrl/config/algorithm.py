"""The algorithm's part of the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dphrl.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class DivergenceConfig(Section):
    # A registered generator, or none for plain RLVR (no reference stage at all).
    name: str = "forward_kl"
    # Parameters of the generator, for instance alpha of the alpha divergence.
    params: dict[str, float] = {}  # noqa: RUF012  (pydantic copies it)


def import_plugins(plugins: Sequence[str]) -> None:
    """Import a user's modules by name. Raises ValueError that says which one cannot be, and why."""
    for name in plugins:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(
                f"algorithm.plugins: {name!r} cannot be imported ({type(error).__name__}: {error}); install it or put "
                "its folder on PYTHONPATH"
            ) from error


def _parse_divergence(value: Any) -> Any:
    """`forward_kl`, or `{name: alpha, alpha: 0.5}`: the short form users write."""
    if value is None:
        return {"name": "none"}
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and "params" not in value:
        return {"name": value.get("name"), "params": {k: v for k, v in value.items() if k != "name"}}
    return value


class AlgorithmConfig(Section):
    # Your modules, imported before anything is looked up by name, in this process and in every actor: they may
    # register divergences. They must be importable there (installed, or on PYTHONPATH).
    plugins: tuple[str, ...] = ()
    divergence: Annotated[DivergenceConfig, BeforeValidator(_parse_divergence)] = DivergenceConfig()
    # Weight of the divergence term. At 8B the paper recommends 0.01-0.05 (forward KL, alpha), 0.05-0.2 (JS).
    eta: Annotated[float, Field(ge=0)] = 0.05
    # Where the divergence is estimated. reference: stored samples of the initial policy, nothing resident (DPH).
    # rollout: the policy's own samples. definition: Jensen-Shannon by its two KL halves, one on each. The last two
    # keep a frozen copy of the initial policy in every learner rank.
    estimator: Literal["reference", "rollout", "definition"] = "reference"
    # Reverse KL on rollouts: which estimate. k3_as_loss has forward KL's gradient, as GRPO's penalty does.
    kl_estimator: Literal["k1", "k2", "k3", "k3_as_loss"] | None = None
    # Weight of the policy's token entropy, maximised.
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    # DAPO's soft length penalty: completions lose up to 1 over the last so many tokens before max_tokens; 0 is off.
    overlong_buffer_tokens: NonNegativeInt = 0
    # Groups without signal (all scores equal) are replaced by fresh prompts, at most this many rounds a step.
    dynamic_sampling_rounds: PositiveInt = 1
    advantage: Literal["group_normalized", "mean_only", "leave_one_out"] = "group_normalized"
    # What counts the same: every completion token (token_mean, DAPO), every completion (sequence_mean, GRPO), or
    # every token against the full rollout.max_tokens (fixed_length, Dr.GRPO: no bias towards short answers).
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    # sequence: one ratio for the whole completion, the geometric mean of its tokens' (GSPO; clip bounds ~1e-4).
    ratio: Literal["token", "sequence"] = "token"
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    # Bounds the loss of a bad action whose probability grew (ratio >> 1, advantage < 0).
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    # Truncation of the engine-to-learner importance weight (numeric mismatch and staleness).
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    # Optimizer steps per rollout batch; above 1 costs one extra forward pass for the old log-probs.
    num_minibatches: PositiveInt = 1
