"""A sync that breaks at each of its steps, in each of the ways that an engine fails: named, in time, never a hang.

Stand-ins for engines: no Ray and no vLLM runs. `tests/integration/test_weight_session.py` has the real ones.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError

from actors.asks import Ask
from actors.decoding import Decoding
from actors.engine_repair import CannotPlaceError
from actors.learner_group import RayLearner
from actors.rollout_engine import RolloutEngine
from actors.rollout_pool import RayRolloutPool
from actors.step_thread import StepThread
from actors.weight_transfer import client, sender
from actors.weight_transfer.backends import choose_backend, engine_backend, with_backend
from actors.weight_transfer.client import EngineFleet
from actors.weight_transfer.failures import EngineFailure, Place, SyncFailedError, last_words
from actors.weight_transfer.ledger import EngineRecord, WeightSummary
from actors.weight_transfer.sender import SessionSender
from dphrl.config.loading import InputError
from dphrl.protocols import EnginesLostError, LearnerLostError
from dphrl.types import Completion, Prompt

LIMIT_S = 0.3
PROBES = [Prompt(f"probe{i}", "text", (1, 2, 3 + i), "", "d") for i in range(2)]
WORDS = "Worker failed with error 'CUDA out of memory'"
# How an engine fails, and what the run says of it.
HOW = {
    "raises": f"failed to {{doing}}, after 0.0 s: RuntimeError: {WORDS}",
    "hangs": "did not {doing} within 0.3 s (sync.timeout_s)",
    "dies": "died when it was to {doing}, after 0.0 s: its worker process has died.",
}
seen: list[tuple[str, str, str, float, str]] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Any:
    """The table that docs/operations.md shows; `pytest -s` prints it."""
    yield
    print(f"\n\n| backend | engine 1 ... | at | s (limit {LIMIT_S:g}) | the run prints |\n|---|---|---|---|---|")
    for backend, how, method, seconds, told in seen:
        print(f"| {backend} | {how} | {method} | {seconds:.1f} | {told} |")


def died(message: str) -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(error_message=message, actor_id=bytes(16)))


class Engine:
    """An engine that serves as `version` once a session has ended well; at `fault` it raises, hangs or dies."""

    def __init__(self, fault: tuple[str, str] = ("", "")) -> None:
        self.fault, self.version, self.calls = fault, None, []
        self.dead = self.closed = False
        for name in (
            "ready",
            "init_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
            "receive_weights",
            "finish_weight_update",
        ):
            setattr(self, name, SimpleNamespace(remote=self._method(name)))
        self.probe = SimpleNamespace(remote=self._probe)

    def _method(self, name: str) -> Callable[..., Future[Any]]:
        return lambda *args: self._answer(name, args)

    def _answer(self, name: str, args: tuple[Any, ...]) -> Any:
        self.calls.append((name, *args))
        reply: Future[Any] = Future()
        # vLLM closes a session that failed, so what comes after fails as well.
        self.closed |= self.fault[0] == name
        how = self.fault[1] if self.closed else ""
        self.dead |= how == "dies"
        if self.dead:
            reply.set_exception(died("The actor is dead because its worker process has died."))
        elif how == "misses it":
            reply.set_exception(OwnerDiedError("ab", None, "put"))
        elif how == "raises":
            reply.set_exception(RayTaskError("f", "Traceback ...", RuntimeError(f"several lines\n{WORDS}")))
        elif how != "hangs":
            reply.set_result(self._result(name, args))
        return Reply(reply)

    def _result(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == "ready":
            return Place("10.0.0.9", 77)
        self.version = args[0] if name == "finish_weight_update" else None
        return EngineRecord(args[0], (Learner.content,)) if name == "finish_weight_update" else None

    def _probe(self, prompts: Any, seed: int, max_tokens: int) -> Any:
        assert self.version is not None, "a stale engine serves nothing"
        if self.fault[0] == "probe":
            return self._answer("probe", ())
        done: Future[Any] = Future()
        done.set_result(
            [Completion(prompt.prompt_id, 0, (5,), "", (-0.05,), "stop", self.version) for prompt in prompts]
        )
        return Reply(done)


class Reply:
    """A reference to an answer that may never come, as Ray gives one."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def __await__(self) -> Any:
        return asyncio.wrap_future(self.future).__await__()


class Learner:
    """At version 3; by `send_weights` it runs sessions itself, as the real one does in its ranks."""

    policy_version = 3
    last_update = None
    content = WeightSummary(1, 4, 5)

    def __init__(self, session: SessionSender | None = None) -> None:
        self.session = session

    async def sent(self) -> WeightSummary:
        return self.content

    async def publish(self) -> Any:
        for chunk in ("chunk 0", "chunk 1"):
            yield chunk

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        return [(-0.05,) * (len(ids) - num_prompt) for ids, num_prompt in sequences]

    async def send_weights(self, engines: Any, width: int, limit_s: float) -> Any:
        assert self.session is not None
        return await asyncio.to_thread(self.session.send, engines, width, self.policy_version, limit_s)


class Source:
    """Weights whose pass the learner's other ranks are in."""

    def __init__(self) -> None:
        self.num_completed = 0

    def forget(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def complete(self) -> None:
        self.num_completed += 1


class Trainer:
    """Like vLLM's for nccl: it asks the engines in a thread of its own, and waits in a collective with all of them."""

    def __init__(self, fleet: EngineFleet, *, deaf: bool = False) -> None:
        self.fleet, self.deaf = fleet, deaf
        self.broken_off = threading.Event()
        fleet.init_weight_transfer_engine({"rank_offset": 1, "world_size": fleet.world_size})

    def send_weights(self) -> None:
        self.fleet.start_weight_update()
        received = threading.Event()
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                self.fleet.update_weights({"names": ["w"]})
                received.set()
            except SyncFailedError as error:
                errors.append(error)

        threading.Thread(target=ask, daemon=True).start()
        while not received.wait(0.01):
            if self.broken_off.is_set() and not self.deaf:
                raise RuntimeError("communicator aborted")
        self.fleet.finish_weight_update()

    def shutdown(self) -> None:
        self.broken_off.set()


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def ray_wait(replies: list[Reply], num_returns: int, timeout: float) -> tuple[list[Reply], list[Reply]]:
        done, _ = wait([reply.future for reply in replies], timeout, FIRST_COMPLETED)
        return [reply for reply in replies if reply.future in done], []

    monkeypatch.setattr(client.ray, "wait", ray_wait)
    monkeypatch.setattr(client.ray, "get", lambda reply: reply.future.result())
    monkeypatch.setattr(sender, "GRACE_S", 0.2)
    monkeypatch.setattr(client, "LINGER_S", 0.05)


class Starter:
    """Has `spare` engines, each up at once; one that is an error does not start."""

    can_replace = True

    def __init__(self, spare: list[Any]) -> None:
        self.spare, self.num_starts, self.ended = spare, 0, []

    async def start(self, index: int) -> Any:
        self.num_starts += 1
        engine = self.spare.pop(0)
        if isinstance(engine, Exception):
            raise engine
        return engine

    async def end(self, index: int) -> None:
        self.ended.append(index)


def pool_of(
    make_config: Any, engines: list[Engine], backend: str = "object_store", **options: Any
) -> tuple[RayRolloutPool, Learner, list[Trainer], Source]:
    """A pool, and a learner that reaches it by `backend`; `spare` engines take the places of failed ones."""
    spare = options.pop("spare", None)
    on_failure = "stop" if spare is None else "replace"
    sync, rollout = {"backend": backend, "timeout_s": LIMIT_S}, {"on_failure": on_failure}
    config = make_config(sync=sync, rollout=rollout, learner={"timeout_s": 60.0})
    trainers: list[Trainer] = []
    source = Source()

    def meet(fleet: EngineFleet) -> Trainer:
        trainers.append(Trainer(fleet, deaf=options.get("deaf", False)))
        return trainers[-1]

    session = SessionSender(source, meet, 0, others_can_leave=options.get("others_can_leave", True))
    pool = RayRolloutPool(engines, config, PROBES, starter=Starter([] if spare is None else spare))
    return pool, Learner(session), trainers, source


def refit(pool: RayRolloutPool, learner: Learner) -> dict[str, float]:
    return dict(asyncio.run(pool.refit(learner)))  # type: ignore[arg-type]


STEPS = {
    "object_store": {
        "start_weight_update": "start a weight update",
        "update_weights": "take chunk 1 of the weights",
        "finish_weight_update": "finish its weight update",
        "probe": "answer the probes",
    },
    "nccl": {
        "init_weight_transfer_engine": "join the learner's group",
        "start_weight_update": "start a weight update",
        "receive_weights": "take weights",
        "finish_weight_update": "finish its weight update",
        "probe": "answer the probes",
    },
}
POINTS = [(backend, method, how) for backend, steps in STEPS.items() for method in steps for how in HOW]


@pytest.mark.parametrize(("backend", "method", "how"), POINTS)
def test_a_failure_at_any_step_names_the_engine_in_time(make_config: Any, backend: str, method: str, how: str) -> None:
    engines = [Engine(), Engine((method, how))]
    pool, learner, _, source = pool_of(make_config, engines, backend)
    began = time.monotonic()
    with pytest.raises(EnginesLostError) as failed:
        refit(pool, learner)
    took = time.monotonic() - began
    told = str(failed.value)
    seen.append((backend, how, method, took, told.partition(". rollout.on_failure is")[0]))
    expected = HOW[how].format(doing=STEPS[backend][method])
    assert told.startswith(f"rollout engine 1 (node 10.0.0.9, process 77) {expected}")
    assert "engine 0" not in told
    assert told.endswith(
        "rollout.on_failure is stop, so the run stops; replace starts another engine instead. "
        "--resume goes on from the last checkpoint"
    )
    assert "\n" not in told, "the command line prints the first line"
    assert took < (LIMIT_S if how == "hangs" else 0) + 0.5
    after = method == "probe"
    assert engines[1].version == (3 if after else None), "it stays stale"
    # A store's sessions do not depend on each other.
    assert (engines[0].version == 3) == (backend == "object_store" or after or method == "finish_weight_update")
    in_session = backend == "nccl" and not after
    assert source.num_completed == in_session, "the learner's other ranks wait for the end of the pass"


@pytest.mark.parametrize("backend", STEPS)
@pytest.mark.parametrize("how", HOW)
def test_an_engine_that_fails_is_replaced_and_the_sync_ends(make_config: Any, backend: str, how: str) -> None:
    method = "update_weights" if backend == "object_store" else "receive_weights"
    engines, spare = [Engine(), Engine((method, how)), Engine()], [Engine(), Engine(), Engine()]
    new = list(spare)
    pool, learner, trainers, _ = pool_of(make_config, engines, backend, spare=spare)
    metrics = refit(pool, learner)
    # In a group, engines that were in the middle of the session cannot begin another.
    replaced = [1] if backend == "object_store" else [0, 1, 2]
    assert metrics == {
        "sync/logprob_gap_max": 0.0,
        "sync/logprob_gap_mean": 0.0,
        "sync/num_bytes": 4,
    }
    # Nobody waits for a new one as long as others can end the sync.
    assert len(pool.engines) == (2 if backend == "object_store" else 3)
    refit(pool, learner)
    assert [pool.engines[i] is not engines[i] for i in range(3)] == [i in replaced for i in range(3)]
    assert {*pool.engines.values()} & {*new} == {*new[: len(replaced)]}
    assert [engine.version for engine in pool.engines.values()] == [3, 3, 3]
    drained = dict(pool.drain_metrics())
    assert (drained["rollout/engines"], drained["rollout/engines_replaced"]) == (3, len(replaced))
    if backend == "nccl":
        assert trainers[0].broken_off.is_set(), "the learner does not wait in the old group"
        assert len(trainers) == 2
    refit(pool, learner)
    assert pool.drain_metrics()["rollout/engines_replaced"] == 0


def test_an_engine_that_joins_no_group_costs_no_other_engine_that_has_joined(make_config: Any) -> None:
    engines, spare = [Engine(), Engine(("init_weight_transfer_engine", "raises"))], [Engine()]
    pool, learner, *_ = pool_of(make_config, engines, "nccl", spare=spare)
    refit(pool, learner)
    refit(pool, learner)
    assert pool.drain_metrics()["rollout/engines_replaced"] == 1
    assert pool.engines[0] is engines[0]


def test_an_engine_that_keeps_failing_is_given_up_and_the_others_go_on(
    make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spare = [Engine(("update_weights", "raises")) for _ in range(9)]
    pool, learner, *_ = pool_of(make_config, [Engine(), Engine(("update_weights", "dies"))], spare=spare)
    for _ in range(9):
        refit(pool, learner)
    assert len(spare) == 9 - pool.config.rollout.max_replacements
    assert list(pool.engines) == [0]
    assert pool._repair._starter.ended == [1], "nothing of it stays"
    events = [record.__dict__ for record in caplog.records if hasattr(record, "event")]
    assert [event["event"] for event in events] == ["engine_lost"] * 4 + ["engine_given_up"]
    assert events[0]["facts"] == {
        "engine": 1,
        "node": "10.0.0.9",
        "pid": 77,
        "doing": "take chunk 1 of the weights",
        "how": "died",
        "reason": "its worker process has died.",
        "num_resubmitted": 0,
    }
    assert WORDS in events[-1]["facts"]["reason"]
    assert "given up; it was started again 3 times" in caplog.text


def test_the_last_engine_that_is_given_up_stops_the_run(make_config: Any) -> None:
    spare = [Engine(("update_weights", "raises")) for _ in range(9)]
    pool, learner, *_ = pool_of(make_config, [Engine(("update_weights", "dies"))], spare=spare)
    with pytest.raises(EnginesLostError, match=r"^no rollout engine is left; .* engine 0 .* failed to take .*--resume"):
        refit(pool, learner)


def test_a_new_engine_that_does_not_start_counts_like_one_that_fails(make_config: Any) -> None:
    errors = [RuntimeError("no GPU is free") for _ in range(9)]
    pool, learner, *_ = pool_of(make_config, [Engine(("update_weights", "dies"))], spare=errors)
    with pytest.raises(EnginesLostError, match=r"rollout engine 0 failed to start.*no GPU is free"):
        refit(pool, learner)
    assert pool._repair._starter.num_starts == pool.config.rollout.max_replacements


def test_an_engine_that_finds_no_room_is_given_up_at_once(make_config: Any) -> None:
    pool, learner, *_ = pool_of(
        make_config, [Engine(), Engine(("update_weights", "dies"))], spare=[CannotPlaceError("needs 1 CPU")]
    )
    refit(pool, learner)
    assert pool._repair._starter.num_starts == 1
    assert list(pool.engines) == [0]


def test_an_engine_that_starts_is_not_waited_for_and_joins_at_the_next_sync(
    make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        new, may_start = Engine(), asyncio.Event()
        pool, learner, *_ = pool_of(make_config, [Engine(), Engine(("update_weights", "dies"))], spare=[new])
        start = pool._repair._starter.start

        async def slow(index: int) -> Any:
            await may_start.wait()
            return await start(index)

        pool._repair._starter.start = slow
        await pool.refit(learner)  # type: ignore[arg-type]
        assert list(pool.engines) == [0]
        may_start.set()
        await asyncio.sleep(0.01)
        assert list(pool.engines) == [0], "it is stale until it is refit"
        assert not any("is replaced" in record.message for record in caplog.records)
        await pool.refit(learner)  # type: ignore[arg-type]
        assert pool.engines[1] is new
        assert new.version == 3
        event = caplog.records[-1].__dict__
        assert event["event"] == "engine_replaced"
        assert event["facts"] == {"engine": 1, "node": "10.0.0.9", "pid": 77, "reason": "its worker process has died."}

    asyncio.run(run())


def test_engines_that_share_gpus_with_the_learner_are_not_replaced(make_config: Any) -> None:
    pool, learner, *_ = pool_of(make_config, [Engine(), Engine(("update_weights", "dies"))], spare=[Engine()])
    pool._repair._starter.can_replace = False
    with pytest.raises(EnginesLostError, match=r"engine 1 .*died.*Its GPU is the learner's too.*so the run stops"):
        refit(pool, learner)


def test_two_engines_that_fail_are_both_named(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    engines = [Engine(("update_weights", "raises")), Engine(), Engine(("finish_weight_update", "hangs"))]
    pool, learner, *_ = pool_of(make_config, engines, spare=[Engine(), Engine()])
    refit(pool, learner)
    lost = [record.message for record in caplog.records if getattr(record, "event", "") == "engine_lost"]
    assert "engine 0 (node 10.0.0.9, process 77) failed to take chunk 1 of" in lost[0]
    assert "engine 2 (node 10.0.0.9, process 77) did not finish its weight update within 0.3 s" in lost[1]


def test_an_engine_that_does_not_even_answer_is_named_before_its_place_is_known(make_config: Any) -> None:
    pool, learner, *_ = pool_of(make_config, [Engine(("ready", "hangs"))])
    with pytest.raises(EnginesLostError, match=r"^rollout engine 0 did not answer within 0\.3 s"):
        refit(pool, learner)


# --------------------------------------------------------------------------- the learner's own part


def test_every_engine_is_told_its_own_place_in_the_group(make_config: Any) -> None:
    engines = [Engine() for _ in range(3)]
    fleet = EngineFleet(engines, 4, LIMIT_S)
    assert fleet.world_size == 13
    fleet.init_weight_transfer_engine({"rank_offset": 1, "world_size": 13})
    assert [engine.calls for engine in engines] == [
        [("init_weight_transfer_engine", {"rank_offset": offset, "world_size": 13})] for offset in (1, 5, 9)
    ]
    fleet.init_weight_transfer_engine({"packed": True})  # ipc has no group
    assert engines[2].calls[-1] == ("init_weight_transfer_engine", {"packed": True})


@pytest.mark.parametrize(("other", "blamed"), [("dies", [1]), ("raises", [0, 1]), ("hangs", [0])])
def test_an_engine_that_fails_because_another_died_is_not_blamed(other: str, blamed: list[int]) -> None:
    engines = [Engine(("receive_weights", "raises")), Engine(("receive_weights", other)), Engine()]
    fleet = EngineFleet(engines, 1, LIMIT_S)
    fleet.start_weight_update()
    with pytest.raises(SyncFailedError):
        fleet.update_weights({})
    assert sorted(failure.index for failure in fleet.failures) == blamed
    assert fleet.cut == {0, 1, 2} - {*blamed}


def test_the_group_is_kept_until_an_engine_changes(make_config: Any) -> None:
    pool, learner, trainers, _ = pool_of(make_config, [Engine(), Engine()], "nccl")
    refit(pool, learner)
    refit(pool, learner)
    assert len(trainers) == 1
    pool.engines[1] = Engine()
    refit(pool, learner)
    assert len(trainers) == 2
    assert trainers[0].broken_off.is_set(), "the old group is left"


def test_an_engine_that_is_dead_without_anybody_s_knowing_is_found() -> None:
    """The learner's connection breaks, and neither the engine nor Ray has said anything."""

    class Broken(SlowTrainer):
        def send_weights(self) -> None:
            engines[1].dead = True
            raise RuntimeError("Connection closed by peer")

    engines, source = [Engine(), Engine()], Source()
    outcome = SessionSender(source, Broken, 0, others_can_leave=True).send(engines, 1, 3, 60.0)
    assert [(failure.index, failure.how) for failure in outcome.failures] == [(1, "died")]
    assert source.num_completed == 1


def test_engines_are_named_by_their_numbers_where_one_is_missing(make_config: Any) -> None:
    engines = [Engine(), Engine(), Engine(("receive_weights", "raises"))]
    pool, learner, *_ = pool_of(make_config, engines, "nccl")
    del pool.engines[0]
    with pytest.raises(EnginesLostError, match=r"^rollout engine 2 .* failed to take weights"):
        refit(pool, learner)


def test_a_learner_that_cannot_be_freed_says_so_and_stops_in_time(make_config: Any) -> None:
    """Also where engines are replaced: a new one would not help."""
    engines = [Engine(), Engine(("receive_weights", "hangs"))]
    pool, learner, *_ = pool_of(make_config, engines, "nccl", spare=[Engine(), Engine()], deaf=True)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"engine 1 did not take weights.*the learner is stuck.*--resume") as failed:
        refit(pool, learner)
    assert not isinstance(failed.value, SyncFailedError)
    assert time.monotonic() - began < LIMIT_S + 1


def test_a_failure_is_not_waited_out() -> None:
    """The learner waits in a collective with all engines, and one has failed: nothing will come of it."""
    engines = [Engine(), Engine(("receive_weights", "raises"))]
    began = time.monotonic()
    outcome = SessionSender(Source(), Trainer, 0, others_can_leave=True).send(engines, 1, 3, 60.0)
    assert [failure.index for failure in outcome.failures] == [1]
    assert time.monotonic() - began < 30


def test_ranks_that_wait_in_the_middle_of_a_session_stop_the_run(make_config: Any) -> None:
    engines = [Engine(("receive_weights", "raises"))]
    pool, learner, _, source = pool_of(make_config, engines, "ipc", others_can_leave=False)
    with pytest.raises(RuntimeError, match=r"engine 0 failed to take weights.*other ranks wait in the middle"):
        refit(pool, learner)
    assert source.num_completed == 0


class SlowTrainer:
    def __init__(self, fleet: EngineFleet) -> None:
        self.shutdown = lambda: None

    def send_weights(self) -> None:
        time.sleep(10 * LIMIT_S)


def test_a_learner_that_never_gets_to_its_engines_is_not_waited_for_without_end() -> None:
    session = SessionSender(Source(), SlowTrainer, 0, others_can_leave=True)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"the learner was still at sending its weights 0\.3 s \(sync\.timeout_s\)"):
        session.send([Engine()], 1, 3, LIMIT_S)
    assert time.monotonic() - began < LIMIT_S + 1


@pytest.mark.parametrize("doing", ["publish", "score"])
def test_a_learner_that_hangs_may_tell_itself_that_it_is_lost(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    async def hang(*_: Any) -> Any:
        await asyncio.sleep(2 * LIMIT_S)
        raise LearnerLostError("learner rank 0 did not answer within its own limit")

    async def stream() -> Any:
        yield await hang()

    pool, learner, *_ = pool_of(make_config, [Engine()], spare=[])
    monkeypatch.setattr(learner, doing, stream if doing == "publish" else hang)
    with pytest.raises(LearnerLostError, match="its own limit"):
        refit(pool, learner)
    assert set(pool.engines) == {0}


def test_no_engine_is_blamed_for_weights_that_died_with_the_learner(make_config: Any) -> None:
    pool, learner, *_ = pool_of(make_config, [Engine(("update_weights", "misses it")) for _ in range(2)], spare=[])
    with pytest.raises(LearnerLostError, match=r"^the learner's weights were gone from Ray's object store .* node"):
        refit(pool, learner)
    assert set(pool.engines) == {0, 1}


def test_the_learners_own_error_is_told_as_its_own() -> None:
    class Broken(SlowTrainer):
        def send_weights(self) -> None:
            raise ValueError("metadata() disagrees with iteration")

    session = SessionSender(Source(), Broken, 0, others_can_leave=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"the learner failed to send its weights: metadata\(\) disagrees"):
        session.send([Engine()], 1, 3, LIMIT_S)


def test_other_ranks_take_part_and_ask_nobody() -> None:
    sent: list[str] = []
    trainer = SimpleNamespace(send_weights=lambda: sent.append("took part"))
    engine = Engine()
    session = SessionSender(Source(), lambda fleet: trainer, 1, others_can_leave=True)  # type: ignore[arg-type,return-value]
    for _ in range(2):
        assert session.send([engine], 1, 3, LIMIT_S).records == ()
    assert sent == ["took part"] * 2
    assert engine.calls == []


def test_the_ranks_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails ends the sync, though the others wait for it; ranks that say nothing do not hold it up."""

    async def silent(*args: Any) -> None:
        await asyncio.sleep(60)

    async def fails(*args: Any) -> None:
        raise RuntimeError("rank 1 ran out of memory")

    def learner(*methods: Any) -> RayLearner:
        return RayLearner([handle(send_weights=method, idle_s=alive, stack=alive) for method in methods])

    def handle(**methods: Any) -> Any:
        return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})

    async def alive() -> float:
        return 0.0

    with pytest.raises(RuntimeError, match="rank 1 ran out of memory"):
        asyncio.run(learner(silent, fails).send_weights([], 1, 60))
    monkeypatch.setattr("actors.learner_group.SESSION_GRACE_S", 0.1)
    with pytest.raises(LearnerLostError, match=r"learner rank 0, 1 did not end a weight sync within 0\.15 s"):
        asyncio.run(learner(silent, silent).send_weights([], 1, 0.01))


# ------------------------------------------------------------------------------------- the engine


def engine_over(make_config: Any, llm: Any) -> Any:
    """The actor's own class around another LLM, serving as version 4."""
    engine = object.__new__(RolloutEngine.__ray_metadata__.modified_class)
    engine._llm, engine._segment, engine._thread, engine._outboxes = llm, None, StepThread("test"), {}
    engine._probe_numbers = itertools.count()
    engine._decoding = Decoding(llm, make_config(), 2, engine._deliver, engine._fail, str, [])
    engine._thread.open(lambda: engine._decoding)
    engine._decoding.policy_version = 4
    return engine


def llm_of(rpc: Any = lambda *args, **options: [], resets: bool = True) -> Any:
    return SimpleNamespace(collective_rpc=rpc, reset_prefix_cache=lambda reset_running_requests: resets)


@pytest.mark.parametrize("resets", [True, False])
def test_an_engine_whose_prefix_cache_stays_serves_nothing(make_config: Any, resets: bool) -> None:
    async def run() -> None:
        engine = engine_over(make_config, llm_of(resets=resets))
        await engine.start_weight_update()
        if resets:
            assert (await engine.finish_weight_update(5)).policy_version == 5
            assert engine._decoding.policy_version == 5
            return
        with pytest.raises(RuntimeError, match=r"vLLM kept its prefix cache, which the old weights .* version 5"):
            await engine.finish_weight_update(5)
        with pytest.raises(RuntimeError, match="rollout engine 2 has no current weights"):
            await engine.submit("pool", [Ask(0, PROBES[0], (0,), 0)])
        with pytest.raises(RuntimeError, match="rollout engine 2 has no current weights"):
            await engine.probe(PROBES, 0, 8)

    asyncio.run(run())


POINTS_OF_AN_ENGINE = ["start_weight_update", "update_weights", "finish_weight_update"]


@pytest.mark.parametrize("broken", POINTS_OF_AN_ENGINE)
def test_an_engine_that_failed_in_a_session_is_stale(make_config: Any, broken: str) -> None:
    def rpc(method: str, **options: Any) -> list[Any]:
        if method == broken:
            raise RuntimeError("no")
        return []

    async def run() -> None:
        engine = engine_over(make_config, llm_of(rpc))
        steps = [engine.start_weight_update, lambda: engine.receive_weights({}), lambda: engine.finish_weight_update(5)]
        for step in steps[: POINTS_OF_AN_ENGINE.index(broken)]:
            await step()
        with pytest.raises(RuntimeError, match=r"^no$"):
            await steps[POINTS_OF_AN_ENGINE.index(broken)]()
        assert engine._decoding.policy_version is None

    asyncio.run(run())


def test_an_update_that_broke_off_is_ended_before_the_next(make_config: Any) -> None:
    """The learner was lost between start and finish; vLLM refuses to start, or to meet another, before."""
    active, ended = [False], [0]

    def rpc(method: str, **options: Any) -> list[Any]:
        if method == "finish_weight_update":
            ended[0] += 1
            active[0] = False
        elif method != "update_weights":
            assert not active[0], f"{method} in the midst of an update"
            active[0] = method == "start_weight_update"
        return []

    async def run() -> None:
        engine = engine_over(make_config, llm_of(rpc))
        await engine.start_weight_update()
        await engine.receive_weights({})
        await engine.start_weight_update()
        assert ended == [1]
        await engine.init_weight_transfer_engine({})
        assert ended == [2]
        await engine.start_weight_update()
        await engine.receive_weights({})
        assert (await engine.finish_weight_update(5)).policy_version == 5
        await engine.start_weight_update()
        assert ended == [3]

    asyncio.run(run())


# ------------------------------------------------------------------------------------- the backend


def test_auto_takes_what_the_machine_has(make_config: Any) -> None:
    alone, beside = make_config(), make_config(cluster={"colocate": True})
    assert choose_backend(alone, with_gpus=False) == choose_backend(beside, with_gpus=False) == "object_store"
    assert choose_backend(alone, with_gpus=True) == "nccl"
    assert choose_backend(beside, with_gpus=True) == "ipc"
    chosen = with_backend(alone, with_gpus=True)
    assert (chosen.sync.backend, engine_backend(chosen.sync), engine_backend(alone.sync)) == (
        "nccl",
        "nccl",
        "object_store",
    )
    assert with_backend(chosen, with_gpus=True) == chosen


@pytest.mark.parametrize(
    ("backend", "with_gpus", "colocate", "reason"),
    [
        ("nccl", False, False, "nccl moves weights between GPUs, and this run has none"),
        ("ipc", False, True, "ipc moves weights between GPUs, and this run has none"),
        ("nccl", True, True, "nccl cannot join two processes on one GPU"),
        ("ipc", True, False, "every GPU of an engine must have a learner rank"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    make_config: Any, backend: str, with_gpus: bool, colocate: bool, reason: str
) -> None:
    config = make_config(sync={"backend": backend}, cluster={"colocate": colocate})
    with pytest.raises(InputError, match=rf"^sync\.backend: .*{reason}.*set sync\.backend="):
        choose_backend(config, with_gpus=with_gpus)
    everywhere = make_config(sync={"backend": "object_store"}, cluster={"colocate": colocate})
    assert choose_backend(everywhere, with_gpus=with_gpus) == "object_store"


# ------------------------------------------------------------------------------------- the words


def test_the_words_are_the_last_that_the_engine_said() -> None:
    told = RayTaskError("f", "Traceback", RuntimeError("first\n\n  EngineDeadError: the last  \n"))
    assert last_words(told) == "RuntimeError: EngineDeadError: the last"
    text = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    text += "exit code 9."
    assert last_words(died(text)).endswith("exit code 9.")
    assert last_words(ValueError()) == "ValueError"
    ours = EngineFailure.of(
        0, "answer", 1.0, RayTaskError("f", "t", TimeoutError("its own")).as_instanceof_cause(), 5.0
    )
    assert (ours.how, ours.words) == ("raised", "TimeoutError: its own")
