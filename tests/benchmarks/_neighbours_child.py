"""One side of `neighbours`: `dphrl train` of a checkout that goes on to its next step when it is told to.

Run by path in a process of its own, with a checkout first on PYTHONPATH and the command's arguments. For each line of
standard input it takes one step and answers with the step's seconds; at its end the run ends. It must run with older
revisions too, so it changes one method only: the one that prints a step's line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


class Ended(BaseException):
    """The other side has no more orders."""


def step_line(console: Any, record: Mapping[str, Any], num_steps: int) -> None:
    print("answer " + json.dumps({"seconds": record["time/step_s"], "step": record["step"]}), flush=True)
    if not sys.stdin.readline():
        raise Ended


def main() -> None:
    checkout = sys.argv[1]
    sys.argv = ["dphrl", *sys.argv[2:]]
    import dphrl.tracking.console

    assert dphrl.tracking.console.__file__.startswith(checkout), dphrl.tracking.console.__file__
    dphrl.tracking.console.Console.step_line = step_line  # type: ignore[method-assign]
    assert "torch" not in sys.modules, "the command decides what is set before torch is loaded"
    from dphrl.__main__ import main as command

    try:
        command()
    except Ended:
        sys.exit(0)


if __name__ == "__main__":
    main()
