"""A Ray cluster of three nodes, as `ray start` makes them, and runs that are submitted to it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Small enough to take a minute, with two engines; one thread each, since the nodes are one machine.
SMALL = [
    "learner.num_steps=3",
    "learner.threads_per_rank=1",
    "rollout.num_engines=2",
    "rollout.threads_per_engine=1",
    "rollout.num_prompts=8",
    "rollout.num_samples=4",
    "data.train={name: factor, kind: tiny, split: train, limit: 64}",
    "data.evaluation=[{name: factor, kind: tiny, split: held_out, limit: 8}]",
    "reference.rows_per_step=8",
    "evaluation.num_samples=8",
]


# A user's module that ends the process of the first learner rank that imports it.
DIES_ONCE = """
import os, pathlib, ray
mark = pathlib.Path(__file__).with_suffix(".died")
if ray.is_initialized() and (ray.get_runtime_context().get_actor_name() or "").endswith("learner-0"):
    if not mark.exists():
        mark.touch()
        os._exit(1)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def node_environment(**more: str) -> dict[str, str]:
    """Of Ray nodes that a test starts: nothing of this process's Ray, a token of their own, this checkout; and `more`.

    A value of `more` replaces one of these.
    """
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        # Jobs run `python`.
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        **more,
    }


class Cluster:
    """Three `ray start --block`, each node with a CPU, a folder and a name of its own, and a token."""

    def __init__(self, folder: Path) -> None:
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard_port}"
        # This checkout is what the nodes have installed, as far as a job can tell.
        self.environment = node_environment(PYTHONPATH=f"{folder}:{ROOT}")
        self.token = self.environment["RAY_AUTH_TOKEN"]
        (folder / "dies_once.py").write_text(DIES_ONCE)
        self.died_once = folder / "dies_once.died"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, folder: Path) -> None:
        head = [
            *("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}"),
            *(f"--metrics-export-port={self.metrics_port}", '--resources={"head": 1}'),
        ]
        self.processes.append(self._node("head", head, folder))
        self._wait(1)
        for num_nodes, name in enumerate(("first", "second"), start=2):
            joining = [f"--address=127.0.0.1:{self.port}", f'--resources={{"{name}": 1}}']
            self.processes.append(self._node(name, joining, folder))
            self._wait(num_nodes)

    def _node(self, name: str, options: list[str], folder: Path) -> Any:
        # A folder each, as machines have. Nodes that share one remove uploaded working directories under each other's
        # workers, and the next of these that loads torch dies: MKL needs the working directory to be there.
        options = [f"--temp-dir={folder / name}", "--num-cpus=1", "--object-store-memory=200000000", *options]
        # Its default is one port for all of a machine, which another cluster here may have.
        command = [str(BIN / "ray"), "start", "--block", f"--dashboard-agent-listen-port={free_port()}", *options]
        with (folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _wait(self, num_nodes: int, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if sum(node["state"] == "ALIVE" for node in self.ask("/api/v0/nodes")) == num_nodes:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"the cluster did not come to {num_nodes} nodes in {timeout_s:g} s")

    def ask(self, path: str) -> list[dict[str, Any]]:
        """From the state API."""
        request = urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
            return found

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def dphrl(self, *arguments: str, cwd: Path = ROOT, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "dphrl", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=cwd, env=self.environment, **pipes, **options)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's own folder: the path of a socket may have 107 characters, and Ray needs 70 of them.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start(folder)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """demo-math submitted with --wait and run to its end, the metrics endpoint scraped meanwhile.

    Its learner's first worker dies while starting.
    """
    run_dir = tmp_path_factory.mktemp("runs")
    submitted = cluster.dphrl(
        *("submit", "demo-math", *SMALL, "algorithm.plugins=[dies_once]", f"run_dir={run_dir}"),
        *("--address", cluster.address, "--wait"),
    )
    scraped = ""
    while submitted.poll() is None:
        found = cluster.metrics()
        if "ray_dphrl_step{" in found:
            scraped = found
        time.sleep(0.5)
    stdout, stderr = submitted.communicate()
    return {"status": submitted.returncode, "out": stdout, "err": stderr, "metrics": scraped, "run_dir": run_dir}


def test_a_submitted_run_succeeds_and_its_log_is_followed(cluster: Cluster, finished: dict[str, Any]) -> None:
    assert finished["status"] == 0, finished["out"][-3000:] + finished["err"][-3000:]
    assert re.search(r"submitted as demo-math(-\d)? to http", finished["out"])
    assert f":{cluster.metrics_port}/metrics" in finished["out"]
    for words in ("rollout engine 0 up", "rollout engine 1 up", "step 3/3", "Pass@1"):
        assert words.lower() in finished["out"].lower()
    assert finished["err"] == ""
    steps = (finished["run_dir"] / "demo-math" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]


def test_a_learner_that_died_while_starting_was_started_again(cluster: Cluster, finished: dict[str, Any]) -> None:
    assert cluster.died_once.exists()
    assert "a learner worker died while starting: starting the learner again" in finished["out"]


def test_its_actors_were_on_different_nodes(cluster: Cluster, finished: dict[str, Any]) -> None:
    jobs: dict[str, dict[str, str]] = {}
    for actor in cluster.ask("/api/v0/actors?detail=1&limit=1000"):
        jobs.setdefault(actor["job_id"], {})[actor["name"]] = actor["node_id"]
    newest = jobs[max(job for job, names in jobs.items() if "demo-math-rollout-1" in names)]
    where = [newest[f"demo-math-{role}"] for role in ("learner-0", "rollout-0", "rollout-1")]
    assert len(set(where)) == 3


def test_the_metrics_endpoint_shows_the_families_during_the_run(finished: dict[str, Any]) -> None:
    names = set(re.findall(r"^(ray_dphrl_\w+)\{", finished["metrics"], flags=re.MULTILINE))
    for name in (
        *("ray_dphrl_step", "ray_dphrl_reward_mean", "ray_dphrl_pass_at_k", "ray_dphrl_logprob_gap"),
        *("ray_dphrl_engine_tokens_per_s", "ray_dphrl_reward_status_total", "ray_dphrl_step_seconds_bucket"),
        *("ray_dphrl_completions_waiting", "ray_dphrl_sync_seconds", "ray_dphrl_staleness"),
    ):
        assert name in names, sorted(names)
    assert 'run="demo-math"' in finished["metrics"]


def test_bad_input_found_over_there_is_the_commands_status_and_line(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    bad = cluster.dphrl(
        *("submit", "demo-math", f"model.path={path}", "run_name=bad", f"run_dir={tmp_path}"),
        *("--address", cluster.address, "--wait"),
    )
    stdout, stderr = bad.communicate()
    assert bad.returncode == 2, stdout + stderr
    assert "dphrl: error: " in stdout
    assert str(path) in stdout
    assert "job bad failed, exit status 2" in stderr
    assert "Traceback" not in stdout


def test_a_run_larger_than_the_cluster_is_refused_with_the_arithmetic(cluster: Cluster, tmp_path: Path) -> None:
    large = cluster.dphrl(
        *("submit", "demo-math", "rollout.num_engines=9", "run_name=large", f"run_dir={tmp_path}"),
        *("--address", cluster.address, "--wait"),
    )
    stdout, stderr = large.communicate()
    assert large.returncode == 2, stdout + stderr
    assert "1 learner x 0.75 + 9 rollout x 0.75 + 1 reward x 0.25 = 7.75 CPUs; the cluster has 3 on 3 nodes" in stdout


def test_doctor_asks_every_node(cluster: Cluster, tmp_path: Path) -> None:
    doctor = cluster.dphrl(
        *(
            "doctor",
            "--address",
            f"127.0.0.1:{cluster.port}",
            "--run-dir",
            str(tmp_path),
            "--timeout-s",
            "120",
            "--json",
        )
    )
    stdout, stderr = doctor.communicate()
    checks = {check["name"]: check for check in json.loads(stdout)["checks"]}
    asked = [checks[name] for name in ("cluster", "node versions", "node clocks", "node storage")]
    assert [check["status"] for check in asked] == ["ok"] * 4, asked
    assert "3" in checks["cluster"]["found"]
    assert doctor.returncode == 0, stderr


def test_a_missing_token_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "dphrl", "jobs", "list", "--address", cluster.address]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "token" in line
