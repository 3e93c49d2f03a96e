"""Reward workers on Ray: a worker that dies costs a retry, never a silent 0."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

pytestmark = pytest.mark.integration


def items(*texts: str) -> list[tuple[Prompt, Completion]]:
    prompt = Prompt("p", "FACTOR 0 0 0 2 1 ?", (1,), "factor:00021", "factor")
    return [(prompt, Completion("p", i, (1,), text, (0.0,), "stop", 0)) for i, text in enumerate(texts)]


class Worker:
    """Grades as the real one does, but the first of them that gets a batch dies by SIGKILL."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def is_first(self) -> bool:
        """True for one call of all workers, also where two get their batches at the same moment."""
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def ready(self) -> bool:
        return True

    def grade(self, pairs: list[tuple[str, str]]) -> list[RewardResult]:
        if self.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        return [RewardResult(RewardStatus.CORRECT) for _ in pairs]


def test_real_worker_grades_in_order(ray_cluster: None, make_config: Any) -> None:
    from actors.reward import RewardWorker
    from actors.reward_pool import RayRewardPool

    config = make_config()
    pool = RayRewardPool([RewardWorker.options(num_cpus=0.1).remote(config.reward)], config)
    texts = (r"3 : 0 0 0 2 0 \boxed{ 3 * 0 0 0 0 7 }", r"\boxed{1*21}", "no answer", r"\boxed{7*3}")
    results = asyncio.run(_grade(pool, items(*texts)))
    assert [r.status for r in results] == ["correct", "wrong", "unparsable", "correct"]
    assert [r.score for r in results] == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("num_workers", "num_retries", "statuses"),
    [
        (2, 2, ["correct", "correct"]),
        (1, 1, ["correct", "correct"]),
        # Each worker has one of the two; one of them dies.
        (2, 0, ["correct", "infrastructure_error"]),
        (1, 0, ["infrastructure_error", "infrastructure_error"]),
    ],
)
def test_a_killed_worker_is_retried_then_typed(
    ray_cluster: None, make_config: Any, tmp_path: Path, num_workers: int, num_retries: int, statuses: list[str]
) -> None:
    import ray

    from actors.reward_pool import RayRewardPool

    config = make_config(reward={"num_retries": num_retries})
    workers = [
        ray.remote(Worker).options(num_cpus=0.1, max_restarts=-1).remote(str(tmp_path / "died"))
        for _ in range(num_workers)
    ]
    results = asyncio.run(_grade(RayRewardPool(workers, config), items("a", "b")))
    assert sorted(r.status for r in results) == statuses
    assert all(r.score == (1.0 if r.status == "correct" else None) for r in results)


class Fragile:
    """A reward that cannot start while there is a file of this name."""

    def __init__(self, obstacle: str) -> None:
        if Path(obstacle).exists():
            raise OSError("no licence")

    def __call__(self, completion: str, answer: str) -> bool:
        return completion == "right"


def test_a_worker_whose_restart_fails_starts_again_once_it_can(
    ray_cluster: None, make_config: Any, tmp_path: Path
) -> None:
    import ray

    from actors.reward import RewardWorker
    from actors.reward_pool import RayRewardPool

    obstacle = tmp_path / "obstacle"
    name = "tests.integration.test_reward_pool:Fragile"
    config = make_config(reward={"name": name, "params": {"obstacle": str(obstacle)}})
    worker = RewardWorker.options(num_cpus=0.1, max_restarts=-1).remote(config.reward)
    pid = ray.get(worker.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    pool = RayRewardPool([worker], config)

    async def grade() -> list[RewardResult]:
        obstacle.touch()
        ray.kill(worker, no_restart=False)
        # Ray tells it to end. On a busy machine it might grade what comes until then.
        async with asyncio.timeout(60):
            while psutil.pid_exists(pid):
                await asyncio.sleep(0.05)
        grading = asyncio.create_task(_grade(pool, items("right", "wrong")))
        await asyncio.sleep(5)
        assert not grading.done(), "it is down, and waited for"
        obstacle.unlink()
        return await asyncio.wait_for(grading, 60)

    assert [result.status for result in asyncio.run(grade())] == ["correct", "wrong"]
    obstacle.touch()
    first = RewardWorker.options(num_cpus=0.1, max_restarts=-1).remote(config.reward)
    with pytest.raises(ray.exceptions.RayActorError, match="no licence"):
        ray.get(first.ready.remote(), timeout=60)


class StuckWorker(Worker):
    """The first of them that gets a batch never comes back from it."""

    def grade(self, pairs: list[tuple[str, str]]) -> list[RewardResult]:
        if self.is_first():
            time.sleep(3600)
        return [RewardResult(RewardStatus.CORRECT) for _ in pairs]


def test_a_stuck_worker_is_started_again(
    ray_cluster: None, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from actors import reward_pool as pools

    monkeypatch.setattr(pools, "WORKER_GRACE_S", 20.0)
    config = make_config(reward={"num_retries": 1, "timeout_s": 0.1})
    worker = ray.remote(StuckWorker).options(num_cpus=0.1, max_restarts=-1).remote(str(tmp_path / "stuck"))
    ray.get(worker.ready.remote())
    monkeypatch.setattr(pools, "within", _soon(pools.within))
    results = asyncio.run(asyncio.wait_for(_grade(pools.RayRewardPool([worker], config), items("a", "b")), 100))
    assert [r.status for r in results] == ["correct"] * 2


def _soon(within: Any) -> Any:
    """The same wait, with the grading's deadline cut to two seconds."""

    async def cut(waiting: Any, seconds: float, setting: str, what: str) -> Any:
        return await within(waiting, 2.0 if what.endswith("gradings") else seconds, setting, what)

    return cut


class SlowWorker:
    """Right, but slower than completions arrive."""

    def ready(self) -> bool:
        return True

    def grade(self, pairs: list[tuple[str, str]]) -> list[RewardResult]:
        time.sleep(0.1)
        return [RewardResult(RewardStatus.CORRECT) for _ in pairs]


def test_waiting_in_line_for_a_busy_worker_is_no_failure(
    ray_cluster: None, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from actors import reward_pool as pools

    # 40 batches of 0.1 s on one worker against a deadline of 1 s each.
    monkeypatch.setattr(pools, "WORKER_GRACE_S", 0.9)
    config = make_config(reward={"num_retries": 0, "timeout_s": 0.1})
    worker = ray.remote(SlowWorker).options(num_cpus=0.1, max_restarts=-1).remote()
    ray.get(worker.ready.remote())

    async def run() -> list[Any]:
        pool = pools.RayRewardPool([worker], config)
        return await asyncio.gather(*[pool.grade(items("a")) for _ in range(40)])

    assert {result.status for results in asyncio.run(run()) for result in results} == {"correct"}


async def _grade(pool: Any, graded: Any) -> Any:
    return await pool.grade(graded)
