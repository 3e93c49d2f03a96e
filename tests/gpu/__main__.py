"""Runs the parts one by one, each in a process of its own, and prints one table.

    python -m tests.gpu                  every part, those that need torch alone first (8 minutes on one H200)
    python -m tests.gpu head mask        some parts
    python -m tests.gpu --small          tiny sizes; the torch parts also run on a CPU with it, to try the script itself

Exit status 0 when every part that could run was right, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.gpu.parts import PARTS, Part, missing

# The whole must end within this; a part that would begin later is left out, and the table says so.
BUDGET_S = 8 * 60.0


@dataclass(frozen=True)
class Outcome:
    """state: ok, FAILED, or why the part did not run. seen: figures, or the last line of the error."""

    name: str
    state: str
    seconds: float
    seen: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which ({', '.join(PARTS)}); all when none is named")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script itself; runs on a CPU too")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="begin no part after so many seconds")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if arguments.inside:
        print(json.dumps(PARTS[arguments.parts[0]].run(arguments.small)))
        return 0
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for name in arguments.parts or PARTS:
        left = arguments.budget_s - (time.monotonic() - began)
        outcomes.append(_run(PARTS[name], left, small=arguments.small))
        print(f"{name}: {outcomes[-1].state}", file=sys.stderr, flush=True)
    print("\n".join(_line(outcome) for outcome in outcomes))
    print(_machine())
    return 1 if any(outcome.state == "FAILED" for outcome in outcomes) else 0


def _run(part: Part, left_s: float, *, small: bool) -> Outcome:
    if reason := missing(part, small=small):
        return Outcome(part.name, "not run", 0.0, reason)
    if left_s <= 0:
        return Outcome(part.name, "not run", 0.0, "no time left")
    command = [sys.executable, "-m", "tests.gpu", part.name, "--inside", *(["--small"] if small else [])]
    began = time.monotonic()
    # A session of its own, so that what a part started ends with it, and the next part finds the GPU free.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=min(part.limit_s, left_s))
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome(part.name, "FAILED", time.monotonic() - began, f"not done after {error.timeout:.0f} s")
    seconds = time.monotonic() - began
    if process.returncode:
        return Outcome(part.name, "FAILED", seconds, _last_line(stderr))
    return Outcome(part.name, "ok", seconds, _figures(json.loads(_last_line(stdout))))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _figures(found: dict[str, float | str]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    return ", ".join(f"{name} {text}" for name, text in shown.items())


def _line(outcome: Outcome) -> str:
    return f"{outcome.name:<14} {outcome.state:<8} {outcome.seconds:6.1f} s  {outcome.seen}"


def _machine() -> str:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{device}, {torch.cuda.device_count()} of them, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
