"""Learners of several checkouts or configurations beside each other, each in a process, asked in turn."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.benchmarks._sides import Side, side

CHILD = Path(__file__).with_name("_learner_child.py")
# Freed memory stays with the process: a pass that asks the system for its pages again takes several times as long.
# Threads that wait do not spin: beside other processes they would take the processor from the one that they wait for.
SURROUNDINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
}


def learner(checkout: Path, model: str, changes: dict[str, Any]) -> AbstractContextManager[Side]:
    """A learner that starts. changes: sections of its configuration."""
    return side(CHILD, [str(checkout), model, json.dumps(changes)], [checkout], SURROUNDINGS)


@contextlib.contextmanager
def small_model(like: str, num_layers: int) -> Iterator[str]:
    """`like` itself, or where a number is given a directory with its first so many layers."""
    if not num_layers:
        yield like
        return
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="dphrl-learner-model-") as folder:
        config = AutoConfig.from_pretrained(like, num_hidden_layers=num_layers)
        AutoModelForCausalLM.from_pretrained(like, config=config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(like).save_pretrained(folder)
        yield folder


def wait_for(sides: dict[str, Side]) -> dict[str, Side]:
    """The same, each of them ready."""
    for one in sides.values():
        one.answer()
    return sides


def measure(
    sides: dict[str, Side], orders: dict[str, dict[str, Any]], num_rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Answers of each side to its order: first one that measures memory, then as many that measure time, in turn."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        # Whoever comes second finds warmer caches, so the order changes.
        for name in sorted(sides, reverse=bool(number % 2)):
            seen[name].append(sides[name].ask({"rehearsal": [], **orders[name], "memory": number == 0}))
    return seen


def summary(seen: dict[str, list[dict[str, float]]], label: str = "") -> dict[str, float]:
    """Medians of each side's seconds, and what it took of memory. step_gib is a step's own: its peak without weights,
    gradients and optimizer state."""
    result: dict[str, float] = {}
    for name, answers in seen.items():
        first, *timed = answers
        result[f"{label}{name}_s"] = statistics.median(one["seconds"] for one in timed)
        result[f"{label}{name}_cpu_s"] = statistics.median(one["cpu_s"] for one in timed)
        result[f"{label}{name}_step_gib"] = first["step_bytes"] / 2**30
        result[f"{label}{name}_peak_gib"] = first["peak_bytes"] / 2**30
        result[f"{label}{name}_tokens"] = first["num_tokens"]
    return result


def ratios(seen: dict[str, list[dict[str, float]]], one: str, other: str, label: str = "") -> dict[str, float]:
    """`one` to `other`: the median over rounds of the ratio within the round; of memory, that of the first pass."""
    pairs = list(zip(seen[one][1:], seen[other][1:], strict=True))
    result = {
        f"{label}{one}_vs_{other}_{kind}": statistics.median(a[key] / b[key] for a, b in pairs)
        for kind, key in (("time", "seconds"), ("cpu_time", "cpu_s"))
    }
    for kind in ("step", "peak"):
        result[f"{label}{one}_vs_{other}_{kind}_memory"] = (
            seen[one][0][f"{kind}_bytes"] / seen[other][0][f"{kind}_bytes"]
        )
    return result
