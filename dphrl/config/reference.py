"""The reference stage's part of the configuration: the samples of the initial policy that training rehearses."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dphrl.config.section import ByteCount, NonNegativeInt, PositiveInt, SampleCount, Section


class ReferenceConfig(Section):
    num_samples: SampleCount = 8
    """K: responses of the initial policy to each training prompt, sampled once. The time of the stage grows with
    it."""
    threshold: PositiveInt = 7
    """With at least this many of its num_samples responses correct and complete, a prompt is near-perfect (D_pef): it
    is rehearsed. A truncated response does not count, since it cannot be rehearsed. Where the reward failed on some
    responses, the same share of those that have a verdict is enough. The other prompts (D_exp) are explored. A larger
    value rehearses fewer prompts. A change of this setting, of stored_per_prompt or of all_wrong reuses the responses
    that are there."""
    confirm: bool = False
    """Whether each near-perfect prompt is sampled once more, and stays near-perfect only if that answer is correct and
    complete too. The paper's code does this. It removes prompts that reached the threshold by luck. The answer is not
    stored. A change of this setting reuses the responses that are there."""
    stored_per_prompt: PositiveInt = 1
    """m: correct responses stored for each near-perfect prompt. More hold more of its different ways to answer, and
    take more memory."""
    rows_per_step: NonNegativeInt = 64
    """Stored responses in the divergence term of each step. It must be a multiple of algorithm.num_minibatches. 0
    rehearses nothing. More cost learner time, as completions of the same length do."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of each step's rollout.num_prompts that are near-perfect prompts, sampled and trained like those to
    explore, in the place of some of them; rounded to whole prompts, but at least one. It is rehearsal without a
    divergence, and its control: with algorithm.divergence: none the reference stage runs for the split alone. The
    default 0 replays none."""
    all_wrong: Literal["keep", "drop"] = "keep"
    """What becomes of prompts with none of the responses correct. keep explores them; drop leaves them out as
    hopeless. Responses on which the reward failed do not count, and a prompt without any verdict is never dropped."""
    prompts_per_chunk: PositiveInt = 512
    """Prompts that are stored together, once all of them are graded. The next chunk begins before, so engines do not
    wait. A killed stage loses the chunks that were not complete: those that engines were at."""
    max_bytes: ByteCount = 4 * 2**30
    """The largest buffer, in bytes as arrays: 4 for each prompt token id, completion token id and log-prob, and for
    each entropy where these are stored. A larger one is refused. Every process that reads a whole buffer holds it as
    Python objects, which take several times as much."""

    @model_validator(mode="after")
    def _threshold_reachable(self) -> Self:
        if self.threshold > self.num_samples:
            raise ValueError(
                f"threshold={self.threshold} can never be reached with num_samples={self.num_samples}; "
                f"set reference.threshold <= {self.num_samples}"
            )
        return self
