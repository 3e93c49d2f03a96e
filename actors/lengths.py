"""How long completions may be expected to be."""

from __future__ import annotations

from dphrl.types import Completion


class Lengths:
    """How many tokens a prompt's completions may be expected to have, by those it had."""

    def __init__(self) -> None:
        self._mean: dict[str, float] = {}
        self._num_seen, self._total = 0, 0.0

    def see(self, completion: Completion) -> None:
        length = float(len(completion.token_ids))
        before = self._mean.get(completion.prompt_id, length)
        self._mean[completion.prompt_id] = (before + length) / 2  # later ones are of a policy closer to the present
        self._num_seen, self._total = self._num_seen + 1, self._total + length

    def of(self, prompt_id: str) -> float:
        """In tokens; the mean of all for a prompt without completions."""
        return self._mean.get(prompt_id, self._total / self._num_seen if self._num_seen else 0.0)
