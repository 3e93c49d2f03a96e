"""Weights from a real learner rank to a real engine by vLLM's nccl (two GPUs) and ipc (one GPU).

It needs CUDA builds of torch, vllm, ray and deepspeed, and about three minutes: `pytest -m gpu tests/gpu -s`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

START_LIMIT_S = 300.0


@pytest.fixture(autouse=True)
def libraries() -> None:
    for name in ("vllm", "ray", "deepspeed"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=torch.cuda.device_count(),
        object_store_memory=2**30,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}},
    )
    yield
    ray.shutdown()


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_an_engine_holds_what_the_learner_sent(
    gpu_cluster: None, make_config: Any, tiny_dir: str, prompts: list[Any], backend: str
) -> None:
    """Three syncs, an update between them: the proof of each is content and log-probs, as in a run."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl joins processes on different GPUs, and here is one")
    config = make_config(
        # Content is checked to the bit; the bound on log-probs allows for other kernels in engine and learner.
        sync={"backend": backend, "timeout_s": 120, "num_probes": 4, "max_mean_logprob_gap": 1e-2},
        cluster={"colocate": backend == "ipc"},
        # An engine beside a learner takes its part of the GPU first; the tiny learner needs little.
        rollout={"gpu_memory_utilization": 0.3, "enforce_eager": True},
        learner={"num_ranks": 1, "zero_stage": 3, "micro_batch_tokens": 96},
    )
    asyncio.run(_sync_three_times(config, tiny_dir, prompts))


async def _sync_three_times(config: Any, tiny_dir: str, prompts: list[Any]) -> None:
    import ray

    from actors.learner_group import RayLearner
    from actors.learner_rank import LearnerRank
    from actors.rollout_engine import RolloutEngine
    from actors.rollout_pool import RayRolloutPool
    from tests.integration.test_learner import make_batches

    rank = LearnerRank.options(num_cpus=1, num_gpus=1).remote(config, 0)  # type: ignore[attr-defined]
    actors = [rank]
    try:
        devices = None
        if config.cluster.colocate:
            devices = [str(gpu) for gpu in await rank.gpu_ids.remote()]
        options = {"num_cpus": 1, "num_gpus": 0 if devices else 1}
        engine = RolloutEngine.options(**options).remote(config, tiny_dir, 0, devices)  # type: ignore[attr-defined]
        actors.append(engine)
        # The engine measures free memory while it starts, so the learner waits.
        await asyncio.wait_for(engine.ready.remote(), START_LIMIT_S)
        master = await rank.address.remote()
        await asyncio.wait_for(rank.connect.remote(master, tiny_dir), START_LIMIT_S)
        learner = RayLearner([rank])
        pool = RayRolloutPool([engine], config, prompts[:4], "float32")
        for batch in (None, *make_batches(prompts)[:2]):
            if batch is not None:
                await learner.update(batch)
            began = time.monotonic()
            metrics = await pool.refit(learner)
            gap, took = metrics["sync/logprob_gap_max"], time.monotonic() - began
            print(f"{config.sync.backend}: version {learner.policy_version}, gap {gap:.2g}, {took:.2f} s")
            assert gap < 1
        completions = [c async for done in pool.generate(prompts[:4], 1, seed=0) for c in done]
        assert {completion.policy_version for completion in completions} == {2}
    finally:
        for actor in actors:
            ray.kill(actor)
