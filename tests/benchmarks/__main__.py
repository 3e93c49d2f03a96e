"""Runs one benchmark: a table for people, then one JSON object on the last line. `--check [NAME ...]` compares ratios
with the committed ones: see `--check --help`."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

from tests.benchmarks import _check


def main() -> None:
    if {"--check", "--update"} & set(sys.argv[1:]):
        sys.exit(_check.main(sys.argv[1:]))
    # setup_time is called `setup`; a module of that name would be taken for the packaging's.
    found = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_")]
    modules = {name.removesuffix("_time"): name for name in found}
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        epilog=(
            "Some have options of their own. setup: --old REVISION, --new REVISION, --rounds N; "
            "grader_change: --old REVISION, --rounds N, --pairs N; weights: --shards N, --rounds N; "
            "attention_mask: --tokens N, --layers N, --rounds N, --dtype NAME; "
            "weight_sync: --old REVISION, --rounds N, --engines N, --width N, --chunk-mib N, --model DIR; "
            "e2e_vs_trl: --dtype NAME, --small, --rounds N, --peer-rows N, --peer-weights NAME, --peer-keeps-memory; "
            "rollout_overhead: --model NAME, --dtype NAME, --rounds N; "
            "tail: --old REVISION, --rounds N, --stages N, --prompts N, --chunk N, --answers NAME; "
            "controller: --engines N, --completions N, --steps N; "
            "idle_share: --engines N ..., --staleness K ..., --concurrency N, --waves X, --learn X, --steps N; "
            "overlap: --rounds N, --steps N, --prompts N, --staleness N, --on-update NAME; "
            "neighbours: --old REVISION, --rounds N, --steps N, --busy-steps N, --busy N, --spin COUNT, --seconds N; "
            "zero_advantage: --old REVISION, --rounds N, --layers N, --groups N; "
            "shared_prefix: --old REVISION, --rounds N, --layers N, --groups N, --only NAME; "
            "divergence_cost: --rounds N, --layers N; micro_batches: --rows N, --layers N, --rounds N; "
            "checkpoint_cost: --rounds N, --layers N, --groups N."
        ),
    )
    parser.add_argument("name", choices=modules, help="which benchmark")
    parser.add_argument("--json", action="store_true", help="the JSON object alone")
    arguments, rest = parser.parse_known_args()
    module = importlib.import_module(f"tests.benchmarks.{modules[arguments.name]}")
    options = [module.parse(rest)] if hasattr(module, "parse") else []
    if rest and not options:
        parser.error(f"{arguments.name} takes no {' '.join(rest)}")
    result = module.run(*options)
    if not arguments.json:
        width = max(map(len, result))
        for key, value in result.items():
            print(f"{key:<{width}}  {value:.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
