"""What an evaluation asks of the engines, and against what it measures: by hand, on scripted answers."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl.evaluation.differences import self_retention
from dphrl.evaluation.estimators import bootstrap_interval, describe_samples, summarize
from dphrl.evaluation.stage import Evaluation, evaluate_sets
from dphrl.prepare import EvaluationSet
from dphrl.protocols import Parts
from dphrl.tracking.console import Console
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup

STATUS = {"r": RewardStatus.CORRECT, "w": RewardStatus.WRONG, "x": RewardStatus.INFRASTRUCTURE_ERROR}


class Scripted:
    """Engines and grader: a prompt's text holds a letter per sample, then one for the greedy completion."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool, int]] = []

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
        self.asked.append((num_samples, greedy, seed))
        for prompt in prompts:
            letters = prompt.text[-1:] if greedy else prompt.text[:num_samples]
            yield [Completion(prompt.prompt_id, i, (1,), of, (-0.5,), "stop", 0) for i, of in enumerate(letters)]

    async def grade(self, items: Any) -> list[RewardResult]:
        return [RewardResult(STATUS[c.text]) for _, c in items]


def evaluate(make_config: Any, sets: dict[str, list[str]], base: Sequence[Any] = ()) -> tuple[list[Any], Scripted]:
    scripted = Scripted()
    learner: Any = SimpleNamespace(dtype="float32")
    prepared = [
        EvaluationSet(name, "test", [Prompt(f"{name}{i}", text, (1,), "", name) for i, text in enumerate(texts)])
        for name, texts in sets.items()
    ]
    config = make_config(evaluation={"num_samples": 3, "k": [1, 3]}, rollout={"num_samples": 2})
    parts: Any = Parts(learner, scripted, scripted)  # type: ignore[arg-type]
    evaluation = Evaluation(config, prepared, "model", base=base)
    console = Console(io.StringIO(), interactive=False)
    return asyncio.run(evaluate_sets(evaluation, parts, console)), scripted


def test_samples_and_one_greedy_completion_are_asked_for_with_one_seed(make_config: Any) -> None:
    (summary,), scripted = evaluate(make_config, {"d": ["rwwr", "wwww"]})
    assert [(count, greedy) for count, greedy, _ in scripted.asked] == [(3, False), (1, True)]
    assert len({seed for *_, seed in scripted.asked}) == 1
    assert summary["num_samples"] == 3
    assert (summary["pass@1"], summary["pass@3"]) == (pytest.approx(1 / 6), 0.5)
    assert summary["greedy"] == 0.5


def test_what_the_grader_failed_on_is_in_no_rate(make_config: Any) -> None:
    (summary,), _ = evaluate(make_config, {"d": ["rxwx", "rwwr", "rrrw"]})
    assert summary["greedy"] == 0.5, "of the two greedy completions that have a verdict"
    assert summary["pass@1"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert summary["num_ungraded"] == 1
    (nothing,), _ = evaluate(make_config, {"d": ["xxxx"]})
    assert (nothing["greedy"], nothing["num_ungraded"]) == (None, 3)
    assert [row["greedy"] for row in (*summary["per_prompt"], *nothing["per_prompt"])] == [None, 1, 0, None]


def test_retention_is_measured_on_the_same_set_of_the_base(make_config: Any) -> None:
    base, _ = evaluate(make_config, {"d": ["rwww", "rrrr", "wwww", "wrww"], "e": ["rrrr"]})
    model, _ = evaluate(make_config, {"d": ["rrrr", "wwwr", "rrrr", "wwrr"], "f": ["rrrr"]}, base)
    assert [summary["retention"] for summary in base] == [None, None]
    # Three solved by the base: the first and the last still are; the third is won, which is no retention.
    assert model[0]["retention"] == pytest.approx(2 / 3)
    assert model[1]["retention"] is None, "another data set's base says nothing"
    low, high = model[0]["intervals"]["retention"]
    assert low < 2 / 3 < high
    # Greedy: w r w w against r r r r. Pass@1 over three samples: 1 3 0 1 against 3 0 3 1.
    assert [row["greedy"] for row in base[0]["per_prompt"]] == [0, 1, 0, 0]
    assert model[0]["difference"]["greedy"]["value"] == 0.75
    assert model[0]["difference"]["pass@1"]["value"] == pytest.approx((2 - 3 + 3) / 12)
    assert model[0]["difference"]["retention"]["num_samples"] == 1
    assert "difference" not in base[0]
    assert "difference" not in model[1]
    assert base[0]["self_retention"] == self_retention(base[0]["per_prompt"])


def test_the_interval_of_retention_is_over_what_the_base_solves() -> None:
    counts = [(f"p{i}", 1, int(i < 5)) for i in range(40)]
    base = [(f"p{i}", 1, int(i < 10)) for i in reversed(range(40))]  # in whatever order
    summary = summarize("d", "test", counts, (1,), None, base)
    assert summary["retention"] == 0.5
    kept, solved = [i < 5 for i in range(40)], [i < 10 for i in range(40)]
    assert summary["intervals"]["retention"] == bootstrap_interval(kept, weights=solved)
    low, high = summary["intervals"]["retention"]
    assert low < 0.5 < high
    assert summary["intervals"]["pass@1"] == bootstrap_interval([float(i < 5) for i in range(40)])


def test_an_interval_of_known_quantiles() -> None:
    # One prompt of two solved: a resample's mean is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], level=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)
    # Of many fair coins: mean 1/2, standard error 1/20; 95 % is 1.96 of them on each side.
    low, high = bootstrap_interval([0.0, 1.0] * 50, num_resamples=8000) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(0.402, abs=0.012), pytest.approx(0.598, abs=0.012))


def test_entropy_is_per_token_whatever_the_lengths() -> None:
    completions = (
        Completion("a", 0, (1, 2, 3), "x", (-0.2, -0.3, -0.4), "stop", 0),
        Completion("a", 1, (1,), "y", (-1.1,), "stop", 0),
    )
    results = (RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG))
    group = RolloutGroup(Prompt("a", "?", (1,), "!", "d"), completions, results)
    described = describe_samples([group], (1,))
    assert (described["entropy_mean"], described["completion_tokens_mean"]) == (pytest.approx(0.5), 2.0)
