"""The split of the training prompts by what the initial policy already solves (arXiv 2509.07430, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """The prompt_ids of the three parts, each in the order of the training data."""

    near_perfect: tuple[str, ...]  # D_pef: rehearsed through the divergence
    exploration: tuple[str, ...]  # D_exp: trained by the policy loss
    dropped: tuple[str, ...]  # all responses wrong, and the config drops such prompts


def split_prompts(num_correct: Mapping[str, int], *, threshold: int, all_wrong: str) -> Split:
    """Prompts with at least `threshold` correct responses are near-perfect; the rest are to explore.

    num_correct: number of correct responses by prompt_id. all_wrong: "keep" or "drop" prompts that have none.
    """
    near_perfect, exploration, dropped = [], [], []
    for prompt_id, count in num_correct.items():
        if count >= threshold:
            near_perfect.append(prompt_id)
        elif count == 0 and all_wrong == "drop":
            dropped.append(prompt_id)
        else:
            exploration.append(prompt_id)
    return Split(tuple(near_perfect), tuple(exploration), tuple(dropped))
