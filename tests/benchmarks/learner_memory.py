"""Host memory of a ZeRO-3 rank of two while it builds SmolLM2, and of its resident reference model: an older revision
and this one.

Memory is anonymous memory: what the process allocated, and cannot be dropped. Pages mapped from the model's file are
counted apart, because the kernel shares them between ranks and drops them when memory is short. Everything is a ratio
to one whole copy of the model: its parameters (tied ones once) times the bytes of one in the run's number type.

build: from the model's folder to a sharded module, before the optimizer. engine: with DeepSpeed's float32 masters and
AdamW's moments too, to compare. reference: what the resident reference model adds to that.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")

# One rank, without Ray. It prints, for each part, anonymous and file bytes at the part's peak and after it.
_CHILD = """
import json, sys, threading, time

checkout, rank, port, model, small, dtype = sys.argv[1:]
rank = int(rank)


def memory():
    with open("/proc/self/smaps_rollup") as file:
        seen = {line.split()[0]: int(line.split()[1]) * 1024 for line in file.readlines()[1:]}
    return seen["Anonymous:"], seen["Rss:"] - seen["Anonymous:"]


class Sampler(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.start_part()
        self.start()

    def start_part(self):
        self.peak, self.first = (0, 0), memory()

    def look(self):
        now = memory()
        self.peak = tuple(map(max, self.peak, now))
        return now

    def end_part(self):
        now = self.look()
        before = self.first
        result = [[peak - start, after - start] for peak, after, start in zip(self.peak, now, before)]
        return {"anonymous": result[0], "file": result[1]}

    def run(self):
        while True:
            self.look()
            time.sleep(0.01)


def main():
    import deepspeed
    import torch
    from deepspeed.runtime.zero import parameter_offload, stage3

    import actors.learner_rank as module
    from dphrl.config.schema import Config

    assert module.__file__.startswith(checkout), module.__file__
    config = lambda path: Config.model_validate({
        "model": {"path": path, "dtype": dtype},
        "data": {"train": {"name": "factor", "kind": "tiny"}, "evaluation": []},
        "reward": {"name": "factorization"},
        # An estimator with a resident reference model.
        "algorithm": {"divergence": "reverse_kl", "estimator": "rollout"},
        "learner": {"num_ranks": 2, "zero_stage": 3, "threads_per_rank": 1},
    })
    assert config(model).uses_reference_model
    Rank = module.LearnerRank.__ray_metadata__.modified_class
    # A small model of the same kind first, so that neither code nor connections are counted.
    warm = Rank(config(small), rank)
    warm.connect(("127.0.0.1", int(port)), small)
    learner = Rank(config(model), rank)
    sampler, parts = Sampler(), {}

    def ends(name, function):
        def wrapped(*arguments, **named):
            result = function(*arguments, **named)
            if name not in parts:
                parts[name] = sampler.end_part()
                if name == "engine":
                    sampler.start_part()
            return result
        return wrapped

    # Where the module is sharded and DeepSpeed has hung its hooks on it, and the optimizer is not yet there.
    offload = parameter_offload.DeepSpeedZeRoOffload
    offload.__init__ = ends("build", offload.__init__)
    deepspeed.initialize = ends("engine", deepspeed.initialize)
    sampler.start_part()
    started = time.perf_counter()
    facts = learner.connect(("127.0.0.1", int(port)), model)
    parts["reference"] = sampler.end_part()
    print(json.dumps({"parts": parts, "num_parameters": facts["num_parameters"],
                      "seconds": time.perf_counter() - started}), flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks learner_memory", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", help="a revision to compare with")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The larger of the two ranks counts. The new side is the checkout that this file is in, as it is."""
    from dphrl.models import ensure_smollm2

    model = str(ensure_smollm2())
    result: dict[str, Any] = {"benchmark": "learner_memory", "checkpoint": "float32"}
    with tempfile.TemporaryDirectory(prefix="dphrl-memory-") as folder:
        sides = {"new": ROOT}
        if arguments.old:
            sides = {"old": _checkout(arguments.old, Path(folder, "old")), **sides}
        program, small = Path(folder, "child.py"), Path(folder, "small")
        program.write_text(_CHILD)
        _save_small_model(small)
        for dtype in DTYPES:
            for side, checkout in sides.items():
                result |= _measure(program, checkout, [model, str(small), dtype], f"{dtype}/{side}")
    return result


def _checkout(revision: str, folder: Path) -> Path:
    def git(*arguments: str, where: Path = ROOT) -> str:
        return subprocess.run(
            ["git", "-C", str(where), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("clone", "--quiet", "--no-checkout", str(ROOT), str(folder))
    git("checkout", "--quiet", "--detach", git("rev-parse", f"{revision}^{{commit}}"), where=folder)
    return folder


def _save_small_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=32)).save_pretrained(folder)


def _measure(program: Path, checkout: Path, arguments: list[str], label: str) -> dict[str, float]:
    """Both ranks at once; their numbers under `label`/part/..."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(checkout), str(rank), str(port), *arguments],
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("DPHRL_BENCHMARK_DEBUG") else subprocess.DEVNULL,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        lines = [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{label}: a rank failed; set DPHRL_BENCHMARK_DEBUG=1 to see what it says")
    seen = [json.loads(rank_lines[-1]) for rank_lines in lines]
    whole_bytes = seen[0]["num_parameters"] * {"float32": 4, "bfloat16": 2}[arguments[-1]]
    result = {f"{label}/whole_copy_mib": whole_bytes / 2**20, f"{label}/seconds": max(one["seconds"] for one in seen)}
    for part in ("build", "engine", "reference"):
        for kind in ("anonymous", "file"):
            for i, when in enumerate(("peak", "after")):
                most = max(one["parts"][part][kind][i] for one in seen)
                result[f"{label}/{part}_{kind}_{when}"] = most / whole_bytes
    return result
