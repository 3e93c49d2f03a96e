"""The report's line charts as inline SVG: curves with bands and their names at their ends.

Colours and dashes come from the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dphrl.report.axes import Axis, show_number, thin_out
from dphrl.report.statistics import Band
from dphrl.report.svg import BOTTOM_PX, LEFT_PX, TOP_PX, Frame, Style, axes, cursor, straight, svg_element
from dphrl.report.text import escape

# Labels at the ends of curves: width of a character, greatest length, distance between two labels; and how early a
# curve must end to have its label there instead of at the right edge.
LABEL_CHAR_PX = 7.0
MAX_LABEL_CHARS = 18
LABEL_GAP_PX = 13.0
EARLY_END_PX = 40.0


@dataclass(frozen=True)
class Line:
    """One curve. raw: the values before smoothing, drawn faintly. marked: the xs with a marker; the end has one too."""

    name: str
    style: Style
    band: Band
    raw: Band | None = None
    marked: frozenset[float] = frozenset()
    # Shown beside each x in the read-out if x is no step and no k, such as "step 40".
    notes: Sequence[str] = ()


def line_chart(
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    *,
    size: tuple[float, float] = (420, 250),
    is_plane: bool = False,
    bound: tuple[float, str] | None = None,
    marks: Sequence[float] = (),
) -> str:
    """Curves with their names at their ends. bound: a horizontal line with its name. marks: upright lines, by their x.

    is_plane: x is not time. A curve may end anywhere, its name stands at its end, and the diagonal y = x is drawn.
    """
    longest = max((min(len(line.name), MAX_LABEL_CHARS) for line in lines), default=0)
    frame = Frame(*size, x, y, right=18 + LABEL_CHAR_PX * longest)
    parts = [axes(frame)]
    if is_plane:
        low, high = max(x.low, y.low), min(x.high, y.high)
        if low < high:
            ends = (frame.px(low), frame.py(low), frame.px(high), frame.py(high))
            parts.append(straight("guide", *ends))
    if bound and y.low <= bound[0] <= y.high:
        level = frame.py(bound[0])
        parts.append(straight("guide", LEFT_PX, level, frame.width - frame.right, level))
        parts.append(f'<text class="tick" x="{LEFT_PX + 4:g}" y="{level - 4:.1f}">{escape(bound[1])}</text>')
    for mark in marks:
        parts.append(straight("guide", frame.px(mark), TOP_PX, frame.px(mark), frame.height - BOTTOM_PX))
    # Bands are drawn first, because a band must not dim the line of another curve.
    parts += [f'<g class="{line.style.css}">{_band_path(frame, line.band)}</g>' for line in lines]
    parts += [_curve(frame, line) for line in lines]
    parts.append(_end_labels(frame, lines, beside_points=is_plane))
    return svg_element(title, description, frame, [*parts, cursor(frame)], interactive=True)


def _curve(frame: Frame, line: Line) -> str:
    kept = thin_out(list(zip(line.band.xs, line.band.ys, strict=True)))
    band = _select(line.band, kept)
    faint = ""
    if line.raw is not None:
        raw = _select(line.raw, thin_out(list(zip(line.raw.xs, line.raw.ys, strict=True))))
        faint = f'<path class="raw" d="{_path(frame, raw.xs, raw.ys)}"/>'
    marks = [
        line.style.marker(frame.px(x), frame.py(y), 3.2)
        for x, y in zip(band.xs, band.ys, strict=True)
        if y is not None and x in line.marked
    ]
    points = " ".join(
        ",".join(show_number(v).replace(",", "") for v in (x, y, low, high) if v is not None)
        for x, y, low, high in _rows(band)
        if y is not None
    )
    notes = f' data-notes="{escape("|".join(line.notes))}"' if line.notes else ""
    return (
        f'<g class="series {line.style.css}" data-name="{escape(line.name)}" data-points="{points}"{notes}>'
        f'{faint}<path class="line" d="{_path(frame, band.xs, band.ys)}"/>{"".join(marks)}</g>'
    )


def _end_labels(frame: Frame, lines: Sequence[Line], *, beside_points: bool) -> str:
    """Each curve's name beside its last point or at the right edge, moved apart where they would overlap."""
    ends = []
    for line in lines:
        present = [(x, y) for x, y in zip(line.band.xs, line.band.ys, strict=True) if y is not None]
        if present:
            ends.append((frame.py(present[-1][1]), frame.px(present[-1][0]), line))
    ends.sort(key=lambda end: end[0])
    levels = spread([end[0] for end in ends], LABEL_GAP_PX, TOP_PX, frame.height - BOTTOM_PX + 4)
    parts = []
    for (y, x, line), level in zip(ends, levels, strict=True):
        # The curve of a run that stopped early has its name where it ends, not at the edge across other curves.
        edge = frame.width - frame.right
        start = (x if beside_points or edge - x > EARLY_END_PX else edge) + 12
        name = line.name if len(line.name) <= MAX_LABEL_CHARS else f"{line.name[: MAX_LABEL_CHARS - 1]}…"
        leader = "" if start - x < 14 and abs(level - y) < 2 else straight("leader", x + 5, y, start - 2, level)
        parts.append(
            f'<g class="{line.style.css}">{leader}{line.style.marker(x, y)}'
            f'<text class="label" x="{start:.1f}" y="{level + 4:.1f}">{escape(name)}</text></g>'
        )
    return "".join(parts)


def spread(levels: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """The ascending levels, moved so that they lie `gap` apart, between top and bottom while there is room."""
    placed: list[float] = []
    for level in levels:
        placed.append(max(level, top, placed[-1] + gap if placed else top))
    limit = bottom
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _band_path(frame: Frame, band: Band) -> str:
    rows = [_rows(band)[i] for i in thin_out(list(zip(band.xs, band.ys, strict=True)))]
    upper = [(x, high) for x, _, low, high in rows if low is not None and high is not None]
    lower = [(x, low) for x, _, low, high in rows if low is not None and high is not None]
    if len(upper) < 2:
        return ""
    outline = " ".join(f"{frame.px(x):.1f} {frame.py(v):.1f}" for x, v in [*upper, *reversed(lower)])
    return f'<path class="band" d="M{outline}z"/>'


def _path(frame: Frame, xs: Sequence[float], ys: Sequence[float | None]) -> str:
    pieces, pen_is_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            pieces.append(f"{'L' if pen_is_down else 'M'}{frame.px(x):.1f} {frame.py(y):.1f}")
        pen_is_down = y is not None
    return "".join(pieces)


def _rows(band: Band) -> list[tuple[float, float | None, float | None, float | None]]:
    nothing = [None] * len(band.xs)
    return list(zip(band.xs, band.ys, band.low or nothing, band.high or nothing, strict=True))


def _select(band: Band, indices: Sequence[int]) -> Band:
    def pick(values: Sequence[float | None] | None) -> list[float | None] | None:
        return None if values is None else [values[i] for i in indices]

    xs, ys = [band.xs[i] for i in indices], [band.ys[i] for i in indices]
    return replace(band, xs=xs, ys=ys, low=pick(band.low), high=pick(band.high))
