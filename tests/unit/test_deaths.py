"""Actors that die or hang: what is told, what is started again, what is given up. With stand-ins for Ray's actors."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayTaskError

from actors import buffer, learner_group, reference, reward_pool, watched
from actors.buffer import RayReferenceStore
from actors.last_words import is_broken_link, is_device_failure, last_words
from actors.learner_group import RayLearner
from actors.reference import run_stage
from actors.reward_pool import RayRewardPool
from actors.watched import StuckError, Watched, answer_of
from dphrl.inline import InlineSystem
from dphrl.protocols import LearnerLostError
from dphrl.recovery import Recovery
from dphrl.tracking.console import Console
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, TrainBatch

NOTHING_KNOWN = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) ..."
)


def death(message: str = NOTHING_KNOWN, pid: int = 4711) -> ActorDiedError:
    context = ActorDiedErrorContext(class_name="X", actor_id=b"0" * 16, pid=pid, node_ip_address="10.0.0.7")
    context.error_message = message
    return ActorDiedError(context)


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("f", f"Traceback ...\n{cause}", cause).as_instanceof_cause()  # type: ignore[no-any-return]


def handle(**methods: Any) -> Any:
    return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})


async def answer(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def fail(error: Exception) -> Any:
    await asyncio.sleep(0)
    raise error


async def hang() -> Any:
    await asyncio.sleep(60)


# ---------------------------------------------------------------------------------- last words


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (death(), "learner rank 1 (node 10.0.0.7, process 4711) died: its process was killed by a signal or crashed"),
        (
            death(
                "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: killed due to the node running low on memory."
            ),
            "learner rank 1 (node 10.0.0.7, process 4711) died: the memory of its node was full, and Ray killed it",
        ),
        (OutOfMemoryError("..."), "learner rank 1 died: the memory of its node was full, and Ray killed it"),
        (
            death(
                "The actor died because its node has died. Node Id: abc\n\tthe actor's node was terminated "
                "unexpectedly: health check failed"
            ),
            "learner rank 1 (node 10.0.0.7, process 4711) died: its node is gone",
        ),
        (
            death("The actor is dead because it was killed by `ray.kill`."),
            "learner rank 1 (node 10.0.0.7, process 4711) died: it was ended on purpose",
        ),
        (ActorUnavailableError("RPC error", b"0" * 16), "learner rank 1 cannot be reached: its process restarts"),
        (raised(ValueError("first\nlast line")), "learner rank 1 failed: ValueError: last line"),
        (
            raised(RuntimeError("CUDA error: uncorrectable ECC error encountered")),
            "learner rank 1 has a failing device: RuntimeError: CUDA error: uncorrectable ECC",
        ),
        (StuckError("learner rank 1 did not update within 5 s"), "learner rank 1 did not update within 5 s"),
    ],
)
def test_an_error_of_ray_becomes_a_line(error: Exception, told: str) -> None:
    line = last_words("learner rank 1", error)
    assert line.startswith(told)
    assert "\n" not in line


def test_the_end_of_a_peer_is_told_from_errors_of_the_ranks_own() -> None:
    closed = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20154"
    assert is_broken_link(raised(RuntimeError(closed)))
    assert not is_broken_link(raised(ValueError("Connection closed by peer, says a file")))
    assert not is_broken_link(raised(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert is_device_failure(raised(RuntimeError("CUDA error: an illegal memory access was encountered")))
    assert not is_device_failure(raised(RuntimeError("CUDA error: out of memory")))


# ---------------------------------------------------------------------------------- what hangs


def test_an_actor_tells_where_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    actor, told = Watched(), list[tuple[str, str]]()

    def look() -> None:  # as Ray does, in a thread of its own
        time.sleep(0.05)  # until this thread hangs below
        told.append(actor.stack())

    looking = threading.Thread(target=look)
    looking.start()
    looking.join()
    ((where, stacks),) = told
    assert where.startswith("node 10.0.0.7, process ")
    assert "thread MainThread:" in stacks
    assert "test_an_actor_tells_where_it_hangs" in stacks
    assert "in stack" not in stacks, "the thread that looks is not of interest"
    assert actor.idle_s() > 0
    actor.moved()
    assert actor.idle_s() < 1


def test_what_hangs_is_told_with_its_stacks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    actor = handle(stack=lambda: answer(("node 10.0.0.7, process 5", "thread MainThread:\n  in gather")))
    told = r"^learner rank 1 \(node 10.0.0.7, process 5\) did not save within 0.05 s \(learner.timeout_s\); asked at "
    with pytest.raises(StuckError, match=told + "..:..:.. UTC$"):
        asyncio.run(answer_of(actor, "learner rank 1", "save", hang(), 0.05, "learner.timeout_s"))
    warning, stacks = caplog.records
    assert warning.getMessage() == "learner rank 1 (node 10.0.0.7, process 5) hangs; its stacks are in run.log"
    assert stacks.levelno == logging.INFO
    assert "in gather" in stacks.getMessage()


def test_who_does_not_tell_is_told_as_well(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "STACK_TIMEOUT_S", 0.05)
    with pytest.raises(StuckError, match=r"^learner rank 1 did not save within"):
        asyncio.run(answer_of(handle(stack=hang), "learner rank 1", "save", hang(), 0.05, "learner.timeout_s"))
    assert "hangs, and does not tell where within 0.05 s (TimeoutError): its node is gone, or its code" in caplog.text


def test_long_work_may_take_longer_than_its_limit_as_long_as_it_goes_on() -> None:
    began = time.monotonic()

    async def work() -> str:
        await asyncio.sleep(0.4)
        return "done"

    def idle_s() -> Any:
        return answer(0.0 if time.monotonic() - began < 0.3 else 9.0)

    actor = handle(idle_s=idle_s, stack=lambda: answer(("there", "")))
    done = asyncio.run(answer_of(actor, "rank", "update", asyncio.wait_for(work(), 5), 0.25, "s", moves=True))
    assert done == "done"
    began = time.monotonic() - 9
    with pytest.raises(StuckError, match="counted from its last progress"):
        asyncio.run(answer_of(actor, "rank", "update", work(), 0.1, "s", moves=True))


def test_a_rank_on_a_node_that_is_gone_is_waited_for_until_ray_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = [ActorUnavailableError("RPC error", b"0" * 16), death("its node has died")]

    async def no_time(seconds: float) -> None:
        return None

    monkeypatch.setattr(watched.asyncio, "sleep", no_time)
    asyncio.run(watched.settled(handle(idle_s=lambda: fail(told.pop(0)))))
    assert told == []
    asyncio.run(watched.settled(handle(idle_s=lambda: answer(0.0))))


# ---------------------------------------------------------------------------------- the learner


def rank(update: Callable[[Any], Any], idle: Callable[[], Any] = lambda: answer(0.0)) -> Any:
    return handle(update=update, idle_s=idle, stack=lambda: answer(("node 10.0.0.8, process 6", "in recv")))


def update(*ranks: Any, timeout_s: float = 5.0) -> Any:
    return asyncio.run(RayLearner(ranks, timeout_s=timeout_s).update(TrainBatch(0, 0, (), 1e-3)))


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_group.ray, "put", lambda value: value)


PEER_GONE = raised(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:20154"))


def test_the_rank_that_died_is_named_and_not_the_one_that_told_of_it() -> None:
    survivor = rank(lambda batch: fail(PEER_GONE))
    dead = rank(lambda batch: hang(), idle=lambda: fail(death()))
    with pytest.raises(
        LearnerLostError, match=r"^learner rank 1 \(node 10.0.0.7, process 4711\) died: its process was"
    ):
        update(survivor, dead)


def test_ranks_that_lost_each_other_are_a_lost_learner_too(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LearnerLostError, match=r"^the learner failed: RuntimeError: .*Connection closed by peer"):
        update(rank(lambda batch: fail(PEER_GONE)), rank(lambda batch: hang()))
    assert "learner rank 1 (node 10.0.0.8, process 6) hangs" in caplog.text


def test_a_rank_that_hangs_is_a_lost_learner() -> None:
    with pytest.raises(LearnerLostError, match=r"^learner rank 0 \(node 10.0.0.8, process 6\) did not update within"):
        update(rank(lambda batch: hang(), idle=lambda: answer(9.0)), timeout_s=0.05)


def test_an_error_of_the_ranks_own_code_is_no_loss() -> None:
    with pytest.raises(ValueError, match="no such batch"):
        update(rank(lambda batch: fail(raised(ValueError("no such batch")))), rank(lambda batch: hang()))


def test_a_new_learner_is_at_version_0_and_counted() -> None:
    learner = RayLearner([rank(lambda batch: answer({"learner/grad_norm": 1.0}))], timeout_s=5.0)
    batch = TrainBatch(0, 0, (), 1e-3)
    assert "learner/restarts" not in asyncio.run(learner.update(batch))
    learner.begin_anew()
    assert learner.policy_version == 0
    assert learner.last_update is None
    assert asyncio.run(learner.update(batch))["learner/restarts"] == 1


# ---------------------------------------------------------------------------------- the run's recovery


class World:
    """A system whose learner is lost as often as it is told to, and a run folder."""

    def __init__(self, folder: Path, make_config: Any, max_restarts: int, losses: int) -> None:
        self.folder, self.losses, self.num_restarts, self.num_tries = folder, losses, 0, 0
        config = make_config(learner={"max_restarts": max_restarts})
        system: Any = self
        self.recovery = Recovery(config, system, folder, Console())

    async def restart_learner(self, on_ready: Any) -> None:
        self.num_restarts += 1

    def checkpoint(self, step: int) -> None:
        path = self.folder / "checkpoints" / f"step_{step}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")

    async def work(self) -> str:
        self.num_tries += 1
        if self.num_tries <= self.losses:
            raise LearnerLostError("learner rank 1 died")
        return "done"


def test_work_is_repeated_with_another_learner(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path, make_config, max_restarts=2, losses=2)
    world.checkpoint(4)
    assert asyncio.run(world.recovery.repeat(world.work)) == "done"
    assert (world.num_restarts, world.num_tries) == (2, 3)
    first, second = (record for record in caplog.records if hasattr(record, "event"))
    assert first.getMessage().startswith(
        "learner rank 1 died. The learner starts again and goes on after step 4; rollouts under way are given up; "
        "restart 1 of 2 since the last checkpoint"
    )
    assert "restart 2 of 2" in second.getMessage()
    assert (first.event, first.facts["step"]) == ("learner_restarted", 4)


@pytest.mark.parametrize(
    ("max_restarts", "told"), [(2, "was started again 2 times since"), (0, "is not started again")]
)
def test_restarts_without_a_checkpoint_between_are_bounded(
    make_config: Any, tmp_path: Path, max_restarts: int, told: str
) -> None:
    world = World(tmp_path, make_config, max_restarts, losses=9)
    world.checkpoint(4)
    with pytest.raises(
        LearnerLostError, match=rf"^learner rank 1 died. The learner {told} .*--resume goes on from step 4$"
    ):
        asyncio.run(world.recovery.repeat(world.work))
    assert world.num_restarts == max_restarts


def test_a_checkpoint_between_makes_restarts_count_anew(make_config: Any, tmp_path: Path) -> None:
    world = World(tmp_path, make_config, max_restarts=1, losses=3)

    async def work() -> str:
        world.checkpoint(world.num_tries + 1)
        return await world.work()

    assert asyncio.run(world.recovery.repeat(work)) == "done"
    assert world.num_restarts == 3


def test_a_learner_that_does_not_start_again_is_tried_so_often_and_ends_the_run(
    make_config: Any, tmp_path: Path
) -> None:
    world = World(tmp_path, make_config, max_restarts=3, losses=1)
    num_tries = 0

    async def no_room(on_ready: Any) -> None:
        nonlocal num_tries
        num_tries += 1
        raise ExceptionGroup("start", [RuntimeError("waited 120 s for 2 GPUs")])

    world.restart_learner = no_room  # type: ignore[method-assign]
    said = "^the learner did not start again: waited 120 s for 2 GPUs. .* 3 times since .*; --resume starts at step 1"
    with pytest.raises(LearnerLostError, match=said):
        asyncio.run(world.recovery.repeat(world.work))
    assert num_tries == 3


def test_other_errors_are_none_of_the_recoverys(make_config: Any, tmp_path: Path) -> None:
    world = World(tmp_path, make_config, max_restarts=3, losses=0)

    async def work() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(world.recovery.repeat(work))
    assert world.num_restarts == 0


def test_inline_nothing_is_started_again() -> None:
    with pytest.raises(AssertionError):
        asyncio.run(InlineSystem.restart_learner(object(), print))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- buffer and reference stage


@pytest.mark.parametrize("error", [death(), raised(ObjectLostError("0" * 56, None, ""))], ids=["dead", "object lost"])
def test_a_lost_buffer_is_filled_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    revived: list[Any] = []

    async def revive() -> Any:
        revived.append(handle(sample=lambda step, num_rows: answer([step] * num_rows)))
        return revived[-1]

    store = RayReferenceStore(handle(sample=lambda *_: fail(error)), frozenset(), frozenset(), revive, 5.0)
    assert asyncio.run(store.sample(2, 3)) == [2, 2, 2]
    assert [store.actor] == revived
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["buffer_restarted"]
    assert asyncio.run(store.sample(3, 1)) == [3]


@pytest.mark.parametrize("error", [death(), TimeoutError("waited")], ids=["dead", "silent"])
def test_a_buffer_whose_successor_is_lost_too_is_filled_once_more(error: Exception) -> None:
    """As when its node goes just after its process: the successor is placed there before anybody knows."""
    successors: list[Any] = [fail(error), answer(handle(sample=lambda *_: answer(["row"])))]
    store = RayReferenceStore(
        handle(sample=lambda *_: fail(death())), frozenset(), frozenset(), lambda: successors.pop(0), 5.0
    )
    assert asyncio.run(store.sample(0, 1)) == ["row"]


def test_a_buffer_that_is_lost_for_ever_ends_the_run() -> None:
    dead = handle(sample=lambda *_: fail(death()))
    store = RayReferenceStore(dead, frozenset(), frozenset(), lambda: answer(dead), 5.0)
    with pytest.raises(RuntimeError, match=r"^the reference buffer \(node .*filled again 3 times"):
        asyncio.run(store.sample(0, 1))
    assert buffer.MAX_REVIVALS == 3


def test_an_error_of_the_buffers_own_code_is_raised() -> None:
    store = RayReferenceStore(
        handle(sample=lambda *_: fail(raised(IndexError("row")))), frozenset(), frozenset(), hang, 5.0
    )
    with pytest.raises(IndexError):
        asyncio.run(store.sample(0, 1))


class Samplers:
    """Starts samplers that end as told, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: Any) -> None:
        self.ends, self.started, self.killed, self.graded = list(ends), [], [], 0
        monkeypatch.setattr(reference, "PROGRESS_INTERVAL_S", 0.01)
        monkeypatch.setattr(reference.ray, "kill", self.killed.append)

    def start(self) -> Any:
        end = self.ends.pop(0)
        sampler = handle(
            fill=end,
            newly_graded=lambda: answer((2, 20)),
            idle_s=lambda: answer(9.0),
            stack=lambda: answer(("there", "")),
        )
        self.started.append(sampler)
        return sampler

    def run(self, limit_s: float = 5.0) -> Any:
        def count(num_completions: int, num_tokens: int) -> None:
            self.graded += num_completions

        return asyncio.run(run_stage(self.start, lambda sampler: sampler.fill.remote(), count, limit_s))


FILLED = (frozenset({"a"}), frozenset({"b"}), {"num_prompts": 2.0})


def test_a_stage_that_dies_or_hangs_is_continued_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samplers = Samplers(monkeypatch, lambda: fail(death()), hang, lambda: answer(FILLED))
    assert samplers.run(limit_s=0.1) == FILLED
    assert samplers.killed == samplers.started
    assert samplers.graded >= 2
    events = [record for record in caplog.records if hasattr(record, "event")]
    assert [record.event for record in events] == ["reference_stage_restarted"] * 2
    assert "did not grade or score anything within 0.1 s" in events[1].getMessage()


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (death(), RuntimeError, "it was started 3 times. --resume continues it"),
        (raised(LearnerLostError("learner rank 0 died")), LearnerLostError, "^learner rank 0 died$"),
        (raised(ValueError("a bug")), ValueError, "a bug"),
    ],
)
def test_a_stage_that_cannot_end_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], said: str
) -> None:
    samplers = Samplers(monkeypatch, *[lambda: fail(error)] * 3)
    with pytest.raises(expected, match=said):
        samplers.run()
    assert samplers.killed == samplers.started
    assert len(samplers.started) == (3 if isinstance(error, ActorDiedError) else 1)


# ---------------------------------------------------------------------------------- reward workers


class Workers:
    """Reward workers by what becomes of their calls, each in turn; a verdict when nothing is left to go wrong."""

    def __init__(self, make_config: Any, *troubles: list[Any], num_retries: int = 2) -> None:
        self.calls: list[int] = []
        self.down: dict[int, int] = {}
        self.troubles = troubles
        workers = [handle(grade=self._grade(i), ready=self._ready(i), stack=hang) for i in range(len(troubles))]
        self.pool = RayRewardPool(workers, make_config(reward={"num_retries": num_retries}))

    def _grade(self, index: int) -> Any:
        def grade(pairs: Any) -> Any:
            self.calls.append(index)
            if self.troubles[index]:
                return fail(self.troubles[index].pop(0))
            return answer([RewardResult(RewardStatus.CORRECT)] * len(pairs))

        return grade

    def _ready(self, index: int) -> Any:
        def ready() -> Any:
            self.down[index] = self.down.get(index, 0) - 1
            return fail(death()) if self.down[index] >= 0 else answer(True)

        return ready

    def grade(self, *texts: str) -> list[str]:
        prompt = Prompt("a", "text", (1,), "", "d")

        async def one_by_one() -> list[str]:
            verdicts = []
            for i, text in enumerate(texts):
                item = (prompt, Completion("a", i, (1,), text, (-0.1,), "stop", 0))
                verdicts += [str(result.status) for result in await self.pool.grade([item])]
            return verdicts

        return asyncio.run(one_by_one())


def test_a_worker_that_died_gets_nothing_until_it_answers(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workers = Workers(make_config, [death()], [])
    workers.down[0] = 10**6
    assert workers.grade(*"abcd") == ["correct"] * 4
    assert workers.calls == [0, 1, 1, 1, 1], "one call found out, and no other was wasted"
    (event,) = (record for record in caplog.records if hasattr(record, "event"))
    assert event.event == "reward_worker_restarted"
    assert event.getMessage().startswith("reward worker 0 (node 10.0.0.7, process 4711) died: ")
    assert workers.pool.drain_metrics()["reward/num_restarts"] == 1


def test_a_sole_worker_is_waited_for_until_it_answers_again(make_config: Any) -> None:
    workers = Workers(make_config, [death()])
    workers.down[0] = 2
    assert workers.grade("a", "b") == ["correct"] * 2


def test_a_worker_that_stays_away_is_a_typed_error_and_no_verdict(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "WORKER_GRACE_S", 0.3)
    workers = Workers(make_config, [death()], num_retries=1)
    workers.down[0] = 10**6
    prompt = Prompt("a", "text", (1,), "", "d")
    item = (prompt, Completion("a", 0, (1,), "x", (-0.1,), "stop", 0))
    (result,) = asyncio.run(workers.pool.grade([item]))
    assert (result.status, result.score) == (RewardStatus.INFRASTRUCTURE_ERROR, None)
    assert result.detail == "reward worker 0 did not start again within 0.3 s"
    assert workers.calls == [0]


ITEMS = [
    (Prompt("a", "text", (1,), "", "d"), Completion("a", i, (1,), "x", (-0.1,), "stop", 0))
    for i in range(reward_pool.MAX_BATCH)
]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_pool, "WORKER_GRACE_S", 0.2)
    monkeypatch.setattr(reward_pool, "ASK_S", 0.02)
    monkeypatch.setattr(reward_pool, "ASK_LATER_S", 0.02)


def statuses(results: list[RewardResult]) -> set[RewardStatus]:
    return {result.status for result in results}


@pytest.mark.usefixtures("impatient")
def test_workers_that_stay_away_are_waited_for_once_and_used_when_they_come_back(
    make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    workers = Workers(make_config, [death()], [death()])
    workers.down = {0: 10**6, 1: 10**6}

    async def run() -> None:
        began = time.monotonic()
        assert statuses(await workers.pool.grade(ITEMS)) == {RewardStatus.INFRASTRUCTURE_ERROR}
        assert statuses(await workers.pool.grade(ITEMS)) == {RewardStatus.INFRASTRUCTURE_ERROR}
        assert time.monotonic() - began < 2.0, "and not for each item"
        assert workers.calls == [0, 1]
        assert workers.pool.drain_metrics()["reward/num_retried"] < 10, "and not each item once more"
        await asyncio.sleep(0.2)
        workers.down[1] = 0
        await asyncio.sleep(0.2)
        assert statuses(await workers.pool.grade(ITEMS)) == {RewardStatus.CORRECT}
        assert set(workers.calls[2:]) == {1}

    asyncio.run(run())
    told = sorted(message for message in caplog.messages if "did not start again" in message)
    until = "did not start again within 0.2 s; others do its work until it does"
    assert told == [f"reward worker {i} {until}" for i in range(2)]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("has_room", [True, False])
def test_a_worker_that_stays_away_is_replaced_where_there_is_room(
    make_config: Any, caplog: pytest.LogCaptureFixture, has_room: bool
) -> None:
    class Starter:
        def __init__(self) -> None:
            self.ended: list[Any] = []

        async def start_worker(self) -> Any:
            if not has_room:
                raise RuntimeError("no node has 1 CPU")
            return handle(grade=lambda pairs: answer([RewardResult(RewardStatus.CORRECT)] * len(pairs)))

        async def end_worker(self, worker: Any) -> None:
            self.ended.append(worker)

    workers, starter = Workers(make_config, [death()], num_retries=0), Starter()
    workers.down[0] = 10**6
    workers.pool._starter = starter
    lost = workers.pool.workers[0]

    async def run() -> None:
        assert statuses(await workers.pool.grade(ITEMS)) == {RewardStatus.INFRASTRUCTURE_ERROR}
        await asyncio.sleep(0.4)
        expected = RewardStatus.CORRECT if has_room else RewardStatus.INFRASTRUCTURE_ERROR
        assert statuses(await workers.pool.grade(ITEMS)) == {expected}

    asyncio.run(run())
    assert starter.ended == ([lost] if has_room else [])
    assert list(workers.pool.workers) == ([1] if has_room else [0])
    told = [message for message in caplog.messages if "did not start again" in message]
    (line,) = told
    assert line.endswith("; reward worker 1 is there in its place" if has_room else ": no node has 1 CPU")


def test_an_error_of_the_graders_own_code_leaves_its_worker_up(make_config: Any) -> None:
    workers = Workers(make_config, [raised(ValueError("bad regex"))], num_retries=0)
    assert workers.grade("a", "b") == ["infrastructure_error", "correct"]
    assert workers.pool.drain_metrics()["reward/num_restarts"] == 0
