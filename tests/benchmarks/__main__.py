"""Runs one benchmark: a table for people, then one JSON object on the last line."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path


def main() -> None:
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_")]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", choices=names, help="which benchmark")
    parser.add_argument("--json", action="store_true", help="the JSON object alone")
    arguments = parser.parse_args()
    result = importlib.import_module(f"tests.benchmarks.{arguments.name}").run()
    if not arguments.json:
        width = max(map(len, result))
        for key, value in result.items():
            print(f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
