"""Runs of a suite in processes of their own, several at a time. One that a lost cluster ended is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from cluster.address import host_and_port, is_dashboard, joined_cluster, unreachable
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.own_code import own_first
from dphrl.stopping import Stopped
from dphrl.tracking.console import Console

Run = tuple[str, int]  # (arm, seed)
OWN_PROGRAM = own_first("from dphrl.__main__ import main; main()")
# Statuses of a run that is not tried again: done; bad input, which would be refused again; stopped by somebody.
_DONE, _REFUSED, _STOPPED = 0, 2, (130, 143)
# How `dphrl` begins the lines that say why it ended.
_REASONS = ("dphrl: failed: ", "dphrl: error: ")
# No more than this is read of what a process said, from its end.
_SAID_BYTES = 2**16

# Prints what the cluster at an address has in all.
RESOURCES_PROGRAM = """
import json, sys
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps({name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}))
"""
_ASK_TIMEOUT_S = 60.0
_POLL_S = 1.0


@dataclass(frozen=True)
class Ended:
    """How a run's process ended. status: as Python has it, negative for a signal. lines: why, at least one."""

    status: int
    lines: tuple[str, ...]


def run_apart(
    runs: Mapping[Run, Config],
    options_of: Callable[[Run], Sequence[str]],
    num_parallel: int,
    num_retries: int,
    console: Console,
) -> None:
    """Train each of `runs`, `num_parallel` at a time. Each waits for its own place on the cluster.

    options_of: what the process of a run is told after `dphrl`. The first run of a seed goes ahead of the others of
    that seed, which then find its reference buffer and base evaluation.
    num_retries: how often a run that failed is started again, once the cluster has what it had: it goes on from its
    last checkpoint, with the reference buffer that it has. What was refused is not, nor what somebody stopped.
    Raises, after all have been tried, InputError when every run that failed was refused, RuntimeError when one failed
    otherwise; Stopped when a signal ended it.
    """
    processes = _Processes(_Clusters(runs.values()) if num_retries else None, num_retries, console)
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run[1], []).append(run)
    failed: dict[Run, Ended] = {}

    def train(run: Run) -> None:
        ended = processes.train(run, runs[run], options_of(run))
        if ended.status != _DONE:
            failed[run] = ended

    with ThreadPoolExecutor(num_parallel) as pool, console.task("runs", len(runs)) as advance:
        try:
            waiting = {pool.submit(train, of_seed.pop(0)): of_seed for of_seed in by_seed.values()}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    waiting |= {pool.submit(train, run): [] for run in waiting.pop(future)}
                    future.result()
                    advance(1)
        except BaseException as error:
            # The pool waits at its exit for what still runs. So end the running processes, and let nothing new begin.
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end(error.number if isinstance(error, Stopped) else signal.SIGTERM)
            raise
    if failed:
        raise _failure(failed, len(runs))


def _failure(failed: Mapping[Run, Ended], num_runs: int) -> Exception:
    others = {run: ended for run, ended in failed.items() if ended.status != _REFUSED}
    if not others:
        # What the runs share is wrong in each of them, and said once.
        return InputError(*dict.fromkeys(line for ended in failed.values() for line in ended.lines))
    run, ended = next(iter(others.items()))
    why = "; ".join(ended.lines)
    return RuntimeError(f"{len(failed)} of {num_runs} runs failed; the first: {run[0]}-s{run[1]}: {why}")


class _Processes:
    """The processes of runs. `train` is called in threads, `end` by the one that started them."""

    def __init__(self, clusters: _Clusters | None, num_retries: int, console: Console) -> None:
        self._clusters = clusters
        self._num_retries = num_retries
        self._console = console
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ending = threading.Event()
        self._lock = threading.Lock()

    def train(self, run: Run, config: Config, options: Sequence[str]) -> Ended:
        """Train in a process, and in a further one where that failed. Returns how the last one ended."""
        ended = self._in_a_process(options)
        for _ in range(self._num_retries):
            if ended.status in (_DONE, _REFUSED, *_STOPPED) or self._ending.is_set():
                break
            self._console.info(f"{run[0]}, seed {run[1]} failed and is tried again: {ended.lines[0]}")
            if self._clusters is not None:
                self._clusters.wait_for(config, self._ending)
            if self._ending.is_set():
                break
            ended = self._in_a_process(options)
        return ended

    def _in_a_process(self, options: Sequence[str]) -> Ended:
        # A file and not a pipe: whatever the run leaves behind may hold a pipe open, and would be waited for.
        with tempfile.TemporaryFile() as said:
            with self._lock:
                if self._ending.is_set():
                    return Ended(_STOPPED[1], ("not started",))
                # In a session of its own: Ctrl-C in a terminal reaches all processes there, and so this one twice.
                process = subprocess.Popen(
                    [sys.executable, "-c", OWN_PROGRAM, *options],
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
            said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID_BYTES))
            return Ended(status, reasons(status, said.read().decode(errors="replace")))

    def end(self, number: int) -> None:
        """Pass a signal on to runs, and wait until they have finished their step and saved it; another kills them."""
        with self._lock:
            self._ending.set()
            running = [*self._running]
        try:
            for process in running:
                process.send_signal(number)
            for process in running:
                process.wait()
        except Stopped:
            for process in running:
                process.kill()
            raise


def reasons(status: int, said: str) -> tuple[str, ...]:
    """Why a `dphrl` ended, out of all that it said: the lines that give a reason, else status and last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line.removeprefix(start) for line in lines for start in _REASONS if line.startswith(start)]
    if told:
        return tuple(told)
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return (f"{how}; it last said: {lines[-1]}" if lines else how,)


class _Clusters:
    """What the clusters of the runs had in the beginning. Those on this machine start and end with a run."""

    def __init__(self, configs: Iterable[Config]) -> None:
        addresses = {head_address(config) for config in configs} - {None}
        self._had = {address: resources_of(address) for address in addresses if address is not None}

    def wait_for(self, config: Config, ending: threading.Event) -> None:
        """Return when a run's cluster has what it had, or at the latest after the time that a run waits for its place.

        Its workers come back after its head, and a run that is started between the two is refused.
        """
        address = head_address(config)
        if address is None:
            return
        deadline = time.monotonic() + config.cluster.placement_timeout_s
        while time.monotonic() < deadline and not ending.wait(_POLL_S):
            if (target := host_and_port(address)) and not unreachable(*target, _POLL_S):
                now = resources_of(address)
                if now and all(now.get(name, 0.0) >= amount for name, amount in self._had[address].items()):
                    return


def head_address(config: Config) -> str | None:
    """The address of the cluster that a run joins; None for one on this machine, and for what names no place."""
    address = joined_cluster(config.cluster.address, os.environ)
    return address if address and not is_dashboard(address) and host_and_port(address) else None


def resources_of(address: str) -> dict[str, float]:
    """CPUs and GPUs of a cluster; nothing if it does not answer. In a process: Ray joins one cluster in a process."""
    command = [sys.executable, "-c", RESOURCES_PROGRAM, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}
