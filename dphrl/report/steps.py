"""Bars of what a step consists of: seconds by phase, completions by status. And a histogram of the reference split."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from dphrl.report.axes import Axis, linear_axis, step_axis
from dphrl.report.bars import histogram, stacked_bars
from dphrl.report.figures import figure, last_step, note
from dphrl.report.runs import Arm, ReferenceSplit, Run
from dphrl.report.statistics import series
from dphrl.report.text import escape
from dphrl.types import RewardStatus

MAX_BARS = 50
# The first step warms the engines up, and may take many times as long as a later one. From this ratio on its bar is
# cut, and its height is written above it.
OUTLIER_RATIO = 1.5
PHASES = (("rollout", "p0"), ("reward", "p1"), ("learn", "p2"), ("sync", "p3"), ("other", "p4"))
STATUS_CSS = {
    RewardStatus.CORRECT: "p2",
    RewardStatus.WRONG: "p4",
    RewardStatus.UNPARSABLE: "p1",
    RewardStatus.REFUSED: "p3",
    RewardStatus.TIMEOUT: "p0",
    RewardStatus.RESOURCE_LIMIT: "p5",
    RewardStatus.INFRASTRUCTURE_ERROR: "p6",
}
# Name -> step -> value, of one run.
Parts = Mapping[str, Mapping[int, float]]


def time_figures(arms: Sequence[Arm]) -> str:
    """Seconds of a step by phase, a chart per arm on one scale."""
    per_arm = {arm.name: [phases(run) for run in arm.runs if run.metrics] for arm in arms}
    css = dict(PHASES)
    return _stacked(arms, per_arm, css, "seconds a step", "where the time of a step goes")


def status_figures(arms: Sequence[Arm]) -> str:
    """Completions of a step by status, a chart per arm on one scale; only statuses that occur."""
    per_arm = {
        arm.name: [
            {s.value: series(run, f"reward/status/{s}") for s in RewardStatus} for run in arm.runs if run.metrics
        ]
        for arm in arms
    }
    occurring = {
        status.value: css
        for status, css in STATUS_CSS.items()
        if any(any(run[status.value].values()) for runs in per_arm.values() for run in runs)
    }
    never = [status.value for status in RewardStatus if status.value not in occurring]
    text = note(f"Never: {', '.join(never).replace('_', ' ')}.") if never and occurring else ""
    return _stacked(arms, per_arm, occurring, "completions a step", "completions of a step by status") + text


def phases(run: Run) -> dict[str, dict[int, float]]:
    """Seconds of every phase by step; `other` is the part of the step that belongs to no phase, never negative."""
    measured = {name: series(run, f"time/{name}_s") for name, _ in PHASES if name != "other"}
    whole = series(run, "time/step_s")
    other = {step: max(0.0, total - sum(m.get(step, 0.0) for m in measured.values())) for step, total in whole.items()}
    return {**measured, "other": other}


def _stacked(
    arms: Sequence[Arm], per_arm: Mapping[str, Sequence[Parts]], css: Mapping[str, str], unit: str, what: str
) -> str:
    last = last_step(arms)
    if not last or not css:
        return note("No step was recorded.")
    num_bars = min(last, MAX_BARS)
    edges = [round(i * last / num_bars) for i in range(num_bars + 1)]
    heights = {
        arm: {part: _means(edges, [run[part] for run in runs]) for part in css} for arm, runs in per_arm.items() if runs
    }
    totals = [[sum(bar) for bar in zip(*parts.values(), strict=True)] for parts in heights.values()]
    high = max(max(bars) for bars in totals)
    later = max((bar for bars in totals for bar in bars[1:]), default=high)
    if 0 < later * OUTLIER_RATIO < high:
        high = later
    y = linear_axis(unit, [0.0, high], floor=0.0)
    charts = []
    for arm in arms:
        if arm.name not in heights:
            charts.append(figure(arm.name, "No step was recorded.", "", "empty"))
            continue
        parts = heights[arm.name]
        shares = {part: sum(values) for part, values in parts.items()}
        whole = sum(shares.values()) or 1.0
        described = ", ".join(f"{part.replace('_', ' ')} {100 * share / whole:.1f} %" for part, share in shares.items())
        drawn = [(part.replace("_", " "), css[part], values) for part, values in parts.items()]
        svg = stacked_bars(
            f"{arm.name}: {what}", f"Over all steps: {described}.", step_axis("training step", last), y, edges, drawn
        )
        charts.append(figure(arm.name, f"Over all steps: {described}.", svg))
    binned = note(f"Each bar is the mean of {last / num_bars:.3g} steps on average.") if num_bars < last else ""
    return f'{_key(css)}{binned}<div class="grid small">{"".join(charts)}</div>'


def _means(edges: Sequence[int], runs: Sequence[Mapping[int, float]]) -> list[float]:
    """The mean over the steps after each edge up to the next, and over runs; 0 where there are none."""
    means = []
    for begin, end in itertools.pairwise(edges):
        values = [run[step] for run in runs for step in range(begin + 1, end + 1) if step in run]
        means.append(statistics.fmean(values) if values else 0.0)
    return means


def _key(css: Mapping[str, str]) -> str:
    # In the order in which the bars are stacked: the last part lies on top.
    patch = '<path class="fill" d="M0 0H16V12H0z"/><path class="hatch" d="M0 0H16V12H0z"/>'
    items = "".join(
        f'<li><svg class="patch {style}" width="16" height="12" aria-hidden="true">{patch}</svg>'
        f"{escape(name.replace('_', ' '))}</li>"
        for name, style in css.items()
    )
    return f'<ul class="key" aria-label="Parts, from the bottom up">{items}</ul>'


def split_figure(owners: str, split: ReferenceSplit, num_samples: int, threshold: int) -> str:
    """How many prompts have 0, 1, ... K correct and complete responses; prompts from the threshold on are rehearsed."""
    heights = [0] * (num_samples + 1)
    for complete, graded in zip(split.num_complete, split.num_graded, strict=True):
        if graded:
            heights[min(complete, num_samples)] += 1
    css = ["p2" if i >= threshold else ("p1" if i == 0 else "p4") for i in range(num_samples + 1)]
    y: Axis = linear_axis("prompts", [0.0, 1.08 * max(heights)], floor=0.0)
    counted = ", ".join(f"{count} with {i}" for i, count in enumerate(heights))
    label = f"correct and complete of {num_samples} responses"
    svg = histogram(f"Reference split of {owners}", f"Prompts by {label}: {counted}.", label, y, heights, css)
    return figure(owners, f"Near-perfect from {threshold} on (green), if all have a verdict; none hatched.", svg)
