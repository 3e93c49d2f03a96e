"""Rows, weights, staleness and streaming, against fakes of the protocols."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dphrl.collect import collect_groups
from dphrl.config import LearnerConfig
from dphrl.loop import check_staleness, learning_rate, make_batch
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
    batch = make_batch(
        make_config(algorithm={"num_minibatches": 1, "advantage": "mean_only"}),
        0,
        0,
        [group("a", [CORRECT, WRONG, FAILED])],
        [],
    )
    assert [row.advantage for row in batch.minibatches[0]] == [0.5, -0.5]
    assert batch.metrics["reward/mean"] == 0.5
    assert batch.metrics["reward/status/infrastructure_error"] == 1


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
