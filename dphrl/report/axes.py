"""Scales, ticks and numbers of the report's charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A scale from values to [0, 1] with its tick marks. label says what and in which unit."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at low, 1 at high; values beyond them are clamped. On a log axis, values <= 0 lie at the lower end."""
        if self.is_log:
            # Zero has no place on a log axis; the lower end is the nearest.
            value = math.log(max(value, self.low))
            share = (value - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def show_number(value: float) -> str:
    """At most four significant digits, without trailing zeros: 0.5432, 1234, 1.2e-06."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    if abs(value) >= 10_000 or abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        if abs(value) < 1e-4:
            return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
        return f"{value:,.0f}"
    return f"{value:.4g}"


def linear_axis(label: str, values: Iterable[float], *, floor: float | None = None, cap: float | None = None) -> Axis:
    """An axis over the range of the values with a margin of 5 %; it goes no lower than floor and no higher than cap.

    floor=0 does not force zero onto the axis: a curve between 0.90 and 0.95 should fill its chart.
    """
    found = [value for value in values if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    # Values that differ only by rounding count as one value.
    is_constant = high - low <= 1e-9 * max(abs(low), abs(high))
    margin = (0.05 * abs(high) or 0.5) if is_constant else 0.05 * (high - low)
    low, high = low - margin, high + margin
    if floor is not None and low < floor:
        low = floor
    if cap is not None and high > cap:
        high = cap
    if high <= low:
        high = low + 1.0
    step = _nice_step((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    ticks = [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, tuple((tick, _tick_label(tick, step)) for tick in ticks))


def step_axis(label: str, last: float) -> Axis:
    """Training steps from 0 to the last one; whole numbers only."""
    high = max(1.0, last)
    step = max(1.0, _nice_step(high / 6))
    ticks = [i * step for i in range(int(high / step) + 1)]
    return Axis(label, 0.0, high, tuple((tick, f"{tick:,.0f}") for tick in ticks))


def k_axis(label: str, last: int) -> Axis:
    """k from 1 on, logarithmic, with ticks at the powers of two and at the last k."""
    ticks = [2**i for i in range(last.bit_length()) if 2**i <= last]
    # A tick close to the last one would be printed over it.
    if ticks[-1] != last:
        ticks = [tick for tick in ticks if tick * 1.5 <= last] + [last]
    return Axis(label, 1.0, float(max(2, last)), tuple((float(tick), str(tick)) for tick in ticks), is_log=True)


def log_axis(label: str, values: Iterable[float]) -> Axis:
    """A log axis between whole powers of ten around the positive values; a linear axis when there are none."""
    found = [value for value in values if math.isfinite(value) and value > 0]
    if not found:
        return linear_axis(label, [0.0, 1.0], floor=0.0)
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    high = max(high, low + 1)
    every = 1 + (high - low) // 6
    ticks = tuple((10.0**e, _power_label(e)) for e in range(low, high + 1, every))
    return Axis(label, 10.0**low, 10.0**high, ticks, is_log=True)


def thin_out(points: Sequence[tuple[float, float | None]], limit: int = 400) -> list[int]:
    """Indices of at most about `limit` points that keep the look of the curve: the lowest and the highest point of each
    stretch, the ends, and the gaps (None)."""
    if len(points) <= limit:
        return list(range(len(points)))
    num_buckets = max(1, limit // 2 - 1)
    kept = {0, len(points) - 1}
    for bucket in range(num_buckets):
        begin, end = bucket * len(points) // num_buckets, (bucket + 1) * len(points) // num_buckets
        present = [(y, i) for i in range(begin, end) if (y := points[i][1]) is not None]
        if present:
            kept |= {min(present)[1], max(present)[1]}
        if len(present) < end - begin:
            kept.add(next(i for i in range(begin, end) if points[i][1] is None))
    return sorted(kept)


def _nice_step(rough: float) -> float:
    """`rough` rounded up to 1, 2 or 5 times a power of ten."""
    if rough <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)


def _tick_label(tick: float, step: float) -> str:
    if abs(tick) >= 10_000:
        return f"{tick:,.0f}"
    if 0 < step < 1e-4:
        return show_number(tick)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:.{digits}f}"


def _power_label(exponent: int) -> str:
    if -3 < exponent < 4:
        return f"{10.0**exponent:g}"
    return f"1e{exponent}"
