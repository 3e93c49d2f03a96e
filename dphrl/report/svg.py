"""What all charts of the report share: the look of an arm, the plot's frame, axes, the SVG element around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dphrl.report.axes import Axis
from dphrl.report.text import escape

NUM_COLOURS = 8
NUM_DASHES = 4
NUM_MARKERS = 7
TOP_PX, BOTTOM_PX, LEFT_PX = 26.0, 38.0, 44.0


@dataclass(frozen=True)
class Style:
    """How an arm looks in every chart. key: what the legend switches on and off."""

    key: str
    index: int
    is_base: bool = False

    @property
    def css(self) -> str:
        """The classes of an element of this arm: colour, dash, legend switch."""
        colour = "cb" if self.is_base else f"c{self.index % NUM_COLOURS}"
        # Beyond the number of colours, the second round gets other dashes and markers than the first.
        dash = "db" if self.is_base else f"d{(self.index + self.index // NUM_COLOURS) % NUM_DASHES}"
        return f"{colour} {dash} s-{self.key}"

    def marker(self, x: float, y: float, size: float = 4.0) -> str:
        """A filled shape around (x, y)."""
        shape = NUM_MARKERS if self.is_base else (self.index + self.index // NUM_COLOURS) % NUM_MARKERS
        return f'<path class="mark" d="{_marker_path(shape, x, y, size)}"/>'


@dataclass(frozen=True)
class Frame:
    """Where the plot lies within an SVG of width x height."""

    width: float
    height: float
    x: Axis
    y: Axis
    right: float

    def px(self, value: float) -> float:
        """The horizontal position of a value, in pixels from the left."""
        return LEFT_PX + self.x.place(value) * (self.width - LEFT_PX - self.right)

    def py(self, value: float) -> float:
        """The vertical position of a value, in pixels from the top."""
        return self.height - BOTTOM_PX - self.y.place(value) * (self.height - TOP_PX - BOTTOM_PX)


def swatch(style: Style) -> str:
    """The arm's line and marker for a legend or a table."""
    return (
        f'<svg class="swatch" width="30" height="12" aria-hidden="true" focusable="false"><g class="{style.css} shown">'
        f'<path class="line" d="M1 6H29"/>{style.marker(15, 6)}</g></svg>'
    )


def svg_element(title: str, description: str, frame: Frame, parts: Iterable[str], *, interactive: bool) -> str:
    """The SVG around `parts`. interactive: it can be focused, and the script shows a read-out for it."""
    scales = ""
    if interactive:
        box = f"{LEFT_PX:g},{frame.width - frame.right:g}"
        scales = (
            f' tabindex="0" data-chart="" data-box="{box}" data-x="{frame.x.low:g},{frame.x.high:g}'
            f'{",log" if frame.x.is_log else ""}" data-x-label="{escape(frame.x.label)}"'
        )
    return (
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img"{scales}>'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f"{''.join(parts)}</svg>"
    )


def axes(frame: Frame) -> str:
    """Grid lines, ticks, numbers and names of both axes."""
    left, right, bottom = LEFT_PX, frame.width - frame.right, frame.height - BOTTOM_PX
    parts = []
    for value, label in frame.y.ticks:
        level = frame.py(value)
        parts.append(straight("grid", left, level, right, level))
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 6:g}" y="{level + 3.5:.1f}">{label}</text>')
    for value, label in frame.x.ticks:
        at = frame.px(value)
        parts.append(straight("axis", at, bottom, at, bottom + 4))
        parts.append(f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{bottom + 16:g}">{label}</text>')
    parts.append(straight("axis", left, bottom, right, bottom))
    parts.append(f'<text class="name" x="2" y="12">{escape(frame.y.label)}</text>')
    middle, foot = (left + right) / 2, frame.height - 5
    x_name = escape(frame.x.label)
    parts.append(f'<text class="name" text-anchor="middle" x="{middle:.1f}" y="{foot:g}">{x_name}</text>')
    return f'<g class="frame">{"".join(parts)}</g>'


def cursor(frame: Frame) -> str:
    """The vertical line that the read-out moves."""
    return f'<line class="cursor" y1="{TOP_PX:g}" y2="{frame.height - BOTTOM_PX:g}" visibility="hidden"/>'


def straight(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line from (x1, y1) to (x2, y2), in pixels."""
    return f'<path class="{css}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _marker_path(shape: int, x: float, y: float, r: float) -> str:
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        4: [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        5: [(-1.3, -0.4), (1.3, -0.4), (1.3, 0.4), (-1.3, 0.4)],
        6: [(-0.4, -1.3), (0.4, -1.3), (0.4, 1.3), (-0.4, 1.3)],
    }.get(shape)
    if corners is None:
        # A circle; that of the base (the last shape) is a little smaller.
        r = r * (0.8 if shape else 1.0)
        return f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z"
    return "M" + " ".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in corners) + "z"
