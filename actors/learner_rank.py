"""One DeepSpeed rank in one Ray actor."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch

from actors.deepspeed_engine import DeepSpeedEngine, build_policy
from actors.sequence_parallel import share_rows
from actors.training_state import check_movable, offload_training_state, reload_training_state
from actors.waiting import Actor
from actors.watched import WATCH, Watched
from actors.weight_transfer.backends import engine_backend
from actors.weight_transfer.failures import SendOutcome
from actors.weight_transfer.ledger import Ledger, WeightSummary
from actors.weight_transfer.packing import PackedTensor, packed_chunks, unpack_tensors
from actors.weight_transfer.source import LearnerWeights
from dphrl.background import step_back
from dphrl.config.schema import Config
from dphrl.learner.attention import check_rows_apart
from dphrl.learner.digest import digest_of, optimizer_tensors
from dphrl.learner.export import check_exportable
from dphrl.learner.lora import add_adapters
from dphrl.learner.policy import dtype_name
from dphrl.learner.prefixes import fit_to_model
from dphrl.learner.repeatable import use_repeatable_kernels
from dphrl.learner.snapshot import Snapshot
from dphrl.learner.state import STATE_FOLDER, StoredState
from dphrl.learner.update import UpdateSettings, measure_sequences, run_update, score_sequences
from dphrl.learner.utilization import compute_of, device_name, full_size
from dphrl.own_code import pin
from dphrl.tracking.log import install_json_log
from dphrl.types import TokenScores, TrainBatch

# Chunks that wait in the object store beside those that engines are at. One would do, if every step took the same time.
CHUNKS_AHEAD = 2


# A checkpoint is written beside the training.
@ray.remote(concurrency_groups=WATCH | {"disk": 1})
class LearnerRank(Watched):
    """Holds one shard of the policy and its optimizer.

    Lifecycle: ranks are made one by one; then `connect`, called on all ranks at once (a collective), loads the model.
    Every later call that does not say otherwise is a collective too: call it on all ranks with the same arguments.
    """

    def __init__(self, config: Config, rank: int) -> None:
        pin()
        install_json_log(f"learner-{rank}")
        self._config, self._rank, self._num_ranks = config, rank, config.learner.num_ranks
        self._sent: WeightSummary | None = None

    def address(self) -> tuple[str, int]:
        """Where the other ranks can reach rank 0: the address of its node, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def gpu_ids(self) -> list[int | str]:
        """The GPUs that Ray gave this rank, by their numbers on the node; a colocated engine runs on them too."""
        return list(ray.get_gpu_ids())

    def gpu_bytes(self) -> int:
        """All memory of this rank's GPU; 0 without one. It starts CUDA in this process."""
        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0

    def connect(self, master: tuple[str, int], model_dir: str) -> dict[str, Any]:
        """Join the process group and build the engine; returns facts about the rank and its model.

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
            timeout=timedelta(seconds=self._collective_timeout_s()),
            auto_mpi_discovery=False,
            verbose=False,
        )
        torch.manual_seed(self._config.seed)
        use_repeatable_kernels(self._config.deterministic)
        policy = build_policy(self._config, model_dir)
        add_adapters(policy.lm, self._config.model.lora, self._config.seed)
        if self._rank == 0:
            check_exportable(policy.lm, model_dir)
        if self._config.learner.sequence_parallel > 1:
            policy.share = share_rows(policy.lm, self._config.model.attention, self._config.learner.sequence_parallel)
        self._policy = policy
        self._weights = LearnerWeights(policy, self._config.learner.zero_stage)
        self._engine = DeepSpeedEngine(policy, self._config, model_dir)
        policy.register_forward_pre_hook(lambda *_: self.moved())
        if self._config.cluster.colocate and on_gpu:
            check_movable(self._engine.module)
        if (backend := engine_backend(self._config.sync)) != "object_store":
            from actors.weight_transfer.trainer import LearnerSource, open_sender

            self._source = LearnerSource(self._weights, records=self._rank == 0)
            self._sender = open_sender(self._source, backend, self._rank, self._num_ranks)
        settings = UpdateSettings.from_config(self._config)
        sharing = fit_to_model(settings.sharing, policy.lm, self._engine.forward, self._engine.device, self._num_ranks)
        # Each rank has tried it, and their numbers may differ by rounding; their plans may not.
        told = torch.tensor(int(sharing.prefixes != "never"), device=self._engine.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN)
        self._settings = replace(settings, sharing=sharing if told else replace(sharing, prefixes="never"))
        if self._settings.packed:
            check_rows_apart(self._engine.forward, self._engine.device)
        self._model_dir = model_dir
        num_parameters = sum(map(full_size, policy.parameters()))
        return {
            "num_parameters": num_parameters,
            "device": str(self._engine.device),
            "dtype": dtype_name(self._config.model.dtype),
            "compute": compute_of(policy.lm, device_name(), dtype_name(self._config.model.dtype), self._num_ranks),
        }

    def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> dict[int, tuple[float, ...]]:
        """This rank's part of the log-probs, by index: see `score_sequences`."""
        self.moved()
        return score_sequences(sequences, self._engine, self._settings, rank=self._rank, num_ranks=self._num_ranks)

    def measure(self, sequences: Sequence[tuple[Sequence[int], int]]) -> dict[int, TokenScores]:
        """This rank's part of log-probs and entropies, by index: see `measure_sequences`."""
        self.moved()
        return measure_sequences(sequences, self._engine, self._settings, rank=self._rank, num_ranks=self._num_ranks)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """All optimizer steps of `batch`; returns this rank's share of the metrics: see `run_update`."""
        self.moved()
        return run_update(batch, self._engine, self._settings, rank=self._rank, num_ranks=self._num_ranks)

    def offload(self) -> None:
        """Leave the device to an engine but for the weights, with which this rank can still score and publish."""
        offload_training_state(self._engine.module)

    def reload(self) -> None:
        """Take back what `offload` put away; before `update`, `save` and `load`."""
        reload_training_state(self._engine.module)

    @ray.method(num_returns="streaming", _generator_backpressure_num_objects=2 * CHUNKS_AHEAD)
    def publish(self) -> Iterator[bool | list[PackedTensor]]:
        """Put the weights into the object store, in chunks as they are asked for; other ranks than 0 yield nothing.

        Yields True before each chunk, which tells that the chunk is whole: the caller reads that, and hears of this
        rank's error by it, and passes on the reference to the chunk, which only travels to engines. It lives as long as
        somebody holds that reference. A caller that stops asking does not hold up the ranks: they go on to the end,
        since all are in the same gathers.
        """
        if self._rank != 0:
            self._weights.join()
            return
        ledger = Ledger()
        for chunk in packed_chunks(self._weights):
            # As packed, in host memory, which is where the engines read them.
            for name, tensor in unpack_tensors(chunk):
                ledger.note(name, tensor)
            yield True
            # Not a reference inside a value: Ray deletes what such a one stands for when this rank drops it, before the
            # caller has it.
            yield chunk
        self._sent = ledger.summary

    def sent(self) -> WeightSummary:
        """What the last sync sent, by rank 0's own count; no collective. Raises RuntimeError before the first."""
        if self._sent is None:
            raise RuntimeError(f"learner rank {self._rank} has not sent its weights yet")
        return self._sent

    def send_weights(self, engines: Sequence[Actor], width: int, policy_version: int, limit_s: float) -> SendOutcome:
        """This rank's part in a session of vLLM's trainer side with all engines: see `SessionSender.send`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # vLLM reads on streams of its own, which do not wait for the optimizer's
        outcome = self._sender.send(engines, width, policy_version, limit_s)
        self._sent = self._source.summary
        return outcome

    def _collective_timeout_s(self) -> float:
        """The deadline of the ranks' own operations. Where rank 0 asks the engines itself, the others wait for it in a
        gather meanwhile, so its deadlines must come first: to meet, to start and to take weights."""
        sync, seconds = self._config.sync, self._config.learner.timeout_s
        return seconds if engine_backend(sync) == "object_store" else seconds + 3 * sync.timeout_s

    def copy_state(self) -> int:
        """Copy this rank's part of a checkpoint to host memory; rank 0 copies the model too. Returns their bytes."""
        pieces = [piece.copied() for piece in self._engine.pieces()]
        if self._rank != 0:
            self._weights.join()
            self._weights.join_adapters()
            self._snapshot = Snapshot(pieces)
        else:
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._weights}
            adapters = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._weights.adapters()}
            self._snapshot = Snapshot(pieces, weights, adapters)
        return self._snapshot.num_bytes

    @ray.method(concurrency_group="disk")
    def write_state(self, folder: str) -> dict[str, str]:
        """Write what `copy_state` copied of masters and moments; no collective. See `Snapshot.write_state`."""
        step_back()  # this thread does nothing else
        return self._snapshot.write_state(Path(folder), self._rank)

    @ray.method(concurrency_group="disk")
    def write_export(self, folder: str) -> None:
        """Write the model that `copy_state` copied, on rank 0; no collective. See `Snapshot.write_export`."""
        step_back()
        self._snapshot.write_export(Path(folder), self._policy.lm, self._model_dir)

    def load(self, folder: str, weights_only: bool) -> None:
        """Restore this rank's part of what `write_state` of all ranks wrote, of these or of others."""
        with StoredState(Path(folder) / STATE_FOLDER) as stored:
            self._engine.restore(stored, weights_only=weights_only)

    def digest(self) -> str:
        """A hash of this rank's part of the weights and of the optimizer's state."""
        # Under ZeRO-3 a rank holds its shard of a weight beside an empty parameter.
        weights = ((name, getattr(p, "ds_tensor", p)) for name, p in self._policy.named_parameters())
        states = self._engine.module.optimizer.optimizer.state.values()
        return digest_of([*weights, *optimizer_tensors(states)])


def _skip_shared_memory_op() -> None:
    """Leave collectives to gloo.

    DeepSpeed would compile a shared-memory all-reduce, which takes over a minute at the first start, and would use it
    even between nodes.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
