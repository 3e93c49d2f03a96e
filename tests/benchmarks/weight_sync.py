"""Seconds from the learner's first byte to the last engine's acknowledgement, by the object store: one engine, several,
and one of two workers, beside a memcpy of the same bytes and beside another revision."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dphrl.models import ensure_smollm2
from dphrl.processors import whole_cpus
from tests.benchmarks._sides import ROOT, Side, checked_out, side

CHILD = Path(__file__).with_name("_weight_sync_child.py")
NUM_WARM_UP = 8


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks weight_sync", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", help="the revision to compare with (default: none)")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is measured (default: 9)")
    parser.add_argument(
        "--engines", type=int, default=4, help="how many several are; 1 leaves them out, 0 the one too (default: 4)"
    )
    parser.add_argument("--width", type=int, default=2, help="workers of the wide engine; 1 leaves it out (default: 2)")
    parser.add_argument("--chunk-mib", type=int, default=0, help="size of a chunk (default: the program's)")
    parser.add_argument("--model", type=Path, help="a model directory (default: SmolLM2-135M-Instruct, float32)")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every ratio is the median over rounds of two times of the same round. Some rounds before are left out, because in
    them processes still ask the system for memory, which later ones use again. `proved`, which takes ten times as long
    for its probes, is measured in every third round. Exits with status 2 where the revision is not known.

    SmolLM2 has 9 attention heads, which two workers cannot share. So `wide` and `narrow` are one engine of several
    workers and one of one for a model of about its size with 8 heads and random weights.
    """
    small = str(arguments.model or ensure_smollm2())
    ones, chunk_bytes = list(range(arguments.engines)), arguments.chunk_mib * 2**20
    with contextlib.ExitStack() as stack:
        # Each side's engines start while the others' do.
        sides = {}
        if ones:
            sides["new"] = stack.enter_context(engines(ROOT, small, [1] * len(ones), chunk_bytes))
        if arguments.old:
            old = stack.enter_context(checked_out(arguments.old))
            sides["old"] = stack.enter_context(engines(old, small, [1], 0))
        if arguments.width > 1:
            even = stack.enter_context(even_model(Path(small)))
            sides["even"] = stack.enter_context(engines(ROOT, str(even), [1, arguments.width], chunk_bytes))
        for started in sides.values():
            started.answer()
        plans: dict[str, tuple[Side, Any]] = {}
        if "old" in sides:
            plans["old"] = sides["old"], {"engines": [0], "prove": False}
        if "new" in sides:
            plans["copy"] = sides["new"], {}
            plans["one"] = sides["new"], {"engines": [0], "prove": False}
            plans["proved"] = sides["new"], {"engines": [0], "prove": True}
        if len(ones) > 1:
            plans["several"] = sides["new"], {"engines": ones, "prove": False}
        if "even" in sides:
            plans.setdefault("copy", (sides["even"], {}))
            plans["narrow"] = sides["even"], {"engines": [0], "prove": False}
            plans["wide"] = sides["even"], {"engines": [1], "prove": False}
        return summary(measure(plans, arguments.rounds), len(ones), arguments.width)


def engines(checkout: Path, model: str, widths: list[int], chunk_bytes: int) -> contextlib.AbstractContextManager[Side]:
    """A learner and one engine for each of `widths`, as the revision in `checkout` has them."""
    return side(CHILD, [str(checkout), model, json.dumps(widths), str(chunk_bytes)], [checkout])


@contextlib.contextmanager
def even_model(like: Path) -> Iterator[Path]:
    """A directory with a model of SmolLM2's kind, 0.53 GB in float32, whose heads two or four workers can share."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="dphrl-sync-model-") as folder:
        for file in like.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 34}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like, head_dim=64, **shape))
        model.float().save_pretrained(folder)
        yield Path(folder)


def measure(plans: dict[str, tuple[Side, Any]], num_rounds: int) -> dict[str, list[dict[str, float]]]:
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    for number in range(-NUM_WARM_UP, num_rounds):
        # Whoever comes second finds warmer caches, so the order changes.
        for name in sorted(plans, reverse=bool(number % 2)):
            where, order = plans[name]
            if name == "proved" and (number < 0 or number % 3):
                continue
            answer = where.ask(order)
            if number >= 0:
                seen[name].append(answer)
    return seen


def summary(seen: dict[str, list[dict[str, float]]], num_engines: int, width: int) -> dict[str, Any]:
    def median(name: str, key: str = "seconds") -> float:
        return statistics.median(answer[key] for answer in seen[name])

    def ratio(name: str, other: str) -> float:
        others = seen[other][::3] if name == "proved" else seen[other]
        pairs = zip(seen[name], others, strict=True)
        return statistics.median((a["seconds"] / a["num_bytes"]) / (b["seconds"] / b["num_bytes"]) for a, b in pairs)

    num_bytes = {name: answers[0]["num_bytes"] for name, answers in seen.items()}
    result: dict[str, Any] = {
        "benchmark": "weight_sync",
        "num_cpus": whole_cpus(),
        "num_engines": num_engines,
        "width": width,
    }
    for name in seen:
        result[f"{name}_s"] = median(name)
        result[f"{name}_s_per_gb"] = median(name) / num_bytes[name] * 1e9
        if name != "copy":
            result[f"{name}_vs_memcpy"] = ratio(name, "copy")
            # The longest time that one engine was in vLLM, loading and repacking; the rest is waiting for chunks.
            result[f"{name}_in_vllm_s"] = median(name, "vllm_s")
            result[f"{name}_learner_cpu_s"] = median(name, "learner_cpu_s")
            result[f"{name}_engines_cpu_s"] = median(name, "engines_cpu_s")
    pairs = [("one", "old"), ("several", "one"), ("wide", "narrow"), ("proved", "one")]
    result |= {f"{name}_vs_{other}": ratio(name, other) for name, other in pairs if {name, other} <= seen.keys()}
    return result
