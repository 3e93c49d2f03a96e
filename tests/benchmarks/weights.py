"""Time to hash a model's weights at the first start on a machine, and at the next ones, which remember them."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dphrl.fingerprint import files
from dphrl.processors import whole_cpus

# Each start is a process of its own, whose imports are not measured.
PROGRAM = """
import sys, time
from pathlib import Path
from dphrl.fingerprint.files import hash_files
started = time.perf_counter()
print(hash_files(Path(sys.argv[1]), ["*.safetensors"]), time.perf_counter() - started)
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks weights", description=__doc__)
    parser.add_argument("--shards", type=int, default=4, help="files of 256 MiB (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="how often the next start is measured (default: 5)")
    return parser.parse_args(arguments)


def start(model: Path, cache: Path) -> tuple[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        env=os.environ | {"DPHRL_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    digest, seconds = done.stdout.split()
    return digest, float(seconds)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dphrl-weights-") as folder:
        model, cache = Path(folder, "model"), Path(folder, "cache")
        model.mkdir()
        for shard in range(arguments.shards):
            (model / f"model-{shard}.safetensors").write_bytes(os.urandom(2**20) * 256)
        # A file that has just been written is not remembered.
        time.sleep(files.CLOCK_GRAIN_NS / 1e9 + 0.1)
        digest, first_s = start(model, cache)
        again = [start(model, cache) for _ in range(arguments.rounds)]
    assert {other for other, _ in again} == {digest}
    again_s = statistics.median(seconds for _, seconds in again)
    return {
        "benchmark": "weights",
        "num_cpus": whole_cpus(),
        "gib": arguments.shards / 4,
        "first_s": first_s,
        "again_s": again_s,
        "time_ratio": again_s / first_s,
    }
