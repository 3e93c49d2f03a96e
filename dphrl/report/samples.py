"""Chooses the graded completions that the report carries: evenly spaced steps, few enough for a page one can mail."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dphrl.report.runs import Arm, Run
from dphrl.report.text import clean
from dphrl.tracking.tracker import SAMPLES_FOLDER

MAX_TOTAL_BYTES = 700_000
MAX_TEXT_CHARS = 4_000
# The end of a long completion is kept too, because its answer stands there.
TAIL_CHARS = 1_000


@dataclass(frozen=True)
class Samples:
    """page: what the browser shows, ready for JSON. summary: one sentence on what is in it and what is not."""

    page: Mapping[str, Any]
    summary: str


def choose_samples(arms: Sequence[Arm]) -> Samples:
    """The completions of evenly spaced steps, the same steps for all runs, within MAX_TOTAL_BYTES.

    A text beyond MAX_TEXT_CHARS loses its middle, and a note in the text says so.
    """
    files = {(arm.index, i): _sample_files(run) for arm in arms for i, run in enumerate(arm.runs)}
    sizes: dict[int, int] = {}
    for by_step in files.values():
        for step, path in by_step.items():
            sizes[step] = sizes.get(step, 0) + path.stat().st_size
    steps = choose_steps(sizes, MAX_TOTAL_BYTES)
    prompts: dict[tuple[str, str, str], int] = {}
    rows: list[list[Any]] = []
    num_bytes = num_left_out = num_broken = 0
    for step in steps:
        for arm in arms:
            for i, run in enumerate(arm.runs):
                for sample in _read_lines(files[arm.index, i].get(step)):
                    if sample is None:
                        num_broken += 1
                        continue
                    prompt = _prompt_key(sample, run)
                    row = _row(sample, arm, run, step, prompts.get(prompt, len(prompts)))
                    new = [row] if prompt in prompts else [row, prompt]
                    num_bytes += len(json.dumps(new, ensure_ascii=False).encode())
                    # The files' sizes were an estimate, and one step alone may be too large.
                    if num_bytes > MAX_TOTAL_BYTES:
                        num_left_out += 1
                        continue
                    prompts.setdefault(prompt, len(prompts))
                    rows.append(row)
    page = {
        "arms": [arm.name for arm in arms],
        "prompts": [list(key) for key in prompts],
        "rows": rows,
    }
    return Samples(page, _summary(len(rows), steps, sizes, num_left_out, num_broken))


def choose_steps(sizes: Mapping[int, int], budget: int) -> list[int]:
    """The first step, the last step, and evenly spaced steps between them, as many as the budget (bytes) allows."""
    steps = sorted(sizes)
    for stride in range(1, len(steps) + 1):
        chosen = sorted({*steps[::stride], steps[-1]})
        if sum(sizes[step] for step in chosen) <= budget:
            return chosen
    return sorted({*steps[:1], *steps[-1:]})


def shorten(text: str) -> str:
    """At most about MAX_TEXT_CHARS characters; a middle that is left out is counted in its place."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    head, tail = text[: MAX_TEXT_CHARS - TAIL_CHARS], text[-TAIL_CHARS:]
    return f"{head}\n[... {len(text) - MAX_TEXT_CHARS:,} characters left out ...]\n{tail}"


def _sample_files(run: Run) -> dict[int, Path]:
    found = {}
    for path in (run.folder / SAMPLES_FOLDER).glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal():
            found[int(number)] = path
    return found


def _read_lines(path: Path | None) -> list[dict[str, Any] | None]:
    """None for a line that is no sample."""
    if path is None:
        return []
    samples: list[dict[str, Any] | None] = []
    # splitlines() would also split at other characters, which a completion may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            sample = json.loads(line)
            samples.append(sample if isinstance(sample, dict) and "completion" in sample else None)
        except ValueError:
            samples.append(None)
    return samples


def _prompt_key(sample: Mapping[str, Any], run: Run) -> tuple[str, str, str]:
    """(data set, prompt_id, text)"""
    dataset = run.setting("data.train.name", "training data")
    prompt_id, text = sample.get("prompt_id", "?"), shorten(str(sample.get("prompt", "")))
    return clean(dataset), clean(prompt_id), clean(text)


def _row(sample: Mapping[str, Any], arm: Arm, run: Run, step: int, prompt: int) -> list[Any]:
    """[arm, seed, step, prompt, completion, score, status, detail, policy_version, finish_reason]"""
    score, version = sample.get("score"), sample.get("policy_version")
    return [
        arm.index,
        run.seed,
        step,
        prompt,
        clean(shorten(str(sample["completion"]))),
        score if isinstance(score, int | float) and math.isfinite(score) else None,
        clean(sample.get("status", "?")),
        clean(str(sample.get("detail", ""))[:500]),
        version if isinstance(version, int) else None,
        clean(sample.get("finish_reason", "")),
    ]


def _summary(num_rows: int, steps: Sequence[int], sizes: Mapping[int, int], num_left_out: int, num_broken: int) -> str:
    broken = f"{num_broken:,} broken lines were left out" if num_broken else ""
    if not num_rows:
        return f"No completions were stored (tracking.samples_per_step){'; ' if broken else ''}{broken}."
    stored = f"of all {len(steps)} steps that stored any"
    if len(steps) < len(sizes):
        stored = f"of {len(steps)} of the {len(sizes)} steps that stored any; the others are in the runs' samples/"
    left_out = f"{num_left_out:,} more of these steps were left out, to keep this page small" if num_left_out else ""
    said = [f"{num_rows:,} graded completions of training prompts, {stored}", left_out, broken]
    return f"{'; '.join(filter(None, said))}. A text beyond {MAX_TEXT_CHARS:,} characters loses its middle."
