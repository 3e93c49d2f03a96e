"""What the reference stage stores of the initial policy's answers, and in which order steps rehearse it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl.data.schedule import derive_seed
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.reference.reuse import prepare_reference
from dphrl.reference.split import PromptCounts, Split
from dphrl.reference.stage import fill_reference
from dphrl.rewards.watch import MAX_FAILED_PROMPTS, RewardFailedError
from dphrl.tracking.console import Console
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

# One letter a completion: right, wrong, right but cut at the token limit, grader failed.
STATUS = {
    "r": RewardStatus.CORRECT,
    "w": RewardStatus.WRONG,
    "t": RewardStatus.CORRECT,
    "x": RewardStatus.INFRASTRUCTURE_ERROR,
}


class Rollouts:
    """Completion j of a prompt has the tokens (20 + j, 3), the engine's log-probs -1, and its letter as text.

    confirming: the letter of the one further answer of each prompt that is asked for one.
    """

    def __init__(self, answers: dict[str, str], confirming: dict[str, str] | None = None) -> None:
        self.answers, self.confirming = answers, confirming or {}
        self.seeds: list[int] = []
        self.confirmed: list[list[str]] = []

    async def generate(
        self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
        assert not greedy, "the reference is sampled as training samples"
        self.seeds.append(seed)
        answers = self.answers if num_samples > 1 else self.confirming
        if num_samples == 1:
            self.confirmed.append([p.prompt_id for p in prompts])
        for p in prompts:
            letters = answers[p.prompt_id]
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
    make_config: Any,
    answers: dict[str, str],
    folder: Path,
    *,
    seed: int = 0,
    rollouts: Rollouts | None = None,
    rewards: Any = None,
    on_graded: Any = lambda count, num_tokens: None,
    **reference: Any,
) -> ReferenceBuffer:
    settings = {"num_samples": len(next(iter(answers.values()))), "threshold": 2, "stored_per_prompt": 2} | reference
    prompts = [Prompt(name, name, (1, 2, 3), f"gold of {name}", "data") for name in answers]
    config = make_config(reference=settings, seed=seed)
    parts = rollouts or Rollouts(answers), rewards or Rewards(), Learner()
    return asyncio.run(fill_reference(config, prompts, *parts, {}, folder, on_graded))


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


@pytest.mark.parametrize(
    ("letters", "all_wrong", "part"),
    [
        ("rrrw", "drop", "near_perfect"),
        ("rrww", "drop", "exploration"),
        ("rrrx", "drop", "near_perfect"),  # three of three
        ("rrwx", "drop", "exploration"),  # two of three are fewer than three of four
        ("rrxx", "drop", "near_perfect"),
        ("rxxx", "drop", "near_perfect"),
        ("rrrt", "drop", "near_perfect"),
        ("rrtw", "drop", "truncated"),
        ("rrtt", "drop", "truncated"),
        ("rtwx", "drop", "exploration"),
        ("tttt", "drop", "truncated"),
        ("ttxx", "drop", "truncated"),
        ("twww", "drop", "exploration"),  # one was right, though cut: it is not hopeless
        ("wwww", "drop", "dropped"),
        ("wwwx", "drop", "dropped"),
        ("wwww", "keep", "exploration"),
        ("xxxx", "drop", "exploration"),
        ("xxxx", "keep", "exploration"),
    ],
)
def test_the_split_counts_what_can_be_used_of_what_has_a_verdict(
    make_config: Any, tmp_path: Path, letters: str, all_wrong: str, part: str
) -> None:
    # The other prompt is there so that the reward gives a verdict.
    buffer = fill(make_config, {"a": letters, "b": "rwww"}, tmp_path / "r", threshold=3, all_wrong=all_wrong)
    split = buffer.split
    assert {name for name in vars(split) if "a" in getattr(split, name)} == {part} | (
        {"exploration"} if part == "truncated" else set()
    )
    assert bool(stored(buffer, "a")) == (part == "near_perfect"), "a near-perfect prompt has something to rehearse"
    counts = buffer.counts()
    assert counts["num_truncated"] == (part == "truncated")
    assert counts["num_nothing_storable"] == (part == "truncated" and "r" not in letters)
    assert counts["num_without_verdict"] == (letters == "xxxx")
    assert counts["num_graded"] == 8 - letters.count("x")
    assert ReferenceBuffer.load(tmp_path / "r").split == split


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


def test_chunks_of_every_size_sample_with_the_same_seed(make_config: Any, tmp_path: Path) -> None:
    answers = dict.fromkeys("abcde", "rw")
    prompts = [Prompt(name, name, (1,), "", "data") for name in answers]
    for size, num_chunks in ((2, 3), (5, 1)):
        rollouts = Rollouts(answers)
        config = make_config(reference={"num_samples": 2, "threshold": 1, "prompts_per_chunk": size}, seed=9)
        asyncio.run(fill_reference(config, prompts, rollouts, Rewards(), Learner(), {}, tmp_path / str(size)))
        assert rollouts.seeds == [derive_seed(9, "reference")] * num_chunks


# --------------------------------------------------------------------------------------- confirmation

SAMPLED = {"a": "rrrr", "b": "rrrw", "c": "rrrx", "d": "rrrr", "e": "rrww", "f": "rrrr"}
CONFIRMING = {"a": "r", "b": "w", "c": "t", "d": "x", "e": "r", "f": "r"}
CONFIRM = {"threshold": 3, "confirm": True, "prompts_per_chunk": 2}


def test_a_near_perfect_prompt_needs_one_more_correct_and_complete_answer(make_config: Any, tmp_path: Path) -> None:
    rollouts, counted = Rollouts(SAMPLED, CONFIRMING), []
    buffer = fill(
        make_config, SAMPLED, tmp_path / "r", rollouts=rollouts, on_graded=lambda n, _: counted.append(n), **CONFIRM
    )
    assert buffer.split == Split(("a", "f"), ("b", "c", "d", "e"), (), (), ("b", "c", "d"))
    assert rollouts.confirmed == [["a", "b", "c", "d", "f"]], "those alone, and as many at once as a chunk has samples"
    assert sum(counted) == len(SAMPLED) * 5, "progress is of all K + 1, needed or not"
    assert rollouts.seeds == [derive_seed(0, "reference")] * 3 + [derive_seed(0, "confirmation")]
    assert buffer.counts()["num_unconfirmed"] == 3
    assert ReferenceBuffer.load(tmp_path / "r").split == buffer.split
    # The confirming answers are not stored, so the buffer is a part of what it is without them.
    without = fill(make_config, SAMPLED, tmp_path / "w", threshold=3)
    assert [s for s in without.samples if s.prompt_id in "af"] == buffer.samples


def test_a_killed_confirmation_continues_and_another_threshold_confirms_anew(make_config: Any, tmp_path: Path) -> None:
    class DyingRewards(Rewards):
        """Dies at the first chunk of confirming answers when the second is complete."""

        async def grade(self, items: Any) -> list[RewardResult]:
            if killed.confirmed and items[0][0].prompt_id == "a":
                for _ in range(100):
                    await asyncio.sleep(0)
                raise ConnectionError
            return await super().grade(items)

    answers = SAMPLED | {"e": "rrrr"}
    settings = CONFIRM | {"prompts_per_chunk": 1}
    killed = Rollouts(answers, CONFIRMING)
    with pytest.raises(BaseExceptionGroup):
        fill(make_config, answers, tmp_path / "r", rollouts=killed, rewards=DyingRewards(), **settings)
    rest, counted = Rollouts(answers, CONFIRMING), []
    continued = fill(
        make_config, answers, tmp_path / "r", rollouts=rest, on_graded=lambda n, _: counted.append(n), **settings
    )
    assert rest.confirmed == [list("abcd")]
    assert rest.seeds == [derive_seed(0, "confirmation")]
    assert sum(counted) == len(answers), "one for each prompt, as the others were counted by the first process"
    whole = fill(make_config, answers, tmp_path / "w", rollouts=Rollouts(answers, CONFIRMING), **settings)
    assert continued == whole
    fewer = Rollouts(answers, CONFIRMING)
    narrower = fill(make_config, answers, tmp_path / "r", rollouts=fewer, **settings | {"threshold": 4})
    assert fewer.confirmed == [["a", "c", "d", "e"], ["f"]]
    assert narrower.split.unconfirmed == ("c", "d")
    again = Rollouts(answers, CONFIRMING)
    fill(make_config, answers, tmp_path / "r", rollouts=again, **settings | {"threshold": 4, "stored_per_prompt": 1})
    assert again.seeds == [], "the same prompts are not asked again"


def test_nothing_to_confirm_asks_nothing(make_config: Any, tmp_path: Path) -> None:
    answers = {"a": "rwww", "b": "wwww"}
    rollouts = Rollouts(answers)
    buffer = fill(make_config, answers, tmp_path / "r", rollouts=rollouts, **CONFIRM)
    assert (rollouts.confirmed, buffer.samples, buffer.split.exploration) == ([], [], ("a", "b"))


# ------------------------------------------------------------------------------------------ a dead reward


class FailingRewards:
    """Gives verdicts only on the prompts in `works_on`."""

    def __init__(self, works_on: str = "") -> None:
        self.works_on = works_on
        self.num_graded = 0

    async def grade(self, items: Any) -> list[RewardResult]:
        self.num_graded += len(items)
        failed = RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "the reward raised\nOops", trace="Traceback\n  Oops")
        return [RewardResult(STATUS[c.text]) if p.prompt_id in self.works_on else failed for p, c in items]


def test_a_reward_that_fails_everywhere_stops_the_stage_with_its_own_words(make_config: Any, tmp_path: Path) -> None:
    answers = dict.fromkeys("abcdef", "rrrr")
    with pytest.raises(RewardFailedError) as stopped:
        fill(make_config, answers, tmp_path / "r", rewards=FailingRewards(), prompts_per_chunk=2)
    assert "'factorization' gave no verdict on any of 8 completions of 2 prompts: the reward raised Oops;" in str(
        stopped.value
    )
    assert len(stopped.value.__notes__) == 3
    for words in ("prompt a", "begins: 'r'", "answer: 'gold of a'", "  Traceback\n    Oops"):
        assert words in stopped.value.__notes__[0]
    # Nothing is kept of the chunk, so that the same command does all of it once the reward works.
    mended = fill(make_config, answers, tmp_path / "r", prompts_per_chunk=2)
    assert mended == fill(make_config, answers, tmp_path / "w")


def test_a_long_chunk_is_not_sampled_to_its_end(make_config: Any, tmp_path: Path) -> None:
    class Decoding(Rollouts):
        async def generate(
            self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
        ) -> Any:
            async for completions in super().generate(prompts, num_samples, seed=seed, greedy=greedy):
                yield completions
                await asyncio.sleep(0)

    answers, rewards = {f"p{i}": "rr" for i in range(3 * MAX_FAILED_PROMPTS)}, FailingRewards()
    with pytest.raises(RewardFailedError, match=f"{2 * MAX_FAILED_PROMPTS - 1} completions of {MAX_FAILED_PROMPTS} pr"):
        fill(make_config, answers, tmp_path / "r", rewards=rewards, rollouts=Decoding(answers))
    assert rewards.num_graded < len(answers)


def test_a_reward_that_fails_on_some_prompts_does_not_stop(make_config: Any, tmp_path: Path) -> None:
    answers = {"a": "rrrr", "b": "rrrr", "c": "rrrr"}
    buffer = fill(make_config, answers, tmp_path / "r", rewards=FailingRewards("a"), prompts_per_chunk=1)
    assert buffer.split == Split(("a",), ("b", "c"), ())
    assert len(buffer.failures) == 3
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["failures"] == buffer.failures


def test_a_reward_that_dies_later_stops_at_a_chunk_of_many_prompts(make_config: Any, tmp_path: Path) -> None:
    answers = {"a": "rr"} | {f"p{i}": "rr" for i in range(2 * MAX_FAILED_PROMPTS - 1)}
    chunks = {"prompts_per_chunk": MAX_FAILED_PROMPTS}
    with pytest.raises(RewardFailedError):
        fill(make_config, answers, tmp_path / "r", rewards=FailingRewards("a"), **chunks)
    rest = Rollouts(answers)
    fill(make_config, answers, tmp_path / "r", rollouts=rest, **chunks)
    assert rest.seeds == [derive_seed(0, "reference")], "the first chunk is kept"


# ---------------------------------------------------------------------------------- what the run says


def said_of(make_config: Any, tiny_dir: str, folder: Path, answers: dict[str, str], capsys: Any, **parts: Any) -> str:
    """The console's lines about the split. parts: what of the fakes differs."""
    settings = {"num_samples": 4, "threshold": 3, "all_wrong": "drop"} | parts.pop("reference", {})
    config = make_config(reference=settings)
    prompts = [Prompt(name, name, (1,), "", "data") for name in answers]

    class System:
        async def fill_reference(self, prompts: Any, identity: Any, folder: Path, on_graded: Any) -> Any:
            fakes = parts.get("rollouts", Rollouts(answers)), parts.get("rewards", Rewards()), Learner()
            buffer = await fill_reference(config, prompts, *fakes, identity, folder, on_graded)
            return buffer, buffer.counts()

    prepared: Any = SimpleNamespace(model_dir=tiny_dir, prompts=prompts)
    system: Any = System()
    running: Any = SimpleNamespace(learner=SimpleNamespace(dtype="torch.float32"))
    asyncio.run(prepare_reference(config, prepared, system, running, folder, Console(interactive=False)))
    return str(capsys.readouterr().out)


def test_the_run_says_why_prompts_are_not_near_perfect(
    make_config: Any,
    tiny_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "dphrl")
    answers = {"a": "rrrr", "b": "rrrw", "c": "rrtw", "d": "tttt", "e": "rrrx", "f": "xxxx", "g": "wwww", "h": "tttx"}
    out = said_of(make_config, tiny_dir, tmp_path / "1", answers, capsys)
    assert "3 near-perfect prompts (>= 3 of 4 correct), 4 to explore, 1 dropped;" in out
    assert "NOTE: the reward failed on 6 of 32 completions (run.log has the first failures in full)" in out
    assert "explores 1 prompts without any verdict" in out
    assert "NOTE: 3 prompts would be near-perfect if truncated answers counted, and are explored (2 of them have" in out
    assert "raise rollout.max_tokens=24" in out
    assert "confirmed" not in out
    assert [message.split(":")[0] for message in caplog.messages if message.startswith("The reward")] == [
        "The reward failed on prompt e",
        "The reward failed on prompt f",
        "The reward failed on prompt f",
    ]
    rollouts = Rollouts(answers, {"a": "r", "b": "w", "e": "t"})
    out = said_of(
        make_config, tiny_dir, tmp_path / "2", answers, capsys, reference={"confirm": True}, rollouts=rollouts
    )
    assert "1 near-perfect prompts" in out
    assert "NOTE: 2 prompts were near-perfect but not confirmed by one more answer" in out
    assert "initial policy  40/40 (100 %)" in out
    assert "NOTE" not in said_of(make_config, tiny_dir, tmp_path / "3", {"a": "rrrr", "b": "wwwr"}, capsys)


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
