"""Exits with 0 when the Ray node of this container answers, or when the container runs none (a plan, an inline run)."""

import sys
import urllib.request
from pathlib import Path

# Every Ray node answers there without a token, unless it was told another port.
URL = "http://127.0.0.1:52365/api/healthz"


def runs_a_node() -> bool:
    """Whether a Ray node (its raylet) runs in this container."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == "raylet":
                return True
        except OSError:  # the process has ended meanwhile
            continue
    return False


def main() -> int:
    """Returns the exit status: 0 for healthy, else 1."""
    if not runs_a_node():
        return 0
    try:
        with urllib.request.urlopen(URL, timeout=10) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{URL}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
