"""The learner's training engine: one policy under DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from actors.sharded_state import held_pieces, restore_pieces
from actors.sharding import shard_model
from dphrl.config.schema import Config
from dphrl.learner.batching import MicroBatch
from dphrl.learner.loading import load_policy, load_reference
from dphrl.learner.lora import adapters_off, trained_parameters
from dphrl.learner.policy import PolicyModel, dtype_name
from dphrl.learner.state import Piece, StoredState


class DeepSpeedEngine:
    """`update.TrainEngine` over a DeepSpeed engine of any ZeRO stage.

    The number of micro-batches varies from step to step. So DeepSpeed gets an accumulation of 1, which divides
    nothing, and its boundary is set by hand. Apart from clipping, DeepSpeed only averages gradients over ranks.
    """

    def __init__(self, policy: PolicyModel, config: Config, model_dir: str) -> None:
        import deepspeed

        self.policy, learner = policy, config.learner
        settings = deepspeed_settings(config)
        dtype = getattr(torch, dtype_name(config.model.dtype))
        if learner.zero_stage == 3:
            shard_model(policy, dtype, settings)
        optimizer = torch.optim.AdamW(
            trained_parameters(policy),
            lr=learner.lr,
            weight_decay=learner.weight_decay,
            # One kernel for all, on a CPU too. It works on DeepSpeed's float32 masters, which lie on the rank's device,
            # or with learner.offload in host memory; the parameters here may still be elsewhere.
            fused=True,
        )
        self.module, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
        self._keeps_sums = learner.offload == "optimizer" and learner.zero_stage < 3
        self.device = torch.device(self.module.device)
        self.reference = _resident_reference(config, model_dir, settings, self.device)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self.module(batch))

    def reference_forward(self, batch: MicroBatch) -> Tensor:
        if self.reference is None:
            with adapters_off(self.module):
                return cast(Tensor, self.module(batch)[0])
        return cast(Tensor, self.reference(batch)[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss)

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of the learner's state."""
        return held_pieces(self.module, self.policy)

    def restore(self, stored: StoredState, *, weights_only: bool) -> None:
        """Take this rank's part of a stored state: see `restore_pieces`."""
        restore_pieces(self.module, self.policy, stored, weights_only=weights_only)

    def step(self, learning_rate: float) -> float:
        for group in self.module.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        if self._keeps_sums and not math.isfinite(norm):
            # DeepSpeed has skipped the step. It would skip every one that follows: it goes on adding to the same sums.
            sums = self.module.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        if math.isfinite(norm) != self.module.was_step_applied():
            did = "took" if self.module.was_step_applied() else "skipped"
            raise RuntimeError(f"DeepSpeed {did} a step whose gradient norm is {norm}; its weights cannot be trusted")
        return norm


def build_policy(config: Config, model_dir: str) -> PolicyModel:
    """The policy as `DeepSpeedEngine` takes it. Under ZeRO-3 its weights are still the files' own, mapped: the engine
    converts and shards them, and nothing may hold them until then. Raises InputError: see `load_policy`."""
    return load_policy(
        model_dir,
        config.model,
        temperature=config.rollout.temperature,
        gradient_checkpointing=config.learner.gradient_checkpointing,
        keep_stored_dtype=config.learner.zero_stage == 3,
    )


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    learner = config.learner
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for the CPU would have to be compiled first; torch's fused one is there.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype_name(config.model.dtype) == "bfloat16"},
        # A bfloat16 sum over micro-batches would depend on how many there are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def _resident_reference(config: Config, model_dir: str, settings: dict[str, Any], device: torch.device) -> Any:
    """The initial policy, frozen, and sharded like the trained one; None where the estimator needs none. Only baselines
    need one: rehearsal uses stored samples."""
    if config.learner.zero_stage < 3:
        reference = load_reference(model_dir, config)
        return None if reference is None else reference.to(device)
    reference = load_reference(model_dir, config, keep_stored_dtype=True)
    if reference is None:
        return None
    import deepspeed

    own = settings | {"zero_optimization": {"stage": 3}}
    shard_model(reference, getattr(torch, dtype_name(config.model.dtype)), own)
    # An engine without an optimizer gathers each layer when its turn comes.
    return deepspeed.initialize(model=reference, config=own)[0]
