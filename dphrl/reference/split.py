"""The split of the training prompts by what the initial policy already solves (arXiv 2509.07430, section 3.1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dphrl.config.reference import ReferenceConfig


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """What the verdicts on one prompt's K responses are.

    num_graded: how many have a verdict. num_correct: how many are correct. num_complete: how many of the correct ones
    are not truncated; only these can be stored.
    """

    num_graded: int
    num_correct: int
    num_complete: int


@dataclass(frozen=True)
class Split:
    """The prompt_ids of the three parts, each in the order of the training data.

    A prompt is near-perfect when, of its responses that have a verdict, the share that is correct and complete (not
    truncated) is at least reference.threshold / reference.num_samples. If every response has a verdict, these are
    `threshold` responses. A prompt without any verdict is to explore.

    truncated, unconfirmed: prompts to explore that are not near-perfect only because too many of their correct
    responses are truncated, or because the answer that should confirm them (reference.confirm) was not correct.
    """

    near_perfect: tuple[str, ...]  # D_pef: rehearsed through the divergence
    exploration: tuple[str, ...]  # D_exp: trained by the policy loss
    dropped: tuple[str, ...]  # all responses that have a verdict are wrong, and the config drops such prompts
    truncated: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()


def split_prompts(
    counts: Mapping[str, PromptCounts], reference: ReferenceConfig, unconfirmed: Collection[str] = ()
) -> Split:
    """The split of the prompts whose counts are given by prompt_id.

    unconfirmed: prompts whose counts are near-perfect, but whose confirming answer is not correct.
    """
    near_perfect, exploration, dropped, truncated = [], [], [], []
    for prompt_id, of_prompt in counts.items():
        if is_near_perfect(of_prompt, reference) and prompt_id not in unconfirmed:
            near_perfect.append(prompt_id)
        elif of_prompt.num_graded and not of_prompt.num_correct and reference.all_wrong == "drop":
            dropped.append(prompt_id)
        else:
            exploration.append(prompt_id)
            if prompt_id not in unconfirmed and _reaches(of_prompt.num_correct, of_prompt.num_graded, reference):
                truncated.append(prompt_id)
    refused = [prompt_id for prompt_id in exploration if prompt_id in unconfirmed]
    return Split(tuple(near_perfect), tuple(exploration), tuple(dropped), tuple(truncated), tuple(refused))


def is_near_perfect(counts: PromptCounts, reference: ReferenceConfig) -> bool:
    """Whether a prompt is near-perfect by its K responses. Such a prompt has at least one that can be stored."""
    return _reaches(counts.num_complete, counts.num_graded, reference)


def _reaches(count: int, num_graded: int, reference: ReferenceConfig) -> bool:
    # count / num_graded >= threshold / K, in whole numbers, so that no rounding decides.
    return num_graded > 0 and count * reference.num_samples >= reference.threshold * num_graded
