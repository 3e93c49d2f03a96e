"""What the reference stage stores of the initial policy's answers, and in which order steps rehearse it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dphrl.data.schedule import derive_seed
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.reference.split import PromptCounts, Split
from dphrl.reference.stage import fill_reference
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

# One letter a completion: right, wrong, right but cut at the token limit, grader failed.
STATUS = {
    "r": RewardStatus.CORRECT,
    "w": RewardStatus.WRONG,
    "t": RewardStatus.CORRECT,
    "x": RewardStatus.INFRASTRUCTURE_ERROR,
}


class Rollouts:
    """Completion j of a prompt has the tokens (20 + j, 3), the engine's log-probs -1, and its letter as text."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.seeds: list[int] = []

    async def generate(self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False) -> Any:
        assert not greedy, "the reference is sampled as training samples"
        self.seeds.append(seed)
        for p in prompts:
            letters = self.answers[p.prompt_id]
            assert len(letters) == num_samples
            yield [
                Completion(p.prompt_id, j, (20 + j, 3), kind, (-1.0, -1.0), "length" if kind == "t" else "stop", 0)
                for j, kind in enumerate(letters)
            ]


class Rewards:
    async def grade(self, items: Any) -> list[RewardResult]:
        return [RewardResult(STATUS[c.text]) for _, c in items]


class Learner:
    """Its own log-probs: of each token a hundredth, and by the place in the sequence."""

    policy_version = 0

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        return [tuple(-0.01 * ids[t] - t for t in range(num_prompt, len(ids))) for ids, num_prompt in sequences]


def fill(
    make_config: Any, answers: dict[str, str], folder: Path, *, seed: int = 0, **reference: Any
) -> ReferenceBuffer:
    settings = {"num_samples": len(next(iter(answers.values()))), "threshold": 2, "stored_per_prompt": 2} | reference
    prompts = [Prompt(name, name, (1, 2, 3), "", "data") for name in answers]
    stage = fill_reference(
        make_config(reference=settings, seed=seed), prompts, Rollouts(answers), Rewards(), Learner(), {}, folder
    )
    return asyncio.run(stage)


def stored(buffer: ReferenceBuffer, name: str) -> list[int]:
    """Which completions of a prompt were kept, by their number."""
    return [sample.token_ids[0] - 20 for sample in buffer.samples if sample.prompt_id == name]


# ------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(("threshold", "near_perfect"), [(1, "abc"), (2, "bc"), (3, "c")])
def test_the_threshold_itself_is_enough(make_config: Any, tmp_path: Path, threshold: int, near_perfect: str) -> None:
    answers = {"z": "www", "a": "rww", "b": "rrw", "c": "rrr"}
    buffer = fill(make_config, answers, tmp_path / "r", threshold=threshold)
    assert buffer.near_perfect == frozenset(near_perfect)
    assert buffer.exploration == frozenset(answers) - buffer.near_perfect
    assert {sample.prompt_id for sample in buffer.samples} == set(near_perfect)


@pytest.mark.parametrize(
    ("all_wrong", "split"),
    [("keep", Split(("c",), ("z", "a"), ())), ("drop", Split(("c",), ("a",), ("z",)))],
)
def test_prompts_without_a_correct_answer_are_kept_or_dropped(
    make_config: Any, tmp_path: Path, all_wrong: str, split: Split
) -> None:
    buffer = fill(make_config, {"z": "wxw", "a": "rww", "c": "rrr"}, tmp_path / "r", all_wrong=all_wrong)
    assert buffer.split == split
    assert buffer.exploration.isdisjoint(split.dropped)


def test_a_failed_grading_is_neither_right_nor_wrong(make_config: Any, tmp_path: Path) -> None:
    buffer = fill(make_config, {"a": "rrxx", "b": "rrww"}, tmp_path / "r", threshold=2)
    assert buffer.verdicts == {"a": PromptCounts(2, 2, 2), "b": PromptCounts(4, 2, 2)}
    assert buffer.counts()["mean_correct"] == pytest.approx(4 / 6)
    assert sorted(stored(buffer, "a")) == [0, 1]


# ------------------------------------------------------------------------------------ what is stored


def test_only_correct_and_whole_answers_are_stored(make_config: Any, tmp_path: Path) -> None:
    answers = {"a": "wrtrxw", "b": "tttttt", "c": "rrrrrr"}
    buffer = fill(make_config, answers, tmp_path / "r", stored_per_prompt=4)
    # Rehearsed, a cut answer would teach to ramble, so a prompt with nothing else has nothing to rehearse.
    assert buffer.near_perfect == frozenset("ac")
    assert sorted(stored(buffer, "a")) == [1, 3]
    assert stored(buffer, "b") == []
    assert len(set(stored(buffer, "c"))) == 4, "so many of them, and no answer twice"


def test_the_choice_depends_on_the_runs_seed_and_the_prompt_alone(make_config: Any, tmp_path: Path) -> None:
    answers = dict.fromkeys("abcdef", "r" * 8)
    backwards = dict(reversed(answers.items()))
    one = fill(make_config, answers, tmp_path / "1")
    same = fill(make_config, backwards, tmp_path / "2", prompts_per_chunk=2)
    other = fill(make_config, answers, tmp_path / "3", seed=1)
    choices = {name: stored(one, name) for name in answers}
    assert choices == {name: stored(same, name) for name in answers}
    assert choices != {name: stored(other, name) for name in answers}
    assert len({tuple(choice) for choice in choices.values()}) > 3, "each prompt has a draw of its own"
    fewer = fill(make_config, answers, tmp_path / "4", stored_per_prompt=1)
    assert {name: stored(fewer, name) for name in answers} == {name: choice[:1] for name, choice in choices.items()}


def test_samples_carry_the_learners_own_logprobs(make_config: Any, tmp_path: Path) -> None:
    for sample in fill(make_config, {"a": "rrr", "b": "rrw"}, tmp_path / "r").samples:
        first, last = sample.token_ids
        assert sample.prompt_token_ids == (1, 2, 3)
        assert sample.logprobs == pytest.approx((-0.01 * first - 3, -0.01 * last - 4))


def test_every_chunk_samples_with_a_seed_of_its_place(make_config: Any, tmp_path: Path) -> None:
    answers = dict.fromkeys("abcde", "rw")
    prompts = [Prompt(name, name, (1,), "", "data") for name in answers]
    rollouts = Rollouts(answers)
    config = make_config(reference={"num_samples": 2, "threshold": 1, "prompts_per_chunk": 2}, seed=9)
    asyncio.run(fill_reference(config, prompts, rollouts, Rewards(), Learner(), {}, tmp_path / "r"))
    assert rollouts.seeds == [derive_seed(9, "reference", start) for start in (0, 2, 4)]


# ------------------------------------------------------------------------------------------ rehearsal


def rehearsed(buffer: ReferenceBuffer, steps: Sequence[int], num_rows: int) -> list[list[tuple[str, int]]]:
    rows = [asyncio.run(buffer.sample(step, num_rows)) for step in steps]
    return [[(sample.prompt_id, sample.token_ids[0]) for sample in of_step] for of_step in rows]


def test_an_epoch_rehearses_every_sample_once_in_an_order_of_the_runs_seed(make_config: Any, tmp_path: Path) -> None:
    answers = dict.fromkeys("abcdef", "r" * 4)
    buffer, other = (fill(make_config, answers, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    everything = {(sample.prompt_id, sample.token_ids[0]) for sample in buffer.samples}
    assert len(everything) == 12
    first, second = rehearsed(buffer, range(4), 3), rehearsed(buffer, range(4, 8), 3)
    for epoch in (first, second):
        assert {row for step in epoch for row in step} == everything
        assert all(len(step) == 3 for step in epoch)
    assert first != second, "each epoch in another order"
    assert [[name for name, _ in step] for step in first] != [
        [name for name, _ in step] for step in rehearsed(other, range(4), 3)
    ]
    loaded = ReferenceBuffer.load(tmp_path / "0")
    assert rehearsed(loaded, [2, 5], 3) == [first[2], second[1]], "a resumed run sees the same"
