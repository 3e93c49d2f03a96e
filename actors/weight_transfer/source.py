"""The learner's weights as engines know them: full tensors under the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dphrl.learner.lora import adapter_weights, plain_weights
from dphrl.learner.policy import PolicyModel


class LearnerWeights:
    """(name, full tensor) of every weight of one policy, as often as it is iterated; tied weights come once.

    Adapters are part of the weights that they belong to. Iterating is a collective under ZeRO-3: every rank must do it,
    in step, and a tensor is whole only until the next one is asked for.
    """

    def __init__(self, policy: PolicyModel, zero_stage: int) -> None:
        self._policy, self._zero_stage = policy, zero_stage

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for weight in plain_weights(self._policy.lm):
            with self._gathered(weight.parameters):
                yield weight.name, weight.value()

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, under the names that peft's files have. A collective, as iterating is; without adapters
        there are none."""
        for name, parameter in adapter_weights(self._policy.lm):
            with self._gathered([parameter]):
                yield name, parameter

    @property
    def gathers(self) -> bool:
        """Whether a tensor is whole only until the next one is asked for."""
        return self._zero_stage == 3

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, type and full shape of what iteration yields, in its order. Nothing is gathered for it."""
        return [
            (weight.name, weight.base.dtype, tuple(getattr(weight.base, "ds_shape", weight.base.shape)))
            for weight in plain_weights(self._policy.lm)
        ]

    def join(self) -> None:
        """Take part in another rank's iteration without keeping anything."""
        for _ in self:
            pass

    def join_adapters(self) -> None:
        """Take part in another rank's iteration over `adapters`."""
        for _ in self.adapters():
            pass

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        import deepspeed

        return cast(
            AbstractContextManager[Any],
            deepspeed.zero.GatheredParameters(parameters, enabled=self._zero_stage == 3),
        )
