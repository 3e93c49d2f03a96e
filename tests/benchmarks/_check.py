"""Compares ratios of benchmarks with those that are committed: `python -m tests.benchmarks --check [NAME ...]`.

A time says as much about the machine as about the program. A ratio of two times of one run says little about the
machine, so ratios can be committed. `baselines.json` has one line for each:

    {"benchmark": "logprobs", "ratio": "time_ratio", "better": "lower", "baseline": 1.1, "quick": true}

benchmark, ratio: what is run, and the key of its JSON line. better: "lower" or "higher". baseline: the ratio's value,
or null for one that was never measured, which `--update` fills in. Optional: options, what the benchmark is run with;
quick, whether `--check` without names runs it; tolerance, the share by which the ratio may be worse between two runs of
the same code, with its reason. A ratio that is more than 10 % beyond that has regressed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).with_name("baselines.json")
MARGIN = 0.1
KEYS = ("benchmark", "options", "ratio", "better", "baseline", "quick", "tolerance", "reason")
COLUMNS = ("benchmark", "ratio", "baseline", "now", "change", "")
COMMAND = (sys.executable, "-m", "tests.benchmarks")


class BaselineError(Exception):
    """What is wrong with the file or with a name, in one line."""


@dataclass(frozen=True)
class Baseline:
    """One line of the file."""

    benchmark: str
    ratio: str
    better: str
    baseline: float | None = None
    options: str = ""
    quick: bool = False
    tolerance: float = 0.0
    reason: str = ""

    def worse_by(self, now: float) -> float:
        """The share by which `now` is worse than the baseline; negative when it is better."""
        assert self.baseline
        return now / self.baseline - 1 if self.better == "lower" else self.baseline / now - 1

    def verdict(self, now: float | None) -> str:
        if now is None:
            return "FAILED"
        if self.baseline is None:
            return "new"
        return "REGRESSED" if self.worse_by(now) > self.tolerance + MARGIN else "ok"


def read(path: Path) -> list[Baseline]:
    """Raises BaselineError with the place of what is wrong."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BaselineError(f"{path.name}:{error.lineno}: {error.msg}") from error
    found = []
    for number, row in enumerate(rows, start=1):
        what = f"{path.name}: entry {number}"
        if unknown := row.keys() - set(KEYS):
            raise BaselineError(f"{what}: {', '.join(sorted(unknown))}: no key; there are {', '.join(KEYS)}")
        if missing := {"benchmark", "ratio", "better"} - row.keys():
            raise BaselineError(f"{what}: {', '.join(sorted(missing))} is missing")
        entry = Baseline(**row)
        if entry.better not in ("lower", "higher"):
            raise BaselineError(f"{what}: better: {entry.better!r}; use lower or higher")
        if entry.baseline is not None and not entry.baseline > 0:
            raise BaselineError(f"{what}: baseline: {entry.baseline}; a ratio is above 0, and null before the first")
        if bool(entry.tolerance) != bool(entry.reason):
            raise BaselineError(f"{what}: tolerance and reason come together")
        found.append(entry)
    return found


def write(path: Path, entries: Sequence[Baseline]) -> None:
    """One line an entry, without what it leaves out."""
    lines = []
    for entry in entries:
        values = {key: getattr(entry, key) for key in KEYS}
        shown = {key: value for key, value in values.items() if value or key == "baseline"}
        lines.append("  " + json.dumps(shown, ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def chosen(entries: Sequence[Baseline], names: Sequence[str]) -> list[Baseline]:
    """The entries of these benchmarks; of the quick ones without names. Raises BaselineError for a name without any."""
    if unknown := [name for name in names if all(entry.benchmark != name for entry in entries)]:
        known = ", ".join(dict.fromkeys(entry.benchmark for entry in entries))
        raise BaselineError(f"{', '.join(unknown)}: no such benchmark in baselines.json, which has {known}")
    return [entry for entry in entries if (entry.benchmark in names if names else entry.quick)]


def measure(benchmark: str, options: str, command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """The JSON object of one run, in a process of its own; empty, with the reason on standard error, when it failed."""
    program = [*command, benchmark, "--json", *shlex.split(options)]
    # A session of its own, so that what it has started ends with it.
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            print(f"{benchmark}: no result within {timeout_s:g} s", file=sys.stderr)
            return {}
    last = (out.strip().splitlines() or [""])[-1]
    try:
        result = json.loads(last)
    except json.JSONDecodeError:
        result = None
    if process.returncode or not isinstance(result, dict):
        print(f"{benchmark}: exit status {process.returncode}: {err.strip()[-2000:] or last}", file=sys.stderr)
        return {}
    return result


def value_of(result: dict[str, Any], entry: Baseline) -> float | None:
    value = result.get(entry.ratio)
    if isinstance(value, int | float) and value > 0:
        return float(value)
    if result:
        print(f"{entry.benchmark}: {entry.ratio} is {value!r}, no ratio; it tells {', '.join(result)}", file=sys.stderr)
    return None


def rows_of(entries: Sequence[Baseline], values: Sequence[float | None]) -> list[tuple[str, ...]]:
    rows = []
    for entry, now in zip(entries, values, strict=True):
        allowed = f" (up to {entry.tolerance + MARGIN:.0%}: {entry.reason})" if entry.tolerance else ""
        compared = entry.baseline is not None and now is not None
        shown = (
            "-" if entry.baseline is None else f"{entry.baseline:.4g}",
            "-" if now is None else f"{now:.4g}",
            f"{now / entry.baseline - 1:+.1%}" if compared else "-",
        )
        rows.append((entry.benchmark, entry.ratio, *shown, entry.verdict(now) + allowed))
    return rows


def main(arguments: Sequence[str], path: Path = BASELINES, command: Sequence[str] = COMMAND) -> int:
    """0 when no ratio regressed, 1 when one did or could not be measured, 2 for a name or a file that is not known."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks --check", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks (default: those marked quick)")
    parser.add_argument("--check", action="store_true", help="compare with baselines.json")
    parser.add_argument("--update", action="store_true", help="write what was measured into baselines.json")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one benchmark (default: 600)")
    options = parser.parse_args(arguments)
    # `timeout` sends it, and a benchmark in a session of its own would go on.
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(128 + signal.SIGTERM))
    try:
        entries = read(path)
        mine = chosen(entries, options.names)
    except BaselineError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    results = {
        (name, given): measure(name, given, command, options.timeout)
        for name, given in dict.fromkeys((entry.benchmark, entry.options) for entry in mine)
    }
    values = [value_of(results[entry.benchmark, entry.options], entry) for entry in mine]
    rows = [COLUMNS, *rows_of(mine, values)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if options.update:
        measured = {id(entry): now for entry, now in zip(mine, values, strict=True) if now is not None}
        write(path, [renewed(entry, measured.get(id(entry))) for entry in entries])
        return int(None in values)
    verdicts = [entry.verdict(now) for entry, now in zip(mine, values, strict=True)]
    return int(any(verdict in ("FAILED", "REGRESSED") for verdict in verdicts))


def renewed(entry: Baseline, now: float | None) -> Baseline:
    fields = {key: getattr(entry, key) for key in KEYS}
    return entry if now is None else Baseline(**(fields | {"baseline": float(f"{now:.4g}")}))
