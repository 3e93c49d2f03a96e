"""Weights to engines and back again as a proof, work to engines and graders: with stand-ins for Ray's actors.

A stand-in has, for each method, `.remote` that gives something to await, as a handle does; nothing of Ray runs.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from actors import buffer as buffer_module
from actors import learner_group, reward_pool
from actors.asks import Ask
from actors.buffer import BufferActor, RayReferenceStore
from actors.learner_group import RayLearner
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from actors.weight_proof import PROBE_TOKENS
from actors.weight_transfer.failures import Place
from actors.weight_transfer.ledger import EngineRecord, WeightSummary
from dphrl.inline import InlineRewards
from dphrl.protocols import LastUpdate
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.reference.split import Split
from dphrl.rewards.base import build_grader
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, TrainBatch
from tests.unit.fake_engine import FakeWork

PROBES = [Prompt(f"probe{i}", "text", (1, 2, 3 + i), "", "d") for i in range(3)]


class Handle:
    """A stand-in for an actor: its methods by name, each called through `.remote`."""

    def __init__(self, **methods: Any) -> None:
        for name, method in methods.items():
            setattr(self, name, SimpleNamespace(remote=method))


async def answer(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def stream(chunks: list[Any]) -> Any:
    """What a rank publishes: for each chunk the word that it is whole, then its reference."""
    for chunk in chunks:
        yield answer(True)
        yield chunk


# -------------------------------------------------------------------------------- refit and its proof


class Learner:
    """A learner at version 7 whose log-prob of a token is minus a hundredth of it."""

    policy_version = 7
    last_update: LastUpdate | None = None
    content = WeightSummary(3, 24, 99)

    def __init__(self) -> None:
        self.scored: list[Any] = []

    async def publish(self) -> Any:
        for chunk in ("chunk 0", "chunk 1", "chunk 2"):
            yield chunk

    async def sent(self) -> WeightSummary:
        return self.content

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        self.scored.append(list(sequences))
        return [tuple(-0.01 * token for token in ids[num_prompt:]) for ids, num_prompt in sequences]


class Engine(FakeWork, Handle):
    """Takes weights in order; its log-probs are the learner's but for `gap` at the last token of the last probe."""

    def __init__(self, gap: float = 0.0, acknowledges: int | None = None) -> None:
        self.gap, self.acknowledges, self.calls = gap, acknowledges, []
        Handle.__init__(
            self,
            ready=lambda: answer(Place("a", 1)),
            start_weight_update=self._start,
            update_weights=self._update,
            finish_weight_update=self._finish,
        )
        FakeWork.__init__(self, self._complete)

    def _start(self) -> Any:
        self.calls.append("start")
        return answer(None)

    def _update(self, chunk: Any) -> Any:
        self.calls.append(chunk)
        return answer(None)

    def _finish(self, version: int) -> Any:
        self.calls.append(("finish", version))
        version = version if self.acknowledges is None else self.acknowledges
        return answer(EngineRecord(version, (Learner.content,) * 2))

    def _complete(self, ask: Ask, sample_index: int) -> Completion:
        tokens = (ask.prompt.token_ids[-1], 20)
        logprobs = [-0.01 * token for token in tokens]
        if ask.prompt is PROBES[-1]:
            logprobs[-1] += self.gap
        return Completion(ask.prompt.prompt_id, sample_index, tokens, "", tuple(logprobs), "stop", 7)

    async def _probe(self, prompts: Any, seed: int, max_tokens: int) -> list[Completion]:
        self.calls.append(("probe", len(prompts), seed, max_tokens))
        return await super()._probe(prompts, seed, max_tokens)


def refit(make_config: Any, *engines: Engine, learner: Any = None, **sync: Any) -> Any:
    pool = RayRolloutPool(engines, make_config(sync=sync), PROBES)
    return asyncio.run(pool.refit(learner or Learner()))  # type: ignore[arg-type]


def test_every_engine_takes_every_chunk_in_order_and_then_proves_it(make_config: Any) -> None:
    engines, learner = [Engine(), Engine(gap=5e-4)], Learner()
    gaps = refit(make_config, *engines, learner=learner, max_mean_logprob_gap=1e-3)
    # The engine that is off is so at one token of six.
    assert gaps == {
        "sync/logprob_gap_max": pytest.approx(5e-4),
        "sync/logprob_gap_mean": pytest.approx(5e-4 / 6),
        "sync/num_bytes": 24,
    }
    for engine in engines:
        assert engine.calls[:5] == ["start", "chunk 0", "chunk 1", "chunk 2", ("finish", 7)]
        assert engine.calls[5] == ("probe", 3, engines[0].calls[5][2], PROBE_TOKENS)
    # The learner judges each probe of each engine, completion and all, by one call.
    (scored,) = learner.scored
    assert [(ids[-2:], num_prompt) for ids, num_prompt in scored] == [((3 + i, 20), 3) for i in range(3)] * 2


def test_an_engine_that_acknowledges_another_version_is_refused(make_config: Any) -> None:
    with pytest.raises(RuntimeError, match=r"acknowledged versions \[6, 7\] after a sync to 7"):
        refit(make_config, Engine(), Engine(acknowledges=6))


# ------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("num_engines", [1, 2, 3])
@pytest.mark.parametrize("greedy", [False, True])
def test_every_prompt_is_sampled_once_with_the_calls_seed(make_config: Any, num_engines: int, greedy: bool) -> None:
    engines = [Engine() for _ in range(num_engines)]
    pool = RayRolloutPool(engines, make_config())
    prompts = [Prompt(f"p{i}", "text", (1, 2, i), "", "d") for i in range(10)]

    async def run() -> list[Completion]:
        return [c async for done in pool.generate(prompts, 2, seed=5, greedy=greedy) for c in done]

    sampled = sorted((c.prompt_id, c.sample_index) for c in asyncio.run(run()))
    assert sampled == sorted((p.prompt_id, i) for p in prompts for i in range(2))
    asks = [ask for engine in engines for ask in engine.asked]
    assert {ask.seed for ask in asks} == {5}, "engines make one of it for each completion, by its prompt"
    assert {ask.greedy for ask in asks} == {greedy}
    assert all(engine.asked for engine in engines), "none is left without work"


# ------------------------------------------------------------------------------------- the learner's ranks


def test_ranks_are_one_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_group.ray, "put", lambda value: value)
    loaded: list[Any] = []

    def rank(place: int) -> Handle:
        return Handle(
            score=lambda sequences: answer({i: (float(i),) for i in range(len(sequences)) if i % 2 == place}),
            measure=lambda sequences: answer({i: ((float(i),), (i / 2,)) for i in range(place, len(sequences), 2)}),
            update=lambda batch: answer({"learner/grad_norm": 1.0 + place, "rollout/logprob_gap_max": 0.5 * place}),
            publish=lambda: stream(["chunk 0", "chunk 1"] if place == 0 else []),
            sent=lambda: answer(f"what rank {place} sent"),
            load=lambda folder, weights_only: answer(loaded.append((folder, weights_only))),
            copy_state=lambda: answer(10 + place),
            write_state=lambda folder: answer({f"state/rank_{place}": folder}),
        )

    async def run() -> None:
        learner = RayLearner([rank(0), rank(1)])
        assert learner.policy_version == 0
        assert await learner.score([((1, 2), 1)] * 5) == [(0.0,), (1.0,), (2.0,), (3.0,), (4.0,)]
        assert await learner.score([]) == []
        assert await learner.measure([((1, 2), 1)] * 4) == [((float(i),), (i / 2,)) for i in range(4)]
        assert await learner.measure([]) == []
        assert learner.last_update is None
        metrics = await learner.update(TrainBatch(0, 0, (), 1e-3))
        assert learner.last_update == LastUpdate(3.0, 1e-3)
        assert metrics == {"learner/grad_norm": 3.0, "rollout/logprob_gap_max": 0.5}, "shares add up, the largest stays"
        assert learner.policy_version == 1
        assert [chunk async for chunk in learner.publish()] == ["chunk 0", "chunk 1"]
        assert await learner.sent() == "what rank 0 sent"
        await learner.load("folder", 9)  # type: ignore[arg-type]
        assert (learner.policy_version, loaded) == (9, [("folder", False)] * 2)
        assert await learner.copy_state() == 21, "bytes of all ranks"
        assert await learner.write_state(Path("a")) == {"state/rank_0": "a", "state/rank_1": "a"}
        assert learner.last_update is None, "no update made the weights of a checkpoint"

    asyncio.run(run())


# ------------------------------------------------------------------------------------- the buffer


@pytest.mark.parametrize("samples_per_object", [1, 4, 100])
def test_the_buffer_actor_chooses_as_the_buffer_does(monkeypatch: pytest.MonkeyPatch, samples_per_object: int) -> None:
    monkeypatch.setattr(buffer_module, "SAMPLES_PER_OBJECT", samples_per_object)
    fetched: list[int] = []

    def get(shards: list[Any], timeout: float) -> list[Any]:
        fetched.append(len(shards))
        return shards

    monkeypatch.setattr(buffer_module.ray, "put", lambda value: value)
    monkeypatch.setattr(buffer_module.ray, "get", get)
    samples = [ReferenceSample(f"p{i}", (1,), (i,), (-0.5,)) for i in range(10)]
    whole = ReferenceBuffer(Split((), (), ()), {}, samples, {}, 3)
    actor = BufferActor.__ray_metadata__.modified_class()
    actor.put(whole)
    store = RayReferenceStore(
        Handle(sample=lambda step, num_rows: answer(actor.sample(step, num_rows))),
        frozenset("a"),
        frozenset("b"),
        revive=lambda: answer(pytest.fail("it is there")),
        timeout_s=5.0,
    )
    for step in range(7):
        rows = asyncio.run(store.sample(step, 4))
        assert rows == asyncio.run(whole.sample(step, 4))
        assert len(rows) == 4
    assert max(fetched) <= 4, "a step fetches the objects it reads and no other"


# ------------------------------------------------------------------------------------- rewards

CORRECT, FAILED = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "no")


class Worker(Handle):
    """Grades; fails on a text as often as it is told to, and dies on `deadly`."""

    def __init__(self, log: list[Any], name: str, failures: dict[str, int]) -> None:
        self.log, self.name, self.failures = log, name, failures
        super().__init__(grade=self._grade, ready=lambda: answer(True))

    async def _grade(self, pairs: Any) -> list[RewardResult]:
        await asyncio.sleep(0)
        self.log.append((self.name, [text for text, _ in pairs]))
        if any(text == "deadly" for text, _ in pairs):
            raise ray.exceptions.RayActorError
        return [self._verdict(text) for text, _ in pairs]

    def _verdict(self, text: str) -> RewardResult:
        if self.failures.get(text, 0) > 0:
            self.failures[text] -= 1
            return FAILED
        return RewardResult(RewardStatus.CORRECT, text)


def grade(
    make_config: Any, texts: list[str], failures: dict[str, int], num_workers: int = 2, num_retries: int = 2
) -> tuple[list[RewardResult], list[Any], Any]:
    log: list[Any] = []
    workers = [Worker(log, f"worker {i}", failures) for i in range(num_workers)]
    pool = RayRewardPool(workers, make_config(reward={"num_retries": num_retries}))
    prompt = Prompt("a", "text", (1,), "", "d")
    items = [(prompt, Completion("a", i, (1,), text, (-0.1,), "stop", 0)) for i, text in enumerate(texts)]
    return asyncio.run(pool.grade(items)), log, pool.drain_metrics()


def test_a_thought_that_the_prompt_opened_is_graded_as_one_in_both_pools(make_config: Any) -> None:
    sums = {"name": "sums", "kind": "arithmetic"}
    config = make_config(reward={"name": "math_answer", "num_retries": 0}, data={"train": sums, "evaluation": [sums]})
    prompts = [Prompt("a", "4?", (1,), "4", "d"), Prompt("b", "4? <think>\n", (1,), "4", "d")]
    texts = (r"\boxed{4}", r"\boxed{5}</think>\boxed{4}")
    items = [(p, Completion(p.prompt_id, 0, (1,), text, (-0.1,), "stop", 0)) for p in prompts for text in texts]
    grader = build_grader(config.reward)
    worker = Handle(grade=lambda pairs: answer(grader.grade(pairs)))
    for pool in (RayRewardPool([worker], config), InlineRewards(config)):
        assert [r.status for r in asyncio.run(pool.grade(items))] == ["correct", "correct", "unparsable", "correct"]
    grader.close()


def test_verdicts_come_in_the_order_of_the_items(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_pool, "MAX_BATCH", 3)
    texts = [f"text {i}" for i in range(11)]
    results, log, metrics = grade(make_config, texts, {})
    assert [result.detail for result in results] == texts
    assert [len(batch) for _, batch in log] == [3, 3, 3, 2]
    assert {name for name, _ in log} == {"worker 0", "worker 1"}
    assert (metrics["reward/num_retried"], metrics["reward/num_restarts"]) == (0, 0)


@pytest.mark.parametrize(
    ("failures", "num_retries", "retried", "good"),
    [(1, 2, 1, True), (2, 2, 2, True), (3, 2, 2, False), (1, 0, 0, False)],
)
def test_an_infrastructure_error_is_tried_again_alone_so_often(
    make_config: Any, failures: int, num_retries: int, retried: int, good: bool
) -> None:
    results, log, metrics = grade(make_config, ["a", "bad", "c", "d"], {"bad": failures}, 2, num_retries)
    statuses = [result.status for result in results]
    assert statuses == ["correct", "correct" if good else "infrastructure_error", "correct", "correct"]
    alone = [name for name, batch in log if batch == ["bad"]]
    assert len(alone) == retried == metrics["reward/num_retried"]
    first = next(name for name, batch in log if batch != ["bad"] and "bad" in batch)
    for before, after in zip([first, *alone], alone, strict=False):
        assert before != after, "on another worker than the one it failed on"


def test_one_that_kills_workers_costs_its_neighbours_nothing(make_config: Any) -> None:
    results, _, metrics = grade(make_config, ["a", "deadly"], {}, num_workers=1)
    assert [result.status for result in results] == ["correct", "infrastructure_error"]
    assert results[1].score is None
    assert results[1].detail.startswith("reward worker 0 died: ")
    # Both lost the first batch; the neighbour came back at its first retry.
    assert metrics["reward/num_retried"] == 3


# ------------------------------------------------------------------------------------- one rank


def test_a_rank_steps_with_the_steps_rate_at_the_last_micro_batch() -> None:
    from actors.deepspeed_engine import DeepSpeedEngine

    calls: list[Any] = []
    groups = [{"lr": 1.0}, {"lr": 1.0}]
    engine = object.__new__(DeepSpeedEngine)
    engine._keeps_sums = False
    engine.module = SimpleNamespace(
        set_gradient_accumulation_boundary=lambda last: calls.append(("boundary", last)),
        backward=lambda loss: calls.append(("backward", loss)),
        step=lambda: calls.append(("step", [group["lr"] for group in groups])),
        get_global_grad_norm=lambda: 0.75,
        was_step_applied=lambda: True,
        optimizer=SimpleNamespace(param_groups=groups),
    )
    engine.backward(torch.tensor(2.0), last=False)
    engine.backward(torch.tensor(3.0), last=True)
    assert engine.step(0.25) == 0.75
    assert calls == [
        ("boundary", False),
        ("backward", 2.0),
        ("boundary", True),
        ("backward", 3.0),
        ("step", [0.25] * 2),
    ]


@pytest.mark.parametrize(("norm", "kept"), [(0.75, True), (math.inf, False)])
def test_sums_of_a_skipped_step_are_forgotten(norm: float, kept: bool) -> None:
    from actors.deepspeed_engine import DeepSpeedEngine

    sums: dict[int, Any] = {0: "sums", 1: "sums"}
    engine = object.__new__(DeepSpeedEngine)
    engine._keeps_sums = True
    engine.module = SimpleNamespace(
        step=lambda: None,
        get_global_grad_norm=lambda: norm,
        was_step_applied=lambda: kept,
        optimizer=SimpleNamespace(param_groups=[], averaged_gradients=sums),
    )
    assert engine.step(0.25) == norm
    assert sums == dict.fromkeys(range(2), "sums" if kept else None)


@pytest.mark.parametrize(("norm", "taken", "did"), [(math.nan, True, "took"), (0.75, False, "skipped")])
def test_a_step_that_deepspeed_took_or_skipped_against_its_norm_ends_the_run(
    norm: float, taken: bool, did: str
) -> None:
    from actors.deepspeed_engine import DeepSpeedEngine

    engine = object.__new__(DeepSpeedEngine)
    engine._keeps_sums = False
    engine.module = SimpleNamespace(
        step=lambda: None,
        get_global_grad_norm=lambda: norm,
        was_step_applied=lambda: taken,
        optimizer=SimpleNamespace(param_groups=[]),
    )
    with pytest.raises(RuntimeError, match=f"DeepSpeed {did} a step whose gradient norm is {norm}"):
        engine.step(0.25)
