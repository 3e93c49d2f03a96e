"""Placing a run on a cluster without nodes yet: Ray's own autoscaler, with its provider of make-believe machines."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
# The provider calls its first node this.
HEAD = "ray.head.default"
# Every node that it starts is one more raylet on this machine.
AUTOSCALER: dict[str, Any] = {
    "cluster_name": "dphrl-test",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": HEAD,
    # What would be run on and copied to real machines: the autoscaler asks for the keys.
    **{f"{where}_commands": [] for where in ("initialization", "setup", "head_setup", "worker_setup")},
    **{"head_start_ray_commands": [], "worker_start_ray_commands": [], "rsync_exclude": [], "rsync_filter": []},
    **{"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False},
}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# As a run does it, but for the actors: place, let go, and see whether the nodes go as well.
PLACE = """
import sys, time, ray
from ray.util.placement_group import remove_placement_group
from cluster.planning.ray_placement import cluster_nodes, place_on_cluster
from dphrl.config.loading import InputError, load_config

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
try:
    bundles, group = place_on_cluster(load_config("demo-math", sys.argv[2:]))
    print("placed on", len({bundle.node for bundle in bundles}))
    remove_placement_group(group)
except InputError as error:
    print(error)
deadline = time.monotonic() + 60
while len(cluster_nodes()) > 1 and time.monotonic() < deadline:
    time.sleep(1)
print("in the end", len(cluster_nodes()))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a head without CPUs whose autoscaler may start two nodes of one CPU."""
    # Not pytest's own folder: the path of a socket may have 107 characters, and Ray needs 70 of them.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    provider = AUTOSCALER["provider"] | {"gcs_address": f"127.0.0.1:{port}"}
    (folder / "autoscaler.json").write_text(json.dumps(AUTOSCALER | {"provider": provider}))
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={port}"),
        *("--include-dashboard=false", f"--autoscaling-config={folder / 'autoscaler.json'}"),
        "--object-store-memory=200000000",
    ]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=_environment(folder), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for(port, folder / "head.log")
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        try:
            head.wait(20)
        finally:
            # The make-believe nodes are children of the autoscaler, of the same session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return cleared | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        **TOKEN,
    }


def _wait_for(port: int, log: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"no head in {timeout_s:g} s: {log.read_text()}")


def place(address: str, *overrides: str) -> list[str]:
    """What the script above says, line by line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | TOKEN
    command = [sys.executable, "-c", PLACE, address, *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nodes_come_for_a_run_and_go_when_it_lets_go(address: str) -> None:
    assert place(address, "cluster.autoscaling=cpu") == ["placed on 2", "in the end 1"]


def test_a_run_for_which_too_few_can_come_says_so_and_keeps_none(address: str) -> None:
    said, left = place(address, "learner.num_ranks=3", "cluster.autoscaling=cpu", "cluster.placement_timeout_s=10")
    assert said.startswith("this run needs ")
    assert "the autoscaler brought no more within cluster.placement_timeout_s=10; raise its maximum" in said
    assert left == "in the end 1"


def test_without_autoscaling_the_same_run_is_refused_at_once(address: str) -> None:
    said, left = place(address)
    assert said.endswith("lower the counts or shares, or join a larger cluster")
    assert left == "in the end 1"
