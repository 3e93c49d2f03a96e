"""Bar charts of the report: stacked bars over the steps, and counts of 0, 1, 2, ..."""

from __future__ import annotations

from collections.abc import Sequence

from dphrl.report.axes import Axis, show_number
from dphrl.report.svg import LEFT_PX, TOP_PX, Frame, axes, cursor, svg_element
from dphrl.report.text import escape


def stacked_bars(
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    edges: Sequence[float],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    *,
    size: tuple[float, float] = (420, 210),
) -> str:
    """Bars between `edges` (one more than bars); each of `parts` (name, css class, heights) stands on those before it.

    A bar that exceeds the axis is cut, and its full height is written above it.
    """
    frame = Frame(*size, x, y, right=14)
    drawn = [axes(frame)]
    bottoms = [0.0] * (len(edges) - 1)
    for name, css, heights in parts:
        tops = [low + height for low, height in zip(bottoms, heights, strict=True)]
        pieces = []
        for i, (low, top) in enumerate(zip(bottoms, tops, strict=True)):
            y0, y1 = frame.py(low), frame.py(top)
            if y0 - y1 >= 0.05:
                x0, x1 = frame.px(edges[i]), frame.px(edges[i + 1])
                # Bars that are wide enough have a gap of background between them.
                gap = 0.5 if x1 - x0 > 3 else 0.0
                pieces.append(f"M{x0 + gap:.1f} {y0:.1f}H{x1 - gap:.1f}V{y1:.1f}H{x0 + gap:.1f}z")
        path = "".join(pieces)
        total = ",".join(show_number(height) for height in heights)
        drawn.append(
            f'<g class="part {css}" data-name="{escape(name)}" data-heights="{total}">'
            f'<path class="fill" d="{path}"/><path class="hatch" d="{path}"/></g>'
        )
        bottoms = tops
    for i, top in enumerate(bottoms):
        if top > y.high * 1.001:
            centre = (frame.px(edges[i]) + frame.px(edges[i + 1])) / 2
            anchor = "start" if centre < LEFT_PX + 40 else "middle"
            drawn.append(
                f'<text class="tick" x="{max(centre, LEFT_PX + 2):.1f}" y="{TOP_PX - 2:g}" '
                f'text-anchor="{anchor}">↑ {show_number(top)}</text>'
            )
    shown_edges = ",".join(f"{edge:g}" for edge in edges)
    drawn.append(f'<g class="edges" data-edges="{shown_edges}"/>')
    return svg_element(title, description, frame, [*drawn, cursor(frame)], interactive=True)


def histogram(title: str, description: str, x_label: str, y: Axis, heights: Sequence[int], css: Sequence[str]) -> str:
    """A bar for each of 0, 1, ...; with its count above it unless there are many bars. css: each bar's class."""
    every = 1 + len(heights) // 17
    ticks = tuple((i + 0.5, str(i)) for i in range(0, len(heights), every))
    x = Axis(x_label, 0.0, float(len(heights)), ticks)
    frame = Frame(420, 210, x, y, right=14)
    bars = []
    for i, height in enumerate(heights):
        x0, x1, top = frame.px(i + 0.08), frame.px(i + 0.92), frame.py(height)
        path = f"M{x0:.1f} {frame.py(0):.1f}H{x1:.1f}V{top:.1f}H{x0:.1f}z"
        count = ""
        if len(heights) <= 17:
            count = f'<text class="tick" text-anchor="middle" x="{(x0 + x1) / 2:.1f}" y="{top - 4:.1f}">{height}</text>'
        bars.append(
            f'<g class="part {css[i]}" data-count="{height}"><path class="fill" d="{path}"/>'
            f'<path class="hatch" d="{path}"/>{count}</g>'
        )
    return svg_element(title, description, frame, [axes(frame), *bars], interactive=False)
