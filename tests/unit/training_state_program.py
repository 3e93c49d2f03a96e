"""Updates of a small model under DeepSpeed, with the training state put away and taken back between them.

Prints a JSON object, by ZeRO stage and dtype. A program of its own, because DeepSpeed and its process group live as
long as the process. Run by test_colocation, and by the test of that name in tests/gpu, with the argument `cuda`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import torch
from torch import Tensor

os.environ |= {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    "DS_ACCELERATOR": "cuda" if "cuda" in sys.argv else "cpu",
}  # fmt: skip
DEVICE = os.environ["DS_ACCELERATOR"]
STEPS = 3


class Moves:
    """Counts the larger tensors that are asked to go to a device in the block."""

    def __enter__(self) -> Moves:
        self.count, self._to = 0, Tensor.to

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # A buffer without content that is wanted back is only measured, on "meta".
            elsewhere = bool(args) and isinstance(args[0], str | torch.device) and str(args[0]) != "meta"
            self.count += elsewhere and tensor.numel() > 100
            return self._to(tensor, *args, **kwargs)

        Tensor.to = to  # type: ignore[assignment,method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Tensor.to = self._to  # type: ignore[method-assign]


def make_engine(stage: int, dtype: str) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"}, "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 10**9,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)[0]


def rows(dtype: str, seed: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).to(DEVICE, getattr(torch, dtype))


def update(engine: Any, dtype: str, seed: int) -> float:
    loss = engine(rows(dtype, seed)).float().pow(2).mean()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss)
    engine.step()
    return float(loss)


def score(engine: Any, dtype: str) -> list[float]:
    with torch.no_grad():
        return list(engine(rows(dtype, 99)).float().flatten().tolist())


def num_on_gpu(optimizer: Any) -> int:
    """Masters and moments that are on a GPU now."""
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
    states = optimizer.optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return sum(tensor.is_cuda for tensor in (*masters, *moments))


def moved(stage: int, dtype: str) -> dict[str, Any]:
    from actors.training_state import check_movable, offload_training_state, reload_training_state
    from dphrl.config.loading import InputError

    still, moving = make_engine(stage, dtype), make_engine(stage, dtype)
    try:
        check_movable(moving)
    except InputError as error:
        return {"refused": str(error)}
    undisturbed = [update(still, dtype, seed) for seed in range(STEPS)]
    losses, same = [], True
    for seed in range(STEPS):
        losses.append(update(moving, dtype, seed))
        before = score(moving, dtype)
        with Moves() as away:
            offload_training_state(moving)
        on_gpu = num_on_gpu(moving.optimizer)
        same &= score(moving, dtype) == before
        with Moves() as back:
            reload_training_state(moving)
    went, came_back = away.count, back.count
    return {
        "losses": losses, "undisturbed": undisturbed, "scores_while_away": same, "went": went, "came_back": came_back,
        "on_gpu_while_away": on_gpu,
    }  # fmt: skip


def main() -> None:
    import deepspeed

    torch.set_num_threads(1)
    # DeepSpeed would compile this for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    deepspeed.init_distributed("gloo" if DEVICE == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    results = {f"zero-{s} {d}": moved(s, d) for s in (1, 2, 3) for d in ("float32", "bfloat16")}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
