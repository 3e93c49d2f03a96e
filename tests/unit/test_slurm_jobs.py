"""The rendered batch script as jobs of a small Slurm that enforces memory and time, signals, and requeues."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.render.nodes import RenderOptions, render
from dphrl.config.loading import InputError, load_config
from tests import slurm_cluster, slurm_programs

MEMORY_MIB, DEFAULT_MEMORY_MIB = 1024, 256


class Cluster:
    """Two nodes with two GPUs each, and the run of demo-math on both of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = {"memory_mib": MEMORY_MIB, "default_memory_mib": DEFAULT_MEMORY_MIB, "gpus": 2}
        programs = slurm_cluster.install(folder / "slurm", nodes=2, **facts)
        slurm_programs.install(folder)
        self.jobs = slurm_cluster.Jobs(folder / "slurm")
        self.path = f"{folder / 'bin'}:{programs}:/usr/bin:/bin"
        self.run_folder = folder / "runs" / "demo-math"

    def call(self, *command: str, **environment: str) -> str:
        variables = {
            "PATH": self.path,
            "HOME": str(self.folder),
            "PYTHONPATH": str(self.folder / "lib"),
            "STAND_IN_RAY": str(self.folder / "nodes"),
            # What a name such as node-a stands for on a network.
            "DPHRL_HEAD_ADDRESS": "127.0.0.1",
        }
        done = subprocess.run(
            command,
            env=variables | environment,
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(
        self,
        *options: str,
        without: str = "",
        driver: dict[str, Any] | None = None,
        rendered: RenderOptions | None = None,
        **environment: str,
    ) -> int:
        """The job's number. without: a line of the script to leave out. driver: what the stand-in for it does."""
        shape = rendered or RenderOptions(cpus_per_node=1, gpus_per_node=0)
        script = render("slurm", load_config("demo-math", []), shape)
        assert not without or script.count(f"{without}\n") == 1
        file = self.folder / "job.sbatch"
        file.write_text(script.replace(f"{without}\n", "") if without else script)
        told = self.call("sbatch", *options, str(file), DRIVER=json.dumps(driver or {}), **environment)
        return int(told.split()[-1])

    def log(self, job: int) -> str:
        path = self.folder / f"dphrl-demo-math-{job}.log"
        return path.read_text() if path.exists() else ""

    def lines(self, name: str) -> list[str]:
        path = self.run_folder / name
        return path.read_text().splitlines() if path.exists() else []

    def nodes(self, job: int) -> list[dict[str, Any]]:
        """What each Ray node of the job found."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / "nodes").glob(f"{job}-*.json"))]

    def trains(self) -> bool:
        return bool(self.lines("steps"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.jobs.end()


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = {"steps": 1000, "step_s": 0.1}


# ------------------------------------------------------------------------------------------ what a job has
def test_a_job_has_the_memory_of_its_nodes(cluster: Cluster) -> None:
    """Slurm gives a node of one's own without its memory, unless the script asks for that too."""
    eats = {"mib": DEFAULT_MEMORY_MIB + 64, "steps": 20}
    small = cluster.submit(without="#SBATCH --mem=0", driver=eats)
    assert cluster.jobs.wait(small) == ["RUNNING", "OUT_OF_MEMORY"]
    assert len(cluster.lines("steps")) < 20
    whole = cluster.submit(driver=eats)
    assert cluster.jobs.wait(whole) == ["RUNNING", "COMPLETED"], cluster.log(whole)
    assert cluster.lines("steps")[-1] == "20"


def test_memory_may_be_bounded(cluster: Cluster) -> None:
    shape = RenderOptions(cpus_per_node=1, gpus_per_node=0, memory_gib_per_node=1)
    assert "#SBATCH --mem=1G\n" in render("slurm", load_config("demo-math", []), shape)
    job = cluster.submit(rendered=shape)
    assert cluster.jobs.wait(job) == ["RUNNING", "COMPLETED"], cluster.log(job)


def test_each_ray_has_every_gpu_and_core_of_its_node(cluster: Cluster) -> None:
    """Even where an option of sbatch binds tasks to a part of them."""
    shape = RenderOptions(cpus_per_node=1, gpus_per_node=2)
    job = cluster.submit("--nodes=2", "--gpu-bind=single:1", rendered=shape)
    assert cluster.jobs.wait(job) == ["RUNNING", "COMPLETED"], cluster.log(job)
    nodes = cluster.nodes(job)
    assert [node["gpus"] for node in nodes] == [["0", "1"], ["0", "1"]]
    assert {node["num_cores"] for node in nodes} == {len(os.sched_getaffinity(0))}


def test_other_steps_need_not_wait_for_the_end_of_ray(cluster: Cluster) -> None:
    job = cluster.submit(driver=LONG)
    wait_until(cluster.trains)
    for node in ("node-a", "node-b"):
        told = cluster.call("srun", f"--jobid={job}", "--nodes=1", f"--nodelist={node}", "printenv", "SLURMD_NODENAME")
        assert told == f"{node}\n"


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_job_leaves_no_files_of_ray_on_its_nodes(is_stopped: bool, cluster: Cluster) -> None:
    """Sessions and what Ray spilled would fill the disk."""
    job = cluster.submit(driver=LONG if is_stopped else {"steps": 20})
    wait_until(cluster.trains)
    folder = Path(f"/tmp/ray-{job}")
    assert folder.is_dir()
    if is_stopped:
        cluster.call("scancel", "--batch", "--signal=TERM", str(job))
    assert cluster.jobs.wait(job)[-1] == ("FAILED" if is_stopped else "COMPLETED"), cluster.log(job)
    wait_until(lambda: not folder.exists())


def test_jobs_that_share_a_node_have_ports_of_their_own(cluster: Cluster) -> None:
    jobs = [cluster.submit(driver={"steps": 20}), cluster.submit(driver={"status": 0})]
    assert [cluster.jobs.wait(job)[-1] for job in jobs] == ["COMPLETED", "COMPLETED"], cluster.log(jobs[1])
    ports = [{node["agent_port"] for node in cluster.nodes(job)} for job in jobs]
    assert not ports[0] & ports[1]


# ------------------------------------------------------------------------------------------ the end of its time
def test_a_run_that_is_out_of_time_saves_and_goes_on(cluster: Cluster) -> None:
    job = cluster.submit(driver={"steps": 30})
    for rounds in (1, 2):
        wait_until(lambda: len(cluster.lines("steps")) >= 5 * rounds)  # noqa: B023
        cluster.jobs.let_time_pass(job, left_s=300)
        wait_until(lambda: len(cluster.lines("commands")) > rounds)  # noqa: B023
    assert cluster.jobs.wait(job) == ["RUNNING", "REQUEUED"] * 2 + ["RUNNING", "COMPLETED"], cluster.log(job)
    # Every step once: the checkpoint of each end was used.
    assert cluster.lines("steps") == [str(step) for step in range(1, 31)]
    assert [command.split()[3:] for command in cluster.lines("commands")] == [
        ["restarts=0"],
        ["--resume", "restarts=1"],
        ["--resume", "restarts=2"],
    ]
    log = cluster.log(job)
    assert log.count("head on node-a") == 3
    assert log.count("out of time; back in the queue, to go on from what is saved") == 2


def test_a_step_that_is_longer_than_the_warning_is_given_up(cluster: Cluster) -> None:
    job = cluster.submit(driver={"steps": 5, "stuck_at": 4, "every": 1})
    wait_until(lambda: len(cluster.lines("steps")) == 3)
    cluster.jobs.let_time_pass(job, left_s=32)
    assert cluster.jobs.wait(job) == ["RUNNING", "REQUEUED", "RUNNING", "COMPLETED"], cluster.log(job)
    assert cluster.lines("steps") == ["1", "2", "3", "4", "5"]


def test_a_run_without_anything_saved_does_not_go_round(cluster: Cluster) -> None:
    job = cluster.submit(driver={"steps": 5, "stuck_at": 2})
    wait_until(cluster.trains)
    cluster.jobs.let_time_pass(job, left_s=31)
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"], cluster.log(job)
    assert "failed: out of time, and nothing was saved since it began" in cluster.log(job)


def test_a_run_that_was_begun_before_and_saves_nothing_does_not_go_round(cluster: Cluster) -> None:
    (cluster.run_folder / "checkpoints" / "step_1").mkdir(parents=True)
    job = cluster.submit(driver={"steps": 5, "stuck_at": 3})
    wait_until(cluster.trains)
    cluster.jobs.let_time_pass(job, left_s=31)
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"], cluster.log(job)


@pytest.mark.parametrize(("status", "state"), [(0, "COMPLETED"), (1, "FAILED"), (2, "FAILED")])
def test_what_time_did_not_end_is_not_requeued(cluster: Cluster, status: int, state: str) -> None:
    """Neither success, nor a crash, nor bad input, even when it comes after the warning and checkpoints are new."""
    job = cluster.submit(driver=LONG | {"every": 1, "on_term": status})
    wait_until(lambda: len(cluster.lines("steps")) > 1)
    cluster.jobs.let_time_pass(job, left_s=300)
    assert cluster.jobs.wait(job) == ["RUNNING", state], cluster.log(job)
    assert "the time limit is near" in cluster.log(job)


@pytest.mark.parametrize("status", [1, 2])
def test_what_fails_is_not_requeued(cluster: Cluster, status: int) -> None:
    job = cluster.submit(driver={"status": status})
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"], cluster.log(job)


def test_a_job_that_is_out_of_time_before_the_training_says_so(cluster: Cluster) -> None:
    job = cluster.submit(RAY_IS_SLOW_S="60")
    wait_until(lambda: "head on node-a" in cluster.log(job))
    cluster.jobs.let_time_pass(job, left_s=300)
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"], cluster.log(job)
    assert "failed: out of time before the training began; ask for more --time" in cluster.log(job)


def test_a_job_that_may_not_be_requeued_says_how_to_go_on(cluster: Cluster) -> None:
    job = cluster.submit(driver=LONG, without="#SBATCH --requeue")
    wait_until(cluster.trains)
    cluster.jobs.let_time_pass(job, left_s=300)
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"]
    assert "the same sbatch command goes on from what is saved" in cluster.log(job)


# ------------------------------------------------------------------------------------------ other ends
def test_a_failed_node_starts_it_again_from_the_last_checkpoint(cluster: Cluster) -> None:
    # Steps are so long that the node fails between two checkpoints, however busy the machine is.
    job = cluster.submit(driver={"steps": 15, "every": 5, "step_s": 0.7})
    wait_until(lambda: len(cluster.lines("steps")) > 6)
    cluster.jobs.fail_node(job, "node-b")
    assert cluster.jobs.wait(job) == ["RUNNING", "REQUEUED", "RUNNING", "COMPLETED"], cluster.log(job)
    first, second = cluster.lines("commands")
    assert "--resume" not in first
    assert "--resume" in second
    steps = [int(step) for step in cluster.lines("steps")]
    # The run is on another node. It saves when it hears of the end in time; else what came after its last checkpoint is
    # done again.
    again = next((index for index in range(1, len(steps)) if steps[index] <= steps[index - 1]), 0)
    if again:
        assert steps[again] % 5 == 1
        assert steps[again - 1] - steps[again] < 5
    assert steps[again:] == list(range(steps[again], 16))


def test_a_run_that_is_stopped_saves_and_is_not_requeued(cluster: Cluster) -> None:
    job = cluster.submit(driver=LONG | {"step_s": 1.0})
    wait_until(cluster.trains)
    cluster.call("scancel", "--batch", "--signal=TERM", str(job))
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"]
    assert (cluster.run_folder / "checkpoints" / f"step_{cluster.lines('steps')[-1]}").is_dir()


def test_a_run_that_is_cancelled_while_it_saves_is_not_requeued(cluster: Cluster) -> None:
    job = cluster.submit(driver=LONG | {"step_s": 1.0})
    wait_until(cluster.trains)
    for name in ("USR1", "TERM"):
        cluster.call("scancel", "--batch", f"--signal={name}", str(job))
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"], cluster.log(job)
    # The second signal did not break off what the first asked for.
    assert (cluster.run_folder / "checkpoints" / f"step_{cluster.lines('steps')[-1]}").is_dir()


def test_a_worker_that_cannot_be_started_is_named(cluster: Cluster) -> None:
    cluster.jobs.break_node("node-b")
    job = cluster.submit()
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"]
    log = cluster.log(job)
    assert "node-b: srun: error: Task launch failed on node node-b: Communication connection failure\n" in log
    assert "failed: waiting for 2 nodes: Ray on node-b has ended: its srun has status 1, and its output is in" in log
    assert not cluster.trains()


# ------------------------------------------------------------------------------------------ the environment file
def with_file(path: str) -> RenderOptions:
    return RenderOptions(cpus_per_node=1, gpus_per_node=0, env_file=path)


def test_tokens_come_from_a_file_and_are_not_in_the_script(cluster: Cluster) -> None:
    file = cluster.folder / ".dphrl env"
    file.write_text("# of mine\nHF_TOKEN='a secret'\n")
    file.chmod(0o600)
    job = cluster.submit(rendered=with_file("~/.dphrl env"))
    assert cluster.jobs.wait(job) == ["RUNNING", "COMPLETED"], cluster.log(job)
    assert [node["token"] for node in cluster.nodes(job)] == ["a secret", "a secret"]
    assert "warning" not in cluster.log(job)
    written = [cluster.folder / "job.sbatch", *cluster.folder.glob("*.log"), *(cluster.folder / "runs").rglob("*")]
    assert not [path for path in written if path.is_file() and "a secret" in path.read_text()]


def test_a_file_that_others_can_read_is_told(cluster: Cluster) -> None:
    file = cluster.folder / "tokens"
    file.write_text("HF_TOKEN=secret\n")
    file.chmod(0o640)
    job = cluster.submit(rendered=with_file("tokens"))
    assert cluster.jobs.wait(job) == ["RUNNING", "COMPLETED"]
    assert f"warning: {file} is open to others than its owner; chmod 600 it" in cluster.log(job)


def test_a_file_that_is_not_there_is_told(cluster: Cluster) -> None:
    job = cluster.submit(rendered=with_file("tokens"))
    assert cluster.jobs.wait(job) == ["RUNNING", "COMPLETED"]
    assert f"warning: no {cluster.folder / 'tokens'}; going on with the environment of sbatch alone" in cluster.log(job)


def test_a_line_of_the_file_that_fails_ends_the_job(cluster: Cluster) -> None:
    file = cluster.folder / "tokens"
    file.write_text("HF_TOKEN secret\nOTHER=1\n")
    job = cluster.submit(rendered=with_file("tokens"))
    assert cluster.jobs.wait(job) == ["RUNNING", "FAILED"]
    assert f"failed: {file}: a line of it failed; write NAME=VALUE, as for a shell" in cluster.log(job)


# ------------------------------------------------------------------------------------------ the options
def test_the_warning_is_an_option() -> None:
    config = load_config("demo-math", [])
    assert "#SBATCH --signal=B:USR1@300\n" in render("slurm", config, RenderOptions())
    text = render("slurm", config, RenderOptions(warn_before_s=900))
    assert "#SBATCH --signal=B:USR1@900\n" in text
    assert "\nwarning_s=900 " in text
    for seconds in (1, 65536):
        with pytest.raises(InputError, match=f"--warn-before {seconds}: "):
            render("slurm", config, RenderOptions(warn_before_s=seconds))
