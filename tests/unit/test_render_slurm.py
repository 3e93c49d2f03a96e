"""The rendered batch script, run by bash with stand-ins for Slurm, Ray and dphrl."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.render.nodes import RenderOptions, render
from dphrl.config.loading import config_to_yaml, load_config

# What a shell, a template or a here-document could stumble over.
AWKWARD = "data.prompt_template=\"Solve {question}\n\n$HOME ${HOME} `id` @END@ 'x' \\boxed{}  \nEND_OF_CONFIG\""

FAKES = {
    "scontrol": 'echo "scontrol $*" >>"$LOG"; if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; fi',
    "srun": (
        'echo "srun $*" >>"$LOG"; [ -z "${SRUN_FAILS:-}" ] || exit 1\n'
        'trap \'echo "srun ended" >>"$LOG"; exit 0\' TERM\nwhile :; do /bin/sleep 0.05; done'
    ),
    "ray": 'echo "ray $*" >>"$LOG"; if [ "$1" = get-auth-token ]; then printf secret-of-%s "$SLURM_JOB_ID"; fi',
    "python3": 'echo "${NODES_UP:-2}"',
    "getent": 'echo "127.0.1.1 STREAM $2"; echo "10.0.0.7 STREAM $2"',
    "sleep": "/bin/sleep 0.05",
    "dphrl": (
        'echo "dphrl $*" >>"$LOG"\n'
        'echo "token $(cat "$RAY_AUTH_TOKEN_PATH") $(stat -c %a "$RAY_AUTH_TOKEN_PATH") at $RAY_ADDRESS" >>"$LOG"\n'
        'eval "${HOOK:-}"; exit "${STATUS:-0}"'
    ),
}


class Slurm:
    """The script of a run on two nodes, with stand-ins for every program that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        for name, body in FAKES.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
            path.chmod(0o755)
        self.config = load_config("demo-math", [AWKWARD])
        self.script = render("slurm", self.config, RenderOptions(cpus_per_node=1))
        self.runs = folder / "runs"
        self.state = self.runs / ".slurm" / "12345"

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "LOG": str(self.log),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }
        self.log.write_text("")
        path = self.folder / "job.sbatch"
        path.write_text(self.script, encoding="utf-8")
        return subprocess.run(
            ["bash", str(path)],
            env=variables | environment,
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
            cwd="/",
        )

    def calls(self, program: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(f"{program} ")]

    def checkpoint(self) -> None:
        (self.runs / "demo-math" / "checkpoints" / "step_40").mkdir(parents=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_slurm_starts_a_cluster_trains_and_takes_it_down(slurm: Slurm) -> None:
    done = slurm.run()
    assert (done.returncode, done.stderr) == (0, "")
    # Both run in the background, so either may be written down first.
    workers, head = sorted(slurm.calls("srun")[:2], key=lambda call: "--head" in call)
    assert "--nodes=1 --ntasks=1 " in head
    assert "--nodelist=node-a bash -c " in head
    assert " ray-node /tmp/ray-12345 ray start --block" in head
    assert "--head --node-ip-address=10.0.0.7 --port=23450" in head
    assert "--nodelist=node-b bash -c " in workers
    assert "--address=10.0.0.7:23450" in workers
    assert slurm.calls("dphrl") == [f"dphrl train {slurm.state}/config.yaml run_dir={slurm.runs}"]
    assert slurm.calls("token") == ["token secret-of-12345 600 at 10.0.0.7:23450"]
    # Nothing of it stays but what is worth reading.
    assert not (slurm.state / "ray-token").exists()
    assert (slurm.state / "ray-node-a.log").is_file()
    assert slurm.state.stat().st_mode & 0o777 == 0o700
    assert load_config(str(slurm.state / "config.yaml"), []) == slurm.config
    assert wait_until(lambda: slurm.calls("srun").count("srun ended") == 2)


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("status", ["1", "2", "130"])
def test_slurm_passes_on_the_exit_status(slurm: Slurm, status: str) -> None:
    assert slurm.run(STATUS=status).returncode == int(status)


def test_slurm_resumes_from_a_checkpoint(slurm: Slurm) -> None:
    slurm.checkpoint()
    assert slurm.run().returncode == 0
    assert slurm.calls("dphrl")[0].endswith(" --resume")


def test_slurm_resumes_when_it_was_started_again(slurm: Slurm) -> None:
    assert slurm.run(SLURM_RESTART_COUNT="1").returncode == 0
    assert slurm.calls("dphrl")[0].endswith(" --resume")


def test_slurm_says_that_nodes_did_not_come(slurm: Slurm) -> None:
    done = slurm.run(NODES_UP="1", DPHRL_JOIN_TIMEOUT_S="1")
    assert done.returncode == 1
    assert "1 of 2 nodes are there" in done.stdout
    assert "failed: waited 1s for 2 nodes" in done.stderr
    assert slurm.calls("dphrl") == []
    assert not (slurm.state / "ray-token").exists()


def test_slurm_does_not_wait_for_a_ray_that_has_ended(slurm: Slurm) -> None:
    done = slurm.run(SRUN_FAILS="1", NODES_UP="1")
    assert done.returncode == 1
    assert "failed: waiting for " in done.stderr
    assert "has ended: its srun has status 1" in done.stderr


UNTIL_TERM = 'kill -USR1 "$PPID"; trap "exit 143" TERM; while :; do /bin/sleep 0.05; done'


def test_slurm_goes_back_into_the_queue_when_time_is_up(slurm: Slurm) -> None:
    made = f"mkdir -p {slurm.runs}/demo-math/checkpoints/step_40; "
    done = slurm.run(HOOK=made + UNTIL_TERM)
    assert slurm.calls("scontrol")[-1] == "scontrol requeue 12345"
    assert done.returncode == 143
    assert not (slurm.state / "ray-token").exists()


def test_slurm_does_not_go_round_without_progress(slurm: Slurm) -> None:
    slurm.checkpoint()  # of an earlier round
    old = slurm.runs / "demo-math" / "checkpoints" / "step_40"
    os.utime(old, (1e9, 1e9))
    done = slurm.run(HOOK=UNTIL_TERM)
    assert done.returncode == 1
    assert "out of time, and nothing was saved since it began" in done.stderr
    assert "scontrol requeue 12345" not in slurm.calls("scontrol")


def test_slurm_names_a_program_that_is_missing(slurm: Slurm) -> None:
    (slurm.folder / "bin" / "scontrol").unlink()
    done = slurm.run()
    assert done.returncode == 1
    assert "no scontrol on PATH; set DPHRL_VENV" in done.stderr


def test_slurm_settings_survive_the_shell() -> None:
    config = load_config("demo-math", ["run_dir='/data/my runs/$USER'"])
    text = render("slurm", config, RenderOptions())
    assert "run_dir='/data/my runs/$USER'\n" in text
    assert "\n".join(config_to_yaml(config).splitlines()[:3]) in text
