"""The program `dphrl`, also as `python -m dphrl`: sees to its own packages, then hands over to the command line.

It lies here because a folder named `cluster` is likelier than one named `dphrl`.
"""

from __future__ import annotations

import sys

from dphrl.own_code import ForeignCodeError, pin
from dphrl.processors import be_a_neighbour


def main() -> None:
    try:
        pin()
    except ForeignCodeError as error:
        print(f"dphrl: error: {error}", file=sys.stderr)
        sys.exit(2)
    be_a_neighbour()
    from cluster.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
