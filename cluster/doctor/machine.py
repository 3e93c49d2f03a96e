"""Processors, memory and limits: what the system says it has, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.doctor.check import GIB, Check, read_text
from dphrl.processors import cpu_quota, cpu_quota_texts, group_files, visible_cpus

MIN_MEMORY_GIB = 4.0
MIN_SHARED_MEMORY_GIB = 1.0
# Ray's own advice, and the number below which Ray itself gives a warning.
WANTED_OPEN_FILES = 65_536
MIN_OPEN_FILES = 8_192
# Threads count. A node of a small run has about twenty processes of Ray and ours, each with dozens of threads.
MIN_PROCESSES = 4_096


def examine_machine(engine_is_cpu: bool) -> list[Check]:
    """engine_is_cpu: the CPU build of vLLM is installed, so the processor must be able to run it."""
    return [
        judge_cpus(visible_cpus(), cpu_quota(cpu_quota_texts())),
        judge_vectors(cpu_flags(read_text(Path("/proc/cpuinfo"))), platform.machine(), engine_is_cpu),
        judge_memory(memory_limits()),
        judge_shared_memory(shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None),
        judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        judge_processes([resource.getrlimit(resource.RLIMIT_NPROC)[0], *_group_numbers("pids", "pids.max")]),
        judge_core_files(resource.getrlimit(resource.RLIMIT_CORE)[0]),
    ]


# ------------------------------------------------------------ processors and memory


def judge_cpus(visible: int, quota: float | None) -> Check:
    """Libraries start a thread for each processor they see, whatever share of them a container may use."""
    usable = visible if quota is None else min(float(visible), quota)
    found = str(visible) if usable >= visible else f"{usable:g} by the container's limit, {visible} visible"
    if usable < 2:
        return Check(
            "cpus",
            "warning",
            found,
            "two are needed to place engine and learner: cluster.num_cpus=2 lets them share one, or use --inline",
        )
    if usable < visible:
        count = int(usable)
        remedy = (
            f"more threads than processors slow each other: rollout.threads_per_engine and learner.threads_per_rank of "
            f"{count} at most, or pin the container to whole processors (docker run --cpuset-cpus)"
        )
        return Check("cpus", "warning", found, remedy)
    return Check("cpus", "ok", found)


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """What the first processor can do, by the system's names (x86: `flags`, ARM: `Features`)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def judge_vectors(flags: frozenset[str], machine: str, engine_is_cpu: bool) -> Check:
    """Vector instructions: they decide how fast the CPU engine is, and whether it starts at all."""
    name = "vector units"
    if not flags:
        return Check(name, "ok", f"not told by this system ({machine})")
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "BF16", "amx_tile": "AMX", "asimd": "NEON"}
    found = ", ".join(text for flag, text in known.items() if flag in flags) or "none that vLLM uses"
    if machine in ("x86_64", "AMD64") and "avx2" not in flags and engine_is_cpu:
        return Check(name, "missing", found, "vLLM's CPU build needs AVX2: another machine, or a GPU")
    if machine in ("x86_64", "AMD64") and "avx512f" not in flags:
        found += "; no AVX-512, so float32 is the fast number format"
    return Check(name, "ok", found)


def _group_numbers(controller: str, *names: str) -> list[int]:
    return [int(text) for name in names for text in group_files(controller, name) if text.isdigit()]


def memory_limits() -> list[int]:
    """Bytes of this machine's memory, and what this process may use of it; the smallest counts."""
    physical = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    return [*physical, *_group_numbers("memory", "memory.max", "memory.limit_in_bytes")]


def judge_memory(limits: Iterable[int]) -> Check:
    """Physical memory, or what the container may use if that is less."""
    gib = min(limits, default=0) / GIB
    if gib >= MIN_MEMORY_GIB:
        return Check("memory", "ok", f"{gib:.1f} GiB")
    remedy = f"the demos need about {MIN_MEMORY_GIB:g} GiB; lower rollout.kv_cache_gib, or use --inline"
    return Check("memory", "warning", f"{gib:.1f} GiB", remedy)


def judge_shared_memory(num_bytes: int | None) -> Check:
    """/dev/shm, where Ray keeps its objects; containers start with 64 MiB of it."""
    if num_bytes is None:
        return Check("shared memory", "warning", "no /dev/shm", "Ray keeps objects on disk instead, which is slow")
    gib = num_bytes / GIB
    if gib >= MIN_SHARED_MEMORY_GIB:
        return Check("shared memory", "ok", f"{gib:.1f} GiB")
    return Check("shared memory", "warning", f"{gib:.2f} GiB", "start the container with --shm-size=2g or more")


# ------------------------------------------------------------ limits of a process


def _limit_text(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def judge_open_files(soft: int, hard: int) -> Check:
    """A node of Ray has a connection to each of its workers and peers; if one is refused, it looks like a hang."""
    found = _limit_text(soft) if soft == hard else f"{_limit_text(soft)}, may be raised to {_limit_text(hard)}"
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        enough = soft == resource.RLIM_INFINITY or soft >= WANTED_OPEN_FILES
        return Check("open files", "ok", found if enough else f"{found}; Ray advises {WANTED_OPEN_FILES} on a cluster")
    remedy = f"`ulimit -n {WANTED_OPEN_FILES}` before `ray start`"
    if hard != resource.RLIM_INFINITY and hard < WANTED_OPEN_FILES:
        remedy += f"; first raise the hard limit (docker run --ulimit nofile={WANTED_OPEN_FILES}, or limits.conf)"
    return Check("open files", "warning", found, remedy)


def judge_processes(limits: Sequence[int]) -> Check:
    """Processes and threads that this user or this container may have."""
    finite = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    if not finite:
        return Check("processes", "ok", "unlimited")
    if min(finite) >= MIN_PROCESSES:
        return Check("processes", "ok", str(min(finite)))
    remedy = f"threads count: `ulimit -u {4 * MIN_PROCESSES}`, in a container also docker run --pids-limit=-1"
    return Check("processes", "warning", str(min(finite)), remedy)


def judge_core_files(soft: int) -> Check:
    """Reported, not judged: the file that a crash leaves helps to find the cause, but it is large."""
    if soft == 0:
        return Check("core files", "ok", "off; `ulimit -c unlimited` keeps a crashed process's memory to look into")
    return Check("core files", "ok", "a crash may write its process's whole memory; `ulimit -c 0` turns that off")
