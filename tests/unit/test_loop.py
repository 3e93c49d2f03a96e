"""Rows, weights, staleness and streaming, against fakes of the protocols."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dphrl import collect
from dphrl.batch import check_staleness, learning_rate, make_batch
from dphrl.collect import collect_groups, collect_step
from dphrl.config.learner import LearnerConfig
from dphrl.protocols import Parts
from dphrl.tracking.step_metrics import rollout_metrics
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, RolloutGroup, RowKind

CORRECT, WRONG = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG)
FAILED = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR)


def prompt(name: str) -> Prompt:
    return Prompt(name, name, (1, 2, 3), "answer", "data")


def completion(name: str, index: int, length: int = 2, version: int = 0, finish: str = "stop") -> Completion:
    return Completion(name, index, (7,) * length, "text", (-0.5,) * length, finish, version)


def group(name: str, results: list[RewardResult], **options: Any) -> RolloutGroup:
    completions = tuple(completion(name, i, **options) for i in range(len(results)))
    return RolloutGroup(prompt(name), completions, tuple(results))


def sample(length: int) -> ReferenceSample:
    return ReferenceSample("p", (1, 2), (5,) * length, (-0.1,) * length)


def test_each_minibatch_and_each_term_has_its_own_denominator(make_config: Any) -> None:
    groups = [group("a", [CORRECT, WRONG], length=2), group("b", [CORRECT, WRONG], length=3)]
    batch = make_batch(make_config(), 0, 0, groups, [sample(4), sample(6), sample(1), sample(1)])
    for rows, policy_tokens, reference_tokens in zip(batch.minibatches, (4, 6), (10, 2), strict=True):
        for row in rows:
            expected = policy_tokens if row.kind is RowKind.POLICY else reference_tokens
            assert row.weight == pytest.approx(1 / expected)
        totals = {kind: sum(r.weight * r.num_completion_tokens for r in rows if r.kind is kind) for kind in RowKind}
        assert totals == pytest.approx({RowKind.POLICY: 1.0, RowKind.REFERENCE: 1.0})


def test_an_infrastructure_error_is_excluded_not_scored_zero(make_config: Any) -> None:
    config = make_config(algorithm={"num_minibatches": 1, "advantage": "mean_only"})
    groups = [group("a", [CORRECT, WRONG, FAILED])]
    assert [row.advantage for row in make_batch(config, 0, 0, groups, []).minibatches[0]] == [0.5, -0.5]
    metrics = rollout_metrics(groups, 0)
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/status/infrastructure_error"] == 1


def test_masked_truncations_count_in_the_mean_but_not_in_the_loss(make_config: Any) -> None:
    mixed = RolloutGroup(prompt("a"), (completion("a", 0), completion("a", 1, finish="length")), (CORRECT, WRONG))
    config = make_config(algorithm={"num_minibatches": 1, "advantage": "mean_only"}, rollout={"truncated": "mask"})
    (rows,) = make_batch(config, 0, 0, [mixed], []).minibatches
    assert [row.advantage for row in rows] == [0.5]
    assert rows[0].weight == pytest.approx(1 / 2)


def test_nothing_to_train_on_is_an_error_that_says_so(make_config: Any) -> None:
    with pytest.raises(RuntimeError, match="nothing to train on"):
        make_batch(make_config(), 0, 0, [group("a", [FAILED, FAILED])], [])


@pytest.mark.parametrize(("version", "bound", "fine"), [(5, 0, True), (4, 0, False), (4, 1, True), (6, 1, False)])
def test_staleness_bound(version: int, bound: int, fine: bool) -> None:
    groups = [group("a", [CORRECT], version=version)]
    if fine:
        check_staleness(groups, 5, bound)
    else:
        with pytest.raises(RuntimeError, match=f"policy version {version}, the learner is at 5"):
            check_staleness(groups, 5, bound)


def test_learning_rate() -> None:
    linear = LearnerConfig(num_steps=11, lr=1.0, lr_schedule="linear", lr_final_fraction=0.1)
    assert [learning_rate(linear, step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    warm = LearnerConfig(num_steps=10, lr=1.0, warmup_steps=4)
    assert [learning_rate(warm, step) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 1.0])


class SlowEngine:
    """Yields one completion at a time, later prompts first."""

    def __init__(self, missing: int = 0) -> None:
        self.missing, self.num_yielded = missing, 0

    async def generate(self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False) -> Any:
        jobs = [(p, i) for p in reversed(prompts) for i in reversed(range(num_samples))]
        for p, i in jobs[self.missing :]:
            self.num_yielded += 1
            yield [completion(p.prompt_id, i)]
            await asyncio.sleep(0)


class WatchingGrader:
    def __init__(self, engine: SlowEngine) -> None:
        self.engine, self.yielded_at_first_grade = engine, None

    async def grade(self, items: Any) -> list[RewardResult]:
        if self.yielded_at_first_grade is None:
            self.yielded_at_first_grade = self.engine.num_yielded
        return [CORRECT if c.sample_index else WRONG for _, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}


def test_grading_starts_while_others_still_decode_and_order_is_restored() -> None:
    engine = SlowEngine()
    grader = WatchingGrader(engine)
    prompts, counted = [prompt("a"), prompt("b")], []
    collected = asyncio.run(collect_groups(engine, grader, prompts, 3, seed=0, on_graded=counted.append))
    assert grader.yielded_at_first_grade < 6
    assert [g.prompt.prompt_id for g in collected.groups] == ["a", "b"]
    assert all([c.sample_index for c in g.completions] == [0, 1, 2] for g in collected.groups)
    assert all(g.results == (WRONG, CORRECT, CORRECT) for g in collected.groups)
    assert (sum(counted), collected.num_tokens) == (6, 12)


def test_a_lost_completion_stops_the_step() -> None:
    engine = SlowEngine(missing=1)
    with pytest.raises(RuntimeError, match="prompt b: 2 completions came back, 3 were asked"):
        asyncio.run(collect_groups(engine, WatchingGrader(engine), [prompt("a"), prompt("b")], 3, seed=0))


class ScriptedGrader:
    """Prompts whose name ends in an even digit are solved by every sample: no signal."""

    async def grade(self, items: Any) -> list[RewardResult]:
        return [CORRECT if int(p.prompt_id[-1]) % 2 == 0 or c.sample_index else WRONG for p, c in items]

    def drain_metrics(self) -> dict[str, float]:
        return {}


def dynamic_step(make_config: Any, rounds: int, names: list[str]) -> Any:
    config = make_config(
        rollout={"num_prompts": 4, "num_samples": 2},
        algorithm={"dynamic_sampling_rounds": rounds},
    )
    parts = Parts(None, SlowEngine(), ScriptedGrader())  # type: ignore[arg-type]
    return asyncio.run(collect_step(config, [prompt(name) for name in names], parts, 0))


def test_dynamic_sampling_refills_until_enough_groups_have_signal(make_config: Any) -> None:
    names = [f"p{i}" for i in range(10)]
    plain = dynamic_step(make_config, 1, names)
    assert (len(plain.groups), len(plain.sampled), plain.metrics["rollout/num_rounds"]) == (4, 4, 1)
    refilled = dynamic_step(make_config, 5, names)
    assert len(refilled.groups) == 4
    assert all(int(g.prompt.prompt_id[-1]) % 2 for g in refilled.groups)
    assert 1 < refilled.metrics["rollout/num_rounds"] <= 5
    assert len(refilled.sampled) == 4 * refilled.metrics["rollout/num_rounds"]


def test_dynamic_sampling_stops_at_its_bound_with_what_it_has(make_config: Any) -> None:
    hopeless = dynamic_step(make_config, 3, [f"p{i}" for i in range(0, 20, 2)])
    assert (hopeless.metrics["rollout/num_rounds"], len(hopeless.sampled), len(hopeless.groups)) == (3, 12, 4)


def test_length_penalty_shapes_the_advantage_and_nothing_else(make_config: Any) -> None:
    # max 24, buffer 8: 16 tokens cost nothing, 20 cost 1/2, 24 cost 1. Scores 1, 1/2, 0: mean 1/2.
    completions = tuple(completion("a", i, length=n) for i, n in enumerate((16, 20, 24)))
    groups = [RolloutGroup(prompt("a"), completions, (CORRECT,) * 3)]
    shaping = {"num_minibatches": 1, "advantage": "mean_only", "overlong_buffer_tokens": 8}
    (rows,) = make_batch(make_config(algorithm=shaping), 0, 0, groups, []).minibatches
    assert [row.advantage for row in rows] == pytest.approx([0.5, 0.0, -0.5])
    assert rollout_metrics(groups, 0)["reward/mean"] == 1.0


class EndlessEngine:
    """Yields one completion at a time, as fast as it is asked."""

    num_yielded = 0

    async def generate(self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False) -> Any:
        for i in range(num_samples):
            self.num_yielded += 1
            yield [Completion(prompts[0].prompt_id, i, (1,), "x", (0.0,), "stop", 0)]


def test_a_slow_reward_holds_up_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_UNGRADED", 3)
    engine = EndlessEngine()
    ahead: list[int] = []

    class SlowGrader:
        num_graded = 0

        async def grade(self, items: Any) -> list[RewardResult]:
            await asyncio.sleep(0.001)
            ahead.append(engine.num_yielded - self.num_graded)
            self.num_graded += len(items)
            return [CORRECT] * len(items)

    collected = asyncio.run(collect_groups(engine, SlowGrader(), [prompt("p")], 50, seed=0))
    assert len(collected.groups[0].completions) == 50
    assert max(ahead) <= 4
