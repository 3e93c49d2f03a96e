"""Stand-ins for `ray` and `dphrl`, for batch scripts that tests run: they listen, join, train and stop as those do.

`dphrl train` takes steps that only pass time, keeps checkpoints as empty files, and does as the variable DRIVER says,
JSON of: steps (how many make the run), step_s (seconds of one), every (steps between checkpoints), mib (memory that the
second step takes), stuck_at (a step that does not end), on_term (the status with which SIGTERM ends it, else 143 after
its checkpoint), status (with which it ends at once).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

DRIVER = {"steps": 3, "step_s": 0.1, "every": 0, "mib": 0, "stuck_at": 0, "on_term": 143, "status": None}
# The package that the script's own Python imports, to count nodes.
PACKAGE = """
import json, os, pathlib
def init(**options):
    assert os.environ["RAY_ADDRESS"], "no address"
def nodes():
    of_job = pathlib.Path(os.environ["STAND_IN_RAY"]).glob(f"{os.environ['SLURM_JOB_ID']}-*.json")
    found = [json.loads(path.read_text()) for path in of_job]
    return [{"Alive": os.path.exists(f"/proc/{node['pid']}")} for node in found]
"""


def install(folder: Path) -> None:
    """`ray`, `dphrl` and `python3` in folder/bin, and the package ray in folder/lib."""
    (folder / "bin").mkdir(exist_ok=True, parents=True)
    (folder / "lib" / "ray").mkdir(parents=True)
    (folder / "nodes").mkdir()
    (folder / "lib" / "ray" / "__init__.py").write_text(PACKAGE)
    bodies = {name: f'exec {sys.executable} -S {Path(__file__).resolve()} {name} "$@"' for name in ("ray", "dphrl")}
    bodies["python3"] = f'exec {sys.executable} -S "$@"'
    # The script looks for its nodes every five seconds; these are there at once.
    bodies["sleep"] = 'case $1 in 5) set -- 0.1 ;; esac\nexec /bin/sleep "$@"'
    for name, body in bodies.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)


def ray(words: list[str]) -> None:
    """get-auth-token, health-check and start, as far as the script uses them."""
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    if words[0] == "get-auth-token":
        sys.stdout.write(f"secret-of-{os.environ['SLURM_JOB_ID']}")
    elif words[0] == "health-check":
        _connect(words[words.index("--address") + 1])
    else:
        _start_node(words, options)


def _connect(address: str) -> None:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        sys.exit(f"ray: {address}: {error}")


def _start_node(words: list[str], options: dict[str, str]) -> None:
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if int(options["num-gpus"]) > len(visible):
        sys.exit(
            f"ray: Attempting to start raylet with {options['num-gpus']} GPUs, but CUDA_VISIBLE_DEVICES is {visible}"
        )
    time.sleep(float(os.environ.get("RAY_IS_SLOW_S", 0)))
    listening = []
    if "--head" in words:
        Path(options["temp-dir"]).mkdir(exist_ok=True)
        for name in ("port", "dashboard-port", "ray-client-server-port"):
            listening.append(socket.create_server(("", int(options[name]))))
    else:
        _connect(options["address"])
    facts = {
        "pid": os.getpid(),
        "gpus": visible,
        "num_cores": len(os.sched_getaffinity(0)),
        "token": os.environ.get("HF_TOKEN"),
        "agent_port": options["dashboard-agent-listen-port"],
    }
    name = f"{os.environ['SLURM_JOB_ID']}-{os.environ['SLURMD_NODENAME']}"
    path = Path(os.environ["STAND_IN_RAY"]) / f"{name}.json"
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(facts))
    aside.replace(path)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    signal.pause()


class Driver:
    """`dphrl train CONFIG run_dir=FOLDER [--resume]`"""

    def __init__(self, words: list[str]) -> None:
        self.facts: dict[str, Any] = DRIVER | json.loads(os.environ.get("DRIVER", "{}"))
        folder = Path(words[2].removeprefix("run_dir=")) / "demo-math"
        self.checkpoints, self.steps = folder / "checkpoints", folder / "steps"
        self.stops = 0
        if self.facts["status"] is not None:
            sys.exit(self.facts["status"])
        if list(self.checkpoints.glob("step_*")) and "--resume" not in words:
            sys.exit(2)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with (folder / "commands").open("a") as file:
            file.write(" ".join([*words, f"restarts={os.environ.get('SLURM_RESTART_COUNT', 0)}"]) + "\n")

    def hear(self, number: int, frame: Any) -> None:
        self.stops += 1
        if self.stops > 1:
            os._exit(128 + number)

    def save(self, step: int) -> None:
        (self.checkpoints / f"step_{step}").mkdir(exist_ok=True)

    def train(self) -> None:
        signal.signal(signal.SIGTERM, self.hear)
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        memory = []
        done = max((int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*")), default=0)
        for step in range(done + 1, self.facts["steps"] + 1):
            time.sleep(self.facts["step_s"])
            if step == 2:
                memory.append(b"x" * (self.facts["mib"] * 2**20))
            while step == self.facts["stuck_at"] and "SLURM_RESTART_COUNT" not in os.environ:
                time.sleep(0.05)
            with self.steps.open("a") as file:
                file.write(f"{step}\n")
            if self.stops:
                if self.facts["on_term"] == 143:
                    self.save(step)
                sys.exit(self.facts["on_term"])
            if self.facts["every"] and step % self.facts["every"] == 0:
                self.save(step)
        self.save(self.facts["steps"])


if __name__ == "__main__":
    if sys.argv[1] == "ray":
        ray(sys.argv[2:])
    else:
        Driver(sys.argv[2:]).train()
