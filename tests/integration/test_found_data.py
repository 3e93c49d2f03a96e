"""A data set as it was found trains with one word in the configuration."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.tracking.tracker import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.inline]

SUMS = [(a, b) for a in range(1, 7) for b in range(1, 6)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small chat model that adds right about every other time, in a box."""
    import torch

    from dphrl.tiny.model import TinyShape, build_model, build_tokenizer

    tokenizer = build_tokenizer(["+", "\\boxed{", "}", *map(str, range(12))])
    model = build_model(TinyShape(hidden_size=64, intermediate_size=128), tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(0)
    with torch.enable_grad():
        for _ in range(200):
            texts = [_chat(tokenizer, a, b, rng.choice([a + b, a])) for a, b in SUMS]
            ids_BT = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
            optimizer.zero_grad()
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _chat(tokenizer: Any, a: int, b: int, answer: int) -> str:
    messages = [*_prompt(a, b), {"role": "assistant", "content": f"\\boxed{{ {answer} }}"}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


def _prompt(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Add."}, {"role": "user", "content": f" {a} + {b}"}]


def _write_config(folder: Path, model_dir: Path, data: Path) -> Path:
    config = {
        "run_name": "found",
        "run_dir": str(folder / "runs"),
        "model": {"path": str(model_dir), "dtype": "float32"},
        "data": {"train": {"name": "sums", "path": str(data)}, "max_prompt_tokens": 16},
        "rollout": {"num_prompts": 4, "num_samples": 4, "max_tokens": 8},
        "reference": {"num_samples": 4, "threshold": 3, "rows_per_step": 4},
        "learner": {"num_steps": 2, "lr": 1e-3, "micro_batch_tokens": 512},
    }
    path = folder / "found.yaml"
    path.write_text(json.dumps(config))
    return path


def test_a_verl_layout_trains_with_one_word(model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {
            "data_source": "sums",
            "prompt": _prompt(a, b),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"split": "train", "index": index},
        }
        for index, (a, b) in enumerate(SUMS)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    path = _write_config(tmp_path, model_dir, tmp_path / "train.parquet")

    refused = CliRunner().invoke(app, ["train", str(path), "--inline"])
    assert refused.exit_code == 2
    assert "train.parquet:1: no field 'answer'; it has data_source, prompt," in refused.stderr
    assert "it looks like verl: set layout: verl, or set answer_field of data set sums" in refused.stderr

    trained = CliRunner().invoke(app, ["train", str(path), "data.train.layout=verl", "--inline"])
    assert trained.exit_code == 0, trained.output
    assert "No prompt of sums asks for \\boxed{}, and reward.extraction: boxed reads nothing else" in caplog.text
    run = tmp_path / "runs" / "found"
    steps = read_metrics(run)
    assert [step["step"] for step in steps] == [1, 2]
    # Golds are graded against: the model is right about every other time, and never in another way.
    assert all(0 < step["reward/mean"] < 1 for step in steps)
    assert all(step["divergence/loss"] >= 0 and step["learner/grad_norm"] > 0 for step in steps)
    sample = json.loads(next((run / "samples").glob("*.jsonl")).read_text().splitlines()[0])
    assert "Add." in sample["prompt"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 99, mtime=0)[:12],
            "a.jsonl.gz cannot be read: Truncated compressed stream; replace",
        ),
        (
            "a.csv",
            b"question,answer\n1 + 1,2,3\n",
            "a.csv:2: 3 cells, but the header has 2; quote cells that hold a comma",
        ),
        ("a.jsonl", b'{"question": "q", "answer": {"value": 1}}', "a.jsonl:1: 'answer' is a struct of value, neither"),
    ],
)
def test_a_broken_file_ends_with_one_line_and_status_2(
    model_dir: Path, tmp_path: Path, name: str, content: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ended = CliRunner().invoke(app, ["train", str(_write_config(tmp_path, model_dir, tmp_path / name)), "--inline"])
    assert ended.exit_code == 2
    assert f"{tmp_path}/{line}" in ended.stderr
    assert "Traceback" not in ended.output
    assert not (tmp_path / "runs").exists()
