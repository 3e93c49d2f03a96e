"""How many processors this process may use, and how its computing threads wait beside the work of others.

Imports nothing but the standard library: what is said here must be said before OpenMP is loaded, which comes with torch
and reads its variables once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

# Between two parallel loops the threads of OpenMP (GCC's, which torch brings) turn in a circle, 300,000 times by
# default: for milliseconds, in which they look busy to the system. Beside other work on the same cores the threads that
# wait then use up the share of those that compute. A pause between two loops of one operation is shorter than this many
# turns; in a longer one the thread sleeps.
WAITING = {"GOMP_SPINCOUNT": "1000"}
# Each of them says how threads wait. Whoever sets one has decided it.
WAITING_NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# By itself Ray starts its workers at niceness 15: beside one ordinary busy process they get a thirtieth of a core.
NICENESS = {"RAY_worker_niceness": "0"}


# ------------------------------------------------------------------------------------------ how threads wait


def waiting_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a process whose threads compute. What `environment` (None: this process's) says itself is kept."""
    environment = os.environ if environment is None else environment
    return {name: environment[name] for name in WAITING_NAMES if name in environment} or dict(WAITING)


def be_a_neighbour(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what this process and its children wait by, and the niceness of a Ray that it starts.

    Call it before torch is imported, and before Ray is started. What the environment says already stays.
    """
    environment = os.environ if environment is None else environment
    for name, value in (waiting_variables(environment) | NICENESS).items():
        environment.setdefault(name, value)


# ------------------------------------------------------------------------------------------ how many processors


def usable_cpus() -> float:
    """Processors that this process may use: those it is bound to, or what the quota of its control groups allows in
    their time, if that is less."""
    quota = cpu_quota(cpu_quota_texts())
    return float(visible_cpus()) if quota is None else min(float(visible_cpus()), quota)


def whole_cpus() -> int:
    """`usable_cpus` as a number of threads or of Ray's CPUs: without its fraction, at least one."""
    return max(1, int(usable_cpus()))


def visible_cpus() -> int:
    """Processors that this process is bound to (all, where the system cannot bind), whatever share of their time it
    may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(texts: Iterable[str]) -> float | None:
    """How many processors the tightest of these limits allows, in their time; None without a limit (`max`, -1)."""
    quotas = [text.split() for text in texts]
    return min((int(q[0]) / int(q[1]) for q in quotas if len(q) == 2 and q[0].isdigit() and int(q[1])), default=None)


def cpu_quota_texts(root: Path | None = None, membership: Path | None = None) -> list[str]:
    """`quota period` of every level, in the wording of version 2. Arguments: see `group_files`."""
    v2, *v1 = (
        group_files("cpu", name, root, membership) for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    )
    return [*v2, *map(" ".join, zip(*v1, strict=False))]


def group_files(controller: str, name: str, root: Path | None = None, membership: Path | None = None) -> list[str]:
    """The texts of that file in every control group that limits this process, its own group first.

    root: where the control groups are mounted. membership: the file that names this process's. None: the system's.
    """
    folders = group_folders(_read(membership or MEMBERSHIP), controller, root or CGROUPS)
    return [text for folder in folders if (text := _read(folder / name))]


def group_folders(membership: str, controller: str, root: Path = CGROUPS) -> list[Path]:
    """Folders that may hold limits of this process, its own group first. A limit on any level applies.

    membership: the text of /proc/self/cgroup. Some machines have both versions of control groups, each with its own
    folders.
    """
    folders: list[Path] = []
    for line in membership.splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        path = PurePosixPath(group)
        # Nothing can be seen outside the root of this namespace.
        inside = [] if ".." in path.parts else [path, *path.parents]
        folders += [base / str(one).lstrip("/") for one in inside] or [base]
    return list(dict.fromkeys(folders)) or [root]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
