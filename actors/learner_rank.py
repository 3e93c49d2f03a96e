"""One DeepSpeed rank in one Ray actor."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch

from actors.deepspeed_engine import DeepSpeedEngine
from actors.sequence_parallel import share_rows
from actors.weight_transfer.packing import PackedTensor, packed_chunks
from actors.weight_transfer.source import LearnerWeights
from dphrl.config.schema import Config
from dphrl.learner.attention import check_rows_apart
from dphrl.learner.export import check_exportable, export_model
from dphrl.learner.policy import dtype_name, load_policy
from dphrl.learner.update import UpdateSettings, run_update, score_sequences
from dphrl.own_code import pin
from dphrl.tracking.log import install_json_log
from dphrl.types import TrainBatch


@ray.remote
class LearnerRank:
    """Holds one shard of the policy and its optimizer.

    Lifecycle: ranks are made one by one; then `connect`, called on all ranks at once (a collective), loads the model.
    Every later call is a collective too: call it on all ranks with the same arguments.
    """

    def __init__(self, config: Config, rank: int) -> None:
        pin()
        install_json_log(f"learner-{rank}")
        self._config, self._rank, self._num_ranks = config, rank, config.learner.num_ranks
        self._published: list[ray.ObjectRef[list[PackedTensor]]] = []

    def address(self) -> tuple[str, int]:
        """Where the other ranks can reach rank 0: the address of its node, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def gpu_ids(self) -> list[int | str]:
        """The GPUs that Ray gave this rank, by their numbers on the node; a colocated engine runs on them too."""
        return list(ray.get_gpu_ids())

    def connect(self, master: tuple[str, int], model_dir: str) -> dict[str, Any]:
        """Join the process group and build the engine; returns facts about the rank for the log.

        master: the `address` of rank 0.
        """
        on_gpu = torch.cuda.is_available()
        os.environ |= {
            "RANK": str(self._rank),
            # Ray shows each rank only its own devices, so its device is always the first.
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self._num_ranks),
            "MASTER_ADDR": master[0],
            "MASTER_PORT": str(master[1]),
            "DS_ACCELERATOR": "cuda" if on_gpu else "cpu",
        }
        import deepspeed

        if not on_gpu:
            torch.set_num_threads(self._config.learner.threads_per_rank)
            _skip_shared_memory_op()
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=self._config.learner.timeout_s),
            auto_mpi_discovery=False,
            verbose=False,
        )
        torch.manual_seed(self._config.seed)
        torch.use_deterministic_algorithms(self._config.deterministic)
        policy = load_policy(
            model_dir,
            self._config.model,
            temperature=self._config.rollout.temperature,
            gradient_checkpointing=self._config.learner.gradient_checkpointing,
        )
        if self._rank == 0:
            check_exportable(policy.lm, model_dir)
        if self._config.learner.sequence_parallel > 1:
            policy.share = share_rows(policy.lm, self._config.model.attention, self._config.learner.sequence_parallel)
        self._policy = policy
        self._weights = LearnerWeights(policy, self._config.learner.zero_stage)
        self._engine = DeepSpeedEngine(policy, self._config, model_dir)
        self._settings = UpdateSettings.from_config(self._config)
        if self._settings.packed:
            check_rows_apart(self._engine.forward, self._engine.device)
        self._model_dir = model_dir
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
        return {
            "num_parameters": num_parameters,
            "device": str(self._engine.device),
            "dtype": dtype_name(self._config.model.dtype),
        }

    def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> dict[int, tuple[float, ...]]:
        """This rank's part of the log-probs, by index: see `score_sequences`."""
        return score_sequences(sequences, self._engine, self._settings, rank=self._rank, num_ranks=self._num_ranks)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """All optimizer steps of `batch`; returns this rank's share of the metrics: see `run_update`."""
        return run_update(batch, self._engine, self._settings, rank=self._rank, num_ranks=self._num_ranks)

    def publish(self) -> list[ray.ObjectRef[list[PackedTensor]]]:
        """Put the weights into the object store in chunks; rank 0 returns the references, other ranks an empty list.

        The chunks live until the next publish, because this actor owns them.
        """
        self._published = []  # this comes first, so that the store does not hold two copies
        if self._rank == 0:
            self._published = [ray.put(chunk) for chunk in packed_chunks(self._weights)]
        else:
            self._weights.join()
        return self._published

    def save(self, folder: str) -> None:
        """Write the DeepSpeed state of all ranks below `folder`; rank 0 writes a model directory, `folder/hf`, too."""
        self._engine.module.save_checkpoint(folder, tag="deepspeed")
        if self._rank != 0:
            self._weights.join()
            return
        state = {name: parameter.detach().cpu().clone() for name, parameter in self._weights}
        export_model(self._policy.lm, self._model_dir, Path(folder) / "hf", state)

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises RuntimeError when there is no such checkpoint."""
        path, _ = self._engine.module.load_checkpoint(folder, tag="deepspeed")
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint for {self._num_ranks} ranks there")
        # The state brings the weight decay that it was saved with, and below stage 3 the clipping; the configuration's
        # count.
        optimizer = self._engine.module.optimizer
        optimizer.clip_grad = self._config.learner.grad_clip
        for group in optimizer.param_groups:
            group["weight_decay"] = self._config.learner.weight_decay


def _skip_shared_memory_op() -> None:
    """Leave collectives to gloo.

    DeepSpeed would compile a shared-memory all-reduce, which takes over a minute at the first start, and would use it
    even between nodes.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
