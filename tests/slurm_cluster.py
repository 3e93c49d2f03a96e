"""Clusters of `tests.slurm_stand_in`, for tests: how one is made, and what only a machine room can do there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests import slurm_stand_in
from tests.slurm_stand_in import POLL_S, kill, processes

PROGRAMS = ("sbatch", "srun", "scontrol", "scancel")


def install(
    folder: Path, *, nodes: int = 2, memory_mib: int, default_memory_mib: int, gpus: int = 0, first_job: int = 1
) -> Path:
    """A cluster of equal nodes, node-a and so on, in this folder. Returns the folder of its programs, for PATH.

    memory_mib: of one node. default_memory_mib: what a job gets of it that does not say. gpus: of one node.
    first_job: the number of the first job, from which scripts make ports and names.
    """
    (folder / "bin").mkdir(parents=True)
    facts = {"nodes": [f"node-{chr(ord('a') + index)}" for index in range(nodes)], "gpus": gpus}
    facts |= {"memory_mib": memory_mib, "default_memory_mib": default_memory_mib, "first_job": first_job}
    (folder / "cluster.json").write_text(json.dumps(facts))
    for program in PROGRAMS:
        path = folder / "bin" / program
        words = shlex.join([sys.executable, "-S", slurm_stand_in.__file__, program, str(folder)])
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(0o755)
    return folder / "bin"


class Jobs:
    """The jobs of a cluster, for a test: their states, and what only a machine room can do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def states(self, job: int) -> list[str]:
        """Its states so far: RUNNING, and then one of COMPLETED, FAILED, CANCELLED, TIMEOUT, OUT_OF_MEMORY, or
        REQUEUED and RUNNING again."""
        path = self._folder / str(job) / "states"
        return path.read_text().split() if path.exists() else []

    def wait(self, job: int, timeout_s: float = 120.0) -> list[str]:
        """The states when it has ended."""
        deadline = time.monotonic() + timeout_s
        while (states := self.states(job)) == [] or states[-1] in ("RUNNING", "REQUEUED"):
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} is still there: {states}")
            time.sleep(POLL_S)
        return states

    def let_time_pass(self, job: int, left_s: float) -> None:
        """From now on it is as if the job had run until so long before its time limit."""
        path = self._folder / str(job) / "left"
        path.with_suffix(".aside").write_text(str(left_s))
        path.with_suffix(".aside").replace(path)

    def fail_node(self, job: int, node: str) -> None:
        """The node goes down, with what the job has there."""
        path = self._folder / str(job) / "failed-node"
        path.with_suffix(".aside").write_text(node)
        path.with_suffix(".aside").replace(path)

    def break_node(self, node: str) -> None:
        """No step can be started there any more."""
        (self._folder / f"broken-{node}").touch()

    def end(self) -> None:
        """End what any job has left."""
        for path in self._folder.glob("[0-9]*/controller"):
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        kill(list(processes(self._folder)), signal.SIGKILL)
