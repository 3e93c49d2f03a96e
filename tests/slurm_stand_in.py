"""A small Slurm on one machine: sbatch, srun, scontrol and scancel for PATH, which run real batch scripts in tests.

What it does as Slurm does: options that it does not know, and more than a node has, are refused; a job has the memory
that it asks for, else the site's small default, and is killed when the processes of a node take more; the signal before
the time limit, the end at the limit, requeue with SLURM_RESTART_COUNT, and a node's failure; steps wait for each other
unless they overlap, get the GPUs that they ask for, and are bound as the options say or the environment of sbatch.

What it does not do: queues, partitions, users, cgroups. A node is a name that processes carry in their environment, so
that processes which leave their parents are counted and killed too. Jobs share nodes, as where a site forces that.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Between SIGTERM and SIGKILL. Slurm's default is 30 s.
KILL_WAIT_S = 3.0
POLL_S = 0.05
FLAGS = {"exclusive", "requeue", "no-requeue", "overlap", "batch", "oversubscribe"}
OF_JOBS = {
    *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "gpu-bind", "mem", "time", "output"),
    *("open-mode", "signal", "exclusive", "requeue", "no-requeue", "export", "partition"),
}
OF_STEPS = {
    *("jobid", "nodes", "ntasks", "ntasks-per-node", "nodelist", "cpus-per-task", "cpu-bind", "gpus-per-node"),
    *("gpu-bind", "mem", "overlap", "export"),
}


def _refuse(program: str, what: str) -> NoReturn:
    sys.stderr.write(f"{program}: error: {what}\n")
    sys.exit(1)


def _parse(program: str, words: Sequence[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """Options up to the first word that is none, and the rest."""
    options, rest = {}, list(words)
    while rest and rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        if name not in known:
            _refuse(program, f"unrecognized option '--{name}'")
        if name not in FLAGS and not equals:
            value = rest.pop(0)
        options[name] = value
    return options, rest


def _mib(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]?)", text).groups()  # type: ignore[union-attr]
    return int(number) * (1024 if unit == "G" else 1)


def _seconds(text: str) -> int:
    """HH:MM:SS, MM:SS or MM."""
    parts = [int(part) for part in text.split(":")]
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: parts}[len(parts)]
    return hours * 3600 + minutes * 60 + seconds


def processes(folder: Path, job: str = "", node: str = "") -> Iterator[int]:
    """Processes that carry the mark of the cluster, or of one job or node of it."""
    mark = f"STAND_IN_PLACE={folder}|".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            _, found, rest = path.read_bytes().partition(mark)
            place = rest.partition(b"\0")[0].decode().split("|")
            if found and int(path.parent.name) != os.getpid() and job in ("", place[0]) and node in ("", place[1]):
                yield int(path.parent.name)


def kill(found: Sequence[int], number: int) -> None:
    """Send all of them a signal; who has ended meanwhile needs none."""
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _resident_mib(found: Iterator[int]) -> float:
    pages = 0
    for process in found:
        with suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ------------------------------------------------------------------------------------------ programs
def sbatch(folder: Path, words: list[str]) -> None:
    """Take a script, from a file or standard input, and start a process that sees it through."""
    given, rest = _parse("sbatch", words, OF_JOBS)
    script = Path(rest[0]).read_text() if rest else sys.stdin.read()
    asked = [line.split()[1] for line in script.partition("\nset -")[0].splitlines() if line.startswith("#SBATCH ")]
    options = _parse("sbatch", asked, OF_JOBS)[0] | given
    facts = json.loads((folder / "cluster.json").read_text())
    if int(options.get("nodes", 1)) > len(facts["nodes"]) or int(options.get("gpus-per-node", 0)) > facts["gpus"]:
        _refuse("sbatch", "Batch job submission failed: Requested node configuration is not available")
    if _mib(options.get("mem", "0")) > facts["memory_mib"]:
        _refuse("sbatch", "Batch job submission failed: Memory specification can not be satisfied")
    job = facts["first_job"] + sum(path.is_dir() for path in folder.glob("[0-9]*"))
    (folder / str(job)).mkdir()
    (folder / str(job) / "script").write_text(script)
    (folder / str(job) / "options.json").write_text(json.dumps(options))
    with (folder / str(job) / "controller.log").open("w") as log:
        subprocess.Popen(
            [sys.executable, "-S", __file__, "control", str(folder), str(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    sys.stdout.write(f"Submitted batch job {job}\n")


class _Controller:
    """What Slurm's daemons do for one job."""

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.job, self.place = folder, job, folder / job
        self.options = json.loads((self.place / "options.json").read_text())
        facts = json.loads((folder / "cluster.json").read_text())
        self.nodes = facts["nodes"][: int(self.options.get("nodes", 1))]
        memory = self.options.get("mem")
        self.limit_mib = facts["default_memory_mib"] if memory is None else _mib(memory) or facts["memory_mib"]
        self.limit_s = _seconds(self.options["time"])
        name, _, before = self.options.get("signal", "B:USR1@60").removeprefix("B:").partition("@")
        self.signal, self.warning_s = signal.Signals[f"SIG{name}"], int(before)

    def run(self) -> None:
        (self.place / "controller").write_text(str(os.getpid()))
        for restarts in range(100):
            self._tell("RUNNING")
            state = self._run_once(restarts)
            self._end_processes()
            self._tell(state)
            if state != "REQUEUED":
                return

    def _tell(self, state: str) -> None:
        with (self.place / "states").open("a") as file:
            file.write(f"{state}\n")

    def _start(self, restarts: int) -> subprocess.Popen[bytes]:
        gpus = self.options.get("gpus-per-node")
        environment = os.environ | {
            "STAND_IN_PLACE": f"{self.folder}|{self.job}|{self.nodes[0]}",
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NODELIST": ",".join(self.nodes),
            "SLURM_SUBMIT_DIR": os.getcwd(),
            "SLURM_CPUS_PER_TASK": self.options.get("cpus-per-task", "1"),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            **({"SLURM_GPUS_PER_NODE": gpus} if gpus else {}),
            **({"SLURM_GPU_BIND": self.options["gpu-bind"]} if "gpu-bind" in self.options else {}),
        }
        output = self.options["output"].replace("%x", self.options["job-name"]).replace("%j", self.job)
        with Path(output).open("a" if self.options.get("open-mode") == "append" else "w") as log:
            return subprocess.Popen(
                ["bash", str(self.place / "script")],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _run_once(self, restarts: int) -> str:
        for order in ("requeue", "cancel", "failed-node", "left"):
            (self.place / order).unlink(missing_ok=True)
        end_s, signalled = self._set_end(self.limit_s), False
        batch = self._start(restarts)
        (self.place / "batch").write_text(str(batch.pid))
        while True:
            time.sleep(POLL_S)
            status = batch.poll()
            if (path := self.place / "left").exists():
                end_s = self._set_end(float(path.read_text()))
                path.unlink()
            if (self.place / "requeue").exists():
                return "REQUEUED"
            if (self.place / "cancel").exists():
                return "CANCELLED"
            if (self.place / "failed-node").exists():
                node = (self.place / "failed-node").read_text()
                kill(list(processes(self.folder, self.job, node)), signal.SIGKILL)
                return "REQUEUED" if "requeue" in self.options else "NODE_FAIL"
            if status is not None:
                # With the script the job ends, and what it started gets no time.
                kill(list(processes(self.folder, self.job)), signal.SIGKILL)
                return "COMPLETED" if status == 0 else "FAILED"
            if any(_resident_mib(processes(self.folder, self.job, node)) > self.limit_mib for node in self.nodes):
                kill(list(processes(self.folder, self.job)), signal.SIGKILL)
                return "OUT_OF_MEMORY"
            if time.time() > end_s:
                return "TIMEOUT"
            if "signal" in self.options and time.time() >= end_s - self.warning_s and not signalled:
                signalled = True
                to_batch_alone = self.options["signal"].startswith("B:")
                kill([batch.pid] if to_batch_alone else list(processes(self.folder, self.job)), self.signal)

    def _set_end(self, left_s: float) -> float:
        end_s = time.time() + left_s
        (self.place / "end").write_text(str(end_s))
        return end_s

    def _end_processes(self) -> None:
        """Whatever the job has left: SIGTERM, time to heed it, SIGKILL."""
        kill(list(processes(self.folder, self.job)), signal.SIGTERM)
        deadline = time.monotonic() + KILL_WAIT_S
        while time.monotonic() < deadline and any(processes(self.folder, self.job)):
            time.sleep(POLL_S)
        kill(list(processes(self.folder, self.job)), signal.SIGKILL)


def srun(folder: Path, words: list[str]) -> None:
    """A step: a task on each of its nodes, and its end with the greatest status of them."""
    options, command = _parse("srun", words, OF_STEPS)
    job = options.get("jobid") or os.environ["SLURM_JOB_ID"]
    of_job = json.loads((folder / job / "options.json").read_text())
    facts = json.loads((folder / "cluster.json").read_text())
    allocated = facts["nodes"][: int(of_job.get("nodes", 1))]
    nodes = options.get("nodelist", ",".join(allocated)).split(",")[: int(options.get("nodes", len(allocated)))]
    gpus = int(options.get("gpus-per-node") or os.environ.get("SLURM_GPUS_PER_NODE", 0))
    if not set(nodes) <= set(allocated) or gpus > int(of_job.get("gpus-per-node", 0)):
        _refuse("srun", "Unable to create step for job: Requested node configuration is not available")
    held = [_hold(folder / job / f"held-{node}") for node in nodes] if "overlap" not in options else []
    tasks = {}
    for number, node in enumerate(nodes):
        if (folder / f"broken-{node}").exists():
            _refuse("srun", f"Task launch failed on node {node}: Communication connection failure")
        environment: dict[str, Any] = os.environ | {
            "STAND_IN_PLACE": f"{folder}|{job}|{node}",
            "SLURM_JOB_ID": job,
            "SLURM_PROCID": str(number),
            "SLURMD_NODENAME": node,
        }
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        bound = re.fullmatch(
            r"(?:single|per_task):(\d+)", options.get("gpu-bind", os.environ.get("SLURM_GPU_BIND", ""))
        )
        if facts["gpus"]:
            seen = range(min(gpus, int(bound[1])) if bound else gpus)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, seen))
        tasks[node] = subprocess.Popen(command, env=environment)
        if options.get("cpu-bind") != "none":
            cores = sorted(os.sched_getaffinity(0))[: int(options.get("cpus-per-task", 1))]
            os.sched_setaffinity(tasks[node].pid, cores)

    def forward(number: int, frame: Any) -> None:
        kill([task.pid for task in tasks.values()], number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    worst = 0
    for node, task in tasks.items():
        status = task.wait()
        if status:
            sys.stderr.write(f"srun: error: {node}: task 0: Exited with exit code {status}\n")
        worst = max(worst, status if status >= 0 else 128 - status)
    del held
    sys.exit(worst)


def _hold(path: Path) -> Any:
    """The node for this step alone; waits for the step that has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.stderr.write("srun: Job step creation temporarily disabled, retrying (Requested nodes are busy)\n")
        sys.stderr.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def scontrol(folder: Path, words: list[str]) -> None:
    """show hostnames LIST, show job JOB, requeue JOB."""
    match words:
        case ["show", "hostnames", names]:
            sys.stdout.write("\n".join(names.split(",")) + "\n")
        case ["show", "job", job]:
            end = time.localtime(float((folder / job / "end").read_text()))
            sys.stdout.write(
                f"JobId={job}\n   StartTime=Unknown EndTime={time.strftime('%Y-%m-%dT%H:%M:%S', end)} X=1\n"
            )
        case ["requeue", job]:
            if "requeue" not in json.loads((folder / job / "options.json").read_text()):
                _refuse("scontrol", f"Requested operation is presently disabled for job {job}")
            (folder / job / "requeue").touch()
        case _:
            _refuse("scontrol", f"invalid keyword: {shlex.join(words)}")


def scancel(folder: Path, words: list[str]) -> None:
    """Cancel a job, or with --batch and --signal send its script a signal."""
    options, (job,) = _parse("scancel", words, {"batch", "signal"})
    if "signal" not in options:
        (folder / job / "cancel").touch()
        return
    if "batch" not in options:
        _refuse("scancel", "this stand-in signals the script alone: --batch")
    os.kill(int((folder / job / "batch").read_text()), signal.Signals[f"SIG{options['signal']}"])


def main() -> None:
    """PROGRAM FOLDER WORD...: one of Slurm's programs, in the cluster of that folder."""
    program, folder, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if program == "control":
        _Controller(folder, words[0]).run()
    else:
        {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "scancel": scancel}[program](folder, words)


if __name__ == "__main__":
    main()
