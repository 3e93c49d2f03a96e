"""Makes one error at a time in a private copy of the tree and runs the tests that have to notice.

This process imports the heavy libraries once and none of the project's own modules. Every error costs a fork of it:
the child imports the project from its copy, afresh, and runs pytest in itself. There is a copy for each worker, and
nobody else's tree is touched.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants.catalogue import Mutant, mutated

# What tests import and pytest would import again in every child. None of it may bring the project's own modules.
PRELOAD = (
    "numpy",
    "pyarrow.parquet",
    "hypothesis.extra.numpy",
    "pydantic",
    "ray",
    "rich.console",
    "torch.utils.checkpoint",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.generation",
    "tokenizers",
    "yaml",
)
OWN = ("dphrl", "actors", "cluster", "tests")
BASELINE_TIMEOUT_S = 600
WAIT_S = 30
NEVER_IMPORTED = 90
IGNORED = (".*", "__pycache__", "runs", "build", "dist", "*.egg-info")


@dataclass(frozen=True)
class Verdict:
    """word: killed, SURVIVED or BROKEN (the tests could not be run as they should be)."""

    mutant: Mutant
    word: str
    seconds: float
    log: str = ""


@dataclass
class Worker:
    tree: Path
    log: Path
    pid: int = 0
    started: float = 0.0
    mutant: Mutant | None = None
    original: str = field(default="", repr=False)


@contextlib.contextmanager
def private_copies(root: Path, count: int) -> Iterator[list[Worker]]:
    """`count` copies of the tree, removed afterwards with whatever runs in them."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        workers = []
        for i in range(count):
            tree = Path(scratch) / f"tree{i}"
            shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*IGNORED))
            workers.append(Worker(tree, Path(scratch) / f"log{i}"))
        try:
            yield workers
        finally:
            for worker in workers:
                if worker.pid:
                    os.killpg(worker.pid, signal.SIGKILL)
                    os.waitpid(worker.pid, 0)


def preload(names: Sequence[str] = PRELOAD) -> None:
    """Import once what every child needs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Workers share the cores, and threads of torch that wait for each other would take many times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("pytest", *names):
        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    own = [name for name in sys.modules if name.partition(".")[0] in OWN and not name.startswith("tests")]
    assert not own, f"already imported, so a child would not see its copy: {own}"


def baseline(workers: Sequence[Worker], tests: Sequence[str]) -> str:
    """Run every test that the list names on the tree as it is; returns what failed, or nothing."""
    shares = [tests[i :: len(workers)] for i in range(len(workers))]
    busy = []
    for worker, share in zip(workers, shares, strict=True):
        if share:
            _start(worker, share, None, BASELINE_TIMEOUT_S)
            busy.append(worker)
    failed = ""
    for worker in busy:
        _, status = os.waitpid(worker.pid, 0)
        worker.pid = 0
        if os.waitstatus_to_exitcode(status):
            failed += worker.log.read_text(errors="replace")
    return failed


def judge(workers: Sequence[Worker], mutants: Sequence[Mutant], timeout_s: int) -> Iterator[Verdict]:
    """The verdict on each mutant, in the order in which they come. What computes for timeout_s is an endless loop."""
    left = list(reversed(mutants))
    while left or any(worker.pid for worker in workers):
        for worker in workers:
            if not worker.pid and left:
                _inject(worker, left.pop(), timeout_s)
        pid, status = os.wait()
        worker = next(worker for worker in workers if worker.pid == pid)
        yield _collect(worker, os.waitstatus_to_exitcode(status))


def _inject(worker: Worker, mutant: Mutant, timeout_s: int) -> None:
    path = worker.tree / mutant.file
    changed = mutated(mutant, worker.tree)
    worker.original = path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    _start(worker, mutant.tests, mutant, timeout_s)


def _start(worker: Worker, tests: Sequence[str], mutant: Mutant | None, timeout_s: int) -> None:
    worker.mutant, worker.started = mutant, time.perf_counter()
    sys.stdout.flush()
    worker.pid = os.fork()
    if worker.pid == 0:
        try:
            code = _child(worker, tests, mutant, timeout_s)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 91
        os._exit(code)


def _child(worker: Worker, tests: Sequence[str], mutant: Mutant | None, timeout_s: int) -> int:
    os.setsid()  # a group of its own, so that what it starts ends with it
    log = os.open(worker.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    # An error may make a loop endless. By processor time, so that a busy machine does not pass for one; by the clock
    # only long after.
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    signal.alarm(10 * timeout_s)
    os.chdir(worker.tree)
    os.environ["PYTHONPATH"] = str(worker.tree)
    # Bytecode goes by a file's second and size, in which an error may well equal what it replaces.
    sys.dont_write_bytecode = True
    sys.path[:] = [str(worker.tree), *[entry for entry in sys.path if entry]]
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    importlib.invalidate_caches()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    import pytest

    # An error may also make a test wait for ever; on the tree as it is, none of these waits for long.
    stop = ["-x", "-o", f"timeout={WAIT_S}"] if mutant else []
    code = int(pytest.main([*stop, "-q", "-p", "no:cacheprovider", "--no-header", "--tb=native", *tests]))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if mutant and code in (0, 1):
        module = sys.modules.get(mutant.module)
        if module is None or Path(str(module.__file__)) != worker.tree / mutant.file:
            print(f"{mutant.module} was not imported from the copy: {module}")
            return NEVER_IMPORTED
    return code


def _collect(worker: Worker, code: int) -> Verdict:
    assert worker.mutant is not None
    (worker.tree / worker.mutant.file).write_text(worker.original, encoding="utf-8")
    worker.pid, seconds = 0, time.perf_counter() - worker.started
    if code in (1, -signal.SIGPROF, -signal.SIGALRM):
        return Verdict(worker.mutant, "killed", seconds)
    if code == 0:
        return Verdict(worker.mutant, "SURVIVED", seconds)
    return Verdict(worker.mutant, "BROKEN", seconds, worker.log.read_text(errors="replace")[-3000:])
