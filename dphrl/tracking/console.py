"""What a run prints on standard output: progress, one line per step, tables. Errors belong on standard error.

On a terminal, long work has a progress bar; in a pipe or a log file, it prints a few plain lines.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger(__name__)

# A plain line of progress is printed when this share of the work is new, but not sooner than the pause after the last
# line. Slow work prints a line after each heartbeat, to show that it is alive.
PLAIN_SHARE = 0.1
PLAIN_PAUSE_S = 5.0
PLAIN_HEARTBEAT_S = 60.0
_STEP = re.compile(r"step +(\d+)/(\d+)((?:  .*)?)$")


class Advance(Protocol):
    """Call with the number of units newly done, and of the tokens that were sampled for them, if any."""

    def __call__(self, count: int = 1, num_tokens: int = 0, /) -> None: ...


class Console:
    """Prints a run's own messages. Tasks may overlap; their bars share one display.

    stream: None means standard output. interactive: whether to draw bars; with None, bars are drawn on a
    terminal only.
    """

    def __init__(self, stream: IO[str] | None = None, *, interactive: bool | None = None) -> None:
        self._rich = RichConsole(file=stream or sys.stdout, force_terminal=interactive, highlight=False)
        self._interactive = self._rich.is_terminal
        self._progress: Progress | None = None

    def info(self, message: str) -> None:
        """Print one message; a live bar stays below it."""
        # rich would read brackets in a str as markup; in a Text it does not.
        self._print(Text(message))
        # run.log gets every message too, because the terminal's output may be lost.
        log.info("%s", message)

    def step_line(self, record: Mapping[str, Any], num_steps: int) -> None:
        self.info(format_step(record, num_steps))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print an aligned table: columns of numbers to the right, None as -. Lines are never wrapped."""
        self._print(Text(title, style="bold"))
        self._print(Text(format_table(columns, rows)))
        log.info("%s\n%s", title, format_table(columns, rows))

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show progress of `total` units (None: not known). Yields the function to call with newly done units."""
        manager = self._bar(description, total) if self._interactive else self._plain(description, total)
        with manager as advance:
            yield advance

    def _print(self, text: Text) -> None:
        self._rich.print(text, soft_wrap=True)
        # A redirected stream is block-buffered, but someone who follows the file should see this now.
        self._rich.file.flush()

    @contextmanager
    def _bar(self, description: str, total: int | None) -> Iterator[Advance]:
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
            )
            self._progress = Progress(*columns, console=self._rich, transient=False)
            self._progress.start()
        progress = self._progress
        task_id = progress.add_task(description, total=total, speed="")
        speed = _Speed()

        def advance(count: int = 1, num_tokens: int = 0, /) -> None:
            progress.update(task_id, advance=count, speed=speed.told(num_tokens))

        try:
            yield advance
        finally:
            progress.stop_task(task_id)
            # rich allows only one live display at a time, so the last task that ends closes it.
            if all(task.stop_time is not None for task in progress.tasks):
                progress.stop()
                self._progress = None

    @contextmanager
    def _plain(self, description: str, total: int | None) -> Iterator[Advance]:
        progress = _PlainProgress(self, description, total)
        try:
            yield progress.advance
        except BaseException:
            progress.say(" (stopped)")
            raise
        progress.say()


class _Speed:
    """Tokens a second since it was made."""

    def __init__(self) -> None:
        self._started, self._num_tokens = time.monotonic(), 0

    def told(self, num_new: int = 0) -> str:
        """As text, with so many tokens more; "" as long as there are none."""
        self._num_tokens += num_new
        took_s = max(time.monotonic() - self._started, 1e-3)
        return f"{self._num_tokens / took_s:.0f} tok/s" if self._num_tokens else ""


class _PlainProgress:
    """Decides when a task prints a line."""

    def __init__(self, console: Console, description: str, total: int | None) -> None:
        self._console, self._description, self._total = console, description, total
        self._done = self._said_done = 0
        self._started = self._said_at = time.monotonic()
        self._speed = _Speed()

    def advance(self, count: int = 1, num_tokens: int = 0, /) -> None:
        self._done += count
        self._speed.told(num_tokens)
        pause = time.monotonic() - self._said_at
        enough = self._total is not None and self._done - self._said_done >= PLAIN_SHARE * self._total
        # The last line is printed when the task is closed.
        if self._done != self._total and pause >= (PLAIN_PAUSE_S if enough else PLAIN_HEARTBEAT_S):
            self.say()

    def say(self, suffix: str = "") -> None:
        now = time.monotonic()
        self._said_done, self._said_at = self._done, now
        took = now - self._started
        of = left = ""
        if self._total:
            of = f"/{self._total} ({100 * self._done / self._total:.0f} %)"
            if 0 < self._done < self._total and not suffix:
                left = f", about {took / self._done * (self._total - self._done):.0f} s left"
        speed = f"  {told}" if (told := self._speed.told()) else ""
        self._console.info(f"{self._description}  {self._done}{of}  {took:.1f} s{left}{speed}{suffix}")


class WarningHandler(logging.Handler):
    """Prints warnings of our own packages on standard error, one line each, above a live bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


def format_step(record: Mapping[str, Any], num_steps: int) -> str:
    """`step  12/60  reward 0.531  loss 0.0123  div 0.0041  gap 2e-07  mean gap 3e-08  1520 tok/s  2.1 s (41% waiting)`.

    Absent metrics are left out. tok/s: completion tokens of the step divided by the time of the whole step.
    waiting: the share of that time in which the learner waited for graded rollouts.
    """
    width = len(str(num_steps))
    parts = [f"step {record['step']:>{width}}/{num_steps}"]
    for label, name, style in (
        ("reward", "reward/mean", ".3f"),
        ("loss", "policy/loss", ".4f"),
        ("div", "divergence/loss", ".4f"),
        ("gap", "sync/logprob_gap_max", ".0e"),
        ("mean gap", "sync/logprob_gap_mean", ".0e"),
    ):
        if name in record:
            parts.append(f"{label} {record[name]:{style}}")
    seconds = record.get("time/step_s")
    if seconds and "rollout/num_tokens" in record:
        parts.append(f"{record['rollout/num_tokens'] / seconds:.0f} tok/s")
    if seconds is not None:
        waiting = f" ({record['time/waiting_share']:.0%} waiting)" if "time/waiting_share" in record else ""
        parts.append(f"{seconds:.1f} s{waiting}")
    return "  ".join(parts)


def read_step(line: str) -> dict[str, float] | None:
    """What a line of `format_step` tells, by the metrics' names, with `num_steps`; None for another line. Rounded."""
    found = _STEP.match(line)
    if found is None:
        return None
    parts = [part.rpartition(" ") for part in found[3].split("  ") if part]
    named = {label: number for label, _, number in parts}
    told = {
        name: float(named[label])
        for label, name in (("reward", "reward/mean"), ("gap", "sync/logprob_gap_max"))
        if label in named
    }
    if took := re.search(r"  (\d+\.\d) s(?: \(|$)", line):
        told["time/step_s"] = float(took[1])
    return {"step": float(found[1]), "num_steps": float(found[2]), **told}


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table as text, with two spaces between columns. Floats get three decimals, None becomes -."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    right = [
        bool(rows) and all(value is None or isinstance(value, int | float) for value in column)
        for column in (list(zip(*rows, strict=True)) or [()] * len(columns))
    ]
    lines = [
        "  ".join(
            text.rjust(width) if flush_right else text.ljust(width)
            for text, width, flush_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [list(columns), ["-" * width for width in widths], *cells]
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
