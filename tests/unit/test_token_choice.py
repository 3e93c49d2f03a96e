"""Tokens that are chosen from a whole mini-batch: where the choice is made, and that nothing about it depends on how
rows are dealt to micro-batches and ranks."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dphrl.algo.policy_losses import PolicyLossSettings, PolicyTokens, get_policy_loss
from dphrl.batch import make_batch, undecided_tokens, with_choice
from dphrl.config.loading import ConfigError, config_to_yaml, load_config
from dphrl.learner.batching import collate
from dphrl.learner.policy import PolicyModel
from dphrl.learner.update import UpdateSettings, combine_rank_metrics, run_update
from dphrl.types import (
    Completion,
    Prompt,
    ReferenceSample,
    RewardResult,
    RewardStatus,
    RolloutGroup,
    RowKind,
    TrainBatch,
    TrainRow,
)

CORRECT, WRONG = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG)
# With one update a step the trust region must lie around the policy that sampled, or nothing holds a token anywhere.
BEHIND = {"algorithm": {"proximal_policy": "behavior"}, "rollout": {"max_staleness": 1}}


def make_group(name: str, logprobs: list[tuple[float, ...]], right: list[bool]) -> RolloutGroup:
    completions = [Completion(name, i, (5,) * len(lp), "", lp, "stop", 0) for i, lp in enumerate(logprobs)]
    results = [CORRECT if one else WRONG for one in right]
    return RolloutGroup(Prompt(name, name, (1, 2), "", "data"), tuple(completions), tuple(results))


def config_with(make_config: Any, policy_loss: Any, **algorithm: Any) -> Any:
    changes = {"policy_loss": policy_loss, "advantage": "mean_only", **algorithm}
    return make_config(algorithm=BEHIND["algorithm"] | changes, rollout=BEHIND["rollout"])


# ----------------------------------------------------------------------------------- where the batch is made


def test_the_choice_is_among_all_tokens_of_a_mini_batch_those_of_rows_left_out_too(make_config: Any) -> None:
    # Advantages by the mean: 1/2, -1/2; and 0, 0. Tokens: 2, 1; 2, 1. Mean log-prob (-1-1-4-1-1-1)/6 = -1.5; mean
    # advantage (1/2 + 1/2 - 1/2 + 0) / 6 = 1/12. Centred log-probs 1/2, but -5/2 for the third token. Covariances:
    # 1/2 x 5/12 = .21 (two), -5/2 x -7/12 = 1.46, 1/2 x -1/12 = -.04 (three).
    mixed = make_group("a", [(-1.0, -1.0), (-4.0,)], [True, False])
    flat = make_group("b", [(-1.0, -1.0), (-1.0,)], [True, True])
    config = config_with(make_config, {"name": "kl_cov", "share": 0.2}, num_minibatches=1)
    (rows,) = make_batch(config, 0, 0, [mixed, flat], []).minibatches
    assert [(row.advantage, row.chosen) for row in rows] == [(0.5, ()), (-0.5, (0,))], "0.2 x 6 = 1.2 tokens: one"
    # Half of the six: the two of 0.21 as well. Without the flat group's three tokens half would be one.
    config = config_with(make_config, {"name": "kl_cov", "share": 0.5}, num_minibatches=1)
    (rows,) = make_batch(config, 0, 0, [mixed, flat], []).minibatches
    assert [row.chosen for row in rows] == [(0, 1), (0,)]


def test_a_row_without_advantage_stays_where_one_of_its_tokens_is_chosen(make_config: Any) -> None:
    # Advantages 2/3, -1/3, -1/3 of 1, 2 and 2 tokens, then 0 and 0 of one each: their mean is -2/21. Mean log-prob
    # -14.1 / 7 = -2.01. Covariances: 1.01 x 16/21 = .77; 1.01 x -5/21 = -.24 (four); 1.91 x 2/21 = .18;
    # -6.99 x 2/21 = -.67. 0.3 x 7 = 2.1 tokens: two.
    mixed = make_group("a", [(-1.0,), (-1.0, -1.0), (-1.0, -1.0)], [True, False, False])
    flat = make_group("b", [(-0.1,), (-9.0,)], [False, False])
    config = config_with(make_config, {"name": "kl_cov", "share": 0.3}, num_minibatches=1)
    batch = make_batch(config, 0, 0, [mixed, flat], [])
    (rows,) = batch.minibatches
    assert [(row.chosen, row.num_completion_tokens) for row in rows if row.advantage == 0] == [((0,), 1)]
    assert [row.chosen for row in rows if row.advantage] == [(0,), (), ()]
    assert batch.metrics["learner/num_rows_left_out"] == 1
    plain = make_batch(config_with(make_config, "clipped", num_minibatches=1), 0, 0, [mixed, flat], [])
    assert [row.chosen for row in plain.minibatches[0]] == [None] * 3


def test_each_mini_batch_has_its_own_choice(make_config: Any) -> None:
    groups = [make_group(name, [(-1.0,), (-4.0,)], [True, False]) for name in "ab"]
    config = config_with(make_config, {"name": "kl_cov", "share": 0.3}, num_minibatches=2)
    batch = make_batch(config, 0, 0, groups, [])
    # Covariances 3/2 x 1/2 and -3/2 x -1/2 in each: of equal ones the first.
    assert [[row.chosen for row in rows] for rows in batch.minibatches] == [[(0,), ()]] * 2


def test_a_draw_is_of_the_seed_the_step_and_the_mini_batch(make_config: Any) -> None:
    logprobs = [(-1.0,) * 20, (-4.0,) * 20]
    groups = [make_group(name, logprobs, [True, False]) for name in "ab"]

    def drawn(step: int, seed: int = 0) -> list[tuple[int, ...]]:
        loss = {"name": "clip_cov", "share": 0.2, "low": 0.5, "high": 5.0}
        config = config_with(make_config, loss, num_minibatches=2).model_copy(update={"seed": seed})
        batch = make_batch(config, step, 0, groups, [])
        return [row.chosen or () for rows in batch.minibatches for row in rows]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4) != drawn(4, seed=1)
    assert with_choice([], config_with(make_config, "kl_cov"), step=0, minibatch=0) == []
    first, second = drawn(3)[:2], drawn(3)[2:]
    assert first != second, "equal rows in another mini-batch"
    assert [sum(map(len, half)) for half in (first, second)] == [8, 8], "0.2 x 40"


# ---------------------------------------------------------------------------------------- in the learner


def test_marks_and_weights_come_to_the_tokens_they_are_of() -> None:
    rows = [
        TrainRow(RowKind.POLICY, (1, 7, 8, 9), 1, (-1.0,) * 3, 0.5, 1.0, chosen=(0, 2)),
        TrainRow(RowKind.REFERENCE, (1, 2, 7, 8), 2, (-1.0,) * 2, 0.25, chosen=(1,)),
        TrainRow(RowKind.POLICY, (1, 7), 1, (-1.0,), 0.5, 1.0, chosen=()),
        TrainRow(RowKind.REFERENCE, (1, 7), 1, (-1.0,), 0.125),
    ]
    batch = collate(rows, packed=True)
    assert batch.chosen_N is not None
    assert batch.chosen_N.tolist() == [True, False, True, False, False, False, False]
    assert batch.weights_N.tolist() == [0.5, 0.5, 0.5, 0.0, 0.25, 0.5, 0.125]
    unmarked = collate([replace(row, chosen=None) for row in rows], packed=True)
    assert unmarked.chosen_N is None
    assert unmarked.weights_N.tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.5, 0.125]


@pytest.mark.parametrize("name", ["kl_cov", "clip_cov"])
def test_a_loss_does_not_choose_from_a_micro_batch_by_itself(name: str) -> None:
    some = torch.zeros(2)
    settings = PolicyLossSettings(0.2, 0.28, 3.0, 2.0)
    tokens = PolicyTokens(some.clone().requires_grad_(), some, some, some, some, torch.arange(2))
    with pytest.raises(ValueError, match="chooses tokens from a mini-batch, and nobody has asked it to"):
        get_policy_loss(name)(tokens, settings)
    empty = torch.zeros(0)
    nothing = PolicyTokens(empty.clone().requires_grad_(), empty, empty, empty, empty, torch.arange(0))
    loss, _ = get_policy_loss(name)(nothing, settings)
    assert loss.item() == 0


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    from dphrl.tiny import TinyShape, build_model, build_tokenizer

    return PolicyModel(build_model(TinyShape(), build_tokenizer(), seed=0).eval().double(), temperature=0.7)


class GradientEngine:
    """Accumulates gradients and never steps."""

    device = torch.device("cpu")

    def __init__(self, policy: PolicyModel) -> None:
        self.policy = policy
        policy.zero_grad()

    def forward(self, batch: Any) -> Any:
        return self.policy(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        return 0.0


def rows_for(config: Any) -> list[TrainRow]:
    """Rows of both kinds, with the choices of `config` made among all of them."""
    rng = random.Random(0)
    rows = []
    for i in range(13):
        prompt, length = rng.randint(1, 9), rng.randint(1, 15)
        tokens = tuple(rng.randrange(5, 20) for _ in range(prompt + length))
        logprobs = tuple(-rng.uniform(2, 4) for _ in range(length))
        kind = RowKind.REFERENCE if i % 3 == 0 else RowKind.POLICY
        rows.append(TrainRow(kind, tokens, prompt, logprobs, 0.01, rng.uniform(-2, 2)))
    explored = [row for row in rows if row.kind is RowKind.POLICY]
    rehearsed = [row for row in rows if row.kind is RowKind.REFERENCE]
    share = config.algorithm.rehearsal_share
    if share is not None:
        samples = [
            ReferenceSample("p", (), row.token_ids[row.num_prompt_tokens :], row.logprobs, row.logprobs)
            for row in rehearsed
        ]
        rehearsed = [
            replace(row, chosen=places) for row, places in zip(rehearsed, undecided_tokens(samples, share), strict=True)
        ]
    return with_choice(explored, config, step=0, minibatch=0) + rehearsed


@pytest.mark.parametrize(
    "algorithm",
    [
        {"policy_loss": {"name": "kl_cov", "share": 0.1}},
        {"policy_loss": {"name": "clip_cov", "share": 0.1, "low": 0.1}},
        {"rehearsal_tokens": "entropy", "rehearsal_share": 0.3},
        {"divergence": "sft"},
    ],
    ids=["kl_cov", "clip_cov", "entropy", "sft"],
)
@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 40), (2, 40), (3, 96), (3, 4096)])
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_loss_and_gradient_do_not_depend_on_the_cut(
    policy: PolicyModel, make_config: Any, algorithm: dict[str, Any], num_ranks: int, max_tokens: int, packing: str
) -> None:
    def update(rows: list[TrainRow], num_ranks: int = 1, **learner: Any) -> tuple[torch.Tensor, dict[str, float]]:
        config = make_config(
            algorithm=BEHIND["algorithm"] | algorithm | {"eta": 0.3}, rollout=BEHIND["rollout"], learner=learner
        )
        settings = UpdateSettings.from_config(config)
        engine, batch = GradientEngine(own), TrainBatch(0, 0, (tuple(rows),), 1e-3)
        parts = [run_update(batch, engine, settings, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        gradient = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
        return gradient / num_ranks, combine_rank_metrics(parts)

    own = copy.deepcopy(policy)
    config = make_config(algorithm=BEHIND["algorithm"] | algorithm, rollout=BEHIND["rollout"])
    rows = rows_for(config)
    expected, whole = update(rows, packing="padded", micro_batch_tokens=4096)
    marked = [replace(row, chosen=None if row.kind is RowKind.REFERENCE else ()) for row in rows]
    if algorithm != {"divergence": "sft"}:
        unchosen, _ = update(marked, packing="padded", micro_batch_tokens=4096)
        assert torch.linalg.norm(unchosen - expected) > 1e-3 * torch.linalg.norm(expected), "the choice matters"
    random.Random(1).shuffle(rows)
    got, metrics = update(rows, num_ranks, packing=packing, micro_batch_tokens=max_tokens)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert metrics == pytest.approx(whole, rel=1e-5, abs=1e-7)


def test_nothing_is_held_in_the_first_of_a_steps_updates(policy: PolicyModel, make_config: Any) -> None:
    """There the policy is the old one. In the second it is not, and the penalty is there."""
    config = make_config(algorithm={"policy_loss": {"name": "kl_cov", "share": 0.1}, "num_minibatches": 2})
    assert config.proximal_policy == "learner"
    rows, own = tuple(rows_for(config)), copy.deepcopy(policy)

    class Engine(GradientEngine):
        def step(self, learning_rate: float) -> float:
            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter.mul_(1.02)
            return 1.0

    settings = UpdateSettings.from_config(config)
    for minibatches, expected in (((rows,), 0.0), ((rows, rows), None)):
        metrics = run_update(TrainBatch(0, 0, minibatches, 1e-3), Engine(own), settings)
        if expected is None:
            assert metrics["policy/chosen_penalty"] > 1e-4
        else:
            assert metrics["policy/chosen_penalty"] == expected


# ------------------------------------------------------------------------------------- configuration, files

MISTAKES = [
    (
        ("demo-math-kl-cov", "algorithm.num_minibatches=1"),
        "kl_cov holds tokens near the policy at the start of the step, and with algorithm.num_minibatches=1 there is "
        "no update after the first; set algorithm.num_minibatches >= 2, or rollout.max_staleness with "
        "algorithm.proximal_policy: behavior",
    ),
    (("demo-math", "algorithm.policy_loss={name: clip_cov, low: 5, high: 1}"), "low=5 is not below high=1; lower it"),
    (("demo-math", "algorithm.policy_loss={name: kl_cov, share: 1}"), "takes share: a number > 0 and < 1 (got 1)"),
    (
        ("demo-math", "algorithm.rehearsal_share=0.3"),
        "rehearsal_share=0.3 is for rehearsal_tokens: entropy; set that, or rehearsal_share: null",
    ),
    *(
        (
            arguments,
            "rehearsal_tokens=entropy has no stored answers to choose from without a divergence on reference samples; "
            "set algorithm.divergence and algorithm.estimator: reference, or rehearsal_tokens: all",
        )
        for arguments in (
            ("demo-math-grpo", "algorithm.rehearsal_tokens=entropy"),
            ("demo-math-rkl", "algorithm.rehearsal_tokens=entropy"),
            ("demo-math", "algorithm.eta=0", "algorithm.rehearsal_tokens=entropy"),
        )
    ),
    (
        ("demo-math-sft", "algorithm.estimator=rollout"),
        "divergence=sft is cross-entropy on stored answers; set algorithm.estimator: reference",
    ),
    (("demo-math-sft", "algorithm.estimator=definition"), "estimator=definition is Jensen-Shannon's"),
    (("demo-math", "reference.replay_share=1"), "reference.replay_share: expected a number >= 0 and < 1 (got 1)"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_what_cannot_work_together_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments[0], arguments[1:])
    (told,) = caught.value.lines
    assert line in told


@pytest.mark.parametrize("divergence", ["none", "forward_kl", "js", "{name: alpha, alpha: 0.5}", "sft"])
@pytest.mark.parametrize("policy_loss", ["kl_cov", "clip_cov"])
def test_a_policy_loss_that_chooses_goes_with_every_divergence(divergence: str, policy_loss: str) -> None:
    overrides = [f"algorithm.divergence={divergence}", f"algorithm.policy_loss={policy_loss}"]
    config = load_config("demo-math", [*overrides, "algorithm.num_minibatches=2"])
    assert config.algorithm.policy_loss.name == policy_loss


def test_the_share_that_is_meant_is_written_down_and_read_again(tmp_path: Path) -> None:
    config = load_config("demo-math", ["algorithm.rehearsal_tokens=entropy"])
    assert config.algorithm.rehearsal_share == 0.2
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(str(path)) == config
    assert load_config("demo-math").algorithm.rehearsal_share is None


def test_the_trust_region_lies_around_the_policy_that_sampled_where_the_loss_is_clipped() -> None:
    stale = ["rollout.max_staleness=1", "algorithm.num_minibatches=2"]
    names = {name: f"algorithm.policy_loss={name}" for name in ("clipped", "clip_cov", "kl_cov")}
    found = {name: load_config("demo-math", [*stale, choice]).proximal_policy for name, choice in names.items()}
    assert found == {"clipped": "behavior", "clip_cov": "behavior", "kl_cov": "learner"}


def test_entropies_that_are_missing_are_told(make_config: Any) -> None:
    config = make_config(algorithm={"rehearsal_tokens": "entropy", "num_minibatches": 1})
    with pytest.raises(ValueError, match="needs a reference buffer with entropies; fill it again"):
        make_batch(config, 0, 0, [], [ReferenceSample("p", (1,), (5, 6), (-0.1, -0.2))])
    assert undecided_tokens([], 0.5) == []
