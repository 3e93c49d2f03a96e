"""From groups and rehearsal rows to a batch: which rows, which weights, which rate; and what a step reports of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dphrl.batch import check_staleness, learning_rate, make_batch, shaped_scores
from dphrl.config.learner import LearnerConfig
from dphrl.tracking.step_metrics import rollout_metrics
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, RolloutGroup, RowKind

CORRECT, WRONG = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG)
FAILED = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR)
MEAN_ONLY = {"num_minibatches": 1, "advantage": "mean_only"}


def prompt(name: str) -> Prompt:
    return Prompt(name, name, (1, 2, 3), "answer", "data")


def completion(name: str, index: int, length: int = 2, version: int = 0, finish: str = "stop") -> Completion:
    return Completion(name, index, (7,) * length, "text", (-0.5,) * length, finish, version)


def group(name: str, results: list[RewardResult], **options: Any) -> RolloutGroup:
    completions = tuple(completion(name, i, **options) for i in range(len(results)))
    return RolloutGroup(prompt(name), completions, tuple(results))


def sample(length: int, name: str = "p") -> ReferenceSample:
    return ReferenceSample(name, (1, 2), (5,) * length, (-0.1,) * length)


# ------------------------------------------------------------------------------------------ rows


def test_each_minibatch_and_each_term_has_its_own_denominator(make_config: Any) -> None:
    groups = [group("a", [CORRECT, WRONG], length=2), group("b", [CORRECT, WRONG], length=3)]
    batch = make_batch(make_config(), 0, 0, groups, [sample(4), sample(6), sample(1), sample(1)])
    for rows, policy_tokens, reference_tokens in zip(batch.minibatches, (4, 6), (10, 2), strict=True):
        for row in rows:
            expected = policy_tokens if row.kind is RowKind.POLICY else reference_tokens
            assert row.weight == pytest.approx(1 / expected)
        totals = {kind: sum(r.weight * r.num_completion_tokens for r in rows if r.kind is kind) for kind in RowKind}
        assert totals == pytest.approx({RowKind.POLICY: 1.0, RowKind.REFERENCE: 1.0})


def test_a_row_is_the_prompt_then_the_completion_with_what_each_kind_stored(make_config: Any) -> None:
    rollout = Completion("a", 0, (8, 9), "text", (-0.3, -0.4), "stop", 4)
    mixed = RolloutGroup(prompt("a"), (rollout, completion("a", 1, version=4)), (CORRECT, WRONG))
    rehearsed = ReferenceSample("p", (1, 2), (5, 6), (-0.1, -0.2))
    batch = make_batch(make_config(algorithm=MEAN_ONLY), 6, 4, [mixed], [rehearsed])
    (rows,) = batch.minibatches
    policy, reference = rows[0], rows[-1]
    assert (policy.kind, policy.token_ids, policy.num_prompt_tokens) == (RowKind.POLICY, (1, 2, 3, 8, 9), 3)
    assert (policy.logprobs, policy.advantage, policy.policy_version) == ((-0.3, -0.4), 0.5, 4)
    assert (reference.kind, reference.token_ids, reference.num_prompt_tokens) == (RowKind.REFERENCE, (1, 2, 5, 6), 2)
    assert (reference.logprobs, reference.advantage) == ((-0.1, -0.2), 0.0)
    assert (batch.step, batch.policy_version, len(rows)) == (6, 4, 3)
    assert batch.metrics == {
        "divergence/num_rows": 1.0,
        "learner/lr": batch.learning_rate,
        "learner/num_rows_left_out": 0.0,
        "learner/num_tokens": 14.0,
    }


@pytest.mark.parametrize(("num_groups", "num_samples"), [(4, 4), (5, 7), (3, 2)])
def test_every_row_is_in_one_minibatch_and_in_its_order(make_config: Any, num_groups: int, num_samples: int) -> None:
    groups = [group(f"g{i}", [CORRECT, WRONG], length=1 + i) for i in range(num_groups)]
    rehearsal = [sample(10 + i) for i in range(num_samples)]
    batch = make_batch(make_config(), 0, 0, groups, rehearsal)
    rows = [row for minibatch in batch.minibatches for row in minibatch]
    policy = [row.num_completion_tokens for row in rows if row.kind is RowKind.POLICY]
    assert policy == [1 + i for i in range(num_groups) for _ in range(2)]
    assert [r.num_completion_tokens for r in rows if r.kind is RowKind.REFERENCE] == [
        10 + i for i in range(num_samples)
    ]
    counts = [sum(row.kind is RowKind.REFERENCE for row in minibatch) for minibatch in batch.minibatches]
    assert max(counts) - min(counts) <= 1


def test_an_infrastructure_error_is_excluded_not_scored_zero(make_config: Any) -> None:
    groups = [group("a", [CORRECT, WRONG, FAILED])]
    (rows,) = make_batch(make_config(algorithm=MEAN_ONLY), 0, 0, groups, []).minibatches
    assert [row.advantage for row in rows] == [0.5, -0.5]
    metrics = rollout_metrics(groups, 0)
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/status/infrastructure_error"] == 1


@pytest.mark.parametrize(("truncated", "advantages"), [("mask", [0.5]), ("keep", [0.5, -0.5])])
def test_masked_truncations_count_in_the_mean_but_not_in_the_loss(
    make_config: Any, truncated: str, advantages: list[float]
) -> None:
    mixed = RolloutGroup(prompt("a"), (completion("a", 0), completion("a", 1, finish="length")), (CORRECT, WRONG))
    config = make_config(algorithm=MEAN_ONLY, rollout={"truncated": truncated})
    (rows,) = make_batch(config, 0, 0, [mixed], []).minibatches
    assert [row.advantage for row in rows] == advantages
    assert rows[0].weight == pytest.approx(1 / (2 * len(advantages)))
    assert rollout_metrics([mixed], 0)["rollout/truncated_fraction"] == 0.5


def test_a_finer_signal_trains_and_the_score_stays_the_score(make_config: Any) -> None:
    near, failed = replace(WRONG, signal=0.5), replace(FAILED, signal=0.9)
    groups = [group("a", [CORRECT, near, failed])]
    (rows,) = make_batch(make_config(algorithm=MEAN_ONLY), 0, 0, groups, []).minibatches
    assert [row.advantage for row in rows] == [0.25, -0.25]
    metrics = rollout_metrics(groups, 0)
    assert (metrics["reward/mean"], metrics["reward/signal_mean"]) == (0.5, 0.75)


def test_length_penalty_shapes_the_advantage_and_nothing_else(make_config: Any) -> None:
    # max 24, buffer 8: 16 tokens cost nothing, 20 cost 1/2, 24 cost 1. Scores 1, 1/2, 0: mean 1/2.
    completions = tuple(completion("a", i, length=n) for i, n in enumerate((16, 20, 24)))
    groups = [RolloutGroup(prompt("a"), completions, (CORRECT,) * 3)]
    config = make_config(algorithm=MEAN_ONLY | {"overlong_buffer_tokens": 8})
    assert shaped_scores(groups[0], config) == pytest.approx([1.0, 0.5, 0.0])
    (rows,) = make_batch(config, 0, 0, groups, []).minibatches
    # The one in the middle leaves the batch, and stays in its denominator.
    assert [row.advantage for row in rows] == pytest.approx([0.5, -0.5])
    assert [row.weight for row in rows] == pytest.approx([1 / 60, 1 / 60])
    assert rollout_metrics(groups, 0)["reward/mean"] == 1.0
    assert shaped_scores(groups[0], make_config()) == [1.0, 1.0, 1.0]


def test_rows_without_advantage_leave_the_batch_and_stay_in_its_denominator(make_config: Any) -> None:
    flat, mixed = group("a", [CORRECT, CORRECT], length=3), group("b", [CORRECT, WRONG], length=2)
    batch = make_batch(make_config(algorithm=MEAN_ONLY), 0, 0, [flat, mixed], [sample(4)])
    (rows,) = batch.minibatches
    assert [row.advantage for row in rows] == [0.5, -0.5, 0.0], "a rehearsal row has none, and stays"
    assert [row.weight for row in rows] == pytest.approx([1 / 10, 1 / 10, 1 / 4])
    assert batch.policy_shares == pytest.approx((4 / 10,))
    assert batch.metrics["learner/num_rows_left_out"] == 2
    assert batch.metrics["learner/num_tokens"] == 2 * (3 + 2) + (2 + 4)


@pytest.mark.parametrize(
    "reads_them",
    [
        {"entropy_bonus": 0.01},
        {"divergence": "reverse_kl", "estimator": "rollout"},
        {"divergence": "js", "estimator": "definition"},
        {"plugins": ["tests.unit.user_methods"], "policy_loss": "reinforce"},
    ],
)
def test_rows_that_something_else_reads_stay(make_config: Any, reads_them: dict[str, Any]) -> None:
    groups = [group("a", [CORRECT, CORRECT]), group("b", [CORRECT, WRONG])]
    batch = make_batch(make_config(algorithm=MEAN_ONLY | reads_them), 0, 0, groups, [])
    assert [row.advantage for row in batch.minibatches[0]] == [0.0, 0.0, 0.5, -0.5]
    assert (batch.policy_shares, batch.metrics["learner/num_rows_left_out"]) == ((1.0,), 0)
    without = {"divergence": "reverse_kl", "estimator": "rollout", "eta": 0.0}
    batch = make_batch(make_config(algorithm=MEAN_ONLY | without), 0, 0, groups, [])
    assert len(batch.minibatches[0]) == 2, "a term that counts for nothing reads nothing"


def test_a_minibatch_without_signal_keeps_its_shortest_row(make_config: Any) -> None:
    long, short = group("a", [WRONG, WRONG], length=5), group("b", [CORRECT, CORRECT], length=2)
    batch = make_batch(make_config(algorithm=MEAN_ONLY), 0, 0, [long, short], [])
    ((row,),) = batch.minibatches
    assert (row.num_completion_tokens, row.advantage, row.weight) == (2, 0.0, pytest.approx(1 / 14))
    assert batch.policy_shares == pytest.approx((2 / 14,))
    assert batch.metrics["learner/num_rows_left_out"] == 3


def test_nothing_to_train_on_is_an_error_that_says_so(make_config: Any) -> None:
    with pytest.raises(RuntimeError, match="step 3: nothing to train on"):
        make_batch(make_config(), 2, 0, [group("a", [FAILED, FAILED])], [])


def test_groups_without_signal_are_counted(make_config: Any) -> None:
    groups = [group("a", [CORRECT, CORRECT]), group("b", [CORRECT, WRONG]), group("c", [CORRECT, FAILED])]
    assert rollout_metrics(groups, 0)["reward/zero_variance_fraction"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------- staleness and rate


@pytest.mark.parametrize(
    ("version", "bound", "fine"), [(5, 0, True), (4, 0, False), (4, 1, True), (3, 1, False), (6, 1, False)]
)
def test_staleness_bound(make_config: Any, version: int, bound: int, fine: bool) -> None:
    groups = [group("a", [CORRECT, WRONG], version=5), group("b", [CORRECT, WRONG], version=version)]
    config = make_config(rollout={"max_staleness": bound})
    if fine:
        check_staleness(groups, 5, bound)
        make_batch(config, 0, 5, groups, [])
        assert rollout_metrics(groups, 5)["rollout/staleness_max"] == 5 - version
    else:
        message = f"prompt b came from policy version {version}, the learner is at 5: outside rollout.max_staleness"
        with pytest.raises(RuntimeError, match=message):
            check_staleness(groups, 5, bound)
        with pytest.raises(RuntimeError, match=message):
            make_batch(config, 0, 5, groups, [])


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"num_steps": 3}, [1.0, 1.0, 1.0]),
        # From the first step's full rate to a tenth of it at the last one.
        ({"num_steps": 4, "lr_schedule": "linear"}, [1.0, 0.7, 0.4, 0.1]),
        # The first step already moves, the fourth is the first at the full rate.
        ({"num_steps": 6, "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        # The line begins after the warm-up, and ends at the last step all the same.
        ({"num_steps": 6, "warmup_steps": 2, "lr_schedule": "linear"}, [0.5, 1.0, 1.0, 0.7, 0.4, 0.1]),
        ({"num_steps": 2, "warmup_steps": 5, "lr_schedule": "linear"}, [0.2, 0.4]),
        ({"num_steps": 1, "lr_schedule": "linear"}, [1.0]),
        ({"num_steps": 3, "lr_schedule": "linear", "lr_final_fraction": 0.0}, [1.0, 0.5, 0.0]),
    ],
)
def test_the_learning_rate_of_every_step(make_config: Any, settings: dict[str, Any], rates: list[float]) -> None:
    settings = {"lr": 1.0, "lr_final_fraction": 0.1, **settings}
    learner = LearnerConfig(**settings)
    assert [learning_rate(learner, step) for step in range(learner.num_steps)] == pytest.approx(rates)
    config = make_config(learner=settings)
    batches = [make_batch(config, step, 0, [group("a", [CORRECT, WRONG])], []) for step in range(len(rates))]
    assert [batch.learning_rate for batch in batches] == pytest.approx(rates)
    assert [batch.metrics["learner/lr"] for batch in batches] == pytest.approx(rates)
