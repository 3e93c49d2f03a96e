"""The learner's weights as engines know them: full tensors under the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from dphrl.learner.policy import PolicyModel


class LearnerWeights:
    """(name, full tensor) of every weight of one policy, as often as it is iterated; tied weights come once.

    Iterating is a collective under ZeRO-3: every rank must do it, in step, and a tensor is whole only until the next
    one is asked for.
    """

    def __init__(self, policy: PolicyModel, zero_stage: int) -> None:
        self._policy, self._zero_stage = policy, zero_stage

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for name, parameter in cast(Any, self._policy.lm).named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                yield name, parameter

    @property
    def gathers(self) -> bool:
        """Whether a tensor is whole only until the next one is asked for."""
        return self._zero_stage == 3

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and full shape of what iteration yields, in its order. Nothing is gathered for it."""
        named = cast(Any, self._policy.lm).named_parameters()
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]

    def join(self) -> None:
        """Take part in another rank's iteration without keeping anything."""
        for _ in self:
            pass
