"""The reference buffer on disk, its fingerprint and its schedule; checkpoints that are whole or absent."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from dphrl.config.loading import InputError
from dphrl.fingerprint import changed_parts, fingerprint
from dphrl.reference import stage as reference_stage
from dphrl.reference.buffer import DamagedBufferError, ReferenceBuffer
from dphrl.reference.reuse import prepare_reference
from dphrl.reference.split import Split
from dphrl.reference.stage import GradedResponses, fill_reference
from dphrl.tracking.console import Console
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus


def make_prompts(num_prompts: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"question {i}", (1, 2, 10 + i), str(i), "data") for i in range(num_prompts)]


class KilledError(Exception):
    """Stands for a signal in the middle of a chunk."""


async def others_end() -> None:
    """Returns when whatever needs nothing but the event loop is at its end."""
    for _ in range(100):
        await asyncio.sleep(0)


class ScriptedRollouts:
    """Sample j of prompt i says whether it is right: right when j < i. Dies at prompt `dies_at` when the other chunks
    are complete."""

    def __init__(self, dies_at: str = "") -> None:
        self.dies_at = dies_at
        self.requests: list[tuple[int, list[str]]] = []

    async def generate(
        self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
        self.requests.append((seed, [p.prompt_id for p in prompts]))
        for p in prompts:
            if p.prompt_id == self.dies_at:
                await others_end()
                raise KilledError
            right = int(p.prompt_id[1:])
            yield [
                Completion(p.prompt_id, j, (20 + j, 3), "right" if j < right else "no", (-1.0, -1.0), "stop", 0)
                for j in range(num_samples)
            ]


class ScriptedRewards:
    async def grade(self, items: Any) -> list[RewardResult]:
        return [RewardResult(RewardStatus.CORRECT if c.text == "right" else RewardStatus.WRONG) for _, c in items]


class ScriptedLearner:
    policy_version = 0

    def __init__(self) -> None:
        self.calls: list[int] = []

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        self.calls.append(sum(len(ids) for ids, _ in sequences))
        return [tuple(-0.01 * token for token in ids[num_prompt:]) for ids, num_prompt in sequences]

    async def measure(self, sequences: Any) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        entropies = [tuple(token / 128 for token in ids[num_prompt:]) for ids, num_prompt in sequences]
        return list(zip(await self.score(sequences), entropies, strict=True))


def fill(
    config: Any,
    num_prompts: int = 6,
    folder: Path | None = None,
    rollouts: Any = None,
    learner: Any = None,
    identity: Any = None,
) -> ReferenceBuffer:
    with tempfile.TemporaryDirectory() as elsewhere:
        return asyncio.run(
            fill_reference(
                config,
                make_prompts(num_prompts),
                rollouts or ScriptedRollouts(),
                ScriptedRewards(),
                learner or ScriptedLearner(),
                identity or {"model": "1", "data": "1"},
                folder or Path(elsewhere) / "reference",
            )
        )


def fill_until(dies_at: str, config: Any, folder: Path, **others: Any) -> ScriptedRollouts:
    rollouts = ScriptedRollouts(dies_at)
    with pytest.raises(BaseExceptionGroup) as raised:
        fill(config, folder=folder, rollouts=rollouts, **others)
    assert raised.group_contains(KilledError)
    return rollouts


IN_PAIRS = {"num_samples": 4, "threshold": 3, "stored_per_prompt": 2, "prompts_per_chunk": 2}


def test_split_counts_and_learner_logprobs(make_config: Any) -> None:
    config = make_config(reference={"num_samples": 4, "threshold": 3, "stored_per_prompt": 2, "all_wrong": "drop"})
    buffer = fill(config)
    assert buffer.split == Split(("p3", "p4", "p5"), ("p1", "p2"), ("p0",))
    correct = {name: counts.num_correct for name, counts in buffer.verdicts.items()}
    assert correct == {"p0": 0, "p1": 1, "p2": 2, "p3": 3, "p4": 4, "p5": 4}
    assert [s.prompt_id for s in buffer.samples] == ["p3", "p3", "p4", "p4", "p5", "p5"]
    for sample in buffer.samples:
        assert sample.token_ids[0] - 20 < correct[sample.prompt_id], "only correct responses are stored"
        assert sample.logprobs == pytest.approx([-0.01 * token for token in sample.token_ids])


def test_disk_round_trip_and_audit(make_config: Any, tmp_path: Path) -> None:
    reference = make_config(reference={"num_samples": 4, "threshold": 3}).reference
    buffer = fill(make_config(reference={"num_samples": 4, "threshold": 3}))
    buffer.save(tmp_path / "reference", reference)
    loaded = ReferenceBuffer.load(tmp_path / "reference")
    assert (loaded.split, loaded.verdicts, loaded.seed) == (buffer.split, buffer.verdicts, buffer.seed)
    for ours, theirs in zip(loaded.samples, buffer.samples, strict=True):
        assert (ours.prompt_id, ours.token_ids) == (theirs.prompt_id, theirs.token_ids)
        assert ours.logprobs == pytest.approx(theirs.logprobs)
    split = json.loads((tmp_path / "reference" / "manifest.json").read_text())["split"]
    assert (split["num_prompts"], split["num_near_perfect"], split["num_exploration"]) == (6, 3, 3)
    assert split["num_bytes"] == sum(4 * (3 + 2 * len(s.token_ids)) for s in buffer.samples) == buffer.num_bytes
    buffer.save(tmp_path / "reference", reference)
    assert [p.name for p in tmp_path.iterdir()] == ["reference"]


def test_the_files_say_why_each_prompt_is_where_it_is(make_config: Any, tmp_path: Path) -> None:
    """Whoever audits a split needs nothing but its folder."""
    config = make_config(reference={"num_samples": 4, "threshold": 3, "stored_per_prompt": 1, "all_wrong": "drop"})
    fill(config, folder=tmp_path / "reference")
    rows = pq.read_table(tmp_path / "reference" / "counts.parquet").to_pylist()
    rule = json.loads((tmp_path / "reference" / "manifest.json").read_text())["rule"]
    assert rule == {"num_samples": 4, "threshold": 3, "confirm": False, "all_wrong": "drop", "stored_per_prompt": 1}
    for row in rows:
        share = row["num_complete"] / row["num_graded"]
        near_perfect = share >= rule["threshold"] / rule["num_samples"]
        assert row["part"] == ("near_perfect" if near_perfect else "exploration" if row["num_correct"] else "dropped")
        assert row["reason"] == ""


# What may happen to a folder that is copied or unpacked, or that lies on a full disk.
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # A prompt_id: bits between the columns decide nothing.
    place = re.search(rb"p\d", data)
    assert place
    data[place.end() - 1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_a_row(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def lose_a_column(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns([pq.read_schema(path).names[-1]]), path)


def no_manifest_but_json(path: Path) -> None:
    path.write_text("[]")


def lose_the_seed(path: Path) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "seed"}))


def unseal(folder: Path) -> None:
    """Make of a buffer one of the version before, which wrote no checksums."""
    (folder / "checksums.json").unlink()
    path = folder / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sealed"}))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("manifest.json", damage) for damage in (cut, empty, no_manifest_but_json, lose_the_seed)),
        *(
            (file, damage)
            for file in ("counts.parquet", "samples.parquet")
            for damage in (cut, empty, flip_a_bit, lose_a_row, lose_a_column, Path.unlink)
        ),
    ],
)
def test_a_damaged_buffer_is_one_line_with_the_file_and_made_again(
    make_config: Any, tmp_path: Path, file: str, damage: Callable[[Path], None], sealed: bool
) -> None:
    config, folder = make_config(reference=IN_PAIRS), tmp_path / "reference"
    fill(config, folder=folder)
    whole = ReferenceBuffer.load(folder)
    if not sealed:
        unseal(folder)
        assert ReferenceBuffer.load(folder) == whole, "what the version before stored is read"
    damage(folder / file)
    with pytest.raises(DamagedBufferError) as refused:
        ReferenceBuffer.load(folder)
    (line,) = str(refused.value).splitlines()
    assert "the reference buffer is damaged (" in line
    assert line.startswith(str(folder))
    assert file in line
    rest = ScriptedRollouts()
    fill(config, folder=folder, rollouts=rest)
    assert rest.requests == [], "its graded responses are there"
    assert ReferenceBuffer.load(folder) == whole


def broken(path: Path, choose: random.Random) -> bytes:
    """The file with one bit flipped, or cut off."""
    content = path.read_bytes()
    at = choose.randrange(len(content))
    if choose.random() < 0.5:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]


def test_no_flipped_bit_and_no_cut_of_a_buffer_is_loaded(make_config: Any, tmp_path: Path) -> None:
    folder, choose = tmp_path / "reference", random.Random(0)
    fill(make_config(reference=IN_PAIRS), folder=folder)
    files = sorted(folder.iterdir())
    for _ in range(300):
        path = choose.choice(files)
        before = path.read_bytes()
        path.write_bytes(broken(path, choose))
        with pytest.raises(DamagedBufferError):
            ReferenceBuffer.load(folder)
        path.write_bytes(before)
    ReferenceBuffer.load(folder)


def test_no_flipped_bit_and_no_cut_of_a_chunk_is_read(make_config: Any, tmp_path: Path) -> None:
    config, folder, choose = make_config(reference=IN_PAIRS), tmp_path / "reference", random.Random(0)
    fill(config, folder=folder)
    graded = GradedResponses(folder, make_prompts(6), {"model": "1", "data": "1"}, 2)
    assert graded.done() == {0, 2, 4}
    files = sorted(graded.folder.iterdir())
    for _ in range(300):
        path = choose.choice(files)
        before = path.read_bytes()
        path.write_bytes(broken(path, choose))
        if "identity.json" in path.name:
            assert (graded.done(), graded.changed()) == (frozenset(), [])
            (damage,) = graded.damaged()
            assert "identity.json" in damage
        else:
            assert len(graded.done()) == 2, path.name
            (damage,) = graded.damaged()
            assert path.name.removeprefix(".").removesuffix(".sha256") in damage
        path.write_bytes(before)
    assert graded.damaged() == []


def test_a_chunk_with_a_flipped_bit_is_sampled_again(make_config: Any, tmp_path: Path) -> None:
    config, folder = make_config(reference=IN_PAIRS), tmp_path / "reference"
    whole = fill(config, folder=folder)
    flip_a_bit(tmp_path / "reference.graded" / "chunk_00000002.parquet")
    rest = ScriptedRollouts()
    assert fill(config, folder=folder, rollouts=rest) == whole
    assert [asked for _, asked in rest.requests] == [["p2", "p3"]]


def test_a_chunk_of_the_version_before_is_used(make_config: Any, tmp_path: Path) -> None:
    config, folder = make_config(reference=IN_PAIRS), tmp_path / "reference"
    whole = fill(config, folder=folder)
    for seal in (tmp_path / "reference.graded").glob(".*.sha256"):
        seal.unlink()
    rest = ScriptedRollouts()
    assert fill(config, folder=folder, rollouts=rest) == whole
    assert rest.requests == []
    # Its parquet file has checksums of its own, which see most of what may happen to it.
    flip_a_bit(tmp_path / "reference.graded" / "chunk_00000002.parquet")
    with pytest.raises(InputError, match=r"chunk_00000002\.parquet: the file is damaged \(.*\); delete it, and"):
        fill(config, folder=folder)


def test_chunks_whose_identity_is_damaged_are_kept_aside(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = make_config(reference=IN_PAIRS), tmp_path / "reference"
    whole = fill(config, folder=folder)
    graded, aside = tmp_path / "reference.graded", tmp_path / "reference.graded.damaged"
    chunks = {path.name: path.read_bytes() for path in graded.glob("chunk_*")}
    aside.mkdir()
    (aside / "older").touch()
    path = graded / "identity.json"
    path.write_bytes(path.read_bytes().replace(b'"1"', b'"3"', 1))
    rest = ScriptedRollouts()
    assert fill(config, folder=folder, rollouts=rest) == whole
    assert len(rest.requests) == 3, "all of it is sampled again"
    assert {path.name: path.read_bytes() for path in aside.glob("chunk_*")} == chunks
    assert not (aside / "older").exists()
    (record,) = [record for record in caplog.records if getattr(record, "event", "") == "chunks_set_aside"]
    assert "identity.json has another content than was written, so that" in record.getMessage()
    assert f"the folder is now {aside}" in record.getMessage()
    # What is of another identity, and whole, is in the way of the new one.
    shutil.rmtree(aside)
    fill(config, folder=folder, identity={"model": "2", "data": "1"})
    assert not aside.exists()


def test_an_empty_buffer_gives_no_rows(make_config: Any, tmp_path: Path) -> None:
    config = make_config(reference={"num_samples": 4, "threshold": 4})
    buffer = fill(config, num_prompts=2)
    buffer.save(tmp_path / "reference", config.reference)
    assert asyncio.run(ReferenceBuffer.load(tmp_path / "reference").sample(0, 8)) == []


def test_a_killed_stage_samples_the_chunk_that_is_missing(make_config: Any, tmp_path: Path) -> None:
    config = make_config(reference=IN_PAIRS, seed=3)
    folder = tmp_path / "reference"
    assert len(fill_until("p3", config, folder).requests) == 3
    assert not folder.exists()
    rest = ScriptedRollouts()
    continued = fill(config, folder=folder, rollouts=rest)
    assert [asked for _, asked in rest.requests] == [["p2", "p3"]], "the one before and the one after it are there"
    whole = ScriptedRollouts()
    assert continued == fill(config, rollouts=whole)
    assert all(request in whole.requests for request in rest.requests), "the same seed for the same chunks"


def test_a_stage_killed_while_the_learner_scores_samples_nothing_again(make_config: Any, tmp_path: Path) -> None:
    class DyingLearner(ScriptedLearner):
        async def score(self, sequences: Any) -> list[tuple[float, ...]]:
            raise KilledError

    config = make_config(reference=IN_PAIRS)
    with pytest.raises(KilledError):
        fill(config, folder=tmp_path / "reference", learner=DyingLearner())
    rest = ScriptedRollouts()
    assert fill(config, folder=tmp_path / "reference", rollouts=rest) == fill(config)
    assert rest.requests == []


@pytest.mark.parametrize(
    ("identity", "prompts_per_chunk", "reasons"),
    [
        ({"model": "2", "data": "1"}, 2, ["model"]),
        ({"model": "2", "data": "3"}, 2, ["model", "data"]),
        ({"model": "1", "data": "1"}, 3, ["prompts per chunk"]),
    ],
)
def test_chunks_of_another_identity_are_not_continued(
    make_config: Any, tmp_path: Path, identity: dict[str, str], prompts_per_chunk: int, reasons: list[str]
) -> None:
    folder = tmp_path / "reference"
    fill_until("p5", make_config(reference=IN_PAIRS), folder)
    assert GradedResponses(folder, make_prompts(6), {"model": "1", "data": "1"}, 2).num_done() == 4
    graded = GradedResponses(folder, make_prompts(6), identity, prompts_per_chunk)
    assert (graded.changed(), graded.num_done()) == (reasons, 0)
    config = make_config(reference=IN_PAIRS | {"prompts_per_chunk": prompts_per_chunk})
    rollouts = fill_until("p0", config, folder, identity=identity)
    assert len(rollouts.requests) == 6 / prompts_per_chunk
    first = graded.folder / "chunk_00000000.parquet"
    assert (first.exists(), graded.num_done()) == (False, 6 - prompts_per_chunk), "the other's chunks are gone"


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_all_whole_chunks_are_trusted_and_no_other(make_config: Any, tmp_path: Path, damage: str) -> None:
    config, folder = make_config(reference=IN_PAIRS), tmp_path / "reference"
    fill_until("p5", config, folder)
    first = tmp_path / "reference.graded" / "chunk_00000000.parquet"
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-20])
    else:
        first.unlink()
    again = ScriptedRollouts()
    assert fill(config, folder=folder, rollouts=again) == fill(config)
    assert [asked for _, asked in again.requests] == [["p0", "p1"], ["p4", "p5"]]


def test_a_buffer_over_its_bound_names_the_remedy_and_keeps_what_is_sampled(make_config: Any, tmp_path: Path) -> None:
    # p3, p4 and p5 store two responses each, of 3 prompt and 2 completion tokens: 28 bytes a sample.
    config, folder = make_config(reference=IN_PAIRS | {"max_bytes": 100}), tmp_path / "reference"
    with pytest.raises(InputError, match=r"max_bytes=100: .* 168 bytes; lower reference\.stored_per_prompt=2"):
        fill(config, folder=folder)
    assert not folder.exists()
    rest = ScriptedRollouts()
    buffer = fill(make_config(reference=IN_PAIRS | {"max_bytes": 168}), folder=folder, rollouts=rest)
    assert (buffer.num_bytes, rest.requests) == (168, [])


@pytest.mark.parametrize(
    "selection", [{"threshold": 1}, {"threshold": 4}, {"stored_per_prompt": 4}, {"all_wrong": "drop"}]
)
def test_another_selection_takes_from_what_is_sampled(
    make_config: Any, tmp_path: Path, selection: dict[str, Any]
) -> None:
    before, after = make_config(reference=IN_PAIRS), make_config(reference=IN_PAIRS | selection)
    folder, rest = tmp_path / "reference", ScriptedRollouts()
    first = fill(before, folder=folder, identity={"model": "1", "selection": "1"})
    identity = {"model": "1", "selection": "2"}
    second = fill(after, folder=folder, rollouts=rest, identity=identity)
    assert rest.requests == []
    assert second == fill(after, identity=identity)
    assert ReferenceBuffer.load(folder).split == second.split
    assert (second.split, second.samples) != (first.split, first.samples)


ENTROPY = {"rehearsal_tokens": "entropy", "rehearsal_share": 0.5}


def test_entropies_are_stored_where_they_are_asked_for(make_config: Any, tmp_path: Path) -> None:
    asked, folder = make_config(reference=IN_PAIRS, algorithm=ENTROPY), tmp_path / "reference"
    buffer = fill(asked, folder=folder)
    for sample in buffer.samples:
        assert sample.entropies == tuple(token / 128 for token in sample.token_ids)
    assert [sample.entropies for sample in ReferenceBuffer.load(folder).samples] == [
        sample.entropies for sample in buffer.samples
    ]
    # Three prompts store two responses each, of 3 prompt and 2 completion tokens with two numbers each.
    assert buffer.num_bytes == 6 * 4 * (3 + 3 * 2)
    with pytest.raises(InputError, match=r"max_bytes=168: .* 216 bytes"):
        fill(make_config(reference=IN_PAIRS | {"max_bytes": 168}, algorithm=ENTROPY))
    for damage in (flip_a_bit, lose_a_column):
        before = (folder / "samples.parquet").read_bytes()
        damage(folder / "samples.parquet")
        with pytest.raises(DamagedBufferError):
            ReferenceBuffer.load(folder)
        (folder / "samples.parquet").write_bytes(before)
    plain = fill(make_config(reference=IN_PAIRS), folder=folder)
    assert {sample.entropies for sample in plain.samples} == {()}
    assert {sample.entropies for sample in ReferenceBuffer.load(folder).samples} == {()}
    assert pq.read_schema(folder / "samples.parquet").names == [
        "prompt_id",
        "prompt_token_ids",
        "token_ids",
        "logprobs",
    ]


def test_an_empty_buffer_with_entropies_is_read_again(make_config: Any, tmp_path: Path) -> None:
    config = make_config(reference={"num_samples": 4, "threshold": 4}, algorithm=ENTROPY)
    fill(config, num_prompts=2, folder=tmp_path / "reference")
    assert ReferenceBuffer.load(tmp_path / "reference").samples == []


def test_the_learner_scores_in_bounded_batches(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(reference=IN_PAIRS)
    at_once, in_batches = ScriptedLearner(), ScriptedLearner()
    expected = fill(config, learner=at_once)
    monkeypatch.setattr(reference_stage, "SCORED_TOKENS_PER_CALL", 12)
    assert fill(config, learner=in_batches) == expected
    assert (at_once.calls, in_batches.calls) == ([30], [10, 10, 10])
    monkeypatch.setattr(reference_stage, "SCORED_TOKENS_PER_CALL", 1)
    assert fill(config) == expected


def test_a_run_says_what_it_continues_reuses_or_starts_over(
    make_config: Any, tiny_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared: Any = SimpleNamespace(model_dir=tiny_dir, prompts=make_prompts(6))

    def run(dies_at: str = "", **changes: Any) -> str:
        config = make_config(**{"reference": IN_PAIRS, **changes})

        class System:
            async def fill_reference(self, prompts: Any, identity: Any, folder: Path, on_graded: Any) -> Any:
                scripted = ScriptedRollouts(dies_at), ScriptedRewards(), ScriptedLearner()
                buffer = await fill_reference(config, prompts, *scripted, identity, folder, on_graded)
                return buffer, buffer.counts()

            async def adopt_reference(self, buffer: Any, folder: Path) -> Any:
                return buffer

        system: Any = System()
        parts: Any = SimpleNamespace(learner=SimpleNamespace(dtype="torch.float32"))
        filling = prepare_reference(config, prepared, system, parts, tmp_path, Console(interactive=False))
        if dies_at:
            with pytest.raises(BaseExceptionGroup):
                asyncio.run(filling)
        else:
            asyncio.run(filling)
        return capsys.readouterr().out

    assert "starting over" not in run("p3")
    assert "reference.graded are not used, starting over: sampling changed" in run("p4", seed=1)
    out = run(seed=1)
    assert "reference stage: continuing, 4 of 6 prompts done" in out
    assert "initial policy  8/8 (100 %)" in out, "progress is of what was left"
    assert "6 samples stored (12 tokens, 168 bytes)" in out
    assert "reference buffer reused" in run(seed=1, reference=IN_PAIRS | {"prompts_per_chunk": 6})
    with pytest.raises(InputError, match=r"reference\.max_bytes=1:"):
        run(seed=1, reference=IN_PAIRS | {"max_bytes": 1})
    out = run(seed=1, reference=IN_PAIRS | {"threshold": 4})
    assert "reference is not reused: selection changed" in out
    assert "every prompt is sampled already, selecting from its graded responses" in out
    assert "2 near-perfect prompts (>= 4 of 4 correct)" in out
    # A buffer without entropies is scored again where they are asked for, and serves every other run as it is.
    out = run(seed=1, reference=IN_PAIRS | {"threshold": 4}, algorithm=ENTROPY)
    assert "reference is not reused: selection changed" in out
    assert "every prompt is sampled already, selecting from its graded responses" in out
    assert ReferenceBuffer.load(tmp_path / "reference").has_entropies
    assert "reference buffer reused" in run(seed=1, reference=IN_PAIRS | {"threshold": 4}, algorithm=ENTROPY)
    assert "selection changed" in run(seed=1, reference=IN_PAIRS | {"threshold": 4})
    other = {"divergence": "js", "eta": 1.0}
    assert "reference buffer reused" in run(seed=1, reference=IN_PAIRS | {"threshold": 4}, algorithm=other)
    # A buffer of an older version has other columns and less in its manifest: it is recognised, not misread.
    manifest = json.loads((tmp_path / "reference" / "manifest.json").read_text())
    older = {"fingerprint": manifest["fingerprint"] | {"selection": "0"}, "seed": 1, "split": {}}
    (tmp_path / "reference" / "manifest.json").write_text(json.dumps(older))
    (tmp_path / "reference" / "checksums.json").unlink()
    lose_a_column(tmp_path / "reference" / "counts.parquet")
    out = run(seed=1, reference=IN_PAIRS | {"threshold": 4})
    assert "reference is not reused: selection changed" in out
    assert "every prompt is sampled already" in out
    assert "2 near-perfect prompts (>= 4 of 4 correct)" in out
    assert "reference is not reused: sampling, selection changed" in run(seed=2)
    # What is damaged is named, and made again.
    cut(tmp_path / "reference" / "samples.parquet")
    flip_a_bit(tmp_path / "reference.graded" / "chunk_00000000.parquet")
    out = run(seed=2)
    assert "the reference buffer is damaged (samples.parquet has" in out
    assert "made again from the graded responses in" in out
    assert "chunk_00000000.parquet has another content than was written; these prompts are sampled again" in out
    assert "continuing, 4 of 6 prompts done" in out
    assert "reference buffer reused" in run(seed=2)


def test_steps_see_distinct_rows_and_a_resumed_run_the_same_ones(make_config: Any) -> None:
    buffer = fill(make_config(reference={"num_samples": 4, "threshold": 1, "stored_per_prompt": 4}))
    rows = [asyncio.run(buffer.sample(step, 5)) for step in range(6)]
    assert all(len({(s.prompt_id, s.token_ids) for s in step}) == 5 for step in rows)
    assert asyncio.run(buffer.sample(4, 5)) == rows[4]
    assert rows[0] != rows[1]


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"learner": {"lr": 0.5}, "run_name": "other"}, []),
        ({"reference": {"num_samples": 5}}, ["sampling"]),
        ({"reference": {"threshold": 2}}, ["selection"]),
        ({"reference": {"confirm": True}}, ["selection"]),
        ({"reference": {"stored_per_prompt": 3}}, ["selection"]),
        ({"reference": {"all_wrong": "drop"}}, ["selection"]),
        ({"reference": {"replay_share": 0.5}}, []),
        ({"algorithm": {"rehearsal_tokens": "entropy"}}, ["selection"]),
        ({"rollout": {"temperature": 0.9}}, ["sampling"]),
        ({"seed": 1}, ["sampling"]),
        ({"reward": {"timeout_s": 3.0}}, ["reward"]),
        ({"reward": {"name": "tests.unit.user_rewards:exact"}}, ["reward code", "reward"]),
        ({"model": {"attention": "eager"}}, ["learner numerics"]),
    ],
)
def test_fingerprint_names_what_changed(
    make_config: Any, tiny_dir: str, changes: dict[str, Any], reasons: list[str]
) -> None:
    prompts = make_prompts(3)
    before = fingerprint(make_config(), tiny_dir, prompts, "torch.float32")
    after = fingerprint(make_config(**changes), tiny_dir, prompts, "torch.float32")
    assert changed_parts(before, after) == reasons


def test_a_fingerprint_of_another_version_is_told_as_that() -> None:
    stored = {"model weights": "1", "prompts": "1", "gone": "1"}
    assert changed_parts(stored, {"model weights": "2", "prompts": "1"}) == ["model weights"]
    assert changed_parts(stored, {"model weights": "2", "new": "1"}) == ["what a fingerprint holds"]


def test_fingerprint_sees_weights_prompts_and_dtype(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_dir, copy)
    config, prompts = make_config(), make_prompts(3)
    before = fingerprint(config, str(copy), prompts, "torch.float32")
    assert changed_parts(before, fingerprint(config, tiny_dir, prompts, "torch.float32")) == []
    assert changed_parts(before, fingerprint(config, str(copy), prompts[:2], "torch.float32")) == ["prompts"]
    assert changed_parts(before, fingerprint(config, str(copy), prompts, "torch.bfloat16")) == ["learner numerics"]
    for name, part in [("special_tokens_map.json", "tokenizer"), ("generation_config.json", "generation settings")]:
        kept = (copy / name).read_bytes() if (copy / name).is_file() else None
        (copy / name).write_text('{"eos_token_id": 3}')
        assert changed_parts(before, fingerprint(config, str(copy), prompts, "torch.float32")) == [part]
        (copy / name).unlink() if kept is None else (copy / name).write_bytes(kept)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert changed_parts(before, fingerprint(config, str(copy), prompts, "torch.float32")) == ["model weights"]
