"""Counts by strategy as a suite's results hold them: small, and one line for each row.

A row of a run that counted strategies holds `strategies`: for each of them three lists with a number for every prompt:
graded samples, those that the strategy fits (null where no one knows), right ones. The base's rows hold what is the
same for every arm: `prompt_ids`, and `fitting`, the strategies that fit each prompt, joined by blanks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dphrl.evaluation.strategies import PromptCounts


def pack_strategies(per_prompt: Sequence[Mapping[str, Any]], *, is_base: bool) -> dict[str, Any]:
    """What a row holds of strategies and, for the base, of its prompts; per_prompt: those of a summary."""
    packed: dict[str, Any] = {}
    if is_base:
        packed["prompt_ids"] = [prompt["prompt_id"] for prompt in per_prompt]
        if all("fitting" in prompt for prompt in per_prompt):
            packed["fitting"] = [" ".join(prompt["fitting"]) for prompt in per_prompt]
    if per_prompt and all("strategies" in prompt for prompt in per_prompt):
        names = sorted({name for prompt in per_prompt for name in prompt["strategies"]})
        counts = {name: [prompt["strategies"].get(name, (0, 0, 0)) for prompt in per_prompt] for name in names}
        packed["strategies"] = {name: [_column(of_name, i) for i in range(3)] for name, of_name in counts.items()}
    return packed


def _column(counts: Sequence[Sequence[int | None]], place: int) -> list[int] | None:
    column = [count[place] for count in counts]
    known = [number for number in column if number is not None]
    return known if len(known) == len(column) else None


def unpack_strategies(row: Mapping[str, Any]) -> list[PromptCounts] | None:
    """The counts of every prompt by strategy; None for a row of a run that did not count them."""
    packed = row.get("strategies")
    if packed is None:
        return None
    prompts: list[dict[str, tuple[int | None, ...]]] = [{} for _ in row["num_graded"]]
    for name, columns in packed.items():
        filled = [[None] * len(prompts) if column is None else column for column in columns]
        for prompt, count in zip(prompts, zip(*filled, strict=True), strict=True):
            if count[0]:
                prompt[name] = count
    return list(prompts)
