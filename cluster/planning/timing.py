"""How long a step takes, from speeds that are given or measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.tracking.tracker import METRICS_FILE


@dataclass(frozen=True)
class Speed:
    """Tokens a second that one engine generates, and that one learner rank trains on (prompts, completions and
    rehearsal); mean lengths of completions and prompts in tokens; seconds that a sync takes."""

    engine_tokens_per_s: float
    rank_tokens_per_s: float
    completion_tokens: float
    prompt_tokens: float
    sync_s: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and of its parts."""

    rollout_s: float
    learn_s: float
    sync_s: float
    step_s: float


def step_time(config: Config, speed: Speed) -> StepTime:
    """Engines share the rollout and ranks share the update; with staleness both of these run at the same time."""
    rollout = config.rollout
    rows = rollout.num_prompts * rollout.num_samples
    rehearsal = config.reference.rows_per_step if config.uses_reference_samples else 0
    rollout_s = rows * speed.completion_tokens / (speed.engine_tokens_per_s * rollout.num_engines)
    trained = (rows + rehearsal) * (speed.completion_tokens + speed.prompt_tokens)
    learn_s = trained / (speed.rank_tokens_per_s * config.learner.num_ranks)
    busy = max(rollout_s, learn_s) if rollout.max_staleness else rollout_s + learn_s
    return StepTime(rollout_s, learn_s, speed.sync_s, busy + speed.sync_s)


def given_speed(config: Config, text: str) -> Speed:
    """From `ENGINE,RANK` tokens a second, with completions and prompts as long as they may be.

    Raises InputError for anything but two positive numbers.
    """
    try:
        engine, rank = (float(part) for part in text.split(","))
    except ValueError:
        engine = rank = 0.0
    if not (engine > 0 and rank > 0):
        raise InputError(
            f"--tokens-per-s {text}: give two positive numbers, ENGINE,RANK: tokens a second that one engine generates "
            "and one learner rank trains on"
        )
    return Speed(engine, rank, config.rollout.max_tokens, config.data.max_prompt_tokens)


def measured_speed(folder: Path) -> Speed:
    """From a run's own metrics: its speed by engine and by rank, its lengths, its syncs.

    Raises InputError when the folder holds no steps.
    """
    from dphrl.config.loading import load_config

    path = folder / METRICS_FILE
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"--measured {folder}: no metrics of a run there ({error}); name a run's folder") from None
    # The first quarter is left out, because kernels, caches and the allocator settle in the first steps.
    steps = steps[len(steps) // 4 :]
    if not steps:
        raise InputError(f"--measured {folder}: the run has no step yet; name a finished run's folder")
    run = load_config(str(folder / "config.yaml"), stored=True)
    generated = _sum(steps, "rollout/num_tokens")
    num_completions = sum(step["rollout/num_tokens"] / step["rollout/completion_tokens_mean"] for step in steps)
    trained = _sum(steps, "learner/num_tokens")
    completion_tokens = generated / num_completions
    left_out = sum(step.get("learner/num_rows_left_out", 0.0) for step in steps)
    num_rows = num_completions - left_out + _sum(steps, "divergence/num_rows")
    return Speed(
        engine_tokens_per_s=generated / _sum(steps, "time/rollout_s") / run.rollout.num_engines,
        rank_tokens_per_s=trained / _sum(steps, "time/learn_s") / run.learner.num_ranks,
        completion_tokens=completion_tokens,
        prompt_tokens=max(0.0, trained / num_rows - completion_tokens),
        sync_s=_sum(steps, "time/sync_s") / len(steps),
    )


def _sum(steps: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(step[key] for step in steps)
