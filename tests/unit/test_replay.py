"""One learner step again: what is kept of it comes back equal, and the step repeats to the bit."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from dphrl import replay as replay_module
from dphrl.config.loading import InputError, dump_config, load_config
from dphrl.config.schema import Config
from dphrl.durable import read_seal, seal
from dphrl.inline import InlineLearner
from dphrl.learner.checkpoint import CheckpointManifest, begin_checkpoint, complete_checkpoint
from dphrl.learner.digest import digest_of
from dphrl.replay import (
    BATCH_FILE,
    Replayed,
    ReplayKeeper,
    Route,
    _write,
    find_route,
    read_step,
    replay,
    stored_steps,
)
from dphrl.tracking.tracker import Tracker
from dphrl.types import RowKind, TrainBatch, TrainRow

NUM_STEPS = 4


def make_batch(step: int) -> TrainBatch:
    rng = random.Random(step)

    def row(kind: RowKind) -> TrainRow:
        ids = tuple(rng.randrange(5, 20) for _ in range(rng.randint(5, 20)))
        logprobs = tuple(-rng.uniform(2, 4) for _ in ids[3:])
        return TrainRow(kind, ids, 3, logprobs, rng.random() / 50, rng.uniform(-1, 1), step)

    def minibatch() -> tuple[TrainRow, ...]:
        return (*(row(RowKind.POLICY) for _ in range(3)), row(RowKind.REFERENCE))

    return TrainBatch(step, step, (minibatch(), minibatch()), 1e-3, {"learner/lr": 1e-3}, (1.0, 0.75))


class Stand:
    """A learner of which only a digest is asked."""

    layout = "stand-in"

    async def digest(self) -> str:
        return "abc"


def config_of(num_kept: int = 9, *overrides: str) -> Config:
    return load_config("demo-math", [f"tracking.replay_steps={num_kept}", *overrides])


def keep(
    run: Path, batch: TrainBatch, *overrides: str, num_kept: int = 9, metrics: dict[str, float] | None = None, **of: Any
) -> None:
    keeper = ReplayKeeper(config_of(num_kept, *overrides), run, Stand(), **of)  # type: ignore[arg-type]
    asyncio.run(keeper.keep(batch, metrics or {}))


@pytest.mark.parametrize("shares", [(), (0.5, 1.0)])
def test_a_batch_comes_back_equal(tmp_path: Path, shares: tuple[float, ...]) -> None:
    bad = dataclasses.replace(make_batch(0).minibatches[0][0], advantage=math.inf, weight=1 / 3)
    chosen = [dataclasses.replace(bad, advantage=0.0, chosen=places) for places in ((), (0, 2), None)]
    minibatches = (*make_batch(0).minibatches, (bad, *chosen))
    batch = dataclasses.replace(make_batch(0), minibatches=minibatches, policy_shares=shares)
    keep(tmp_path, batch, metrics={"policy/loss": 0.1 + 0.2, "learner/grad_norm": math.nan})
    stored = read_step(tmp_path, 1)
    assert stored.batch == batch
    assert type(stored.batch.minibatches[0][0].token_ids[0]) is int
    assert stored.metrics["policy/loss"] == 0.1 + 0.2
    assert math.isnan(stored.metrics["learner/grad_norm"]), "the step that went bad is the one to see again"
    assert (stored.digest, stored.layout, stored.config) == ("abc", "stand-in", config_of())
    json.loads((tmp_path / "replay" / "step_1" / "checksums.json").read_text(), parse_constant=pytest.fail)


def test_a_batch_of_a_version_that_chose_no_tokens_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, arrays_of = make_batch(0), replay_module._arrays_of
    older = {name: array for name, array in arrays_of(batch).items() if "chosen" not in name}
    monkeypatch.setattr(replay_module, "_arrays_of", lambda batch: older)
    keep(tmp_path, batch)
    assert read_step(tmp_path, 1).batch == batch


def test_the_newest_are_kept_and_none_without_the_setting(tmp_path: Path) -> None:
    keep(tmp_path, make_batch(0), num_kept=0)
    assert not (tmp_path / "replay").exists()
    for step in range(11):
        keep(tmp_path, make_batch(step), num_kept=3)
    assert stored_steps(tmp_path) == [9, 10, 11], "by number, not by name"
    assert [path.name for path in (tmp_path / "replay").glob(".*")] == []


def test_a_resumed_run_forgets_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    for step in range(4):
        keep(tmp_path, make_batch(step))
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.truncate_after(2)
    assert stored_steps(tmp_path) == [1, 2]


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    keep(tmp_path, make_batch(0))
    path = tmp_path / "replay" / "step_1" / BATCH_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"step_1: {BATCH_FILE} has another content than was written; delete"):
        read_step(tmp_path, 1)


# ------------------------------------------------------------------------------------------- the way to a step


def make_checkpoint(run: Path, step: int) -> Path:
    staging = begin_checkpoint(run / "checkpoints", step)
    (staging / "state").touch()
    return complete_checkpoint(staging, CheckpointManifest(step, step, "stand-in"), {})


def test_the_way_begins_at_the_nearest_start_from_which_all_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 6, 7, 8):
        keep(tmp_path, make_batch(step - 1))
    assert find_route(tmp_path, 2) == Route(None, range(1, 3))
    second, fifth = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 5)
    assert find_route(tmp_path, 2) == Route(None, range(1, 3)), "a checkpoint of the step itself is too late"
    assert find_route(tmp_path, 3) == Route(second, range(3, 4))
    assert find_route(tmp_path, 8) == Route(fifth, range(6, 9))
    shutil.rmtree(fifth)
    with pytest.raises(InputError, match=r"step 8 cannot be replayed, as it has a gap .*; steps 1, 2, 3 can be"):
        find_route(tmp_path, 8)
    with pytest.raises(InputError, match=r"step 4 cannot be replayed, as it is not kept; steps 1, 2, 3 can be"):
        find_route(tmp_path, 4)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learner.micro_batch_tokens=4096", "learner.micro_batch_tokens"),
        ("learner.share_prefix=never", "learner.share_prefix"),
        ("algorithm.eta=0.5", "algorithm.eta"),
        ("rollout.temperature=0.5", "rollout.temperature"),
        ("rollout.max_staleness=2", "algorithm.proximal_policy"),
        ("seed=5", "seed"),
        ("model.lora={}", "model.lora"),
        ("deterministic=true", "deterministic"),
    ],
)
def test_no_way_leads_over_a_change_of_settings(tmp_path: Path, override: str, named: str) -> None:
    for step in range(6):
        keep(tmp_path, make_batch(step), *([override] if step >= 3 else []))
    assert find_route(tmp_path, 3) == Route(None, range(1, 4))
    said = (
        f"step 5 cannot be replayed, as the run went on with another {named} after step 3, and no checkpoint is left "
        "between there and step 5; steps 1, 2, 3 can be"
    )
    with pytest.raises(InputError, match=re.escape(said)):
        find_route(tmp_path, 5)
    # A checkpoint at the change is loaded by a learner of the new settings, as in the run.
    third = make_checkpoint(tmp_path, 3)
    assert find_route(tmp_path, 5) == Route(third, range(4, 6))
    assert read_step(tmp_path, 5).config == config_of(9, override)


@pytest.mark.parametrize("override", ["learner.num_steps=200", "learner.lr=1e-4", "run_name=b", "learner.timeout_s=9"])
def test_a_way_leads_over_a_change_that_the_learner_does_not_see(tmp_path: Path, override: str) -> None:
    for step in range(4):
        keep(tmp_path, make_batch(step), *([override] if step >= 2 else []))
    assert find_route(tmp_path, 4) == Route(None, range(1, 5))


def test_no_way_leads_over_another_layout(tmp_path: Path) -> None:
    for step in range(2):
        keep(tmp_path, make_batch(step))
    _write(tmp_path / "replay", dataclasses.replace(read_step(tmp_path, 2), layout="inline"))
    with pytest.raises(
        InputError, match=r"as the learner was stand-in and became inline after step 1, .*; steps 1 can"
    ):
        find_route(tmp_path, 2)


def test_an_optimizer_that_began_anew_is_left_in_the_checkpoint(tmp_path: Path) -> None:
    keeper = ReplayKeeper(config_of(), tmp_path, Stand(), anew=True)  # type: ignore[arg-type]
    for step in (0, 1):
        keep(tmp_path, make_batch(step))
    for step in (2, 3):
        asyncio.run(keeper.keep(make_batch(step), {}))
    with pytest.raises(
        InputError, match=r"step 4 cannot .* the optimizer began anew after step 2, .*; steps 1, 2 can be"
    ):
        find_route(tmp_path, 4)
    second = make_checkpoint(tmp_path, 2)
    assert find_route(tmp_path, 4) == Route(second, range(3, 5), weights_only=True)
    third = make_checkpoint(tmp_path, 3)
    assert find_route(tmp_path, 4) == Route(third, range(4, 5)), "its moments are the new ones"


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    keep(tmp_path, make_batch(0))
    folder = tmp_path / "replay" / "step_1"
    seal(folder, {**read_seal(folder), "settings": {"nonsense": 1}})
    with pytest.raises(InputError, match=r"step_1: its settings are of another version of dphrl"):
        find_route(tmp_path, 1)
    (folder / "checksums.json").write_text("{}")
    with pytest.raises(InputError, match=r"step_1: checksums.json is not as it was written; delete the folder"):
        find_route(tmp_path, 1)


def shown() -> list[tuple[str, str]]:
    """(tracking.replay_steps, step) of each example of demo-math in help and documentation."""
    root = Path(__file__).parents[2]
    texts = [(root / name).read_text() for name in ("docs/operations.md", "cluster/cli/replay.py")]
    example = r"dphrl train demo-math tracking\.replay_steps=(\d+)\n\s*dphrl replay runs/demo-math --step (\d+)"
    return [found for text in texts for found in re.findall(example, text)]


def test_examples_are_of_steps_that_can_be_replayed(tmp_path: Path) -> None:
    assert len(shown()) == 2
    config = config_of()
    # What a run of the preset leaves: the checkpoints that stay, and the newest steps.
    saved = [*range(config.checkpoint.every_steps, config.learner.num_steps + 1, config.checkpoint.every_steps)]
    for number, (num_kept, step) in enumerate(shown()):
        run = tmp_path / str(number)
        for done in saved[-config.checkpoint.keep :]:
            make_checkpoint(run, done)
        for taken in range(config.learner.num_steps - int(num_kept), config.learner.num_steps):
            keep(run, make_batch(taken), num_kept=int(num_kept))
        assert find_route(run, int(step)).checkpoint is not None


def test_a_run_that_kept_nothing_says_how_to_keep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"keeps no steps to replay; train with tracking.replay_steps=N"):
        find_route(tmp_path, 1)


# --------------------------------------------------------------------------------------------- an inline learner


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_config: Any, tiny_dir: str) -> Path:
    """A run of four steps with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    given = {"run_name": "mine", "run_dir": str(folder.parent), "tracking": {"replay_steps": 9}}
    config = make_config(**given, learner={"micro_batch_tokens": 96})
    # What the run goes on with later is not what its steps so far were taken with.
    dump_config(make_config(**given, rollout={"temperature": 0.5}), folder / "config.yaml")
    learner = InlineLearner(config, tiny_dir)
    keeper = ReplayKeeper(config, folder, learner)

    async def train() -> None:
        for step in range(NUM_STEPS):
            metrics = await learner.update(make_batch(step))
            record = {"step": step + 1, **metrics, "time/step_s": 1.0, "learner/mfu": 0.5}
            await keeper.keep(make_batch(step), record)
            if step == 1:
                staging = begin_checkpoint(folder / "checkpoints", 2)
                await learner.copy_state()
                digests = await learner.write_state(staging)
                complete_checkpoint(staging, CheckpointManifest(2, learner.policy_version, learner.layout), digests)

    asyncio.run(train())
    return folder


def again(run: Path, step: int, make_config: Any, tiny_dir: str) -> list[Replayed]:
    learner = InlineLearner(make_config(learner={"micro_batch_tokens": 96}), tiny_dir)
    return asyncio.run(replay(learner, run, find_route(run, step)))


@pytest.mark.parametrize(("step", "taken"), [(1, [1]), (2, [1, 2]), (4, [3, 4])])
def test_a_step_repeats_to_the_bit(run: Path, step: int, taken: list[int], make_config: Any, tiny_dir: str) -> None:
    done = again(run, step, make_config, tiny_dir)
    assert [one.step for one in done] == taken
    assert [one.difference for one in done] == [None] * len(taken)
    assert done[-1].stored == done[-1].replayed
    assert {"policy/loss", "divergence/loss", "learner/grad_norm", "learner/skipped_steps"} <= set(done[-1].replayed)
    assert "learner/mfu" not in done[-1].replayed, "the time that it took may differ"


def test_a_step_after_a_new_optimizer_repeats_to_the_bit(
    run: Path, tmp_path: Path, make_config: Any, tiny_dir: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = read_step(run, 3).config

    async def go_on() -> None:
        learner = InlineLearner(config, tiny_dir)
        await learner.load(copy / "checkpoints" / "step_2", 2, weights_only=True)
        keeper = ReplayKeeper(config, copy, learner, anew=True)
        for step in (2, 3):
            await keeper.keep(make_batch(step), await learner.update(make_batch(step)))

    asyncio.run(go_on())
    assert read_step(copy, 3).digest != read_step(run, 3).digest
    done = again(copy, 4, make_config, tiny_dir)
    assert [(one.step, one.difference) for one in done] == [(3, None), (4, None)]


def test_another_batch_is_told_and_ends_the_way(run: Path, tmp_path: Path, make_config: Any, tiny_dir: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    stored = read_step(copy, 3)
    rows = stored.batch.minibatches[0]
    changed = (dataclasses.replace(rows[0], weight=rows[0].weight * (1 + 1e-6)), *rows[1:])
    batch = dataclasses.replace(stored.batch, minibatches=(changed, stored.batch.minibatches[1]))
    _write(copy / "replay", dataclasses.replace(stored, batch=batch))
    done = again(copy, 4, make_config, tiny_dir)
    assert [one.step for one in done] == [3], "what follows would differ for that reason alone"
    assert done[0].difference is not None


def test_equal_metrics_with_other_weights_are_a_difference() -> None:
    metrics = {"policy/loss": 0.5, "learner/grad_norm": math.nan}
    assert Replayed(1, metrics, dict(metrics), True).difference is None, "NaN is NaN"
    assert Replayed(1, metrics, dict(metrics), False).difference == (
        "the metrics are equal, but weights or optimizer are not"
    )
    assert Replayed(1, metrics, metrics | {"policy/loss": 0.25}, True).difference == "policy/loss was 0.5 and is 0.25"
    assert Replayed(1, {}, {"new": 1.0}, True).difference == "new was None and is 1.0"


def test_a_digest_sees_every_bit_name_and_order() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    nearly = tensor.clone()
    nearly[1, 2] = torch.nextafter(nearly[1, 2], torch.tensor(9.0))
    others = [
        [("a", nearly)],
        [("b", tensor)],
        [("a", tensor.reshape(3, 2))],
        [("a", tensor.to(torch.bfloat16))],
        [("a", tensor), ("b", torch.tensor(1.0))],
        [("b", torch.tensor(1.0)), ("a", tensor)],
        [],
    ]
    digests = [digest_of([("a", tensor)]), *map(digest_of, others)]
    assert len(set(digests)) == len(digests)
    assert digest_of([("a", tensor.t().contiguous().t())]) == digests[0], "by value, not by layout in memory"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["replay", *arguments])


def test_the_command_prints_both_and_says_identical(run: Path) -> None:
    result = invoke(str(run), "--step", "4")
    assert result.exit_code == 0, result.output
    assert f"replay of step 4: 2 step(s) from {run}/checkpoints/step_2" in result.output
    assert "identical: 2 step(s)" in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("policy/loss ")]
    _, stored, replayed = line.split()
    assert stored == replayed == repr(read_step(run, 4).metrics["policy/loss"])


def test_the_command_ends_with_1_where_the_step_differs(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    stored = read_step(copy, 4)
    _write(copy / "replay", dataclasses.replace(stored, digest="0" * 64))
    result = invoke(str(copy), "--step", "4")
    assert result.exit_code == 1
    assert "step 4: the metrics are equal, but weights or optimizer are not" in result.output
    assert "identical" not in result.output


@pytest.mark.parametrize(
    ("step", "said"), [("5", r"step 5 cannot be replayed, as it is not kept; steps 1, 2, 3, 4 can be")]
)
def test_the_command_ends_with_2_where_it_cannot(run: Path, tmp_path: Path, step: str, said: str) -> None:
    result = invoke(str(run), "--step", step)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    result = invoke(str(tmp_path), "--step", "1")
    assert result.exit_code == 2
    assert "holds no run" in result.output


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (state,) = (copy / "checkpoints" / "step_2" / "state").iterdir()
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    result = invoke(str(copy), "--step", "4")
    assert result.exit_code == 2
    assert f"checkpoints/step_2: state/{state.name} has another content than was written; move it away" in result.output


def test_a_step_of_another_layout_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for step in (3, 4):
        _write(copy / "replay", dataclasses.replace(read_step(copy, step), layout="inline, LoRA of rank 4"))
    result = invoke(str(copy), "--step", "4")
    assert result.exit_code == 2
    assert "was taken by a learner of the layout 'inline, LoRA of rank 4'; this one is 'inline'" in result.output
