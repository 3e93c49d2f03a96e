"""What a learner rank needs for updates alone, moved off its device and back: masters, moments and gradients.

The weights stay, so that a rank can score and publish while engines use the rest of the device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# DeepSpeed 0.19.8 has an optimizer class of its own for ZeRO-1 in bfloat16, and that one lacks the methods.
NEEDS_ANOTHER_STAGE = (
    "cluster.colocate: DeepSpeed cannot take the optimizer state of learner.zero_stage=1 in bfloat16 off the GPU; set "
    "learner.zero_stage=2 or 3"
)


def check_movable(module: Any) -> None:
    """Raises InputError for a DeepSpeed engine whose optimizer state cannot leave its device."""
    from dphrl.config.loading import InputError

    if not hasattr(module.optimizer, "offload_states"):
        raise InputError(NEEDS_ANOTHER_STAGE)


def offload_training_state(module: Any) -> None:
    """Move all that a DeepSpeed engine holds for updates to host memory."""
    if _is_stage_3(module) and not module.zero_use_cpu_optimizer():
        _move_optimizer(module.optimizer, "cpu")
    # DeepSpeed would free pinned buffers at each reload, and pinning them anew takes longer than it saves.
    module.offload_states(include=_by_deepspeed(module), pin_memory=False)


def reload_training_state(module: Any) -> None:
    """Move back what `offload_training_state` took away."""
    module.reload_states()
    if _is_stage_3(module) and not module.zero_use_cpu_optimizer():
        _move_optimizer(module.optimizer, module.device)


def _by_deepspeed(module: Any) -> list[Any]:
    """What DeepSpeed itself moves. At stage 3 it moves optimizers of its own class only, with an assertion."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

    gradients = [State.lp_grads, State.contiguous_grad_buffer]
    return gradients if _is_stage_3(module) else [State.optim_states, State.hp_params, *gradients]


def _is_stage_3(module: Any) -> bool:
    return bool(module.zero_optimization_stage() == 3)


def _move_optimizer(optimizer: Any, device: Any) -> None:
    """Masters and moments of a ZeRO-3 optimizer. They are known by identity, so only what they hold is replaced."""
    for master in optimizer.fp32_partitioned_groups_flat:
        master.data = master.data.to(device)
    for state in optimizer.optimizer.state.values():
        for key, value in state.items():
            # AdamW counts its steps in a scalar, which lies where AdamW wants it.
            if isinstance(value, Tensor) and value.dim():
                state[key] = value.to(device)
