"""The sides of a comparison: child processes that are asked in turn, and checkouts of other revisions."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "answer "
MAX_ERROR_CHARS = 4000
END_TIMEOUT_S = 60


class Side:
    """A child process that answers orders, one at a time. Its first answer, without an order, says that it is ready.

    Orders and answers are JSON, one a line. An answer begins with a mark, because libraries print too.
    """

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self._process, self._errors = process, errors

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self.tell(order)
        return self.answer()

    def measure(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """`ask`, and `cpu_s`: CPU seconds of the child and all its processes meanwhile, which neighbours on the machine
        change less than they change its wall time."""
        before = self._cpu_s()
        answer = self.ask(order)
        return {**answer, "cpu_s": self._cpu_s() - before}

    def _cpu_s(self) -> float:
        me = psutil.Process(self._process.pid)
        spent = 0.0
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                # Of children that ended and were waited for, too.
                spent += times.user + times.system + times.children_user + times.children_system
        return spent

    def tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended, and `answer` says why

    def answer(self) -> dict[str, Any]:
        """Exits with what the child wrote to standard error when it ended without an answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        raise SystemExit(f"a side ended:\n{self._errors.read_text(errors='replace')[-MAX_ERROR_CHARS:]}")


@contextlib.contextmanager
def side(
    child: Path, arguments: Sequence[str], python_path: Sequence[Path], environment: Mapping[str, str] | None = None
) -> Iterator[Side]:
    """The program `child`, in a folder of its own. python_path: where it imports from, before anything installed."""
    own = {"PYTHONPATH": os.pathsep.join(map(str, python_path)), "HF_HUB_OFFLINE": "1", **(environment or {})}
    with tempfile.TemporaryDirectory(prefix="dphrl-side-") as folder:
        errors = Path(folder, "errors")
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(child), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=folder,
                env={**os.environ, **own},
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Side(process, errors)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A checkout of another revision of this repository. Exits with status 2 where the revision is not known."""
    known = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True
    )
    if known.returncode:
        print(f"--old: {revision} is no revision of {ROOT}", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory(prefix="dphrl-old-") as folder:
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), folder], check=True)
        subprocess.run(["git", "-C", folder, "checkout", "--quiet", "--detach", known.stdout.strip()], check=True)
        yield Path(folder).resolve()
