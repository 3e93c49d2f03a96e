"""Run folders as training leaves them, small and with known numbers; and a page taken apart."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import config_to_yaml
from dphrl.config.schema import Config
from dphrl.evaluation.estimators import summarize
from dphrl.report import write_report
from dphrl.types import RewardStatus

NUM_SAMPLES = 8


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    arm: tuple[str, str] | None = None,
    divergence: str = "forward_kl",
    num_steps: int = 4,
    correct: Sequence[int] = (8, 4, 0, 2),
    completion: str = "3 : 0 1 \\boxed{3}",
    **changes: Any,
) -> Path:
    """A finished run of 4 evaluation prompts, of which the base solves three; `correct`: the trained model's counts."""
    folder.mkdir(parents=True)
    config = Config.model_validate(
        {
            "run_name": folder.name,
            "seed": seed,
            "data": {
                "train": {"name": "factor", "kind": "tiny", "limit": 24},
                "evaluation": [{"name": "factor", "kind": "tiny", "split": "held_out"}],
            },
            "reward": {"name": "factorization"},
            "algorithm": {"divergence": divergence, "eta": 0.5},
            "reference": {"num_samples": 4, "threshold": 3},
            "learner": {"num_steps": num_steps, "lr": 1e-3},
            "evaluation": {"num_samples": NUM_SAMPLES, "k": [1, 8]},
        }
        | changes
    )
    (folder / "config.yaml").write_text(config_to_yaml(config))
    if arm:
        (folder / "arm.json").write_text(json.dumps({"suite": arm[0], "arm": arm[1], "seed": seed}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(1, num_steps + 1)))
    (folder / "run.log").write_text("2026-01-02T03:04:05.678Z INFO dphrl.tracking.console: step\n")
    base = write_evaluation(folder / "eval" / "base.json", [6, 2, 1, 0])
    write_evaluation(folder / "eval" / f"step_{num_steps}.json", correct, base)
    samples = folder / "samples"
    samples.mkdir()
    sample = {"prompt_id": "p0", "prompt": "FACTOR 9", "completion": completion, "score": 1.0, "status": "correct"}
    sample |= {"detail": "3*3", "policy_version": 0, "sample_index": 0, "finish_reason": "stop"}
    (samples / "step_000001.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def record(step: int) -> dict[str, float | None]:
    statuses = {f"reward/status/{status}": 0.0 for status in RewardStatus}
    return {
        "step": step,
        "reward/mean": step / 16,
        "policy/entropy": 1.0 / step,
        "divergence/loss": 0.01 * step,
        "sync/logprob_gap_max": 10.0**-step,
        "sync/logprob_gap_mean": 10.0**-step / 8,
        "rollout/staleness_max": 0.0,
        "rollout/num_tokens": 1000.0 * step,
        **statuses,
        "reward/status/correct": 4.0,
        "reward/status/timeout": 1.0,
        "time/step_s": 2.0,
        "time/rollout_s": 1.0,
        "time/reward_s": 0.25,
        "time/learn_s": 0.5,
        "time/sync_s": 0.125,
    }


def write_evaluation(path: Path, correct: Sequence[int], base: Sequence[tuple[str, int, int]] | None = None) -> Any:
    path.parent.mkdir(exist_ok=True)
    counts = [(f"p{i}", NUM_SAMPLES, c) for i, c in enumerate(correct)]
    summary = summarize("factor", "held_out", counts, [1, 8], 0.5, base) | {"distinct_correct": 1.25}
    path.write_text(json.dumps([summary]))
    return counts


def write_reference(
    folder: Path, correct: Sequence[int], graded: Sequence[int], complete: Sequence[int] | None = None
) -> None:
    """complete: None for a buffer of a version that did not count complete answers apart."""
    (folder / "reference").mkdir()
    part = ["near_perfect" if c >= 3 else "exploration" for c in correct]
    columns = {"prompt_id": [f"p{i}" for i in range(len(part))], "num_correct": correct, "num_graded": graded}
    columns |= {} if complete is None else {"num_complete": complete}
    pq.write_table(pa.table(columns | {"part": part}), folder / "reference" / "counts.parquet")
    split = {"num_near_perfect": part.count("near_perfect"), "num_exploration": part.count("exploration")}
    split |= {"num_dropped": 0, "num_stored_samples": 11}
    manifest = {"fingerprint": {"prompts": "abc"}, "seed": 0, "split": split}
    (folder / "reference" / "manifest.json").write_text(json.dumps(manifest))


class Page(HTMLParser):
    """The report's elements, tables (rows of cell texts) and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in_cell = False
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag in ("script", "style")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.tables[-1][-1].append("")
        elif self._in_cell and tag in ("small", "br"):
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data
        if not self._in_script:
            self.text += data

    def table(self, first_columns: str) -> list[list[str]]:
        return next(rows for rows in self.tables if " ".join(rows[0]).startswith(first_columns))

    def charts(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg viewBox.*?</svg>", self.source, re.S)]

    def chart(self, title: str) -> ElementTree.Element:
        return next(svg for svg in self.charts() if (svg.findtext("title") or "").startswith(title))

    def data(self) -> Any:
        block = re.search(r'<script type="application/json" id="samples-data">(.*?)</script>', self.source, re.S)
        assert block is not None
        return json.loads(block[1])


def render(tmp_path: Path, *run_dirs: Path) -> Page:
    output = tmp_path / "out" / "report.html"
    write_report(run_dirs, output)
    return Page(output.read_bytes().decode("utf-8"))


def points(svg: ElementTree.Element, name: str) -> list[list[float]]:
    groups = [group for group in svg.iter("g") if group.get("data-name") == name]
    assert len(groups) == 1
    return [[float(v) for v in text.split(",")] for text in groups[0].get("data-points", "").split()]
