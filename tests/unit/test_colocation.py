"""Turns on shared GPUs, and the order in which actors start: with actors that write down what they are asked.

The state that leaves the device and comes back is a real DeepSpeed engine's, on the CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from actors.device_turns import DeviceTurns
from actors.learner_group import RayLearner
from actors.rollout_pool import RayRolloutPool
from actors.training_state import NEEDS_ANOTHER_STAGE
from actors.weight_transfer.ledger import EngineRecord, WeightSummary
from cluster.start import Start
from dphrl.config.loading import InputError
from dphrl.evaluation.stage import Evaluation, evaluate_sets
from dphrl.loop import train
from dphrl.prepare import EvaluationSet
from dphrl.protocols import LearnerLostError, Parts
from dphrl.reference.stage import fill_reference
from dphrl.tracking.console import Console
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus
from tests.unit.fake_engine import FakeWork

PROMPTS = [Prompt(f"p{i}", "text", (1, 2, 3 + i), "", "data") for i in range(8)]
NUM_ENGINES = 2


class World:
    """Engines, learner ranks and graders; `events` is what they were asked, in order, and `broken` raises."""

    def __init__(self, broken: str = "nothing") -> None:
        self.events: list[str] = []
        self.broken, self.version = broken, 0
        works = [FakeWork(self._complete) for _ in range(NUM_ENGINES)]
        self.engines = [
            self.actor(f"engine {i}", **{name: getattr(work, f"_{name}") for name in ("submit", "finished", "probe")})
            for i, work in enumerate(works)
        ]
        does = {"score": self._score, "update": self._update, "sent": self.sent, "copy_state": lambda: 0}
        self.ranks = [self.actor("learner", **does)]
        self.turns = DeviceTurns(self.engines, self.ranks, timeout_s=30)

    def actor(self, name: str, **methods: Any) -> Any:
        call = self._call

        class Actor:
            def __getattr__(self, method: str) -> Any:
                return SimpleNamespace(remote=lambda *args, **kw: call(name, method, args, methods.get(method)))

        return Actor()

    def _call(self, name: str, method: str, args: tuple[Any, ...], answer: Any) -> Any:
        if method in ("ready", "sent"):  # questions, which take no turn
            return self._answer("", answer(*args) if answer else "somewhere")
        event = f"{name}: {method}"
        if method == "sleep":
            event += f" {args[0]}"
        if method == "wake_up":
            event += f" {'+'.join(args[0])}"
        if method == "finished":
            return answer(*args)
        self.events.append(event)
        if method in ("submit", "probe"):
            return answer(*args)
        return self._answer(event, answer(*args) if answer else None)

    async def _answer(self, event: str, value: Any) -> Any:
        await asyncio.sleep(0)
        if event == self.broken:
            raise RuntimeError("CUDA error: out of memory")
        return value

    def _complete(self, ask: Any, sample_index: int) -> Completion:
        return Completion(ask.prompt.prompt_id, sample_index, (7, 8), "", (-1.0, -1.0), "stop", self.version)

    def _score(self, shared: Any) -> dict[int, tuple[float, ...]]:
        return {i: (-1.0,) * (len(ids) - start) for i, (ids, start) in enumerate(shared)}

    def sent(self) -> WeightSummary:
        return WeightSummary(checksum=self.version)

    def _update(self, batch: Any) -> dict[str, float]:
        return {}

    async def grade(self, items: Any) -> list[RewardResult]:
        return [RewardResult(RewardStatus.CORRECT if c.sample_index else RewardStatus.WRONG) for _, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def after_step(self, step: int, metrics: Any, groups: Any, batch: Any) -> None:
        self.events.append(f"step {step} done")

    def of_one_engine(self) -> list[str]:
        """The events without those of other engines, repeats of neighbours as one."""
        mine = [event for event in self.events if not event.startswith("engine") or event.startswith("engine 0")]
        return [event for i, event in enumerate(mine) if not i or event != mine[i - 1]]


class Transfer:
    """Weights on their way, as an event."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def send(self, learner: Any) -> list[EngineRecord]:
        self.world.version = learner.policy_version
        self.world.events.append("weights sent")
        return [EngineRecord(self.world.version, (self.world.sent(),))] * NUM_ENGINES


@pytest.fixture
def parts_of(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[World], Parts]:
    """The real pool and learner over a world's actors, before the first sync."""
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("actors.learner_group.combine_rank_metrics", lambda parts: {"learner/grad_norm": 1.0})

    def make(world: World) -> Parts:
        config = make_config(rollout={"num_engines": NUM_ENGINES})
        pool = RayRolloutPool(world.engines, config, PROMPTS[:2], turns=world.turns)
        pool._transfer = Transfer(world)  # type: ignore[assignment]
        return Parts(RayLearner(world.ranks, turns=world.turns), pool, world)  # type: ignore[arg-type]

    return make


STARTED = ["engine 0: sleep 2"]
FIRST_SYNC = [
    "learner: offload",
    "engine 0: wake_up weights",
    "weights sent",
    "engine 0: wake_up kv_cache",
    # the proof: engines sample and the learner scores, both with their weights on the device
    "engine 0: probe",
    "learner: score",
]
STEP = ["engine 0: submit", "engine 0: sleep 2", "learner: reload", "learner: update", *FIRST_SYNC]


def test_the_order_of_two_steps_and_an_evaluation_before_and_after(make_config: Any, parts_of: Any) -> None:
    world = World()
    parts = parts_of(world)
    config = make_config(
        algorithm={"divergence": "none"}, learner={"num_steps": 2}, rollout={"num_engines": NUM_ENGINES}
    )

    async def run() -> None:
        await world.turns.make_room()
        await parts.rollouts.refit(parts.learner)
        evaluation = Evaluation(config, [EvaluationSet("set", "test", PROMPTS[:2])], "base")
        await evaluate_sets(evaluation, parts, Console())
        await train(config, PROMPTS, parts, None, world, start_step=0)
        await evaluate_sets(evaluation, parts, Console())

    asyncio.run(run())
    # Two kinds of samples of the evaluation are neighbours here, as one.
    evaluated = ["engine 0: submit"]
    assert world.of_one_engine() == [
        *(*STARTED, *FIRST_SYNC, *evaluated),
        *(*STEP[1:], "step 1 done", *STEP, "step 2 done", *evaluated),
    ]


def test_the_reference_stage_samples_and_scores_without_a_change_of_turns(
    make_config: Any, parts_of: Any, tmp_path: Path
) -> None:
    world = World()
    parts = parts_of(world)
    config = make_config(reference={"num_samples": 4, "threshold": 1}, rollout={"num_engines": NUM_ENGINES})

    async def run() -> None:
        await world.turns.make_room()
        await parts.rollouts.refit(parts.learner)
        await fill_reference(
            config, PROMPTS, parts.rollouts, parts.rewards, parts.learner, {"model": "m"}, tmp_path / "reference"
        )

    asyncio.run(run())
    assert world.of_one_engine() == [*STARTED, *FIRST_SYNC, "engine 0: submit", "learner: score"]


def test_a_checkpoint_takes_the_whole_state_and_leaves_engines_their_weights(make_config: Any, parts_of: Any) -> None:
    world = World()
    parts = parts_of(world)

    async def run() -> None:
        await world.turns.make_room()
        await parts.rollouts.refit(parts.learner)
        world.events.clear()
        await parts.learner.copy_state()
        async for _ in parts.rollouts.generate(PROMPTS, 1, seed=0):
            pass

    asyncio.run(run())
    assert world.of_one_engine() == [
        *("engine 0: sleep 1", "learner: reload", "learner: copy_state"),
        *("learner: offload", "engine 0: wake_up weights+kv_cache", "engine 0: submit"),
    ]


def test_a_resumed_run_loads_and_then_sends_what_it_loaded(make_config: Any, parts_of: Any) -> None:
    world = World()
    parts = parts_of(world)

    async def run() -> None:
        await world.turns.make_room()
        await parts.rollouts.refit(parts.learner)
        world.events.clear()
        await parts.learner.load(Path("there"), 3)
        await parts.rollouts.refit(parts.learner)

    asyncio.run(run())
    assert world.of_one_engine() == ["engine 0: sleep 1", "learner: reload", "learner: load", *FIRST_SYNC]


def test_engines_that_dropped_their_weights_do_not_decode_before_a_sync(make_config: Any, parts_of: Any) -> None:
    world = World()
    parts = parts_of(world)

    async def run() -> None:
        await world.turns.make_room()
        await parts.rollouts.refit(parts.learner)
        await parts.learner.update(SimpleNamespace(learning_rate=1e-3))
        world.events.clear()
        async for _ in parts.rollouts.generate(PROMPTS, 1, seed=0):
            pass

    with pytest.raises(RuntimeError, match="no weights since its update; refit them"):
        asyncio.run(run())
    assert world.events == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("engine 1: wake_up weights", "rollout engine 1 did not wake up (weights) on a shared GPU: CUDA error"),
        ("engine 1: wake_up kv_cache", "rollout engine 1 did not wake up (kv_cache) on a shared GPU: CUDA error"),
        ("engine 0: sleep 2", "rollout engine 0 did not sleep (level 2) on a shared GPU: CUDA error"),
        ("learner: reload", "learner rank 0 did not take its state back on a shared GPU: CUDA error"),
        ("learner: offload", "learner rank 0 did not put its state away on a shared GPU: CUDA error"),
    ],
)
def test_a_turn_that_fails_stops_the_run_and_names_the_actor(
    make_config: Any, parts_of: Any, broken: str, said: str
) -> None:
    world = World()
    parts = parts_of(world)
    config = make_config(
        algorithm={"divergence": "none"}, learner={"num_steps": 3}, rollout={"num_engines": NUM_ENGINES}
    )

    async def run() -> None:
        await world.turns.make_room()
        await parts.rollouts.refit(parts.learner)
        world.broken = broken
        await train(config, PROMPTS, parts, None, world, start_step=0)

    with pytest.raises(RuntimeError) as caught:
        asyncio.run(run())
    assert said in str(caught.value)
    assert "step 1 done" not in world.events
    assert "weights sent" not in world.events[-3:] or "kv_cache" in broken


def test_an_engine_that_never_wakes_has_a_deadline() -> None:
    async def never(*_: Any) -> None:
        await asyncio.sleep(60)

    engine: Any = SimpleNamespace(wake_up=SimpleNamespace(remote=never), sleep=SimpleNamespace(remote=_nothing))
    turns = DeviceTurns([engine], [], timeout_s=0.05)

    async def run() -> None:
        await turns.make_room()
        async with turns.sync():
            pass

    with pytest.raises(TimeoutError, match=r"\(sync.timeout_s\) for rollout engine 0 to wake up \(weights\)"):
        asyncio.run(run())


@pytest.mark.parametrize("how", ["hangs", "dies", "its GPU fails", "raises"])
def test_a_rank_that_is_gone_when_its_state_is_to_move_is_a_lost_learner(how: str) -> None:
    errors = {
        "dies": ActorDiedError(),
        "its GPU fails": RuntimeError("CUDA error: unspecified launch failure"),
        "raises": ValueError("wrong"),
    }

    async def offload() -> None:
        if how == "hangs":
            await asyncio.sleep(60)
        raise errors[how]

    rank: Any = SimpleNamespace(offload=SimpleNamespace(remote=offload))
    turns = DeviceTurns([], [rank], timeout_s=0.05)

    async def run() -> None:
        await turns.make_room()
        async with turns.sync():
            pass

    with pytest.raises(RuntimeError, match="learner rank 0") as caught:
        asyncio.run(run())
    assert isinstance(caught.value, LearnerLostError) == (how != "raises")
    assert "\n" not in str(caught.value)


async def _nothing(*_: Any) -> None:
    return None


# ------------------------------------------------------------------------------------------ start


class Starting:
    """Actors that come up when they are let, and a `Start` over them. `events` has what began and what ended."""

    def __init__(self, *, shared: bool, failing: dict[str, BaseException] | None = None, never: str = "") -> None:
        self.events: list[str] = []
        self.failing, self.never, self.num_renewed = failing or {}, never, 0
        self.ranks = [self._actor(f"rank {i}") for i in range(2)]
        self.engines = [self._actor(f"engine {i}") for i in range(2)]
        self.start = Start(
            dict(enumerate(self.engines)),
            self._restart_engine,
            self.ranks,
            [self._actor("worker 0")],
            self._renew,
            "model",
            30.0,
            DeviceTurns(self.engines, self.ranks, 30.0) if shared else None,
            lambda line: None,
        )

    async def _restart_engine(self, index: int) -> Any:
        self.failing = {}
        return self._actor(f"another engine {index}")

    async def _renew(self) -> None:
        self.num_renewed += 1
        self.failing = {}

    def _actor(self, name: str) -> Any:
        def method(kind: str, answer: Any) -> Any:
            # As a call to an actor, it is on its way before somebody awaits it.
            return SimpleNamespace(remote=lambda *_: asyncio.ensure_future(self._come_up(f"{name} {kind}", answer)))

        facts = {"num_parameters": 1e6, "device": "cuda:0", "dtype": "bfloat16"}
        return SimpleNamespace(
            ready=method("ready", "here"), address=method("address", ("h", 1)), connect=method("connect", facts),
            sleep=method("sleep", None),
        )  # fmt: skip

    async def _come_up(self, event: str, answer: Any) -> Any:
        self.events.append(f"{event} begins")
        await asyncio.sleep(0.01)
        if event == self.never:
            await asyncio.sleep(60)
        if event in self.failing:
            raise self.failing[event]
        self.events.append(f"{event} ends")
        return answer

    def run(self) -> dict[str, Any]:
        return asyncio.run(asyncio.wait_for(self.start.run(), 20))

    def place(self, event: str) -> int:
        return self.events.index(event)


def test_on_shared_gpus_the_learner_starts_when_all_engines_are_up_and_asleep() -> None:
    starting = Starting(shared=True)
    assert starting.run()["dtype"] == "bfloat16"
    asleep = max(starting.place(f"engine {i} sleep ends") for i in range(2))
    assert max(starting.place(f"engine {i} ready ends") for i in range(2)) < starting.place("engine 0 sleep begins")
    assert asleep < starting.place("rank 0 address begins")
    assert asleep < min(starting.place(f"rank {i} connect begins") for i in range(2))


def test_on_gpus_of_their_own_all_start_at_once() -> None:
    starting = Starting(shared=False)
    starting.run()
    assert starting.place("rank 0 address begins") < starting.place("engine 0 ready ends")
    assert not any("sleep" in event for event in starting.events)


@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_that_does_not_start_ends_the_start_at_once(shared: bool) -> None:
    error = RuntimeError("rollout engine 1 on node n did not start: no kernel image")
    never = "engine 0 ready" if shared else "rank 0 connect"
    starting = Starting(shared=shared, failing={"engine 1 ready": error}, never=never)
    with pytest.raises(BaseExceptionGroup) as caught:
        starting.run()
    assert caught.value.exceptions == (error,)
    if shared:
        assert not any(event.startswith("rank") for event in starting.events)


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("connect", f"ray::LearnerRank.connect()\n  File ...\n{type(cause).__name__}: {cause}", cause)


def test_a_rank_that_does_not_start_is_named_and_nobody_waits_for_engines() -> None:
    failing: dict[str, BaseException] = {"rank 1 connect": task_error(RuntimeError("no room"))}
    starting = Starting(shared=False, failing=failing, never="engine 0 ready")
    with pytest.raises(BaseExceptionGroup) as caught:
        starting.run()
    assert [str(error) for error in caught.value.exceptions] == ["learner rank 1 did not start: RuntimeError: no room"]


def test_what_the_user_can_correct_stays_as_it_is() -> None:
    failing: dict[str, BaseException] = {"rank 0 connect": task_error(InputError("model.path: has no weights"))}
    starting = Starting(shared=False, failing=failing)
    with pytest.raises(BaseExceptionGroup) as caught:
        starting.run()
    assert getattr(caught.value.exceptions[0], "cause", None) is failing["rank 0 connect"].cause  # type: ignore[attr-defined]


@pytest.mark.parametrize("of_a_node", [False, True])
def test_a_rank_that_died_while_starting_is_started_again(of_a_node: bool) -> None:
    error = ActorUnavailableError("RPC error", b"0" * 16) if of_a_node else ActorDiedError()
    starting = Starting(shared=True, failing={"rank 1 connect": error})
    assert starting.run()["dtype"] == "bfloat16"
    assert starting.num_renewed == 1


def test_ranks_that_tell_of_the_death_of_another_are_started_again() -> None:
    broken = task_error(RuntimeError("[gloo] Connection closed by peer [10.0.0.7]:4711"))
    starting = Starting(shared=False, failing={"rank 0 connect": broken})
    starting.run()
    assert starting.num_renewed == 1


def test_an_engine_that_died_while_starting_is_started_again() -> None:
    starting = Starting(shared=False, failing={"engine 1 ready": ActorDiedError()})
    asyncio.run(starting.start.run())
    assert "another engine 1 ready begins" in starting.events


def test_an_actor_that_takes_too_long_is_named() -> None:
    starting = Starting(shared=False, never="worker 0 ready")
    object.__setattr__(starting.start, "timeout_s", 0.1)
    with pytest.raises(BaseExceptionGroup) as caught:
        starting.run()
    assert "waited 0.1 s (learner.timeout_s) for reward worker 0 to start" in str(caught.value.exceptions[0])


# ------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness=1 cannot overlap the two; set it to 0"),
        (
            {"rollout": {"accelerator": "L4"}, "learner": {"accelerator": "H100"}},
            "rollout.accelerator=L4 and learner.accelerator=H100 would be the same GPUs",
        ),
    ],
)
def test_what_shared_gpus_cannot_do_is_refused(make_config: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make_config(cluster={"colocate": True}, **changes)
    make_config(**changes)


# ------------------------------------------------------------------------------------------ the learner's state

STATE_PROGRAM = Path(__file__).with_name("training_state_program.py")


@pytest.fixture(scope="module")
def moved_state() -> dict[str, Any]:
    """What the program printed: a DeepSpeed engine needs a process of its own."""
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(STATE_PROGRAM)], env=here, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "case", ["zero-1 float32", *(f"zero-{s} {d}" for s in (2, 3) for d in ("float32", "bfloat16"))]
)
def test_updates_go_on_as_if_the_state_had_never_been_away(moved_state: dict[str, Any], case: str) -> None:
    result = moved_state[case]
    assert result["losses"] == result["undisturbed"]
    assert len(set(result["losses"])) == len(result["losses"])  # it did learn in between
    assert result["scores_while_away"]
    # On a CPU all tensors stay where they are, so what is seen is that each was asked to go, and to come back.
    assert result["went"] == result["came_back"]
    assert result["went"] >= 3  # masters and both moments


def test_a_state_that_cannot_move_is_refused(moved_state: dict[str, Any]) -> None:
    assert moved_state["zero-1 bfloat16"] == {"refused": NEEDS_ANOTHER_STAGE}
