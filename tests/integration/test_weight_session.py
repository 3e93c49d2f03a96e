"""Sessions of vLLM's trainer side with two real engines of width 2 and a learner of two ZeRO-3 ranks, over gloo."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration import gloo_transfer

pytestmark = pytest.mark.integration

LIMIT_S = 4.0
SLACK_S = 5.0


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, make_config: Any, tiny_dir: str, prompts: list[Any]
) -> Iterator[SimpleNamespace]:
    import ray

    from actors.learner_group import RayLearner
    from actors.learner_rank import LearnerRank
    from actors.rollout_engine import RolloutEngine
    from actors.rollout_pool import RayRolloutPool

    folder = str(gloo_transfer.install(tmp_path_factory.mktemp("plugin")))
    sys.path.append(folder)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    engine_variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    config = make_config(
        sync={"backend": "nccl", "timeout_s": LIMIT_S, "num_probes": 4},
        rollout={"num_engines": 2, "tensor_parallel": 2},
        learner={"num_ranks": 2, "zero_stage": 3, "micro_batch_tokens": 96},
    )
    ray.init(address="local", num_cpus=2, object_store_memory=2**29, include_dashboard=False, log_to_driver=False)
    ranks = [LearnerRank.options(num_cpus=0.1, runtime_env={"env_vars": variables}).remote(config, i) for i in range(2)]

    def spawn(index: int) -> Any:
        options = {"num_cpus": 0.1, "runtime_env": {"env_vars": variables | engine_variables}}
        return RolloutEngine.options(**options).remote(config, tiny_dir, index)

    async def start() -> Any:
        master = await ranks[0].address.remote()
        connecting = [rank.connect.remote(master, tiny_dir) for rank in ranks]
        return await asyncio.wait_for(asyncio.gather(*connecting, *[e.ready.remote() for e in engines]), 180)

    engines = [spawn(i) for i in range(2)]

    async def start_engine(index: int) -> Any:
        ray.kill(pool.engines[index])
        engine = spawn(index)
        await asyncio.wait_for(engine.ready.remote(), 120)
        return engine

    pool = RayRolloutPool(engines, config, prompts[:4], "float32", start_engine)
    asyncio.run(start())
    yield SimpleNamespace(pool=pool, learner=RayLearner(ranks), config=config)
    ray.shutdown()
    sys.path.remove(folder)


def break_engine(parts: SimpleNamespace, index: int, method: str, how: str) -> None:
    import ray

    module = import_module(gloo_transfer.NAME)
    function, seconds = module.break_once, LIMIT_S + 1
    call = parts.pool.engines[index].__ray_call__.remote(
        lambda engine: engine._llm.collective_rpc(function, args=(method, how, seconds))
    )
    ray.get(call, timeout=60)


def recover(parts: SimpleNamespace) -> None:
    import ray

    function = import_module(gloo_transfer.NAME).end_session
    calls = [e.__ray_call__.remote(lambda e: e._llm.collective_rpc(function)) for e in parts.pool.engines]
    ray.get(calls, timeout=60)


def refit(parts: SimpleNamespace) -> dict[str, float]:
    return dict(asyncio.run(parts.pool.refit(parts.learner)))


def test_weights_reach_every_worker_of_every_engine_again_and_again(parts: SimpleNamespace) -> None:
    for version in range(2):
        parts.learner._policy_version = version
        assert refit(parts)["sync/logprob_gap_max"] <= 1e-4


@pytest.mark.parametrize(
    ("method", "how", "told"),
    [
        ("init_transfer_engine", "hangs", "did not join the learner's group within 4 s"),
        ("start_weight_update", "hangs", "did not start a weight update within 4 s"),
        ("receive_weights", "raises", "failed to take weights"),
        ("receive_weights", "hangs", "did not take weights within 4 s"),
        ("finish_weight_update", "raises", "failed to finish its weight update"),
    ],
)
def test_a_session_that_breaks_is_told_in_time_and_the_next_one_works(
    parts: SimpleNamespace, method: str, how: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from actors.weight_transfer.failures import SyncFailedError

    break_engine(parts, 1, method, how)
    began = time.monotonic()
    with pytest.raises(SyncFailedError) as failed:
        refit(parts)
    took = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{method} {how}: {took:.1f} s: {failed.value}")
    assert took <= (LIMIT_S if how == "hangs" else 0) + SLACK_S
    assert "rollout engine 1 (node " in str(failed.value)
    assert told in str(failed.value)
    recover(parts)
    assert refit(parts)["sync/logprob_gap_max"] <= 1e-4


def test_a_dead_worker_costs_its_engine_and_the_sync_ends_all_the_same(parts: SimpleNamespace) -> None:
    sync = parts.config.sync.model_copy(update={"on_failure": "replace"})
    parts.pool._repair._config = parts.config.model_copy(update={"sync": sync})
    before = list(parts.pool.engines)
    break_engine(parts, 1, "receive_weights", "dies")
    metrics = refit(parts)
    assert metrics["sync/engines_replaced"] == 2, "the other was in the middle of the same sync"
    assert metrics["sync/logprob_gap_max"] <= 1e-4
    assert not set(before) & set(parts.pool.engines)
