"""`dphrl eval` killed for real, half-way, and started again: its result must not differ from an uninterrupted one.

Also on a model directory of any make: another architecture, a tokenizer without a chat template.
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

pytestmark = [pytest.mark.integration, pytest.mark.inline]

NUM_PROMPTS, PROMPTS_PER_CHUNK = 24, 4
DEADLINE_S = 200.0
# The chunk size is no setting: a user's results must not depend on it.
PROGRAM = f"""
from cluster.cli import main
from dphrl.evaluation import stage as evaluation_stage

evaluation_stage.PROMPTS_PER_CHUNK = {PROMPTS_PER_CHUNK}
main()
"""


@pytest.fixture
def config_file(make_config: Any, tmp_path: Path) -> Path:
    config = make_config(
        data={"evaluation": [{"name": "factor", "kind": "tiny", "split": "held_out", "limit": NUM_PROMPTS}]},
        rollout={"max_concurrent_sequences": 8},
        run_dir=str(tmp_path),
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def start_eval(config_file: Path, output: Path, *arguments: str, model: str = "tiny-factor") -> subprocess.Popen[str]:
    command = ["eval", str(config_file), "--model", model, "-o", str(output), "--inline", *arguments]
    # One thread: sums in another order would be another process's rounding, which is not what is asked here.
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def eval_to_the_end(config_file: Path, output: Path, *arguments: str, model: str = "tiny-factor") -> str:
    process = start_eval(config_file, output, *arguments, model=model)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out
    return out


def kill_half_way(config_file: Path, output: Path, label: str, *arguments: str) -> int:
    """SIGKILL as soon as a chunk of the `label` model is on disk; returns the number of chunks that are."""
    chunks = output.with_name(output.name + ".partial") / label / "factor"
    process = start_eval(config_file, output, *arguments)
    try:
        until = time.monotonic() + DEADLINE_S
        while process.poll() is None and time.monotonic() < until and not list(chunks.glob("chunk_*.parquet")):
            time.sleep(0.005)
    finally:
        process.kill()
        out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended by itself before it could be killed: {out}"
    return len(list(chunks.glob("chunk_*.parquet")))


def test_an_evaluation_killed_half_way_gives_the_same_result(config_file: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed" / "result.json", tmp_path / "whole" / "result.json"
    base = ("--base", "tiny-factor")
    num_chunks = kill_half_way(config_file, killed, "model", *base)
    assert 1 <= num_chunks < NUM_PROMPTS / PROMPTS_PER_CHUNK
    assert not killed.exists()
    out = eval_to_the_end(config_file, killed, *base)
    assert f"evaluating base on factor: continuing, {NUM_PROMPTS} of {NUM_PROMPTS} prompts done" in out
    done = num_chunks * PROMPTS_PER_CHUNK
    assert f"evaluating model on factor: continuing, {done} of {NUM_PROMPTS} prompts done" in out
    assert "continuing" not in eval_to_the_end(config_file, whole, *base)

    ours, theirs = (json.loads(path.read_text()) for path in (killed, whole))
    assert ours == theirs
    assert 0 < ours[0]["pass@1"] < ours[0]["pass_curve"][-1], "the comparison is of something"
    assert (ours[0]["num_prompts"], ours[0]["num_samples"], len(ours[0]["pass_curve"])) == (NUM_PROMPTS, 4, 4)
    assert len(ours[0]["intervals"]["retention"]) == 2
    for label in ("base", "model"):
        files = [path.parent / "result.samples" / label / "factor.jsonl" for path in (killed, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert len(files[0].read_text().splitlines()) == 4 * NUM_PROMPTS
    assert sorted(p.name for p in killed.parent.iterdir()) == ["result.json", "result.samples"]


def test_any_model_directory_is_evaluated_to_the_table(config_file: Path, tmp_path: Path, tiny_dir: str) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**size, **ends)).save_pretrained(tmp_path / "gpt2")
    out = eval_to_the_end(config_file, tmp_path / "result.json", model=str(tmp_path / "gpt2"))
    table = out[out.index("evaluation, ± half") :].splitlines()
    assert table[1].split() == ["data", "set", "split", "model", "pass@1", "pass@4", "greedy", "maj@4", "distinct"]
    assert table[3].split()[:3] == ["factor", "held_out", "model"]
    assert all(len(line) <= 100 for line in table[1:4])
    assert json.loads((tmp_path / "result.json").read_text())[0]["pass@4"] is not None


def test_a_folder_for_output_is_refused_at_once(config_file: Path, tmp_path: Path) -> None:
    process = start_eval(config_file, tmp_path)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert f"dphrl: error: {tmp_path}: is a folder; name a file in it" in out
    assert "data factor" not in out
