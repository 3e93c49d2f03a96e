"""Orders to a run that is under way: their files, what the run makes of them, and where more actors find room."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.reward_pool import RayRewardPool
from cluster import orders, scaling
from cluster.cli import app
from cluster.orders import Answer, Order, Orders, RunSilentError, give_order
from cluster.planning.growth import plan_more
from cluster.planning.placement import Node, PlacementError
from cluster.scaling import Scaler, numbers_to_change
from dphrl.config.loading import InputError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (orders, scaling):
        monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(scaling, "_nodes", lambda: frozenset(["here"]))


# ------------------------------------------------------------------------------------- the files


def answering(run: Orders, *answers: tuple[Any, str]) -> Callable[[], None]:
    """The run's side, which gives these answers to the first order."""

    def serve() -> None:
        while (order := run.next()) is None:
            threading.Event().wait(0.01)
        for state, message in answers:
            run.answer(order, state, message)
            threading.Event().wait(0.1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread.join


def test_the_run_s_answers_come_to_whoever_gave_the_order(tmp_path: Path) -> None:
    run, said = Orders(tmp_path), []
    run.open()
    ended = answering(run, ("working", "1 -> 2: begun"), ("working", "1 engine(s) start"), ("done", "1 -> 2: done"))
    answer = give_order(tmp_path, 2, None, wait_s=30.0, on_message=said.append)
    ended()
    assert (answer.state, said) == ("done", ["1 -> 2: begun", "1 engine(s) start", "1 -> 2: done"])
    assert run.next() is None, "an order is taken once"
    run.close()
    assert not (tmp_path / "control").exists()


def test_without_waiting_it_is_enough_that_the_run_took_it_up(tmp_path: Path) -> None:
    run = Orders(tmp_path)
    run.open()
    ended = answering(run, ("working", "1 -> 2: begun"))
    assert give_order(tmp_path, 2, None, wait_s=0.0, on_message=lambda line: None).state == "working"
    ended()


def test_an_order_that_the_run_refuses_is_bad_input(tmp_path: Path) -> None:
    run = Orders(tmp_path)
    run.open()
    ended = answering(run, ("refused", "8 more engines: 8 rollout x 1 = 8 GPUs"))
    with pytest.raises(InputError, match=r"^8 more engines: 8 rollout x 1"):
        give_order(tmp_path, 9, None, wait_s=30.0, on_message=lambda line: None)
    ended()


def test_a_run_that_takes_too_long_is_told_what_is_awaited(tmp_path: Path) -> None:
    run = Orders(tmp_path)
    run.open()
    ended = answering(run, ("working", "1 engine(s) start"))
    with pytest.raises(RunSilentError, match=r"^after 0\.3 s .* the run still says: 1 engine\(s\) start$"):
        give_order(tmp_path, 2, None, wait_s=0.3, on_message=lambda line: None)
    ended()


@pytest.mark.parametrize(
    ("made", "told"),
    [("", "no such folder"), ("run", "no training runs there now"), ("run/control", "nobody answered")],
)
def test_where_nobody_takes_orders(tmp_path: Path, made: str, told: str) -> None:
    if made:
        (tmp_path / made).mkdir(parents=True)
    with pytest.raises(InputError, match=told):
        give_order(tmp_path / "run", 2, None, wait_s=0.0, on_message=lambda line: None, answer_s=0.1)
    assert not list(tmp_path.rglob("order.json")), "no later run carries it out"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--rollout N, --reward M: give at least one"),
        (["--rollout", "0"], "--rollout 0: a run needs at least one"),
        (["--reward", "-1"], "--reward -1: a run needs at least one"),
        (["--rollout", "2"], "no such folder"),
    ],
)
def test_a_mistaken_command_is_one_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["scale", str(tmp_path / "missing"), *arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert told in line


# ------------------------------------------------------------------------------------- the run's side


def test_the_lowest_free_numbers_come_and_those_that_do_not_serve_leave_first() -> None:
    assert numbers_to_change(frozenset({0, 2}), {0, 2}, 5) == ([1, 3, 4], [])
    assert numbers_to_change(frozenset({0, 1, 2}), {0, 2}, 1) == ([], [1, 2])
    assert numbers_to_change(frozenset({0, 1}), {0, 1}, 2) == ([], [])


class Rollouts:
    """A pool whose new engines join after some polls, but for those in `broken`, which are given up."""

    def __init__(self, num_engines: int, broken: frozenset[int] = frozenset()) -> None:
        self.engines = dict.fromkeys(range(num_engines))
        self.coming: dict[int, int] = {}
        self.broken = broken

    @property
    def numbers(self) -> frozenset[int]:
        for index in list(self.coming):
            self.coming[index] -= 1
            if self.coming[index] == 0:
                del self.coming[index]
                if index not in self.broken:
                    self.engines[index] = None
        return frozenset(self.engines) | frozenset(self.coming)

    def is_up(self, index: int) -> bool:
        return self.coming.get(index, 9) < 3

    def add(self, index: int) -> None:
        self.coming[index] = 6

    async def remove(self, index: int) -> None:
        del self.engines[index]


class Workers:
    def __init__(self, pool: Any) -> None:
        self.pool, self.ended = pool, []

    async def start_worker(self) -> str:
        return f"worker {len(self.pool.workers)}"

    async def end_worker(self, worker: str) -> None:
        self.ended.append(worker)


def carry_out(
    make_config: Any,
    tmp_path: Path,
    order: Order,
    *,
    engines: int = 1,
    room: str = "",
    broken: Any = (),
    colocated: Any = (),
) -> tuple[Answer, Rollouts, Any, list[str]]:
    def check_room(new: Any, num_workers: int) -> None:
        if room:
            raise PlacementError(room)

    async def run() -> tuple[Answer, Rollouts, Any, list[str]]:
        rollouts, rewards = Rollouts(engines, frozenset(broken)), RayRewardPool(["worker 0"], make_config())
        workers = Workers(rewards)
        actors: Any = SimpleNamespace(can_replace=not colocated, check_room=check_room)
        scaler = Scaler(tmp_path, make_config(), actors, workers)
        async with scaler.serving():
            (tmp_path / "control" / "order.json").write_text(json.dumps(order.__dict__))
            scaler.up(rollouts, rewards)  # type: ignore[arg-type]
            while (
                not (found := tmp_path / "control" / "answer.json").exists()
                or (answer := Answer(**json.loads(found.read_text()))).state == "working"
            ):
                await asyncio.sleep(0.01)
        return answer, rollouts, rewards, workers.ended

    return asyncio.run(asyncio.wait_for(run(), 20))


def test_a_run_grows_and_shrinks(make_config: Any, tmp_path: Path) -> None:
    answer, rollouts, rewards, _ = carry_out(make_config, tmp_path, Order("a", 3, 2))
    assert answer == Answer("a", "done", "1 -> 3 engines, 1 -> 2 reward workers: done")
    assert set(rollouts.engines) == {0, 1, 2}
    assert rewards.workers == {0: "worker 0", 1: "worker 1"}
    answer, rollouts, rewards, ended = carry_out(make_config, tmp_path, Order("b", 1), engines=3)
    assert answer.message == "3 -> 1 engines, 1 -> 1 reward workers: done"
    assert (set(rollouts.engines), ended) == ({0}, [])


@pytest.mark.parametrize(
    ("changes", "state", "told"),
    [
        ({"room": "2 more engines: 2 rollout x 1 = 2 CPUs"}, "refused", "2 more engines: 2 rollout x 1 = 2 CPUs"),
        ({"colocated": [0]}, "refused", "share the learner's GPUs"),
        ({"broken": [2]}, "failed", "rollout engine 2 did not start; run.log says why"),
    ],
)
def test_what_cannot_be_is_answered(make_config: Any, tmp_path: Path, changes: Any, state: str, told: str) -> None:
    answer, *_ = carry_out(make_config, tmp_path, Order("a", 3), **changes)
    assert answer.state == state
    assert told in answer.message


def test_engines_start_on_nodes_that_join_up_to_the_maximum(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = {"here"}
    monkeypatch.setattr(scaling, "_nodes", lambda: frozenset(present))
    monkeypatch.setattr(scaling, "NODES_POLL_S", 0.01)
    asked: list[Any] = []

    def fitting_on(nodes: Any, indices: Any) -> int:
        asked.append((set(nodes), list(indices)))
        return 1

    async def run() -> None:
        rollouts = Rollouts(1)
        actors: Any = SimpleNamespace(can_replace=True, fitting_on=fitting_on)
        scaler = Scaler(tmp_path, make_config(rollout={"max_engines": 3}), actors, None)  # type: ignore[arg-type]
        async with scaler.serving():
            scaler.up(rollouts, RayRewardPool(["worker 0"], make_config()))  # type: ignore[arg-type]
            await asyncio.sleep(0.1)
            assert not asked, "nothing joined"
            present.add("new")
            while not rollouts.coming:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        assert asked == [({"new"}, [1, 2])]
        assert list(rollouts.coming) == [1], "as many as fit there"

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_error_of_the_disk_or_of_ray_ends_no_loop_and_is_told_once(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scaling, "NODES_POLL_S", 0.01)
    num_asked = {"room": 0, "orders": 0}

    def failing(what: str, value: Any) -> Any:
        def ask(*_: Any) -> Any:
            num_asked[what] += 1
            if num_asked[what] <= 3:
                raise OSError(f"no {what}")
            return value

        return ask

    async def run() -> None:
        rollouts = Rollouts(1)
        actors: Any = SimpleNamespace(can_replace=True, fitting_on=failing("room", 1))
        scaler = Scaler(tmp_path, make_config(rollout={"max_engines": 2}), actors, None)  # type: ignore[arg-type]
        monkeypatch.setattr(scaler._orders, "next", failing("orders", None))
        monkeypatch.setattr(scaling, "_nodes", lambda: frozenset(["here", "new"]))
        async with scaler.serving():
            scaler.up(rollouts, RayRewardPool(["worker 0"], make_config()))  # type: ignore[arg-type]
            while not rollouts.coming or num_asked["orders"] < 4:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 20))
    told = sorted(record.getMessage() for record in caplog.records if "tries again" in record.getMessage())
    assert told == [
        "nodes that join are not used: OSError: no room; the run tries again",
        "orders to scale are not taken: OSError: no orders; the run tries again",
    ]


# ------------------------------------------------------------------------------------- workers come and go


def test_a_worker_that_leaves_gives_its_verdicts_first(make_config: Any) -> None:
    async def run() -> None:
        pool = RayRewardPool(["a", "b"], make_config())
        async with pool._borrowed(None, 1) as index:
            assert index == 0
            leaving = asyncio.create_task(pool.remove("a"))
            await asyncio.sleep(0.01)
            assert not leaving.done()
        await leaving
        assert pool.workers == {1: "b"}
        await pool.add("c")
        async with pool._borrowed(None, 1) as first, pool._borrowed(first, 1) as second:
            assert {first, second} == {1, 2}
        assert pool.live_metrics()["queue/reward_workers_busy"] == 0

    asyncio.run(asyncio.wait_for(run(), 20))


# ------------------------------------------------------------------------------------- room


def test_more_engines_find_room_beside_what_runs(make_config: Any) -> None:
    config = make_config(rollout={"cpus_per_engine": 0.75})
    free = [Node("a", 1.0), Node("b", 2.0)]
    placed = plan_more(config, "rollout", [1, 4], free, with_gpus=False)
    assert [(bundle.index, bundle.node) for bundle in placed] == [(1, "b"), (4, "b")]
    with pytest.raises(
        PlacementError, match=r"^4 more engines: 4 rollout x 0\.75 = 3 CPUs, each within one node; free"
    ):
        plan_more(config, "rollout", [1, 2, 3, 4], free, with_gpus=False)
    with pytest.raises(PlacementError, match=r"1 more engine: .*free on the nodes: \(0\.5 CPUs\)"):
        plan_more(config, "rollout", [1], [Node("a", 0.5)], with_gpus=False)


def test_engines_with_gpus_fill_nodes_that_are_in_use(make_config: Any) -> None:
    config = make_config(rollout={"tensor_parallel": 2, "accelerator": "H100"})
    free = [Node("whole", 16, 8, "H100"), Node("rest", 16, 2, "H100"), Node("other", 16, 2, "L4")]
    placed = plan_more(config, "rollout", [1, 2], free, with_gpus=True)
    assert [bundle.node for bundle in placed] == ["rest", "whole"]
    with pytest.raises(PlacementError, match=r"5 more engines: 5 rollout x 2 = 10 GPUs of type H100 and .* CPUs"):
        plan_more(config, "rollout", range(5), free[:1], with_gpus=True)
