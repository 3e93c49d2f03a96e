"""The reference stage killed for real, half-way, and continued: nothing of it may differ from an uninterrupted one.

And its samples taken by another threshold.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dphrl.reference.buffer import ReferenceBuffer

pytestmark = [pytest.mark.integration, pytest.mark.inline]

NUM_PROMPTS, PROMPTS_PER_CHUNK = 96, 4
DEADLINE_S = 200.0


@pytest.fixture
def config_file(make_config: Any, tmp_path: Path) -> Path:
    config = make_config(
        data={"train": {"limit": NUM_PROMPTS}, "evaluation": []},
        reference={"prompts_per_chunk": PROMPTS_PER_CHUNK, "confirm": True},
        run_dir=str(tmp_path),
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def start_sampling(config_file: Path, run_name: str, *overrides: str) -> subprocess.Popen[str]:
    # One thread: sums in another order would be another process's rounding, which is not what is asked here.
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dphrl",
            "sample",
            str(config_file),
            f"run_name={run_name}",
            "--inline",
            *overrides,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sample_to_the_end(config_file: Path, run_name: str, *overrides: str) -> str:
    process = start_sampling(config_file, run_name, *overrides)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out
    return out


def kill_half_way(config_file: Path, run_name: str) -> int:
    """SIGKILL as soon as a chunk is on disk; returns the number of chunks that are."""
    graded = config_file.parent / run_name / "reference.graded"
    process = start_sampling(config_file, run_name)
    try:
        until = time.monotonic() + DEADLINE_S
        while process.poll() is None and time.monotonic() < until and not list(graded.glob("chunk_*.parquet")):
            time.sleep(0.005)
    finally:
        process.kill()
        out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended by itself before it could be killed: {out}"
    return len(list(graded.glob("chunk_*.parquet")))


def test_a_stage_killed_half_way_gives_the_same_buffer(config_file: Path) -> None:
    folder = config_file.parent
    num_chunks = kill_half_way(config_file, "killed")
    assert 1 <= num_chunks < NUM_PROMPTS / PROMPTS_PER_CHUNK
    assert not (folder / "killed" / "reference").exists()
    out = sample_to_the_end(config_file, "killed")
    assert f"continuing, {num_chunks * PROMPTS_PER_CHUNK} of {NUM_PROMPTS} prompts done" in out
    assert "continuing" not in sample_to_the_end(config_file, "whole")

    continued, whole = (ReferenceBuffer.load(folder / name / "reference") for name in ("killed", "whole"))
    assert whole.samples, "the comparison is of something"
    assert whole.split.unconfirmed
    assert continued.split == whole.split
    assert continued.verdicts == whole.verdicts
    assert continued.fingerprint == whole.fingerprint
    for ours, theirs in zip(continued.samples, whole.samples, strict=True):
        assert (ours.prompt_id, ours.prompt_token_ids, ours.token_ids) == (
            theirs.prompt_id,
            theirs.prompt_token_ids,
            theirs.token_ids,
        )
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-6, rel=0)
    manifests = [
        json.loads((folder / name / "reference" / "manifest.json").read_text()) for name in ("killed", "whole")
    ]
    assert manifests[0] == manifests[1]
    assert (
        sorted(p.name for p in folder.glob("*/reference.*")) == ["reference.confirmed"] * 2 + ["reference.graded"] * 2
    )

    out = sample_to_the_end(config_file, "killed", "reference.threshold=4")
    assert "selecting from its graded responses" in out
    narrower = ReferenceBuffer.load(folder / "killed" / "reference")
    assert narrower.verdicts == whole.verdicts
    enough = {i for i, counts in whole.verdicts.items() if counts.num_complete >= 4}
    assert {*narrower.split.near_perfect, *narrower.split.unconfirmed} == enough
    assert {s.prompt_id for s in narrower.samples} == set(narrower.split.near_perfect)
    assert enough < {*whole.split.near_perfect, *whole.split.unconfirmed}
