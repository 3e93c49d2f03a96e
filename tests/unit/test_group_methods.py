"""Advantages of other papers: what they estimate, by exact enumeration; what they read of a group; their presets."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dphrl.algo.advantages import (
    AdvantageFn,
    Group,
    GroupAdvantage,
    get_group_advantage,
    group_advantages,
    register_advantage,
)
from dphrl.algo.registry import METHODS
from dphrl.batch import make_batch
from dphrl.config.loading import ConfigError, load_config
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup

METHOD_NAMES = ("maxrl", "pkpo", "w_reinforce", "unlikeliness", "uniqueness")


@pytest.fixture(autouse=True)
def only_builtin_methods() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = METHODS["advantage"].methods()
    yield
    METHODS["advantage"].restore(before)


# ------------------------------------------------------------ what they estimate


def expected_gradient(
    name: str, scores: Sequence[float], logits: Sequence[float], n: int, **params: Any
) -> list[float]:
    """The mean over all groups of n answers of (1/n) sum A_i grad log pi(y_i), by the logits of a softmax policy.

    Answer a has scores[a].
    """
    total = sum(map(math.exp, logits))
    policy = [math.exp(logit) / total for logit in logits]
    gradient = [0.0] * len(logits)
    for answers in itertools.product(range(len(scores)), repeat=n):
        chance = math.prod(policy[a] for a in answers)
        advantages = group_advantages([scores[a] for a in answers], name, **params)
        for answer, advantage in zip(answers, advantages, strict=True):
            assert advantage is not None
            for a in range(len(logits)):
                gradient[a] += chance * advantage / n * ((a == answer) - policy[a])
    return gradient


def gradient_of_best(scores: Sequence[float], logits: Sequence[float], k: int) -> list[float]:
    """The gradient of the expected largest score of k answers: E = sum of s (F(s)^k - F(below s)^k)."""
    total = sum(map(math.exp, logits))
    policy = [math.exp(logit) / total for logit in logits]

    def slope(bound: float, strict: bool, a: int) -> float:
        inside = [score < bound or (score == bound and not strict) for score in scores]
        below = sum(p for p, i in zip(policy, inside, strict=True) if i)
        return k * below ** (k - 1) * policy[a] * (inside[a] - below)

    return [sum(s * (slope(s, False, a) - slope(s, True, a)) for s in set(scores)) for a in range(len(logits))]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_pkpo_has_the_gradient_of_pass_at_k(k: int, logit: float) -> None:
    p = 1 / (1 + math.exp(-logit))
    got = expected_gradient("pkpo", [1.0, 0.0], [logit, 0.0], 5, k=k)
    # d/dlogit of 1 - (1 - p)^k, with dp/dlogit = p (1 - p).
    slope = k * (1 - p) ** (k - 1) * p * (1 - p)
    assert got == pytest.approx([slope, -slope], rel=1e-10)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pkpo_has_the_gradient_of_the_best_of_k_finer_scores(k: int) -> None:
    scores, logits = [0.0, 0.25, 1.0, -0.5], [0.3, -0.2, -1.0, 0.5]
    got = expected_gradient("pkpo", scores, logits, 4, k=k)
    assert got == pytest.approx(gradient_of_best(scores, logits, k), rel=1e-10, abs=1e-12)


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.25, 1.0]), min_size=2, max_size=7), st.integers(2, 7))
def test_pkpo_is_what_a_completion_adds_to_the_others_of_its_sets(scores: list[float], k: int) -> None:
    n = len(scores)
    if n < k:
        assert group_advantages(scores, "pkpo", k=k) == [0.0] * n
        return
    sets = list(itertools.combinations(range(n), k))

    def added(i: int) -> float:
        return sum(max(scores[j] for j in s) - max(scores[j] for j in s if j != i) for s in sets if i in s)

    expected = [n * added(i) / len(sets) for i in range(n)]
    assert group_advantages(scores, "pkpo", k=k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_maxrl_has_the_first_terms_of_the_gradient_of_the_log_likelihood(n: int, logit: float) -> None:
    p = 1 / (1 + math.exp(-logit))
    got = expected_gradient("maxrl", [1.0, 0.0], [logit, 0.0], n)
    # (1/k) grad pass@k = (1 - p)^(k - 1) grad p, for k = 1 .. n - 1.
    slope = sum((1 - p) ** (k - 1) for k in range(1, n)) * p * (1 - p)
    assert slope == pytest.approx((1 - (1 - p) ** (n - 1)) / p * p * (1 - p))
    assert got == pytest.approx([slope, -slope], rel=1e-10)


@pytest.mark.parametrize(("positive", "negative"), [(0.1, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_w_reinforce_has_the_gradient_of_its_two_halves(positive: float, negative: float) -> None:
    p = 1 / (1 + math.exp(0.7))
    got = expected_gradient(
        "w_reinforce", [1.0, 0.0], [-0.7, 0.0], 3, positive_weight=positive, negative_weight=negative
    )
    # lambda L_PSR + L_NSR has the gradient -(lambda + 1) grad p: the wrong ones' share is 1 - p.
    slope = (positive + negative) * p * (1 - p)
    assert got == pytest.approx([slope, -slope], rel=1e-10)


scores_of_a_group = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=10)


@given(scores_of_a_group, st.randoms(use_true_random=False))
def test_among_right_completions_the_likelier_is_paid_less(scores: list[float], rng: Any) -> None:
    logprobs = rng.sample(range(-100, 0), len(scores))
    made = group_advantages(scores, "unlikeliness", {"logprobs": lambda: logprobs})
    if len(set(scores)) == 1:
        assert made == [0.0] * len(scores)
        return
    right = [a for _, s, a in sorted(zip(logprobs, scores, made, strict=True)) if s]  # from the least likely
    wrong = {a for s, a in zip(scores, made, strict=True) if not s}
    assert right == sorted(right, reverse=True)
    assert len(set(right)) == len(right)
    assert len(wrong) == 1
    assert min(right) > max(wrong)


@given(scores_of_a_group, st.randoms(use_true_random=False))
def test_without_their_parameter_two_methods_are_those_of_grpo(scores: list[float], rng: Any) -> None:
    fields: Any = {
        "logprobs": lambda: [rng.random() for _ in scores],
        "clusters": lambda: [rng.choice("abc") for _ in scores],
    }
    grpo = pytest.approx(group_advantages(scores, "group_normalized"))
    assert group_advantages(scores, "unlikeliness", fields, beta=0) == grpo
    assert group_advantages(scores, "uniqueness", fields, alpha=0) == grpo


@given(scores_of_a_group, st.randoms(use_true_random=False))
def test_a_cluster_weighs_as_much_as_a_lone_completion(scores: list[float], rng: Any) -> None:
    keys = [f"{score} {rng.choice('abc')}" for score in scores]
    made = group_advantages(scores, "uniqueness", {"clusters": lambda: keys})
    grpo = dict(zip(keys, group_advantages(scores, "group_normalized"), strict=True))
    for key, alone in grpo.items():
        assert sum(a or 0.0 for k, a in zip(keys, made, strict=True) if k == key) == pytest.approx(alone)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_order_of_completions_does_not_matter(name: str) -> None:
    scores, logprobs, keys = [1.0, 0.0, 1.0, 1.0, 0.0], [-1.0, -2.0, -3.0, -1.0, -5.0], ["a", "b", "c", "a", "b"]
    order = [3, 1, 4, 0, 2]

    def advantages(places: Sequence[int]) -> list[float | None]:
        fields: Any = {"logprobs": lambda: [logprobs[i] for i in places], "clusters": lambda: [keys[i] for i in places]}
        return group_advantages([scores[i] for i in places], name, fields)

    straight = advantages(range(5))
    assert advantages(order) == pytest.approx([straight[i] for i in order])


# ------------------------------------------------------------ what a method may read of a group


def shared() -> GroupAdvantage:
    """The example of dphrl/algo/advantages.py."""

    def advantages(group: Group) -> list[float]:
        return [score / group.clusters.count(c) for score, c in zip(group.scores, group.clusters, strict=True)]

    return GroupAdvantage(advantages, reads=("clusters",))


def test_a_method_of_ones_own_may_read_the_group() -> None:
    register_advantage("shared")(shared)
    made = group_advantages([1.0, None, 1.0, 0.5], "shared", {"clusters": lambda: ["a", "a", "b", "b"]})
    assert made == [1.0, None, 0.5, 0.25]


def test_only_what_a_method_reads_is_computed() -> None:
    seen: list[Group] = []

    def method(*reads: Any) -> GroupAdvantage:
        return GroupAdvantage(lambda group: seen.append(group) or group.scores, reads)  # type: ignore[func-returns-value]

    register_advantage("nothing")(lambda: method())
    register_advantage("likelihood")(lambda: method("logprobs"))
    asked: list[str] = []
    fields: Any = {
        "logprobs": lambda: asked.append("logprobs") or [-1.0, -2.0],
        "clusters": lambda: asked.append("clusters") or ["a", "b"],
    }
    group_advantages([1.0, 0.0], "nothing", fields)
    group_advantages([1.0, 0.0], "mean_only", fields)
    assert asked == []
    group_advantages([1.0, 0.0], "likelihood", fields)
    assert asked == ["logprobs"]
    assert seen == [Group((1.0, 0.0)), Group((1.0, 0.0), logprobs=(-1.0, -2.0))]


@pytest.mark.parametrize("fields", [None, {"logprobs": lambda: [-1.0, -1.0]}])
def test_a_method_that_reads_more_than_it_is_given_is_named(fields: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^advantage 'uniqueness' reads the clusters of a group; give them beside its"
    ):
        group_advantages([1.0, 0.0], "uniqueness", fields)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reads": ("text",)}, "reads 'text'; a group has scores, logprobs, clusters"),
        ({"min_size": 0}, "min_size=0; make it at least 1"),
    ],
)
def test_a_method_with_impossible_needs_is_refused_with_the_configuration(given: Any, words: str) -> None:
    register_advantage("greedy")(lambda: GroupAdvantage(lambda group: group.scores, **given))
    with pytest.raises(ConfigError, match=f"^command line: algorithm.advantage: advantage 'greedy': {words}$"):
        load_config("demo-math", ["algorithm.advantage=greedy"])


def test_a_smaller_group_than_the_method_compares_is_refused_with_the_configuration() -> None:
    assert load_config("demo-math", ["algorithm.advantage={name: pkpo, k: 8}"]).rollout.num_samples == 8
    words = r"rollout.num_samples=8: algorithm.advantage pkpo compares at least 9 completions of a prompt .*; set roll"
    with pytest.raises(ConfigError, match=words):
        load_config("demo-math", ["algorithm.advantage={name: pkpo, k: 9}"])
    register_advantage("trio")(lambda: GroupAdvantage(lambda group: [1.0] * len(group.scores), min_size=3))
    assert group_advantages([1.0, None, 0.0], "trio") == [0.0, None, 0.0]
    assert group_advantages([1.0, 1.0, 0.0], "trio") == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("make", [tuple, lambda scores: GroupAdvantage(lambda group: group.scores)])
def test_functions_of_the_scores_and_of_the_group_are_used_in_one_way(make: Any) -> None:
    def factory() -> AdvantageFn | GroupAdvantage:
        return make if make is tuple else make(())

    register_advantage("either")(factory)
    assert get_group_advantage("either")(Group((1.0, 0.0))) == (1.0, 0.0)
    assert get_group_advantage("either").min_size == 2


# ------------------------------------------------------------ from a graded group

RIGHT, WRONG = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG)
FAILED = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR)


def graded(*items: tuple[RewardResult, str, tuple[float, ...]]) -> RolloutGroup:
    """A group of (verdict, text, log-probs of the tokens)."""
    completions = [
        Completion("p", i, (7,) * len(logprobs), text, logprobs, "stop", 0)
        for i, (_, text, logprobs) in enumerate(items)
    ]
    prompt = Prompt("p", "p", (1, 2, 3), "answer", "data")
    return RolloutGroup(prompt, tuple(completions), tuple(verdict for verdict, _, _ in items))


def trained(config: Any, group: RolloutGroup) -> list[float]:
    (rows,) = make_batch(config, 0, 0, [group], []).minibatches
    return [row.advantage for row in rows]


def test_a_strategy_is_the_solution_or_else_the_answer_or_else_the_text() -> None:
    group = graded(
        (replace(RIGHT, solution="SELECT 1", answer="1"), "a", ()),
        (replace(RIGHT, answer="1/2"), "so  it is\n1/2", ()),
        (WRONG, " no\tanswer ", ()),
    )
    assert group.solutions == ("SELECT 1", "so it is 1/2", "no answer")
    assert group.answers == ("1", "1/2", "no answer")
    assert group.strategies == ("SELECT 1", "1/2", "no answer")


def test_clusters_of_a_step_are_the_strategies_of_its_completions(make_config: Any) -> None:
    config = make_config(algorithm={"num_minibatches": 1, "advantage": "uniqueness"})
    seven, eleven = replace(RIGHT, solution="7*594 is 4158"), replace(RIGHT, solution="11*378 is 4158")
    group = graded(
        (seven, "long 7", (-1.0,)),
        (FAILED, "", (-1.0,)),
        (seven, "7", (-1.0,)),
        (eleven, "", (-1.0,)),
        (WRONG, "", (-1.0,)),
    )
    # Without the failed one as in the golden test: 1/2 shared by two, 1/2, -3/2.
    assert trained(config, group) == pytest.approx([0.25, 0.25, 0.5, -1.5], abs=1e-5)


def test_likelihood_is_that_of_the_whole_completion(make_config: Any) -> None:
    config = make_config(algorithm={"num_minibatches": 1, "advantage": {"name": "unlikeliness", "beta": 0.5}})
    # Sums -3, -2, -1. By the mean per token, -1, -2, -1, the first would not be the least likely.
    group = graded((RIGHT, "a", (-1.0, -1.0, -1.0)), (RIGHT, "b", (-2.0,)), (WRONG, "c", (-1.0,)))
    # Ranks 2, 1, 0: 1 - 1/6, 1 - 2/6, 0: mean 1/2, deviations 2/6, 1/6, -3/6, squares 14/36, / 2 = 7/36.
    assert trained(config, group) == pytest.approx([2 / 7**0.5, 1 / 7**0.5, -3 / 7**0.5], abs=1e-5)


def test_negative_reinforcement_trains_on_groups_of_wrong_completions(make_config: Any) -> None:
    nsr = {"name": "w_reinforce", "positive_weight": 0}
    config = make_config(algorithm={"num_minibatches": 1, "advantage": nsr})
    wrong, right = (WRONG, "a", (-1.0,)), (RIGHT, "b", (-1.0,))
    assert trained(config, graded(wrong, wrong)) == [-1.0, -1.0]
    assert trained(config, graded(wrong, right)) == [-1.0]


# ------------------------------------------------------------ presets

PRESETS = [f"demo-{task}-{name.replace('_', '-')}" for task in ("math", "sql") for name in METHOD_NAMES]
DIVERGENCES = [*METHODS["divergence"].methods(), "none"]


@pytest.mark.parametrize("preset", PRESETS)
def test_each_method_goes_with_each_divergence(preset: str) -> None:
    config = load_config(preset)
    assert config.algorithm.advantage.name == preset.split("-", 2)[2].replace("-", "_")
    assert not config.uses_divergence
    assert config.algorithm.policy_loss.name == "clipped"
    for divergence in DIVERGENCES:
        made = load_config(preset, [f"algorithm.divergence={json.dumps(divergence_of(divergence))}"])
        assert made.algorithm.divergence.name == divergence
        assert made.algorithm.advantage == config.algorithm.advantage


def divergence_of(name: str) -> Any:
    return {"name": name, "alpha": 0.5} if name == "alpha" else name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_demo_with_another_advantage(preset: str) -> None:
    def rest(name: str) -> Any:
        tree = load_config(name).model_dump()
        del tree["run_name"], tree["algorithm"]["advantage"]
        return tree

    assert rest(preset) == rest("-".join([*preset.split("-")[:2], "grpo"]))
