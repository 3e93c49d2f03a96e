"""The reference buffer on disk, its fingerprint and its schedule; checkpoints that are whole or absent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dphrl.algo.partition import Split
from dphrl.buffer import ReferenceBuffer, changed_parts, fill_reference, fingerprint
from dphrl.checkpoint import CheckpointManifest, list_checkpoints, read_manifest, save_checkpoint
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus


def make_prompts(num_prompts: int) -> list[Prompt]:
    return [Prompt(f"p{i}", f"question {i}", (1, 2, 10 + i), str(i), "data") for i in range(num_prompts)]


class ScriptedRollouts:
    """Sample j of prompt i says whether it is right: right when j < i."""

    async def generate(self, prompts: Any, num_samples: int, *, seed: int, greedy: bool = False) -> Any:
        for p in prompts:
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

    async def score(self, sequences: Any) -> list[tuple[float, ...]]:
        return [tuple(-0.01 * token for token in ids[num_prompt:]) for ids, num_prompt in sequences]


def fill(config: Any, num_prompts: int = 6) -> ReferenceBuffer:
    return asyncio.run(
        fill_reference(
            config, make_prompts(num_prompts), ScriptedRollouts(), ScriptedRewards(), ScriptedLearner(), {"model": "1"}
        )
    )


def test_split_counts_and_learner_logprobs(make_config: Any) -> None:
    config = make_config(reference={"num_samples": 4, "threshold": 3, "stored_per_prompt": 2, "all_wrong": "drop"})
    buffer = fill(config)
    assert buffer.split == Split(("p3", "p4", "p5"), ("p1", "p2"), ("p0",))
    assert dict(buffer.num_correct) == {"p0": 0, "p1": 1, "p2": 2, "p3": 3, "p4": 4, "p5": 4}
    assert [s.prompt_id for s in buffer.samples] == ["p3", "p3", "p4", "p4", "p5", "p5"]
    for sample in buffer.samples:
        assert sample.token_ids[0] - 20 < buffer.num_correct[sample.prompt_id], "only correct responses are stored"
        assert sample.logprobs == pytest.approx([-0.01 * token for token in sample.token_ids])


def test_disk_round_trip_and_audit(make_config: Any, tmp_path: Path) -> None:
    buffer = fill(make_config(reference={"num_samples": 4, "threshold": 3}))
    buffer.save(tmp_path / "reference")
    loaded = ReferenceBuffer.load(tmp_path / "reference")
    assert (loaded.split, dict(loaded.num_correct), loaded.seed) == (
        buffer.split,
        dict(buffer.num_correct),
        buffer.seed,
    )
    for ours, theirs in zip(loaded.samples, buffer.samples, strict=True):
        assert (ours.prompt_id, ours.token_ids) == (theirs.prompt_id, theirs.token_ids)
        assert ours.logprobs == pytest.approx(theirs.logprobs)
    split = json.loads((tmp_path / "reference" / "manifest.json").read_text())["split"]
    assert (split["num_prompts"], split["num_near_perfect"], split["num_exploration"]) == (6, 3, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["reference"]


def test_an_empty_buffer_gives_no_rows(make_config: Any, tmp_path: Path) -> None:
    buffer = fill(make_config(reference={"num_samples": 4, "threshold": 4}), num_prompts=2)
    buffer.save(tmp_path / "reference")
    assert asyncio.run(ReferenceBuffer.load(tmp_path / "reference").sample(0, 8)) == []


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
        ({"rollout": {"temperature": 0.9}}, ["sampling"]),
        ({"seed": 1}, ["sampling"]),
        ({"reward": {"name": "math_answer"}}, ["reward"]),
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


def test_fingerprint_sees_weights_prompts_and_dtype(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_dir, copy)
    config, prompts = make_config(), make_prompts(3)
    before = fingerprint(config, str(copy), prompts, "torch.float32")
    assert changed_parts(before, fingerprint(config, tiny_dir, prompts, "torch.float32")) == []
    assert changed_parts(before, fingerprint(config, str(copy), prompts[:2], "torch.float32")) == ["prompts"]
    assert changed_parts(before, fingerprint(config, str(copy), prompts, "torch.bfloat16")) == ["learner numerics"]
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert changed_parts(before, fingerprint(config, str(copy), prompts, "torch.float32")) == ["model weights"]


def test_checkpoints_are_whole_or_absent(tmp_path: Path) -> None:
    async def write(folder: Path) -> None:
        (folder / "state").write_text("weights")

    async def fail(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise OSError("disk full")

    for step in (2, 4, 10):
        asyncio.run(save_checkpoint(tmp_path, CheckpointManifest(step, step, 1), write, keep=2))
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(save_checkpoint(tmp_path, CheckpointManifest(12, 12, 1), fail, keep=2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_4", "step_10"]
    assert read_manifest(list_checkpoints(tmp_path)[-1]) == CheckpointManifest(10, 10, 1)
