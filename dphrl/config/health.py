"""The part of the configuration that says what a run does when its numbers go bad."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dphrl.config.section import Fraction, PositiveInt, Section

Reaction = Literal["warn", "stop", "off"]
Factor = Annotated[float, Field(gt=1)]


class HealthConfig(Section):
    exploding_divergence: Reaction = "warn"
    """What happens when the divergence from the initial policy grows to divergence_factor times what it was. warn tells
    it once, on standard error, in run.log and in events.jsonl, and again only after it has been well for 10 steps. stop
    ends the run, too, before its next checkpoint. off does not look."""
    divergence_factor: Factor = 10.0
    """How many times its own median over the 50 steps before the divergence may be, over three steps. It must also be
    above 0.1 nats a token. Smaller tells of it sooner."""
    entropy_collapse: Reaction = "warn"
    """What happens when the policy's entropy falls below entropy_share of what it was in the first steps: warn, stop or
    off, as with exploding_divergence. What is sampled is then nearly always the same."""
    entropy_share: Fraction = 0.1
    """The share of the mean entropy of the first 5 steps below which the last 5 have collapsed. Larger tells of it
    sooner."""
    one_reward: Reaction = "warn"
    """What happens when every completion of a step has the same score, flat_steps steps in a row: warn, stop or off, as
    with exploding_divergence. The reward then teaches nothing; a wrong answer format is the usual cause."""
    no_signal: Reaction = "warn"
    """What happens when no group of a step has different scores, flat_steps steps in a row, though prompts differ:
    warn, stop or off, as with exploding_divergence. Advantages are then all zero."""
    flat_steps: PositiveInt = 10
    """Steps in a row after which one_reward and no_signal are told. Larger waits longer."""
    rising_gap: Reaction = "warn"
    """What happens when the mean gap in log-probs between engines and learner has doubled since the first steps and
    comes near its bound, sync.max_mean_logprob_gap, at which the run stops in any case: warn, stop or off, as with
    exploding_divergence."""
    gap_share: Fraction = 0.5
    """The share of that bound beyond which rising_gap is told. Smaller tells of it sooner."""
    clipping: Reaction = "warn"
    """What happens when the trust region cuts the gradient of more than clip_share of the tokens, over 5 steps: warn,
    stop or off, as with exploding_divergence. Most of what was sampled is then thrown away."""
    clip_share: Fraction = 0.5
    """The share of exploration tokens beyond which clipping is told. Smaller tells of it sooner."""
    exploding_gradient: Reaction = "warn"
    """What happens when the gradient's norm before clipping grows to gradient_factor times what it was: warn, stop or
    off, as with exploding_divergence."""
    gradient_factor: Factor = 20.0
    """How many times its own median over the 50 steps before the gradient's norm may be, over three steps. Smaller
    tells of it sooner."""
