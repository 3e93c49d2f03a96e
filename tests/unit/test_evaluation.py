"""Pass@k against hand-computed numbers and enumeration; the summary's contract."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dphrl.evaluation.estimators import (
    Count,
    bootstrap_interval,
    count_groups,
    describe_samples,
    majority_at_k,
    pass_at_k,
    pass_curve,
    retention,
    summarize,
)
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup

C, W, X = RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.INFRASTRUCTURE_ERROR


def group(prompt_id: str, *outcomes: tuple[str, RewardStatus]) -> RolloutGroup:
    completions = tuple(
        Completion(prompt_id, i, (1,), text, (-0.1,), "stop", 0) for i, (text, _) in enumerate(outcomes)
    )
    results = tuple(RewardResult(status) for _, status in outcomes)
    return RolloutGroup(Prompt(prompt_id, "?", (1,), "!", "d"), completions, results)


@pytest.mark.parametrize(
    ("n", "c", "k", "wanted"),
    [
        (2, 1, 1, 0.5),
        (2, 1, 2, 1.0),
        (4, 2, 2, 1 - 1 / 6),
        (5, 1, 3, 0.6),
        (10, 3, 5, 1 - 21 / 252),
        (16, 0, 8, 0.0),
        (16, 16, 1, 1.0),
        (1, 0, 1, 0.0),
        (200, 1, 100, 0.5),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, wanted: float) -> None:
    value = pass_at_k(n, c, k)
    assert isinstance(value, float)
    assert value == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_is_the_mean_over_every_subset() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                # Samples 0 .. c-1 are the correct ones.
                hits = [min(subset) < c for subset in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_pass_at_k_of_arrays() -> None:
    values = pass_at_k(np.array([4, 8]), np.array([2, 2]), 2)
    np.testing.assert_allclose(values, [pass_at_k(4, 2, 2), pass_at_k(8, 2, 2)])
    np.testing.assert_allclose(pass_at_k(4, np.array([[0], [4]]), 4), [[0.0], [1.0]])


def test_pass_at_k_of_many_samples_stays_finite() -> None:
    assert 0.999 < float(pass_at_k(100_000, 1_000, 1_000)) <= 1.0
    assert pass_at_k(10_000, 1, 10) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [(4, 2, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0), (4, 2, -1), (0, 0, 1), (-4, 0, 1), (4, 2.0, 1), (4.0, 2, 1)],
)
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"num_samples|num_correct|k="):
        pass_at_k(n, c, k)


def test_one_bad_element_of_an_array_is_refused() -> None:
    with pytest.raises(ValueError, match="k=4"):
        pass_at_k(np.array([8, 3]), np.array([1, 1]), 4)


def test_the_curve_is_pass_at_every_k_of_those_with_enough_samples() -> None:
    counts: list[Count] = [("a", 5, 1), ("b", 3, 2), ("c", 5, 0), ("d", 0, 0)]
    curve = pass_curve(counts)
    wanted = [np.mean([pass_at_k(n, c, k) for _, n, c in counts if n >= k]) for k in range(1, 6)]
    assert curve == pytest.approx(wanted, abs=1e-12)
    assert curve[3:] == pytest.approx([0.4, 0.5])
    summary = summarize("d", "test", counts, range(1, 6), None)
    assert [summary[f"pass@{k}"] for k in range(1, 6)] == curve == summary["pass_curve"]
    assert pass_curve([]) == pass_curve([("d", 0, 0)]) == []


def test_retention() -> None:
    assert retention([1, 0, 8, 2], [0, 5, 1, 3]) == pytest.approx(2 / 3)
    assert retention([0, 0], [1, 1]) is None
    assert retention([], []) is None
    with pytest.raises(ValueError, match="2 prompts of the base against 1"):
        retention([1, 1], [1])


def test_counts_leave_out_what_the_grader_failed_on() -> None:
    groups = [group("a", ("x", C), ("y", W), ("z", X)), group("b", ("x", W), ("x", W), ("x", W))]
    assert count_groups(groups) == [("a", 2, 1), ("b", 3, 0)]


def test_distinct_correct_ignores_white_space_and_wrong_answers() -> None:
    groups = [group("a", ("3 * 5", C), (" 3 *\n5 ", C), ("5 * 3", C), ("7", W)), group("b", ("x", W))]
    assert describe_samples(groups, (1,))["distinct_correct"] == 1.0
    assert describe_samples([], (1, 2)) == {
        "statuses": {},
        "distinct_correct": None,
        "majority@2": None,
        "completion_tokens_mean": None,
        "entropy_mean": None,
    }


def test_distinct_correct_goes_by_the_rewards_canonical_form() -> None:
    of_text = group("a", ("SELECT 1", C), ("select  1", C))
    results = tuple(RewardResult(C, solution="SELECT 1") for _ in range(2))
    assert describe_samples([of_text], (1,))["distinct_correct"] == 2.0
    canonical = RolloutGroup(of_text.prompt, of_text.completions, results)
    assert describe_samples([canonical], (1,))["distinct_correct"] == 1.0


def test_a_majority_votes_by_answers_not_by_their_reasoning() -> None:
    texts = group("a", ("2+1 is 3", C), ("1+2 is 3", C), ("4", W), ("it is 5", W))
    pairs = zip(texts.completions, texts.results, strict=True)
    results = tuple(RewardResult(result.status, answer=completion.text[-1]) for completion, result in pairs)
    described = describe_samples([RolloutGroup(texts.prompt, texts.completions, results)], (4,))
    assert described["majority@4"] == 1.0
    assert described["distinct_correct"] == 2.0
    assert describe_samples([texts], (4,))["majority@4"] == 0.5


def test_samples_are_described_by_tokens_and_surprise() -> None:
    groups = [group("a", ("3", C), ("4", W))]  # one token each, log-prob -0.1
    described = describe_samples(groups, (1,))
    assert (described["completion_tokens_mean"], described["entropy_mean"]) == (1.0, pytest.approx(0.1))


def test_majority_by_hand() -> None:
    three = [("3", 1.0), ("4", 0.0), ("4", 0.0)]
    assert majority_at_k(three, 3) == 0.0
    # Of the three pairs {3,4}, {3,4}, {4,4} two are ties with one right answer in two: 1/3.
    assert majority_at_k(three, 2, num_draws=5000) == pytest.approx(1 / 3, abs=0.02)
    assert majority_at_k(three, 1, num_draws=5000) == pytest.approx(1 / 3, abs=0.02)
    assert majority_at_k([("3", 1.0), ("3", 1.0), ("4", 0.0), ("5", 0.0)], 4) == 1.0


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        interval = bootstrap_interval(rng.random(60) < 0.3, num_resamples=400)
        assert interval is not None
        covered += interval[0] <= 0.3 <= interval[1]
    # A percentile interval of 60 prompts is a little narrow.
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_of_a_weighted_mean_sees_only_what_has_weight() -> None:
    assert bootstrap_interval([1.0, 0.0], weights=[1, 0]) == (1.0, 1.0)
    assert bootstrap_interval([], weights=[]) is None
    assert bootstrap_interval([1.0], weights=[0]) is None


def test_the_summary_has_the_contract_s_keys() -> None:
    counts: list[Count] = [("a", 4, 2), ("b", 4, 0)]
    result = summarize("d", "test", counts, (1, 4), 0.5, [("b", 4, 1), ("a", 4, 1)])
    intervals = result.pop("intervals")
    assert intervals.keys() == {"pass@1", "pass@4", "retention"}
    assert intervals["pass@1"] == (0.0, 0.5)
    assert result == {
        "dataset": "d",
        "split": "test",
        "num_prompts": 2,
        "num_samples": 4,
        "num_ungraded": 0,
        "greedy": 0.5,
        "pass@1": 0.25,
        "pass@4": 0.5,
        "pass_curve": [0.25, pytest.approx(5 / 12), 0.5, 0.5],
        "retention": 0.5,
        "per_prompt": [
            {"prompt_id": "a", "num_samples": 4, "num_correct": 2},
            {"prompt_id": "b", "num_samples": 4, "num_correct": 0},
        ],
    }


def test_a_prompt_short_of_samples_is_left_out_of_that_k_only() -> None:
    result = summarize("d", "test", [("a", 4, 4), ("b", 3, 0)], (1, 4), None)
    assert (result["pass@1"], result["pass@4"], result["num_ungraded"]) == (0.5, 1.0, 1)
    assert result["retention"] is None
    assert result["pass_curve"] == [0.5, 0.5, 0.5, 1.0]
    assert summarize("d", "test", [("b", 3, 0)], (4,), None)["pass@4"] is None
    assert summarize("d", "test", [], (1,), None)["num_samples"] == 0


def test_a_base_of_other_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"d: the base was evaluated on other prompts \(1 only there, 0 missing\)"):
        summarize("d", "test", [("a", 4, 4)], (1,), None, [("a", 4, 1), ("b", 4, 1)])
    with pytest.raises(ValueError, match="1 prompts are counted twice"):
        summarize("d", "test", [("a", 4, 4), ("a", 4, 4)], (1,), None)
