"""A reward for measurements: a number made of the completion's text, so that no two completions of a group are worth
the same and no group is flat. It imports nothing, because sides that know nothing of dphrl use it too."""

from __future__ import annotations

import hashlib


def reward(completion: str, answer: str) -> float:
    """Between 0 and 1, the same for the same text in every process."""
    return int.from_bytes(hashlib.sha256(completion.encode()).digest()[:4], "big") / 2**32
