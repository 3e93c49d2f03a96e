"""The learner's training engine: one policy under DeepSpeed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dphrl.config.schema import Config
from dphrl.learner.batching import MicroBatch
from dphrl.learner.lora import adapters_off, trained_parameters
from dphrl.learner.policy import PolicyModel, dtype_name, load_reference


class DeepSpeedEngine:
    """`update.TrainEngine` over a DeepSpeed engine of any ZeRO stage.

    The number of micro-batches varies from step to step. So DeepSpeed gets an accumulation of 1, which divides
    nothing, and its boundary is set by hand. Apart from clipping, DeepSpeed only averages gradients over ranks.
    """

    def __init__(self, policy: PolicyModel, config: Config, model_dir: str) -> None:
        import deepspeed

        learner = config.learner
        optimizer = torch.optim.AdamW(trained_parameters(policy), lr=learner.lr, weight_decay=learner.weight_decay)
        self.module, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": learner.grad_clip,
                "zero_optimization": {"stage": learner.zero_stage},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": dtype_name(config.model.dtype) == "bfloat16"},
                # A bfloat16 sum over micro-batches would depend on how many there are.
                "data_types": {"grad_accum_dtype": "fp32"},
                "steps_per_print": 10**9,
            },
        )
        self.device = torch.device(self.module.device)
        # Every rank holds the whole reference model. Only baselines need one: rehearsal uses stored samples.
        self.reference = load_reference(model_dir, config, self.device)

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

    def step(self, learning_rate: float) -> float:
        for group in self.module.optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        return float(self.module.get_global_grad_norm())
