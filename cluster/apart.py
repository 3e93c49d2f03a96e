"""Runs of a suite in processes of their own, several at a time. One that a lost cluster ended is started again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from signal import SIGTERM
from urllib.parse import urlsplit

from dphrl.config.schema import Config
from dphrl.own_code import own_first
from dphrl.stopping import Stopped
from dphrl.tracking.console import Console

Run = tuple[str, int]  # (arm, seed)
OWN_PROGRAM = own_first("from dphrl.__main__ import main; main()")
# Bad input: it would be refused again.
_REFUSED = 2
_POLL_S = 1.0


def run_apart(
    runs: dict[Run, Config],
    options_of: Callable[[Run], Sequence[str]],
    num_parallel: int,
    num_retries: int,
    console: Console,
) -> None:
    """Train each of `runs`, `num_parallel` at a time. Each waits for its own place on the cluster.

    options_of: what the process of a run is told after `dphrl`. The first run of a seed goes ahead of the others of
    that seed, which then find its reference buffer and base evaluation.
    num_retries: how often a run that failed is started again, once the cluster answers: it goes on from its last
    checkpoint, with the reference buffer that it has. What was refused is not.
    Raises RuntimeError when a run failed in the end, after all others were tried; Stopped when a signal ended it.
    """
    processes = _Processes(num_retries, console)

    def train(run: Run) -> str | None:
        said = processes.train(run, runs[run], options_of(run))
        return None if said is None else f"{run[0]}-s{run[1]}: {said[-500:]}"

    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run[1], []).append(run)
    problems = []
    with ThreadPoolExecutor(num_parallel) as pool, console.task("runs", len(runs)) as advance:
        try:
            waiting = {pool.submit(train, of_seed.pop(0)): of_seed for of_seed in by_seed.values()}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    waiting |= {pool.submit(train, run): [] for run in waiting.pop(future)}
                    problems.append(future.result())
                    advance(1)
        except BaseException as error:
            # The pool waits at its exit for what still runs. So end the running processes, and let nothing new begin.
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end(error.number if isinstance(error, Stopped) else SIGTERM)
            raise
    if failed := [problem for problem in problems if problem]:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed; the first: {failed[0]}")


class _Processes:
    """The processes of runs. `train` is called in threads, `end` by the one that started them."""

    def __init__(self, num_retries: int, console: Console) -> None:
        self._num_retries = num_retries
        self._console = console
        self._running: set[subprocess.Popen[str]] = set()
        self._ending = threading.Event()
        self._lock = threading.Lock()

    def train(self, run: Run, config: Config, options: Sequence[str]) -> str | None:
        """Train in a process, and in a further one where that failed. Returns what the last one said if it failed."""
        for left in reversed(range(self._num_retries + 1)):
            status, said = self._in_a_process(options)
            if status == 0:
                return None
            if status == _REFUSED or not left or self._ending.is_set():
                break
            last = said.splitlines()[-1:] or [f"status {status}"]
            self._console.info(f"{run[0]}, seed {run[1]} failed and is tried again: {last[0][-200:]}")
            if not self._answers(config):
                break
        return said

    def _in_a_process(self, options: Sequence[str]) -> tuple[int, str]:
        with self._lock:
            if self._ending.is_set():
                return SIGTERM, "not started"
            # In a session of its own: Ctrl-C in a terminal reaches all processes there, and would reach this one twice.
            process = subprocess.Popen(
                [sys.executable, "-c", OWN_PROGRAM, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        said = process.communicate()[1]
        self._running.discard(process)
        return process.returncode, said.strip()

    def _answers(self, config: Config) -> bool:
        """Wait until the head of a run's cluster takes connections, as long as the run would wait for its place there.

        True at once where Ray is started on this machine.
        """
        address = head_address(config)
        deadline = time.monotonic() + config.cluster.placement_timeout_s
        while address is not None and not _takes_connections(address):
            if time.monotonic() > deadline or self._ending.wait(_POLL_S):
                return False
        return True

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


def head_address(config: Config) -> tuple[str, int] | None:
    """Host and port of the cluster that a run joins; None for one on this machine, and for "auto"."""
    address = config.cluster.address if config.cluster.address != "auto" else os.environ.get("RAY_ADDRESS", "")
    parts = urlsplit(address if "://" in address else f"//{address}")
    return (parts.hostname, parts.port) if parts.hostname and parts.port else None


def _takes_connections(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=_POLL_S):
            return True
    except OSError:
        return False
