"""Wall time of the set-up at two revisions, in turn, each from a fresh clone and empty caches."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dphrl.processors import whole_cpus

ROOT = Path(__file__).resolve().parents[2]
# What would let one side find what another run left behind, or build something else than the machine calls for.
CACHES = ("XDG_CACHE_HOME", "PIP_CACHE_DIR", "UV_CACHE_DIR", "DPHRL_VENV", "DPHRL_UNLOCKED", "VIRTUAL_ENV")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks setup", description=__doc__)
    parser.add_argument("--old", metavar="REVISION", help="default: the last one without committed constraints")
    parser.add_argument("--new", metavar="REVISION", default="HEAD", help="default: HEAD")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side is measured (default: 2)")
    return parser.parse_args(arguments)


@dataclass
class Measured:
    wall_s: float
    cpu_s: float
    versions: frozenset[str]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def _before_constraints() -> str:
    added = _git("log", "--diff-filter=A", "--format=%H", "--", "docker/constraints-cpu.txt").split()
    if not added:
        sys.exit("this clone does not reach back to where the constraints were added: name a revision with --old")
    return f"{added[-1]}^"


def _environment(home: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}
    # Packages still come from where the user's pip looks, although the home folder that says so is another one.
    for configuration in (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"):
        if configuration.is_file():
            environment.setdefault("PIP_CONFIG_FILE", str(configuration))
    return {**environment, "HOME": str(home)}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(revision: str) -> Measured:
    with tempfile.TemporaryDirectory(prefix="dphrl-setup-") as folder:
        checkout, home = Path(folder, "checkout"), Path(folder, "home")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(checkout)], check=True)
        subprocess.run(["git", "-C", str(checkout), "checkout", "--quiet", "--detach", revision], check=True)
        environment = _environment(home)
        started, cpu_before = time.perf_counter(), _cpu_s()
        subprocess.run(["docker/setup.sh"], check=True, cwd=checkout, env=environment, stdout=sys.stderr)
        wall_s, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_before
        freeze = [checkout / ".venv/bin/python", "-m", "pip", "freeze", "--exclude-editable"]
        listed = subprocess.run(freeze, check=True, capture_output=True, text=True, env=environment).stdout
    return Measured(wall_s, cpu_s, frozenset(line for line in listed.splitlines() if not line.startswith("uv==")))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The ratios are those of neighbours in time: another process on the machine slows both of them."""
    names = {"old": arguments.old or _before_constraints(), "new": arguments.new}
    # Resolved here: a clone has no branches but the current one.
    revisions = {side: _git("rev-parse", f"{name}^{{commit}}").strip() for side, name in names.items()}
    seen: dict[str, list[Measured]] = {side: [] for side in revisions}
    for number in range(1, arguments.rounds + 1):
        for side, revision in revisions.items():
            load = os.getloadavg()[0]
            print(f"-- round {number}, {side} ({revision[:12]}), load {load:.1f}", file=sys.stderr, flush=True)
            seen[side].append(measure(revision))
    pairs = list(zip(seen["old"], seen["new"], strict=True))
    return {
        "benchmark": "setup",
        "num_cpus": whole_cpus(),
        **{f"{side}_revision": revision[:12] for side, revision in revisions.items()},
        "time_ratio": statistics.median(new.wall_s / old.wall_s for old, new in pairs),
        "cpu_time_ratio": statistics.median(new.cpu_s / old.cpu_s for old, new in pairs),
        **{f"{side}_seconds": [round(each.wall_s, 1) for each in seen[side]] for side in seen},
        **{f"{side}_cpu_seconds": [round(each.cpu_s, 1) for each in seen[side]] for side in seen},
        "differing_versions": sorted(seen["old"][-1].versions ^ seen["new"][-1].versions),
    }
