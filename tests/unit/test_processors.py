"""How many processors a process may use, by control groups and by what it is bound to, and how its threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.vllm_settings import process_variables
from cluster import connection, ray_system
from cluster.planning.describe import describe_plan
from dphrl import __main__ as program
from dphrl import processors
from dphrl.config.loading import load_config
from dphrl.processors import (
    CGROUPS,
    be_a_neighbour,
    cpu_quota,
    group_folders,
    usable_cpus,
    waiting_variables,
    whole_cpus,
)

# ------------------------------------------------------------------------------------------ how many


def test_quotas_of_every_level_count() -> None:
    assert cpu_quota([]) is None
    assert cpu_quota(["max 100000", "-1 100000", "nonsense"]) is None
    assert cpu_quota(["max 100000", "400000 100000", "150000 100000"]) == 1.5


@pytest.mark.parametrize(
    ("membership", "folders"),
    [
        ("0::/user.slice/mine", ["user.slice/mine", "user.slice", "."]),
        ("0::/", ["."]),
        ("0::/../other", ["."]),
        ("3:memory:/m\n2:cpu,cpuacct:/a/b\n", ["cpu,cpuacct/a/b", "cpu,cpuacct/a", "cpu,cpuacct"]),
        ("", ["."]),
    ],
)
def test_where_limits_stand(membership: str, folders: list[str]) -> None:
    assert group_folders(membership, "cpu") == [CGROUPS / folder for folder in folders]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes control groups of files, and binds this process: machine(membership, {file: text}, bound)."""

    def make(membership: str, files: dict[str, str], bound: int = 64) -> None:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        (tmp_path / "membership").write_text(membership)
        monkeypatch.setattr(processors, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(processors, "MEMBERSHIP", tmp_path / "membership")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)

    return make


V2, V1 = "0::/pod/mine\n", "4:memory:/m\n3:cpu,cpuacct:/docker/mine\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "bound", "usable", "whole"),
    [
        (V2, {}, 64, 64, 64),
        (V2, {}, 6, 6, 6),
        (V2, {"pod/mine/cpu.max": "max 100000", "pod/cpu.max": "max 100000"}, 64, 64, 64),
        (V2, {"pod/mine/cpu.max": "250000 100000"}, 64, 2.5, 2),
        (V2, {"pod/mine/cpu.max": "800000 100000", "pod/cpu.max": "300000 100000"}, 64, 3, 3),
        (V2, {"pod/mine/cpu.max": "800000 100000"}, 2, 2, 2),
        (V2, {"pod/mine/cpu.max": "50000 100000"}, 64, 0.5, 1),
        (V2, {"other/cpu.max": "100000 100000"}, 64, 64, 64),
        ("0::/\n", {"cpu.max": "400000 100000"}, 64, 4, 4),
        (
            V1,
            {
                "cpu,cpuacct/docker/mine/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/docker/mine/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/m/cpu.cfs_quota_us": "100000",
                "memory/m/cpu.cfs_period_us": "100000",
            },
            64,
            3,
            3,
        ),
    ],
)
def test_the_tighter_of_quota_and_binding_counts(
    machine: Any, membership: str, files: dict[str, str], bound: int, usable: float, whole: int
) -> None:
    machine(membership, files, bound)
    assert usable_cpus() == usable
    assert whole_cpus() == whole


def test_a_system_without_control_groups_or_binding(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(V2, {})
    monkeypatch.setattr(processors, "MEMBERSHIP", tmp_path / "missing")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert whole_cpus() == 64


def test_a_plan_counts_what_the_container_may_use(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    machine(V2, {"pod/cpu.max": "500000 100000"})
    assert "of 5" in describe_plan(load_config("demo-math"))
    assert "of 3" in describe_plan(load_config("demo-math", ["cluster.num_cpus=3"]))


# ------------------------------------------------------------------------------------------ how they wait


@pytest.mark.parametrize(
    "own",
    [
        {"OMP_WAIT_POLICY": "active"},
        {"GOMP_SPINCOUNT": "7"},
        {"KMP_BLOCKTIME": "0"},
        {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "7"},
    ],
)
def test_what_a_user_says_of_waiting_is_kept_and_passed_on(own: dict[str, str]) -> None:
    assert waiting_variables({"PATH": "/bin", **own}) == own
    environment = dict(own)
    be_a_neighbour(environment)
    assert environment == own | processors.NICENESS


def test_a_user_s_niceness_is_kept() -> None:
    environment = {"RAY_worker_niceness": "10"}
    be_a_neighbour(environment)
    assert environment == processors.WAITING | {"RAY_worker_niceness": "10"}


def test_engines_and_ranks_are_told_how_to_wait(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processors.WAITING_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert process_variables(make_config()).items() >= processors.WAITING.items()
    assert ray_system.rank_variables() == {"runtime_env": {"env_vars": processors.WAITING}}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in process_variables(make_config())
    assert ray_system.rank_variables() == {"runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "active"}}}


def test_ranks_start_with_them(make_config: Any) -> None:
    system = object.__new__(ray_system.RaySystem)
    system.config = make_config()
    spawned: list[dict[str, Any]] = []
    system._spawn = lambda actor, role, index, options: lambda *given: spawned.append(options)  # type: ignore[method-assign]
    system._spawn_rank(0, {"num_cpus": 1})
    assert spawned == [{"num_cpus": 1, "runtime_env": {"env_vars": waiting_variables()}}]


def test_a_ray_that_is_started_here_has_the_niceness_and_the_processors(
    machine: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": os.environ["HOME"]})
    monkeypatch.setattr(connection, "token_obstacle", lambda: None)
    machine(V2, {"pod/cpu.max": "500000 100000"})
    seen: list[Any] = []
    monkeypatch.setattr(connection.ray, "init", lambda **options: seen.append((options, dict(os.environ))))
    connection.connect(make_config())
    [(options, environment)] = seen
    assert options["num_cpus"] == 5
    assert environment.items() >= {"RAY_worker_niceness": "0", **processors.WAITING}.items()


def test_a_ray_that_is_joined_stays_as_it_is(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": os.environ["HOME"]})
    seen: list[Any] = []
    monkeypatch.setattr(connection.ray, "init", lambda **options: seen.append(dict(os.environ)))
    connection.connect(make_config(cluster={"address": "10.0.0.1:6379"}))
    assert "RAY_worker_niceness" not in seen[0]


def test_the_command_sets_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_worker_niceness": "3"})
    seen: list[dict[str, str]] = []
    monkeypatch.setattr("cluster.cli.main", lambda: seen.append(dict(os.environ)))
    program.main()
    assert seen == [{"RAY_worker_niceness": "3"} | processors.WAITING]


PROGRAM = """
import sys, cluster.cli
def command_line():
    assert "torch" not in sys.modules
    import torch
cluster.cli.main = command_line
from dphrl.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("own", "count"), [({}, processors.WAITING["GOMP_SPINCOUNT"]), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_the_command_says_it_before_openmp_is_loaded(own: dict[str, str], count: str) -> None:
    """OpenMP shows what it has read."""
    kept = {name: value for name, value in os.environ.items() if name not in processors.WAITING_NAMES}
    environment = kept | own | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch brings another OpenMP than GCC's")
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
