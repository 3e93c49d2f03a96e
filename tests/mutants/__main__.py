"""`python -m tests.mutants`: exit code 0 when every error of the list is noticed by its tests."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.mutants import catalogue, runner

ROOT = catalogue.FOLDER.parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose room, file or sentence matches")
    parser.add_argument("--list", action="store_true", help="print the list and run nothing")
    parser.add_argument("--workers", type=int, default=2, help="how many at once (2)")
    parser.add_argument(
        "--timeout", type=int, default=120, help="seconds of computing after which a loop counts as endless (120)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to copy (this one)")
    parser.add_argument("--catalogue", type=Path, default=catalogue.FOLDER, help="the folder of .yaml lists")
    chosen = parser.parse_args(arguments)
    root = chosen.root.resolve()

    mutants = catalogue.load(chosen.catalogue)
    if chosen.only:
        mutants = catalogue.select(mutants, chosen.only)
    if chosen.list:
        for mutant in mutants:
            print(f"{mutant.room:<10} {mutant.file:<36} {mutant.error}")
        print(f"{len(mutants)} mutants")
        return 0
    if not mutants:
        print(f"no mutant matches {chosen.only!r}")
        return 1
    if wrong := catalogue.complaints(mutants, root):
        print("the list does not apply to this tree:", *wrong, sep="\n  ")
        return 1
    return _run(root, mutants, chosen.workers, chosen.timeout)


def _run(root: Path, mutants: list[catalogue.Mutant], num_workers: int, timeout_s: int) -> int:
    started = time.perf_counter()
    runner.preload(runner.PRELOAD if root == ROOT else ())
    tests = list(dict.fromkeys(name for mutant in mutants for name in mutant.tests))
    with runner.private_copies(root, num_workers) as workers:
        if failed := runner.baseline(workers, tests):
            print(failed, "tests fail on the tree as it is: mend that first", sep="\n")
            return 1
        print(f"baseline: {len(tests)} test files pass, {time.perf_counter() - started:.0f} s", flush=True)
        verdicts = []
        for verdict in runner.judge(workers, mutants, timeout_s):
            mutant = verdict.mutant
            print(f"{verdict.word:<9}{verdict.seconds:5.1f} s  {mutant.file}: {mutant.error}", flush=True)
            if verdict.log:
                print(verdict.log)
            verdicts.append(verdict)
    bad = [verdict for verdict in verdicts if verdict.word != "killed"]
    print(f"{len(verdicts) - len(bad)} of {len(verdicts)} killed, {time.perf_counter() - started:.0f} s")
    for verdict in bad:
        print(f"{verdict.word}: {verdict.mutant.file}: {verdict.mutant.error}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
