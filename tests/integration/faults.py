"""Commands in a folder of broken files: how one is run, and how it must end. The list is in `fault_cases.py`.

python -m tests.integration.faults   # run all, and print the table of docs/operations.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dphrl.stopping import ECHO_S

ROOT = Path(__file__).resolve().parents[2]
WALL_S = 240.0
# `dphrl` takes the place of the shell, so that it gets the signals. A shell may have started the tests with Ctrl-C
# ignored.
SETUP = 'set -o pipefail; dphrl() { exec "$PYTHON" -c "$PROGRAM" "$@"; }; '
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cluster.cli import main; main()"
)
# What a command says at its end, whatever else it said.
LAST_LINE = re.compile(r"^dphrl: (?:error|failed|stopped).*", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A command in a folder with broken files, and how it must end.

    name: its row in docs/operations.md. command: for bash; `dphrl` is the program. status: the exit status.
    line: a pattern of the one line on standard error; "" for silence. cpu_s: the processor time that it may take, after
    which the system ends it; a loaded machine does not count. signals: what is sent to it, in turn, when there is a
    file that matches `once`.
    """

    name: str
    command: str
    status: int = 2
    line: str = ""
    cpu_s: int = 10
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""
    signals: tuple[int, ...] = ()
    once: str = ""


@dataclass(frozen=True)
class Ended:
    """What became of a command. lines: those that tell why it ended. seconds: from its start to its end, or from the
    first signal."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return LAST_LINE.findall(self.err)


def run_all(cases: Sequence[Case], folder: Path) -> dict[str, Ended]:
    """Two at a time: most of each is the import of libraries."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([case.name for case in cases], pool.map(lambda case: run(case, folder), cases), strict=True))


def run(case: Case, folder: Path) -> Ended:
    environment = {"PYTHON": sys.executable, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT), **case.env}
    command = ["bash", "-c", f"ulimit -t {case.cpu_s}; {SETUP}{case.command}"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, text=True, **pipes) as process:
        began = time.monotonic()
        try:
            if case.signals:
                _wait_for(case, folder, process)
                began = time.monotonic()
            for i, number in enumerate(case.signals):
                time.sleep(2 * ECHO_S if i else 0)
                process.send_signal(number)
            out, err = process.communicate(case.stdin, timeout=WALL_S)
        finally:
            process.kill()
    return Ended(process.returncode, out, err, time.monotonic() - began)


def _wait_for(case: Case, folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + WALL_S
    while not any(path.stat().st_size for path in folder.glob(case.once)):
        if process.poll() is not None or time.monotonic() > until:
            return  # the exit status tells
        time.sleep(0.01)


def main() -> None:
    from dphrl.models import resolve_model
    from tests.integration.fault_cases import CASES, write_files

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, str(resolve_model("tiny-factor")))
        print("| Fault | The line begins, or says | Status | Seconds |\n|---|---|---|---|")
        for fault, ended in run_all(CASES, folder).items():
            line = (ended.lines or [""])[0].removeprefix("dphrl: ")
            print(f"| {fault} | `{line[:110]}` | {ended.status} | {ended.seconds:.1f} |")


if __name__ == "__main__":
    main()
