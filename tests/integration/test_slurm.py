"""The rendered batch script with real Ray, engine and learner, as a job of a small Slurm: out of time, it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.render.nodes import RenderOptions, render
from dphrl.config.loading import load_config
from dphrl.learner.checkpoint import list_checkpoints
from dphrl.tracking.tracker import read_metrics
from tests import slurm_cluster
from tests.integration.test_cluster import SMALL as WITH_TWO_ENGINES

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, TIMEOUT_S = 4, 800.0
# Its number decides over ports and a folder of the machine.
JOB = os.getpid()
SMALL = [*WITH_TWO_ENGINES, "rollout.num_engines=1", f"learner.num_steps={NUM_STEPS}", "checkpoint.every_steps=0"]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[slurm_cluster.Jobs]:
    # One node: two would be of one machine, whose Ray nodes need ports that differ.
    memory = {"memory_mib": 16 * 2**10, "default_memory_mib": 256}
    slurm_cluster.install(tmp_path / "slurm", nodes=1, first_job=JOB, **memory)
    cluster = slurm_cluster.Jobs(tmp_path / "slurm")
    yield cluster
    cluster.end()
    shutil.rmtree(f"/tmp/ray-{JOB}", ignore_errors=True)


def test_a_run_out_of_time_goes_on(jobs: slurm_cluster.Jobs, tmp_path: Path) -> None:
    config = load_config("demo-math", [*SMALL, f"run_dir={tmp_path}/runs"])
    script = tmp_path / "job.sbatch"
    script.write_text(render("slurm", config, RenderOptions(cpus_per_node=2, gpus_per_node=0)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    kept["PATH"] = f"{tmp_path}/slurm/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept |= {"PYTHONPATH": str(ROOT), "DPHRL_HEAD_ADDRESS": "127.0.0.1"}
    subprocess.run(["sbatch", str(script)], env=kept, cwd=tmp_path, check=True, timeout=60)
    folder, log = tmp_path / "runs" / "demo-math", tmp_path / f"dphrl-demo-math-{JOB}.log"

    deadline = time.monotonic() + TIMEOUT_S
    while not read_metrics(folder):
        assert jobs.states(JOB)[-1:] in ([], ["RUNNING"]), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    jobs.let_time_pass(JOB, left_s=300)
    states = jobs.wait(JOB, deadline - time.monotonic())
    assert states == ["RUNNING", "REQUEUED", "RUNNING", "COMPLETED"], log.read_text()
    told = log.read_text()
    assert "out of time; back in the queue" in told
    assert "steps done, continuing from" in told
    # Every step once, and the run is whole.
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, NUM_STEPS + 1))
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step_{NUM_STEPS}"
    assert (folder / "eval" / f"step_{NUM_STEPS}.json").is_file()
