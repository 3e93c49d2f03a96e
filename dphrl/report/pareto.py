"""Pass@1 against Pass@k with a point for each seed: for the report's page, and as a file of its own for a suite."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dphrl.config.loading import InputError
from dphrl.experiments.pareto import Point, choose_k, front, hypervolumes, methods_of, points_of
from dphrl.experiments.results import BASE_ARM, DOMAINS, Results, rows_of
from dphrl.outputs import check_output, save_output
from dphrl.report.axes import linear_axis
from dphrl.report.charts import LABEL_CHAR_PX, LABEL_GAP_PX, MAX_LABEL_CHARS, spread
from dphrl.report.figures import figure, name_of, note, style_of
from dphrl.report.runs import Arm, DatasetKey
from dphrl.report.statistics import pass_keys, trained_summaries
from dphrl.report.svg import BOTTOM_PX, TOP_PX, Frame, Style, axes, straight, svg_element
from dphrl.report.tables import OWN_SETTINGS, flatten
from dphrl.report.text import escape

SIZE = (520.0, 360.0)
# The page's light colours and lines, for a file that no style sheet comes with.
_COLOURS = ("#0072b2", "#d55e00", "#008060", "#b3478f", "#b98200", "#3f8fd6", "#7a4b20", "#6a5acd")
_BASE_COLOUR = "#55595f"
_STYLE = """text { font: 11px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #1c1c1e; }
.tick, .name { fill: #5f6368; } .title { font-weight: 600; }
path.grid { stroke: #d9dce1; stroke-width: .7; fill: none; }
.axis, .guide, .leader { stroke: #5f6368; fill: none; } .guide { stroke-dasharray: 1 3; } .leader { stroke-width: .6; }
.line { fill: none; stroke-width: 1.9; } .mark { stroke: #fff; stroke-width: .6; } .mark.mean { stroke: #1c1c1e; }
.d1 .line { stroke-dasharray: 7 3; } .d2 .line { stroke-dasharray: 2.5 2.5; } .d3 .line { stroke-dasharray: 9 3 2 3; }
"""


def pareto_svg(results: Results, domain: str, k: int, styles: Mapping[str, Style], title: str) -> str:
    """The chart of one domain; styles: how each arm looks. "" without a point.

    Small marks are seeds, and a large one with the arm's name is their mean. A line joins the means of the arms that
    differ in eta alone, by rising eta. The dotted staircase is the front of the means: no arm lies above it.
    """
    by_arm: dict[str, list[Point]] = {}
    for point in points_of(results, domain, k):
        by_arm.setdefault(point.arm, []).append(point)
    if not by_arm:
        return ""
    means = {arm: _mean(points) for arm, points in by_arm.items()}
    every = [(100 * point.x, 100 * point.y) for points in by_arm.values() for point in points]
    x = linear_axis("Pass@1, % of prompts", [one[0] for one in every], floor=0.0, cap=100.0)
    y = linear_axis(f"Pass@{k}, % of prompts", [one[1] for one in every], floor=0.0, cap=100.0)
    longest = max(min(len(arm), MAX_LABEL_CHARS) for arm in by_arm)
    frame = Frame(*SIZE, x, y, right=24 + LABEL_CHAR_PX * longest)
    parts = [axes(frame), _staircase(frame, front(means.values()))]
    parts += [_joined(frame, of_method, means, styles) for of_method in _methods(by_arm)]
    for arm, points in by_arm.items():
        style = styles[arm]
        dots = "".join(style.marker(frame.px(100 * p.x), frame.py(100 * p.y), 2.6) for p in points)
        shown = " ".join(f"{100 * p.x:.2f},{100 * p.y:.2f}" for p in points)
        parts.append(f'<g class="{style.css} seeds" data-name="{escape(arm)}" data-seeds="{shown}">{dots}</g>')
    parts.append(_labels(frame, means, styles))
    description = "; ".join(f"{arm} {100 * mx:.1f}, {100 * my:.1f}" for arm, (mx, my) in means.items())
    return svg_element(
        title, f"Means over seeds of Pass@1 and Pass@{k}, %: {description}.", frame, parts, interactive=False
    )


def _mean(points: Sequence[Point]) -> tuple[float, float]:
    return statistics.fmean(point.x for point in points), statistics.fmean(point.y for point in points)


def _methods(by_arm: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """The arms of each method with several etas, by rising eta."""
    methods: dict[str, list[str]] = {}
    for arm, points in by_arm.items():
        if points[0].eta is not None:
            methods.setdefault(points[0].method, []).append(arm)
    etas = {arm: points[0].eta or 0.0 for arm, points in by_arm.items()}
    return [sorted(arms, key=etas.__getitem__) for arms in methods.values() if len(arms) > 1]


def _joined(
    frame: Frame, arms: Sequence[str], means: Mapping[str, tuple[float, float]], styles: Mapping[str, Style]
) -> str:
    places = [f"{frame.px(100 * means[arm][0]):.1f} {frame.py(100 * means[arm][1]):.1f}" for arm in arms]
    named = escape(" ".join(arms))
    return (
        f'<g class="{styles[arms[0]].css} joined" data-arms="{named}"><path class="line" d="M{"L".join(places)}"/></g>'
    )


def _staircase(frame: Frame, corners: Sequence[tuple[float, float]]) -> str:
    """The border of what the points dominate, from the left edge of the plot to its lower edge."""
    if not corners:
        return ""
    path = f"M{frame.px(frame.x.low):.1f} {frame.py(100 * corners[0][1]):.1f}"
    for corner, following in zip(corners, [*corners[1:], None], strict=True):
        level = frame.py(frame.y.low) if following is None else frame.py(100 * following[1])
        path += f"H{frame.px(100 * corner[0]):.1f}V{level:.1f}"
    return f'<path class="guide" d="{path}"/>'


def _labels(frame: Frame, means: Mapping[str, tuple[float, float]], styles: Mapping[str, Style]) -> str:
    ends = sorted((frame.py(100 * y), frame.px(100 * x), arm) for arm, (x, y) in means.items())
    levels = spread([end[0] for end in ends], LABEL_GAP_PX, TOP_PX, frame.height - BOTTOM_PX + 4)
    parts = []
    for (y, x, arm), level in zip(ends, levels, strict=True):
        name = arm if len(arm) <= MAX_LABEL_CHARS else f"{arm[: MAX_LABEL_CHARS - 1]}…"
        leader = "" if abs(level - y) < 2 else straight("leader", x + 5, y, x + 10, level)
        mark = styles[arm].marker(x, y, 4.6).replace('class="mark"', 'class="mark mean"')
        text = f'<text class="label" x="{x + 12:.1f}" y="{level + 4:.1f}">{escape(name)}</text>'
        parts.append(f'<g class="{styles[arm].css}">{leader}{mark}{text}</g>')
    return "".join(parts)


# -------------------------------------------------------------------------------------------- the page


def pareto_figure(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """The chart of the newest evaluations of every arm and base on `dataset`, with each method's hypervolume."""
    rows: list[Any] = []
    for arm in arms:
        for run in arm.runs:
            step = 0 if arm.is_base else run.last_evaluated_step
            summary = run.evaluations.get(-1 if step is None else step, {}).get(dataset)
            if summary is not None:
                rows += rows_of(arm.name, run.seed, [{"num_samples": 0, **summary}])
    found = {arm.name: arm for arm in arms if any(row["arm"] == arm.name for row in rows)}
    keys = [set(pass_keys([summary])) for arm in found.values() for summary in trained_summaries(arm, dataset)]
    ks = sorted(int(key.removeprefix("pass@")) for key in set.intersection(*keys)) if keys else []
    if len(ks) < 2 or ks[0] != 1:
        return note(f"{name_of(dataset)}: evaluation.k gives no second k to set against Pass@1.")
    settings = {
        name: {key: value for key, value in flatten(arm.runs[0].config) if key not in OWN_SETTINGS}
        for name, arm in found.items()
        if not arm.is_base
    }
    results: Results = {"arms": dict.fromkeys(found), "rows": rows, "k": ks, "methods": methods_of(settings)}
    k = choose_k(results)
    styles = {name: style_of(arm) for name, arm in found.items()}
    title = f"A point for each seed: Pass@1 and Pass@{k} on {name_of(dataset)}"
    svg = pareto_svg(results, DOMAINS[0], k, styles, title)
    if not svg:
        return ""
    volumes = hypervolumes(results, DOMAINS[0], k)
    said = "; ".join(f"{method} {_volume(volume)}" for method, volume in volumes.items())
    caption = (
        "Small: seeds. Large: their mean. Arms that differ in eta alone are joined, the dotted line is the front of "
        f"the means. Hypervolume above the origin, of all etas of a method: {said}."
    )
    return figure(name_of(dataset), caption, svg, "large")


def _volume(found: Mapping[str, Any]) -> str:
    cell = found["cell"]
    half = (cell["high"] - cell["low"]) / 2
    return f"{cell['mean']:.3f}" + (f" ±{half:.3f}" if half else "")


# -------------------------------------------------------------------------------------------- a file


def write_pareto(results: Results, path: Path, k: int | None = None) -> None:
    """Write the charts of a suite's results, in and out of domain side by side, as one SVG file.

    k: which Pass@k stands against Pass@1; None for 16, or the largest. The same results give the same bytes. Raises
    InputError for a k that the results lack, another kind of file, or one that cannot be written.
    """
    if path.suffix != ".svg":
        raise InputError(f"{path}: the picture is SVG; give a name that ends in .svg")
    check_output(path)
    try:
        k = choose_k(results, k)
    except ValueError as error:
        raise InputError(str(error)) from None
    arms = list(results["arms"])
    styles = {
        arm: Style("b0", 0, is_base=True) if arm == BASE_ARM else Style(f"a{i}", i - 1) for i, arm in enumerate(arms)
    }
    charts = []
    for domain in (domain for domain in DOMAINS if domain in results["arms"][BASE_ARM]):
        names = dict.fromkeys(row["dataset"] for row in results["rows"] if row["domain"] == domain)
        title = f"{results['suite']}, {domain.replace('_', ' ')}: {', '.join(names)}"
        charts.append((title, pareto_svg(results, domain, k, styles, title)))
    save_output(path, _standalone([chart for chart in charts if chart[1]]))


def _standalone(charts: Sequence[tuple[str, str]]) -> str:
    width, height = SIZE[0] * len(charts), SIZE[1] + 22
    colours = "\n".join(
        f".{css} .mark {{ fill: {colour}; }} .{css} .line {{ stroke: {colour}; }}"
        for css, colour in [*((f"c{i}", colour) for i, colour in enumerate(_COLOURS)), ("cb", _BASE_COLOUR)]
    )
    parts = []
    for place, (title, svg) in enumerate(charts):
        left = place * SIZE[0]
        parts.append(f'<text class="title" x="{left + 4:g}" y="14">{escape(title)}</text>')
        parts.append(svg.replace("<svg ", f'<svg x="{left:g}" y="22" width="{SIZE[0]:g}" height="{SIZE[1]:g}" ', 1))
    size = f'width="{width:g}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:g} {height:g}">\n'
        f"<style>{_STYLE}{colours}</style>\n"
        f'<rect {size} fill="#fff"/>\n{chr(10).join(parts)}\n</svg>\n'
    )
