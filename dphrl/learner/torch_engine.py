"""The training engine without DeepSpeed: one policy, torch's own backward pass and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from dphrl.config.schema import Config
from dphrl.learner.batching import MicroBatch
from dphrl.learner.lora import adapters_off, trained_by_name, trained_parameters
from dphrl.learner.policy import PolicyModel
from dphrl.learner.state import MASTER, MOMENTS, Piece, StoredState, restore_weights


class TorchEngine:
    """`update.TrainEngine` over one replica: torch's own backward and AdamW."""

    def __init__(self, policy: PolicyModel, config: Config, reference: PolicyModel | None = None) -> None:
        self.policy, self.reference = policy, reference
        self.device = next(policy.parameters()).device
        self.trained = trained_parameters(policy)
        learner = config.learner
        # One kernel for all, as under DeepSpeed.
        self.optimizer = torch.optim.AdamW(self.trained, lr=learner.lr, weight_decay=learner.weight_decay, fused=True)
        self.grad_clip = config.learner.grad_clip

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.policy(batch))

    def reference_forward(self, batch: MicroBatch) -> Tensor:
        if self.reference is None:
            with adapters_off(self.policy):
                return cast(Tensor, self.policy(batch)[0])
        return cast(Tensor, self.reference(batch)[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.grad_clip))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Clipping spreads one NaN over all gradients. DeepSpeed skips such a step too.
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def pieces(self) -> Iterator[Piece]:
        """The state of each trained parameter, as one piece that shares its memory."""
        for name, parameter in trained_by_name(self.policy):
            moments = self.optimizer.state.get(parameter, {})
            tensors = {MASTER: parameter, **{kind: moments[kind] for kind in MOMENTS if moments}}
            flat = {kind: tensor.detach().flatten() for kind, tensor in tensors.items()}
            yield Piece(name, 0, parameter.numel(), int(moments["step"]) if moments else 0, flat)

    def restore(self, stored: StoredState, *, weights_only: bool) -> None:
        """Take the stored state, or its weights alone with a new optimizer. Raises InputError when it is another
        model's."""
        restore_weights(self.policy, stored)
        self.optimizer.state.clear()
        if weights_only:
            return
        for name, parameter in trained_by_name(self.policy):
            if num_updates := stored.num_updates(name):
                state: dict[str, Any] = {k: stored.read(k, name).view_as(parameter).to(self.device) for k in MOMENTS}
                # A scalar on the parameter's device is what AdamW's fused kernel counts with.
                state["step"] = torch.tensor(float(num_updates), device=self.device)
                self.optimizer.state[parameter] = state
