"""Sessions of vLLM's trainer side with two real engines of width 2, over gloo in the place of NCCL.

`test_trainer_side` breaks them at every point, with engines that are threads.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integration import gloo_transfer

pytestmark = pytest.mark.integration

LIMIT_S = 15.0
START_LIMIT_S = 300.0


class LocalLearner:
    """A learner of one rank in this process: the real model, source, sender and client, and a version."""

    def __init__(self, policy: Any, config: Any) -> None:
        from actors.weight_transfer.source import LearnerWeights
        from actors.weight_transfer.trainer import LearnerSource, open_sender
        from dphrl.learner.update import UpdateSettings

        self.policy_version, self.policy = 0, policy
        self.settings = UpdateSettings.from_config(config)
        self.engine = SimpleNamespace(forward=policy, device=torch.device("cpu"))
        self.source = LearnerSource(LearnerWeights(policy, zero_stage=0), records=True)
        self.sender = open_sender(self.source, "nccl", 0, 1)

    last_update = None

    def change(self, scale: float) -> None:
        """Another version, with weights that differ in every place."""
        generator = torch.Generator().manual_seed(self.policy_version)
        self.policy_version += 1
        with torch.no_grad():
            for parameter in self.policy.lm.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    async def send_weights(self, engines: Any, width: int, limit_s: float) -> Any:
        return await asyncio.to_thread(self.sender.send, engines, width, self.policy_version, limit_s)

    async def sent(self) -> Any:
        return self.source.summary

    async def score(self, sequences: Any) -> list[Any]:
        from dphrl.learner.update import score_sequences

        scored = score_sequences(sequences, self.engine, self.settings)
        return [scored[i] for i in range(len(sequences))]


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, make_config: Any, tiny_dir: str, prompts: list[Any]
) -> Iterator[SimpleNamespace]:
    import ray

    from actors.rollout_engine import RolloutEngine
    from actors.rollout_pool import RayRolloutPool
    from dphrl.learner.loading import load_policy

    folder = str(gloo_transfer.install(tmp_path_factory.mktemp("plugin")))
    sys.path.append(folder)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    config = make_config(
        sync={"backend": "nccl", "timeout_s": LIMIT_S, "num_probes": 4},
        rollout={"num_engines": 2, "tensor_parallel": 2},
    )
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=2**29,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}},
    )

    def spawn(index: int) -> Any:
        return RolloutEngine.options(num_cpus=0.5).remote(config, tiny_dir, index)  # type: ignore[attr-defined]

    class Starter:
        can_replace = True

        async def start(self, index: int) -> Any:
            ray.kill(engines[index])
            engines[index] = spawn(index)
            await asyncio.wait_for(engines[index].ready.remote(), START_LIMIT_S)
            return engines[index]

    engines = [spawn(i) for i in range(2)]
    learner = LocalLearner(load_policy(tiny_dir, config.model, temperature=config.rollout.temperature), config)
    pool = RayRolloutPool(engines, config, prompts[:4], "float32", Starter())  # type: ignore[arg-type]
    # A new engine's first probes take seconds of warm-up; none of the faults is made there.
    pool._steps.limit_s = 60.0
    ray.get([engine.ready.remote() for engine in engines], timeout=START_LIMIT_S)
    yield SimpleNamespace(pool=pool, learner=learner, config=config)
    ray.shutdown()
    import_module(gloo_transfer.NAME).wait_for_the_rest()
    sys.path.remove(folder)


def break_engine(parts: SimpleNamespace, index: int, method: str, how: str) -> None:
    import ray

    module = import_module(gloo_transfer.NAME)
    function, seconds = module.break_once, LIMIT_S + 1
    call = parts.pool.engines[index].__ray_call__.remote(
        lambda engine: engine._llm.collective_rpc(function, args=(method, how, seconds))
    )
    ray.get(call, timeout=60)


def refit(parts: SimpleNamespace) -> dict[str, float]:
    parts.learner.change(0.01)
    return dict(asyncio.run(parts.pool.refit(parts.learner)))


def test_weights_reach_every_worker_of_every_engine_again_and_again(parts: SimpleNamespace) -> None:
    for _ in range(2):
        assert refit(parts)["sync/logprob_gap_max"] <= 1e-4


@pytest.mark.long
def test_a_dead_worker_costs_its_engine_and_the_sync_ends_all_the_same(
    parts: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(parts.pool.engines)
    break_engine(parts, 1, "receive_weights", "dies")
    metrics = refit(parts)
    # The other was in the middle of the same sync. Whichever is up first joins, and nobody waits for the second.
    assert parts.pool.drain_metrics()["rollout/engines_replaced"] == len(parts.pool.engines) > 0
    assert metrics["sync/logprob_gap_max"] <= 1e-4
    assert not {*before.values()} & {*parts.pool.engines.values()}
    events = [record for record in caplog.records if getattr(record, "event", "") == "engine_lost"]
    lost = {record.facts["engine"]: record.facts for record in events}  # type: ignore[attr-defined]
    assert set(lost) == {0, 1}
    assert "beside an engine that failed" in lost[0]["reason"]
    assert (lost[1]["doing"], lost[1]["how"]) == ("take weights", "died")


def test_nothing_of_a_killed_engine_stays(parts: SimpleNamespace) -> None:
    import ray

    from actors.engine_processes import names_of_shared_memory

    engine = next(iter(parts.pool.engines.values()))
    processes = ray.get(engine.__ray_call__.remote(lambda engine: processes_of_this_one()), timeout=60)
    assert len(processes) == 3, "the actor and two workers"
    sockets = sockets_of(processes)
    names = {name for name in names_of_shared_memory() if name in mapped_by(processes)}
    os.kill(processes[0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while left := [process for process in processes if Path(f"/proc/{process}").exists()]:
        assert time.monotonic() < deadline, f"processes {left} stay"
        time.sleep(0.1)
    assert [socket for socket in sockets if Path(socket).exists()] == []
    assert not names & names_of_shared_memory()


def processes_of_this_one() -> list[int]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def sockets_of(processes: list[int]) -> list[str]:
    """The paths of Unix sockets that these processes have open."""
    paths = {
        fields[6]: fields[7]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if len(fields := line.split()) > 7
    }
    opened = {os.readlink(file) for process in processes for file in Path(f"/proc/{process}/fd").iterdir()}
    return [path for inode, path in paths.items() if f"socket:[{inode}]" in opened and "ray" not in path]


def mapped_by(processes: list[int]) -> str:
    return "".join(Path(f"/proc/{process}/maps").read_text() for process in processes)
