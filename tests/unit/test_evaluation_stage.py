"""Evaluations killed and continued, alone and inside a training run, against fakes of the protocols."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl.chunks import ChunkFolder
from dphrl.collect import collect_groups
from dphrl.data.schedule import derive_seed
from dphrl.evaluation import stage as evaluation_stage
from dphrl.evaluation.results import read_summaries, write_summaries
from dphrl.evaluation.stage import Evaluation, PartialResult, evaluate_sets
from dphrl.prepare import EvaluationSet
from dphrl.protocols import Parts
from dphrl.rewards.watch import MAX_FAILED_PROMPTS, RewardFailedError
from dphrl.run import training_run
from dphrl.tracking.console import Console
from dphrl.tracking.tracker import Tracker
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus

STATUSES = tuple(RewardStatus)


class KilledError(Exception):
    pass


def make_prompts(count: int, dataset: str = "d") -> list[Prompt]:
    return [Prompt(f"{dataset}{i}", f"question {i}", (i, 2, 3), str(i), dataset) for i in range(count)]


async def others_end() -> None:
    """Returns when whatever needs nothing but the event loop is at its end."""
    for _ in range(100):
        await asyncio.sleep(0)


class FakeRollouts:
    """Completions by seed, prompt and version alone; dies at prompt `dies_at` when the other chunks are complete."""

    def __init__(self, dies_at: str = "", *, dies_at_version: int = 0) -> None:
        self.dies_at, self.dies_at_version = dies_at, dies_at_version
        self.requests: list[tuple[int, bool, list[str]]] = []
        self.version = 0

    async def refit(self, learner: Any) -> dict[str, float]:
        self.version = learner.policy_version
        return {"sync/logprob_gap_max": 0.0}

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncIterator[list[Completion]]:
        self.requests.append((seed, greedy, [prompt.prompt_id for prompt in prompts]))
        for prompt in prompts:
            if prompt.prompt_id == self.dies_at and self.version == self.dies_at_version:
                await others_end()
                raise KilledError
            for i in range(num_samples):
                drawn = derive_seed(seed, greedy, self.version, prompt.prompt_id, i)
                # No logprob of these is a float32, and their sum depends on every digit.
                logprobs = tuple(-1 / (2 + drawn % 7 + t) for t in range(1 + drawn % 3))
                ids = tuple(range(len(logprobs)))
                finish = "length" if drawn % 5 == 0 else "stop"
                yield [Completion(prompt.prompt_id, i, ids, f"ä {drawn}", logprobs, finish, self.version)]


class FakeRewards:
    """Verdicts by the completion's number: every status, and texts that are no UTF-8."""

    async def grade(self, items: Sequence[tuple[Prompt, Completion]]) -> list[RewardResult]:
        return [self._result(int(completion.text.split()[1])) for _, completion in items]

    def _result(self, drawn: int) -> RewardResult:
        status = STATUSES[drawn % len(STATUSES)] if drawn % 3 else RewardStatus.CORRECT
        return RewardResult(status, "\udc80", f"s{drawn % 4}", 0.1 if drawn % 2 else None, f"a{drawn % 2}")

    def drain_metrics(self) -> dict[str, float]:
        return {}


class FakeLearner:
    dtype, layout, policy_version = "float32", "fake", 0

    async def update(self, batch: Any) -> dict[str, float]:
        self.policy_version += 1
        return {}

    async def copy_state(self) -> int:
        return 0

    async def write_state(self, folder: Path) -> dict[str, str]:
        return {}

    async def write_export(self, folder: Path) -> None:
        (folder / "hf").mkdir(parents=True)

    async def load(self, folder: Path, policy_version: int, *, weights_only: bool = False) -> None:
        self.policy_version = policy_version


def make_parts(rollouts: Any, dtype: str = "float32") -> Parts:
    learner: Any = SimpleNamespace(dtype=dtype)
    return Parts(learner, rollouts, FakeRewards())


Evaluate = Callable[..., tuple[list[dict[str, Any]], str]]


@pytest.fixture
def evaluate(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Evaluates two sets of five and three prompts in chunks of two; gives summaries and what was said."""
    monkeypatch.setattr(evaluation_stage, "PROMPTS_PER_CHUNK", 2)

    def run(
        rollouts: Any,
        name: str | None = "out",
        *,
        model: str = "a model",
        policy: str = "initial",
        dtype: str = "float32",
        num_prompts: int = 5,
        **changes: Any,
    ) -> tuple[list[dict[str, Any]], str]:
        config = make_config(**{"evaluation": {"num_samples": 3, "k": [1, 3]}, **changes})
        sets = [EvaluationSet(of, "test", make_prompts(count, of)) for of, count in (("d", num_prompts), ("e", 3))]
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "config.json").write_text(model)
        partial = None if name is None else PartialResult(tmp_path / f"{name}.partial", str(tmp_path / "hf"), policy)
        said = io.StringIO()
        samples = tmp_path / f"{name}.samples"
        evaluation = Evaluation(config, sets, "model", partial=partial, samples_folder=samples)
        running = evaluate_sets(evaluation, make_parts(rollouts, dtype), Console(said, interactive=False))
        return asyncio.run(running), said.getvalue()

    return run


def kill_at(prompt_id: str, evaluate: Evaluate, **options: Any) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        evaluate(FakeRollouts(prompt_id), **options)
    assert raised.group_contains(KilledError)


def asked(rollouts: FakeRollouts) -> list[list[str]]:
    return [prompt_ids for _, greedy, prompt_ids in rollouts.requests if not greedy]


def test_a_killed_evaluation_samples_the_chunk_that_is_missing(evaluate: Evaluate, tmp_path: Path) -> None:
    kill_at("d3", evaluate)
    rest, whole = FakeRollouts(), FakeRollouts()
    continued, said = evaluate(rest)
    assert asked(rest) == [["d2", "d3"], ["e0", "e1"], ["e2"]], "the one before and the one after it are there"
    assert "evaluating model on d: continuing, 3 of 5 prompts done" in said
    assert "evaluating model on d  8/8 (100 %)" in said, "progress is of what was left"
    assert "starting over" not in said
    uninterrupted, said = evaluate(whole, "whole")
    assert "continuing" not in said
    assert continued == uninterrupted
    for name in ("d", "e"):
        ours, theirs = (tmp_path / f"{of}.samples" / f"{name}.jsonl" for of in ("out", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
        assert len(ours.read_text().splitlines()) == (15 if name == "d" else 9)
    assert [request for request in whole.requests if request in rest.requests] == rest.requests, "the same seeds"


def test_a_set_that_was_whole_is_not_sampled_again(evaluate: Evaluate) -> None:
    kill_at("e0", evaluate)
    rest = FakeRollouts()
    continued, said = evaluate(rest)
    assert asked(rest) == [["e0", "e1"]]
    assert "on d: continuing, 5 of 5 prompts done" in said
    assert "on e: continuing, 1 of 3 prompts done" in said
    assert continued == evaluate(FakeRollouts(), None)[0], "nor does it matter whether chunks are kept"


def test_chunks_of_every_size_give_the_same_completions(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks, at_once = FakeRollouts(), FakeRollouts()
    small, _ = evaluate(in_chunks, seed=7)
    monkeypatch.setattr(evaluation_stage, "PROMPTS_PER_CHUNK", 256)
    assert evaluate(at_once, "at_once", seed=7)[0] == small
    seed = derive_seed(7, "evaluation")
    every = [f"d{i}" for i in range(5)]
    assert at_once.requests[:2] == [(seed, False, every), (seed, True, every)]
    assert [request for request in in_chunks.requests if request[2][0] in every] == [
        (seed, greedy, part) for part in (every[:2], every[2:4], every[4:]) for greedy in (False, True)
    ]
    assert {seed for seed, _, _ in in_chunks.requests} == {seed}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, "sampling"),
        ({"rollout": {"temperature": 0.5}}, "sampling"),
        ({"evaluation": {"num_samples": 4, "k": [1, 3]}}, "sampling"),
        ({"reward": {"timeout_s": 3}}, "reward"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"policy": "step 3"}, "policy"),
        ({"model": "another"}, "model weights"),
        ({"num_prompts": 6}, "prompts"),
    ],
)
def test_chunks_of_another_identity_are_not_continued(
    evaluate: Evaluate, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    kill_at("d4", evaluate)
    assert len(list((tmp_path / "out.partial" / "d").glob("chunk_*.parquet"))) == 2
    rollouts = FakeRollouts()
    anew, said = evaluate(rollouts, **changes)
    assert f"unfinished evaluation in {tmp_path / 'out.partial' / 'd'} is not continued, starting over" in said
    assert f"starting over: {reason} changed\n" in said
    assert len(asked(rollouts)) == 5, "in three and two chunks"
    assert anew == evaluate(FakeRollouts(), "whole", **changes)[0]


def test_other_ks_are_read_off_the_same_chunks(evaluate: Evaluate) -> None:
    kill_at("d4", evaluate)
    rollouts, other = FakeRollouts(), {"evaluation": {"num_samples": 3, "k": [2]}}
    assert evaluate(rollouts, **other)[0] == evaluate(FakeRollouts(), "whole", **other)[0]
    assert len(asked(rollouts)) == 3


@pytest.mark.parametrize("damage", ["cut", "missing", "aside"])
def test_a_half_written_chunk_is_as_good_as_none(evaluate: Evaluate, tmp_path: Path, damage: str) -> None:
    kill_at("d4", evaluate)
    second = tmp_path / "out.partial" / "d" / "chunk_00000002.parquet"
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-20])
    elif damage == "missing":
        second.unlink()
    else:
        second.rename(second.with_suffix(".1.aside"))
    rollouts = FakeRollouts()
    assert evaluate(rollouts)[0] == evaluate(FakeRollouts(), "whole")[0]
    assert asked(rollouts)[:2] == [["d2", "d3"], ["d4"]]


def test_a_chunk_holds_its_groups_to_the_last_digit(tmp_path: Path) -> None:
    rollouts = FakeRollouts()
    rollouts.version = 3
    prompts = make_prompts(20)
    parts = make_parts(rollouts)
    collected = [
        asyncio.run(collect_groups(rollouts, parts.rewards, prompts, count, seed=1)).groups for count in (3, 1)
    ]
    results = [result for group in collected[0] for result in group.results]
    assert {result.status for result in results} == set(RewardStatus), "the comparison is of every kind"
    assert {result.signal for result in results} == {None, 0.1}
    chunks = ChunkFolder(tmp_path, prompts, {}, 20, evaluation_stage.CHUNK_SCHEMA)
    chunks.write_rows(0, evaluation_stage.to_rows(*collected))
    assert evaluation_stage.from_rows(prompts, chunks.read_rows(0)) == (collected[0], collected[1])


# ------------------------------------------------------------ inside a training run


class Training:
    """A run of four steps on fakes, evaluated every two; each call is a process of its own."""

    def __init__(self, make_config: Any, tiny_dir: str, folder: Path) -> None:
        self.config = make_config(
            algorithm={"divergence": "none", "num_minibatches": 1},
            learner={"num_steps": 4},
            checkpoint={"every_steps": 2},
            evaluation={"num_samples": 3, "k": [1], "every_steps": 2},
        )
        self.folder = folder
        evaluations = [EvaluationSet("e", "test", make_prompts(5, "e"))]
        self.prepared: Any = SimpleNamespace(model_dir=tiny_dir, prompts=make_prompts(6), evaluations=evaluations)

    def run(self, rollouts: FakeRollouts, config: Any = None) -> str:
        parts, said = Parts(FakeLearner(), rollouts, FakeRewards()), io.StringIO()  # type: ignore[arg-type]

        class System:
            async def start(self, on_ready: Any) -> Parts:
                return parts

        system: Any = System()
        console = Console(said, interactive=False)
        with Tracker(self.folder, tensorboard=False) as tracker:
            asyncio.run(training_run(config or self.config, self.prepared, system, tracker, console, resume=True))
        return said.getvalue()

    def kill(self, prompt_id: str, version: int, config: Any = None) -> None:
        with pytest.raises(BaseExceptionGroup) as raised:
            self.run(FakeRollouts(prompt_id, dies_at_version=version), config)
        assert raised.group_contains(KilledError)

    def results(self) -> dict[str, Any]:
        return {path.name: json.loads(path.read_text()) for path in (self.folder / "eval").glob("*.json")}

    @property
    def unfinished(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "eval").glob("*.partial"))


@pytest.fixture
def training(make_config: Any, tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(evaluation_stage, "PROMPTS_PER_CHUNK", 2)
    return lambda name: Training(make_config, tiny_dir, tmp_path / name)


@pytest.mark.parametrize(("version", "label"), [(0, "base"), (2, "step 2"), (4, "step 4")])
def test_a_run_killed_in_an_evaluation_continues_it(training: Any, version: int, label: str) -> None:
    killed, whole = training("killed"), training("whole")
    killed.kill("e3", version)
    result = f"{label.replace(' ', '_')}.json"
    assert killed.unfinished == [f"{result}.partial"]
    assert result not in killed.results()
    assert f"evaluating {label} on e: continuing, 3 of 5 prompts done" in killed.run(FakeRollouts())
    assert "continuing, " not in whole.run(FakeRollouts()).replace("continuing from", "")
    assert killed.results() == whole.results()
    assert killed.results().keys() == {"base.json", "step_2.json", "step_4.json"}
    assert killed.unfinished == []


def test_what_a_kill_right_after_the_result_left_is_removed(training: Any) -> None:
    run = training("run")
    run.run(FakeRollouts())
    (run.folder / "eval" / "base.json.partial").mkdir()
    assert "evaluating base" not in run.run(FakeRollouts())
    assert run.unfinished == []


def test_the_evaluation_of_a_step_without_checkpoint_starts_over(training: Any) -> None:
    killed = training("killed")
    seldom = killed.config.model_copy(
        update={"checkpoint": killed.config.checkpoint.model_copy(update={"every_steps": 3})}
    )
    killed.kill("e3", 2, seldom)
    assert killed.unfinished == [], "a resumed run comes to other weights there"
    assert "continuing, " not in killed.run(FakeRollouts(), seldom)


def test_a_step_whose_checkpoint_was_made_again_is_evaluated_again(training: Any) -> None:
    killed = training("killed")
    killed.kill("e3", 4)
    manifest = killed.folder / "checkpoints" / "step_4" / "manifest.json"
    manifest.write_text(manifest.read_text())
    said = killed.run(FakeRollouts())
    assert "step_4.json.partial/e is not continued, starting over: policy changed" in said


def test_a_damaged_result_of_the_base_is_made_again(training: Any) -> None:
    run = training("run")
    run.run(FakeRollouts())
    whole, path = run.results(), run.folder / "eval" / "base.json"
    path.write_text(path.read_text().replace('"num_correct": ', '"num_correct": 1'))
    said = run.run(FakeRollouts())
    assert f"{path} is not as it was written; the evaluation is made again" in said
    assert run.results() == whole


def test_a_damaged_chunk_is_named_and_evaluated_again(evaluate: Evaluate, tmp_path: Path) -> None:
    kill_at("d4", evaluate)
    chunk = tmp_path / "out.partial" / "d" / "chunk_00000002.parquet"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    rollouts = FakeRollouts()
    summaries, said = evaluate(rollouts)
    assert "chunk_00000002.parquet has another content than was written; these prompts are evaluated again" in said
    assert summaries == evaluate(FakeRollouts(), "whole")[0]
    assert asked(rollouts)[:2] == [["d2", "d3"], ["d4"]]


def test_no_flipped_bit_and_no_cut_of_a_result_is_read(tmp_path: Path) -> None:
    path, choose = tmp_path / "base.json", random.Random(0)
    write_summaries(path, [{"dataset": "d", "pass@1": 0.25, "per_prompt": list(range(50))}])
    whole = path.read_bytes()
    for _ in range(300):
        at = choose.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1 :])
        assert read_summaries(path) is None
        path.write_bytes(whole[:at])
        assert read_summaries(path) is None
    path.write_bytes(whole)
    assert read_summaries(path) == json.loads(whole)
    (tmp_path / ".base.json.sha256").write_text("")
    assert read_summaries(path) is None
    (tmp_path / ".base.json.sha256").unlink()
    assert read_summaries(path) == json.loads(whole), "one of the version before"


def test_a_reward_that_fails_everywhere_ends_the_evaluation(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FakeRewards, drawn: int) -> RewardResult:
        return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "no judge")

    monkeypatch.setattr(evaluation_stage, "PROMPTS_PER_CHUNK", 3 * MAX_FAILED_PROMPTS)
    monkeypatch.setattr(FakeRewards, "_result", broken)
    with pytest.raises(RewardFailedError, match=f"of {MAX_FAILED_PROMPTS} prompts: no judge"):
        evaluate(FakeRollouts(), num_prompts=2 * MAX_FAILED_PROMPTS)
    # A few prompts may be at fault themselves.
    assert evaluate(FakeRollouts())[0][0]["statuses"] == {"infrastructure_error": 15}
