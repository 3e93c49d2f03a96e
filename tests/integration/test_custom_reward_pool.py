"""Users' rewards in the reward workers: the same pool and deadlines, remote functions too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dphrl.config.data import RewardConfig
from dphrl.types import Completion, Prompt

pytestmark = pytest.mark.integration

MODULE = """
import ray, time

@ray.remote(num_cpus=0)
def remote(completion, answer):
    return completion == answer

def slow(completion, answer):
    time.sleep(3600 if completion == "hang" else 0)
    return completion == answer
"""


@pytest.mark.parametrize(
    ("name", "timeout_s", "texts", "statuses"),
    [
        # A remote function's first call starts a process, which takes seconds on a busy machine.
        ("remote", 60.0, ("4", "5"), ["correct", "wrong"]),
        ("slow", 2.0, ("4", "hang", "5"), ["correct", "infrastructure_error", "wrong"]),
    ],
)
def test_a_users_reward_in_the_pool(
    tmp_path: Path, make_config: Any, name: str, timeout_s: float, texts: tuple[str, ...], statuses: list[str]
) -> None:
    import ray

    from actors.reward import RewardWorker
    from actors.reward_pool import RayRewardPool

    (tmp_path / "their_rewards.py").write_text(MODULE)
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=2**29,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
    )
    try:
        reward = RewardConfig(name=f"their_rewards:{name}", timeout_s=timeout_s, num_retries=1)
        config = make_config().model_copy(update={"reward": reward})
        pool = RayRewardPool([RewardWorker.options(num_cpus=0.1).remote(reward) for _ in range(2)], config)
        prompt = Prompt("p", "?", (1,), "4", "theirs")
        items = [(prompt, Completion("p", i, (1,), text, (0.0,), "stop", 0)) for i, text in enumerate(texts)]
        assert [r.status for r in asyncio.run(_grade(pool, items))] == statuses
        metrics = pool.drain_metrics()
        assert metrics["reward/num_retried"] == statuses.count("infrastructure_error")
        assert metrics["reward/latency_max_s"] >= metrics["reward/latency_mean_s"] > 0
        assert pool.drain_metrics() == {}
    finally:
        ray.shutdown()


async def _grade(pool: Any, items: Any) -> Any:
    return await pool.grade(items)
