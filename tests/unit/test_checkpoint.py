"""Checkpoints: pieces that any learner can read, whole or absent, written beside the training."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from dphrl import saving
from dphrl.config.loading import InputError
from dphrl.durable import SEAL
from dphrl.exporting import export_checkpoint
from dphrl.inline import InlineLearner
from dphrl.learner.checkpoint import (
    FORMAT,
    CheckpointError,
    CheckpointManifest,
    begin_checkpoint,
    complete_checkpoint,
    list_checkpoints,
    newest_whole,
    prune_checkpoints,
    read_manifest,
    set_aside_after,
)
from dphrl.learner.state import Piece, StoredState, write_pieces
from dphrl.saving import CheckpointSaver
from dphrl.tracking.console import Console
from tests.unit.test_learner_update import batch_of


def nothing(line: str) -> None:
    raise AssertionError(line)


# ----------------------------------------------------------------------------- pieces


def pieces_of(values: torch.Tensor, cuts: list[int]) -> list[Piece]:
    """A parameter in pieces that begin at `cuts`, with moments 10 and 100 times as large."""
    spans = zip(cuts, [*cuts[1:], len(values)], strict=True)
    kinds = {"master": 1, "exp_avg": 10, "exp_avg_sq": 100}
    return [
        Piece("layer.weight", start, len(values), 3, {kind: values[start:end] * by for kind, by in kinds.items()})
        for start, end in spans
    ]


def test_any_stretch_is_read_from_pieces_however_they_were_cut(tmp_path: Path) -> None:
    values, choose = torch.arange(50.0), random.Random(0)
    for case in range(20):
        folder = tmp_path / str(case)
        cuts = [0, *sorted(choose.sample(range(1, 50), choose.randrange(6)))]
        for rank, piece in enumerate(choose.sample(parts := pieces_of(values, cuts), len(parts))):
            write_pieces(folder / f"rank_{rank}.safetensors", [piece])
        with StoredState(folder) as stored:
            stored.check({"layer.weight": 50})
            assert stored.num_updates("layer.weight") == 3
            for _ in range(20):
                start, end = sorted(choose.choices(range(51), k=2))
                assert torch.equal(stored.read("master", "layer.weight", start, end), values[start:end])
            assert torch.equal(stored.read("exp_avg_sq", "layer.weight"), values * 100)


def test_a_state_that_lacks_a_piece_or_is_another_models_is_refused(tmp_path: Path) -> None:
    first, _, last = pieces_of(torch.arange(9.0), [0, 3, 6])
    write_pieces(tmp_path / "rank_0.safetensors", [first, last])
    with StoredState(tmp_path) as stored:
        with pytest.raises(InputError, match=r"elements 3 to 8 of layer\.weight are in no file; a rank's is missing"):
            stored.read("master", "layer.weight")
        with pytest.raises(InputError, match=r"layer\.weight has 9 elements there and 8 in this model"):
            stored.check({"layer.weight": 8})
        with pytest.raises(InputError, match="other parameters than are trained now"):
            stored.check({"layer.weight": 9, "lora_A": 4})


def test_a_copy_stays_as_it_was() -> None:
    values = torch.zeros(4)
    (piece,) = pieces_of(values, [0])
    copied = piece.copied()
    piece.tensors["master"].add_(1)
    assert copied.tensors["master"].tolist() == [0.0] * 4
    assert copied.num_bytes == 3 * 4 * 4


@pytest.fixture
def learner(make_config: Any, tiny_dir: str) -> InlineLearner:
    return InlineLearner(make_config(), tiny_dir)


def test_what_is_written_is_the_state_at_the_copy(learner: InlineLearner, tmp_path: Path) -> None:
    asyncio.run(learner.update(batch_of(learner)))
    before = {name: parameter.detach().clone() for name, parameter in learner.policy.lm.named_parameters()}
    asyncio.run(learner.copy_state())
    asyncio.run(learner.update(batch_of(learner)))
    asyncio.run(learner.write_state(tmp_path))
    with StoredState(tmp_path / "state") as stored:
        for name, parameter in before.items():
            assert torch.equal(stored.read("master", name).view_as(parameter), parameter)
            assert stored.num_updates(name) == 1


def test_weights_alone_are_restored_with_a_new_optimizer(
    learner: InlineLearner, make_config: Any, tiny_dir: str, tmp_path: Path
) -> None:
    asyncio.run(learner.update(batch_of(learner)))
    asyncio.run(learner.copy_state())
    asyncio.run(learner.write_state(tmp_path))
    other = InlineLearner(make_config(), tiny_dir)
    asyncio.run(other.update(batch_of(other)))
    asyncio.run(other.load(tmp_path, 1, weights_only=True))
    assert not other.engine.optimizer.state
    assert other.policy_version == 1
    for ours, theirs in zip(learner.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ----------------------------------------------------------------------------- whole or absent


def made(folder: Path, step: int, **told: Any) -> Path:
    staging = begin_checkpoint(folder, step)
    (staging / "state").mkdir()
    (staging / "state" / "rank_00000.safetensors").write_bytes(os.urandom(4096))
    manifest = CheckpointManifest(step, step, "inline", settings={"seed": 1}, inputs={"prompts": "a"}, **told)
    return complete_checkpoint(staging, manifest, {})


def test_the_newest_whole_checkpoint_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    assert newest_whole(tmp_path, nothing) is None
    first, second, third = (made(tmp_path, step) for step in (2, 4, 10))
    assert newest_whole(tmp_path, nothing) == third
    assert read_manifest(third) == CheckpointManifest(10, 10, "inline", "float32", {"seed": 1}, {"prompts": "a"})
    os.truncate(third / "state" / "rank_00000.safetensors", 7)
    (second / SEAL).unlink()
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == first
    assert said == [
        f"{third} cannot be used: state/rank_00000.safetensors has 7 bytes, 4096 were written; the checkpoint before "
        "it is used: step_2",
        f"{second} cannot be used: {SEAL} is missing; the checkpoint before it is used: step_2",
    ]
    assert [path.name for path in set_aside_after(tmp_path, 2)] == ["step_4.damaged", "step_10.damaged"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_2"]
    shutil.rmtree(first / "state")
    with pytest.raises(InputError, match=r"step_2 cannot be used: .*no whole checkpoint is left"):
        newest_whole(tmp_path, nothing)


def test_two_hundred_flips_and_cuts_are_never_loaded_as_good(tmp_path: Path) -> None:
    good, bad, choose = made(tmp_path, 2), made(tmp_path, 4), random.Random(0)
    files = [path for path in bad.rglob("*") if path.is_file()]
    for _ in range(200):
        path = choose.choice(files)
        content = path.read_bytes()
        at = choose.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]
        path.write_bytes(choose.choice([flipped, content[:at]]))
        said: list[str] = []
        assert newest_whole(tmp_path, said.append) == good
        assert len(said) == 1
        path.write_bytes(content)
    assert newest_whole(tmp_path, nothing) == bad


def test_a_checkpoint_of_an_older_format_is_told_apart(tmp_path: Path) -> None:
    made(tmp_path, 2, format=FORMAT - 1)
    with pytest.raises(InputError, match="an earlier version of dphrl wrote it in another format"):
        newest_whole(tmp_path, nothing)


def test_folders_with_other_names_are_left_alone(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", "step_10 (copy)", "step_4.bak", "step_best", "step_"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_9", "step_10"]
    prune_checkpoints(tmp_path, 10, 1, [])
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_10",
        "step_10 (copy)",
        "step_4.bak",
        "step_best",
        "step_",
    }


def test_what_a_killed_writer_left_goes_and_is_never_a_checkpoint(tmp_path: Path) -> None:
    (begin_checkpoint(tmp_path, 3) / "manifest.json").write_text("{}")
    assert list_checkpoints(tmp_path) == []
    begin_checkpoint(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == [".step_6.partial"]


def test_the_newest_and_the_protected_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        made(tmp_path, step)
    prune_checkpoints(tmp_path, 8, 2, [2])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_2", "step_6", "step_8"]
    prune_checkpoints(tmp_path, 6, 2, [])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_2", "step_6", "step_8"], "8 is another run's"


# ----------------------------------------------------------------------------- beside the training


class FakeLearner:
    """Writes when it is told to; `events` is what happened, in order."""

    policy_version, layout, dtype = 0, "fake", "float32"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.may_write, self.may_export = asyncio.Event(), asyncio.Event()
        self.may_write.set()
        self.may_export.set()
        self.num_bytes = 10
        self.error: Exception | None = None
        self.export_error: Exception | None = None

    async def copy_state(self) -> int:
        self.events.append("copy")
        return self.num_bytes

    async def write_state(self, folder: Path) -> dict[str, str]:
        await self.may_write.wait()
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "rank").write_text("state")
        if self.error:
            raise self.error
        self.events.append("state")
        return {}

    async def write_export(self, folder: Path) -> None:
        await self.may_export.wait()
        if self.export_error:
            raise self.export_error
        (folder / "hf").mkdir(parents=True)
        (folder / "hf" / "config.json").write_text("{}")
        self.events.append("export")


def saver_of(make_config: Any, folder: Path, learner: FakeLearner, **settings: Any) -> CheckpointSaver:
    config = make_config(run_dir=str(folder), run_name="run", checkpoint=settings, learner={"num_steps": 12})
    return CheckpointSaver(config, learner, folder / "run", {})  # type: ignore[arg-type]


def checkpoints_in(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "run" / "checkpoints")]


def test_a_step_waits_for_the_copy_alone(make_config: Any, tmp_path: Path) -> None:
    async def run() -> None:
        learner = FakeLearner()
        saver = saver_of(make_config, tmp_path, learner)
        learner.may_write.clear()
        await saver.save(1)
        assert (learner.events, checkpoints_in(tmp_path)) == (["copy"], [])
        learner.may_write.set()
        await saver.whole()
        assert checkpoints_in(tmp_path) == ["step_1"]
        await saver.finish()
        assert learner.events == ["copy", "state", "export"]
        assert (tmp_path / "run" / "checkpoints" / "step_1" / "hf" / SEAL).is_file()

    asyncio.run(run())


def test_a_checkpoint_waits_for_the_one_before_it(make_config: Any, tmp_path: Path) -> None:
    async def run() -> None:
        learner = FakeLearner()
        saver = saver_of(make_config, tmp_path, learner)
        learner.may_export.clear()
        await saver.save(1)
        second = asyncio.create_task(saver.save(2))
        await saver.whole()
        for _ in range(20):
            await asyncio.sleep(0)
        assert learner.events == ["copy", "state"], "a copy takes the place of the one that is still being exported"
        learner.may_export.set()
        await second
        await saver.finish()
        assert learner.events == ["copy", "state", "export"] * 2

    asyncio.run(run())


def test_a_checkpoint_that_is_given_up_never_gets_its_name(make_config: Any, tmp_path: Path) -> None:
    async def run() -> None:
        learner = FakeLearner()
        saver = saver_of(make_config, tmp_path, learner)
        learner.may_write.clear()
        await saver.save(1)
        await asyncio.sleep(0)
        saver.cancel()
        learner.may_write.set()
        with pytest.raises(asyncio.CancelledError):
            await saver.finish()

    asyncio.run(run())
    assert checkpoints_in(tmp_path) == []


def test_a_checkpoint_that_cannot_be_written_says_what_is_left(make_config: Any, tmp_path: Path) -> None:
    async def run() -> None:
        learner = FakeLearner()
        saver = saver_of(make_config, tmp_path, learner)
        await saver.save(3)
        await saver.finish()
        learner.error = OSError(28, "No space left on device")
        await saver.save(6)
        line = (
            r"^the checkpoint of step 6 could not be written to .*run/checkpoints \(OSError: \[Errno 28\] No "
            r"space left on device\); --resume goes on from step 3$"
        )
        with pytest.raises(CheckpointError, match=line):
            await saver.whole()
        with pytest.raises(CheckpointError):
            saver.check()
        await saver.settle()

    asyncio.run(run())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_3"], "its room is given back"


def test_room_is_looked_for_before(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: usage(0, 0, 2**30))
    learner = FakeLearner()
    learner.num_bytes = 3 * 2**29
    line = (
        r"step 1 takes 1\.50 GiB, and .* has 1\.00 GiB free beside 0 older ones; make room, or lower checkpoint\.keep=2"
    )
    with pytest.raises(CheckpointError, match=line + "; there is no earlier checkpoint"):
        asyncio.run(saver_of(make_config, tmp_path, learner).save(1))
    assert learner.events == ["copy"]


def test_an_export_that_fails_costs_no_checkpoint_and_only_the_last_one_is_an_error(
    make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        learner = FakeLearner()
        learner.export_error = ValueError("no generation_config")
        saver = saver_of(make_config, tmp_path, learner)
        await saver.save(1)
        await saver.save(2)
        with pytest.raises(
            CheckpointError, match=rf"`dphrl export {tmp_path / 'run'} --step 2 -o DIR` exports it once"
        ):
            await saver.finish()

    asyncio.run(run())
    assert checkpoints_in(tmp_path) == ["step_1", "step_2"]
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "the model of step 1 could not be exported (ValueError: no generation_config)" in warning.getMessage()


def test_when_a_checkpoint_is_due(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)

    def due(**settings: Any) -> list[int]:
        saver = saver_of(make_config, tmp_path, FakeLearner(), **settings)
        return [step for step in range(1, 13) if saver.is_due(step)]

    assert due() == [12], "the last step always has one"
    assert due(every_steps=5) == [5, 10, 12]
    saver = saver_of(make_config, tmp_path, FakeLearner(), every_minutes=10)
    assert not saver.is_due(3)
    now += 600
    assert saver.is_due(4)
    asyncio.run(saver.save(4))
    assert not saver.is_due(5), "the clock begins anew"
    now += 599
    assert not saver.is_due(6)
    assert not saver_of(make_config, tmp_path, FakeLearner(), every_minutes=0).is_due(6)


def test_a_checkpoint_that_cannot_be_removed_costs_no_training(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    async def run() -> None:
        saver = saver_of(make_config, tmp_path, FakeLearner(), keep=1, keep_best=0)
        await saver.save(1)
        await saver.finish()
        monkeypatch.setattr("dphrl.learner.checkpoint.shutil.rmtree", refuse)
        await saver.save(2)
        await saver.whole()
        saver.check()
        monkeypatch.undo()
        await saver.finish()

    asyncio.run(run())
    assert "an older checkpoint could not be removed: OSError" in caplog.text


def test_an_export_that_is_damaged_is_made_again(make_config: Any, tmp_path: Path) -> None:
    async def run() -> None:
        learner = FakeLearner()
        saver = saver_of(make_config, tmp_path, learner)
        await saver.save(1)
        await saver.finish()
        await saver.catch_up(1)
        assert learner.events == ["copy", "state", "export"], "it is there"
        (tmp_path / "run" / "checkpoints" / "step_1" / "hf" / "config.json").write_text("{ }")
        await saver.catch_up(1)
        await saver.finish()
        assert learner.events == ["copy", "state", "export", "copy", "export"]

    asyncio.run(run())


def test_the_best_evaluated_checkpoint_stays(make_config: Any, tmp_path: Path) -> None:
    scores = {1: 0.2, 2: 0.6, 3: 0.4}
    (tmp_path / "run" / "eval").mkdir(parents=True)
    for step, score in scores.items():
        summaries = [{"pass@1": score - 0.1, "pass@4": 1.0}, {"pass@1": score + 0.1}]
        (tmp_path / "run" / "eval" / f"step_{step}.json").write_text(json.dumps(summaries))

    async def run(**settings: Any) -> list[str]:
        saver = saver_of(make_config, tmp_path, FakeLearner(), keep=1, **settings)
        for step in range(1, 6):
            await saver.save(step)
        await saver.finish()
        return checkpoints_in(tmp_path)

    assert asyncio.run(run()) == ["step_2", "step_5"]
    assert asyncio.run(run(keep_best=0)) == ["step_5"]


# ----------------------------------------------------------------------------- export


def test_a_model_is_exported_from_the_checkpoint_alone(
    make_config: Any, learner: InlineLearner, tiny_dir: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    asyncio.run(learner.update(batch_of(learner)))
    config = make_config(run_dir=str(tmp_path), run_name="run")

    async def save() -> None:
        saver = CheckpointSaver(config, learner, tmp_path / "run", {})
        await saver.save(2)
        await saver.finish()

    asyncio.run(save())
    run, target, console = tmp_path / "run", tmp_path / "exported", Console()
    export_checkpoint(run, None, target, console)
    theirs = load_file(run / "checkpoints" / "step_2" / "hf" / "model.safetensors")
    ours = load_file(target / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (target / "tokenizer.json").read_bytes() == (Path(tiny_dir) / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="exported exists already; name a new folder"):
        export_checkpoint(run, 2, target, console)
    with pytest.raises(InputError, match=r"--step 3: .*run has checkpoints of steps 2; give one of them"):
        export_checkpoint(run, 3, tmp_path / "other", console)
    with pytest.raises(InputError, match="holds no checkpoints"):
        export_checkpoint(tmp_path, None, tmp_path / "other", console)
