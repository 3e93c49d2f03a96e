"""Runs whose nodes reach each other over a network that can be cut: what goes on, what stops, and how it says so.

No machine here has another clock, or sees files later than others: namespaces of time do not shift the time of day.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dphrl.tracking.tracker import read_metrics
from tests.integration.chaos import with_two_engines
from tests.integration.namespaces import Cluster, obstacle, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

if OBSTACLE := obstacle():
    pytest.skip(OBSTACLE, allow_module_level=True)

NUM_STEPS, NUM_PROMPTS, NUM_SAMPLES = 6, 16, 8
SETTINGS = [
    *with_two_engines(NUM_STEPS, NUM_PROMPTS, NUM_SAMPLES),
    "data.train={name: factor, kind: tiny, split: train, limit: 64}",
]


@pytest.fixture(scope="module")
def module_cluster() -> Iterator[Cluster]:
    # Short, because sockets lie below it.
    folder = Path(tempfile.mkdtemp(prefix="ns-", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(module_cluster: Cluster) -> Cluster:
    """With its links whole, and with nodes in place of those that a test before this one cut off."""
    module_cluster.restore()
    return module_cluster


def end_of(training: subprocess.Popen[bytes], cluster: Cluster, run: str, timeout_s: float = 300.0) -> int:
    try:
        return training.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(training.pid, signal.SIGKILL)
        training.wait()
        raise AssertionError(f"not done after {timeout_s:g} s: {cluster.said(run)[-3000:]}") from None


def when_training(cluster: Cluster, run: str, training: subprocess.Popen[bytes]) -> None:
    """Wait until a step is done."""

    def begun() -> bool:
        assert training.poll() is None, cluster.said(run)[-3000:]
        return bool(read_metrics(cluster.folder / run))

    wait_until(begun, "the first step", 240)


def check_steps(cluster: Cluster, run: str) -> list[dict[str, Any]]:
    """Every step once, each with every completion once, sampled by the version before it."""
    records = read_metrics(cluster.folder / run)
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1)), cluster.said(run)
    for step in range(1, NUM_STEPS + 1):
        lines = (cluster.folder / run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        pairs = Counter((row["prompt_id"], row["sample_index"]) for row in rows)
        assert len(rows) == len(pairs) == NUM_PROMPTS * NUM_SAMPLES, f"step {step}"
        assert {row["policy_version"] for row in rows} == {step - 1}
    return records


def events(cluster: Cluster, run: str) -> Counter[str]:
    lines = (cluster.folder / run / "events.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["event"] for line in lines)


def ends_alone(cluster: Cluster, host: str) -> None:
    """A node that was given up while it was cut off ends when it hears of it, and with it all that ran there."""
    there = psutil.Process(cluster.nodes[host].pid).children(recursive=True)
    cluster.network.mend(host)
    wait_until(lambda: cluster.nodes[host].poll() is not None, f"{host} to end", 90)
    assert psutil.wait_procs(there, timeout=20)[1] == []


# ------------------------------------------------------------------------------------------ the tests
def test_a_slow_link_that_is_cut_for_a_moment_costs_time_and_nothing_else(cluster: Cluster) -> None:
    training = cluster.train("slow", *SETTINGS)
    when_training(cluster, "slow", training)
    _, host = cluster.hosts_of("slow")
    # The weights are 1.5 MB.
    cluster.network.slow(host, "4mbit")
    time.sleep(2)
    cluster.network.cut(host)
    time.sleep(2.5)
    cluster.network.join(host)
    assert end_of(training, cluster, "slow") == 0, cluster.said("slow")
    records = check_steps(cluster, "slow")
    assert events(cluster, "slow").keys() <= {"checkpoint"}, cluster.said("slow")
    assert max(record["time/sync_s"] for record in records[1:]) > 2.0


def test_engines_that_are_cut_off_are_replaced_and_what_they_held_is_asked_of_others(cluster: Cluster) -> None:
    training = cluster.train("engines", *SETTINGS)
    when_training(cluster, "engines", training)
    _, host = cluster.hosts_of("engines")
    cluster.network.cut(host)
    assert end_of(training, cluster, "engines") == 0, cluster.said("engines")
    check_steps(cluster, "engines")
    happened = events(cluster, "engines")
    assert happened["engine_lost"] == happened["engine_replaced"] + happened["engine_given_up"] >= 1
    assert "health check failed" in cluster.said("engines")
    ends_alone(cluster, host)


def test_a_run_that_is_to_stop_does_and_goes_on_when_it_is_resumed(cluster: Cluster) -> None:
    training = cluster.train("stop", *SETTINGS, "rollout.on_failure=stop")
    when_training(cluster, "stop", training)
    _, host = cluster.hosts_of("stop")
    cluster.network.cut(host)
    assert end_of(training, cluster, "stop") == 1, cluster.said("stop")
    told, address = cluster.said("stop"), re.escape(cluster.network.addresses[host])
    assert re.search(rf"failed: .*rollout engine \d \(node {address}, process \d+\) died", told), told
    assert "Traceback" not in told
    assert len(read_metrics(cluster.folder / "stop")) < NUM_STEPS
    ends_alone(cluster, host)
    cluster.restore()
    training = cluster.train("stop", *SETTINGS, "rollout.on_failure=stop", "--resume")
    assert end_of(training, cluster, "stop") == 0, cluster.said("stop")
    check_steps(cluster, "stop")


def test_the_learner_goes_on_elsewhere_when_its_node_is_cut_off(cluster: Cluster) -> None:
    # Room for everything on either node.
    cluster.restore(first=4, second=4)
    training = cluster.train("learner", *SETTINGS)
    when_training(cluster, "learner", training)
    host, _ = cluster.hosts_of("learner")
    cluster.network.cut(host)
    assert end_of(training, cluster, "learner") == 0, cluster.said("learner")
    records = check_steps(cluster, "learner")
    assert events(cluster, "learner")["learner_restarted"] == 1
    assert records[-1]["learner/restarts"] == 1
    ends_alone(cluster, host)
