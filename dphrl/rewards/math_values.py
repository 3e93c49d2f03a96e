r"""Whether two trees stand for the same value: both are computed at the same points, to many digits.

Two expressions that agree in 220 digits at every point tried count as equal; expressions that differ at one point do
not. A difference counts as rounding only when it shrinks as the precision grows. Unlike rewriting one expression into
the other, this always ends, and it ends soon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mpmath import mp

from dphrl.rewards.exact import TooLarge
from dphrl.rewards.math_evaluator import Point, Undefined, Value, coordinate, evaluate, shape
from dphrl.rewards.math_parser import Node

_LOW_DIGITS, _HIGH_DIGITS, _HIGHEST_DIGITS = 40, 120, 240
_NUM_POINTS, _MAX_TRIES = 4, 16
# Near zero a piecewise function is the same as one of its pieces: |x - 5| is 5 - x there. So such functions are also
# compared at points far from zero, each given as (scale, whole).
_PIECEWISE = frozenset(["abs", "floor", "ceil", "root", "pow", "factorial", "double_factorial"])
_FAR_POINTS = ((7, False), (50, False), (1000, False), (4, True), (20, True), (100, True))
# (scale, number): an absolute value may make a difference on a short stretch alone.
_NEAR_ABS = ((4, 80), (12, 80))


def same_value(a: Node, b: Node) -> bool:
    """Whether both have the same value at every point tried; False if both are defined at none of them.

    Raises TooLarge for values beyond MAX_BITS.
    """
    if not _same_signs(a, b):
        return False
    seen = 0
    for values in _at_points(a, b, _LOW_DIGITS):
        if not _same_at(a, b, *values):
            return False
        seen += 1
    return seen > 0


def _same_signs(a: Node, b: Node) -> bool:
    r"""Whether an absolute value on one side alone makes no difference where its argument is negative: \ln|x| has a
    value there and \ln x has none, and |x^2 - 9x + 20| differs from its argument between 4 and 5 alone."""
    letters = sorted(names(a) | names(b))
    if not letters or "i" in letters or ("abs" in _kinds(a)) == ("abs" in _kinds(b)):
        return True
    with mp.workdps(_LOW_DIGITS):
        for scale, number in _NEAR_ABS:
            for index in range(number):
                point = {name: coordinate(name, index, True, scale) for name in letters}
                at_a, at_b = _value_or_none(a, point), _value_or_none(b, point)
                if (at_a is None) != (at_b is None):
                    return False
                if at_a is not None and not isinstance(at_a, tuple) and not isinstance(at_b, tuple):
                    distance, size = _distance(at_a, at_b)
                    if size is None or distance > mp.mpf(10) ** -15 * max(size, 1):
                        return False
    return True


def _value_or_none(tree: Node, point: Point) -> Value:
    try:
        return evaluate(tree, point, True)
    except (Undefined, TooLarge):
        return None


def proportional(a: Node, b: Node) -> int:
    """The sign of c where a = c b at every point with the same real c != 0; 0 where there is none."""
    ratio: Value = None
    for _, _, at_a, at_b in _at_points(a, b, 2 * _LOW_DIGITS):
        if isinstance(at_a, tuple) or isinstance(at_b, tuple) or at_a == 0 or at_b == 0:
            return 0
        with mp.workdps(2 * _LOW_DIGITS):
            here = at_a / at_b
            if mp.im(here) or (ratio is not None and abs(here - ratio) > mp.mpf(10) ** -_LOW_DIGITS * abs(ratio)):
                return 0
        ratio = here
    return 0 if ratio is None else 1 if mp.re(ratio) > 0 else -1


def _same_at(a: Node, b: Node, point: Callable[[], Point], real: bool, at_a: Value, at_b: Value) -> bool:
    with mp.workdps(_LOW_DIGITS):
        low, scale = _distance(at_a, at_b)
        if scale is None:
            return False
        # The values are so far apart that rounding cannot explain it.
        if scale > mp.mpf(10) ** -20 and low > scale * mp.mpf(10) ** -20:
            return False
    high, scale = _distance_at(a, b, point, real, _HIGH_DIGITS)
    if scale is None:
        return False
    with mp.workdps(_HIGH_DIGITS):
        near = high <= scale * mp.mpf(10) ** -80
        if not near and low != 0:
            return bool(high <= low * mp.mpf(10) ** -60)
    highest, scale = _distance_at(a, b, point, real, _HIGHEST_DIGITS)
    if scale is None:
        return False
    with mp.workdps(_HIGHEST_DIGITS):
        # Where the value itself is zero, both results are only rounding errors, and these shrink.
        return bool(highest <= scale * mp.mpf(10) ** -220 or (not near and highest <= high * mp.mpf(10) ** -60))


def _distance_at(a: Node, b: Node, point: Callable[[], Point], real: bool, digits: int) -> tuple[Value, Value]:
    with mp.workdps(digits):
        here = point()
        try:
            return _distance(evaluate(a, here, real), evaluate(b, here, real))
        except Undefined:
            return mp.inf, None


def _distance(a: Value, b: Value) -> tuple[Value, Value]:
    """(distance, magnitude of the larger); the magnitude is None for values that cannot be compared."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        if not (isinstance(a, tuple) and isinstance(b, tuple)) or shape(a) != shape(b):
            return mp.inf, None
        pairs = [_distance(x, y) for rows in zip(a, b, strict=True) for x, y in zip(*rows, strict=True)]
        if any(scale is None for _, scale in pairs):
            return mp.inf, None
        # The largest relative distance counts, so that large entries do not hide small ones.
        return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else 0)
    if mp.isnan(a) or mp.isnan(b):
        return mp.inf, None
    if mp.isinf(a) or mp.isinf(b):
        return (mp.mpf(0), mp.mpf(1)) if a == b else (mp.inf, None)
    return abs(a - b), max(abs(a), abs(b))


def _at_points(a: Node, b: Node, digits: int) -> Iterator[tuple[Callable[[], Point], bool, Value, Value]]:
    """(point, whether real, value of a, value of b) where both are defined: with real numbers only if that gives any
    point, else with complex numbers too."""
    letters = sorted(names(a) | names(b))
    num_found = 0
    imaginary = "i" in letters
    letters = [name for name in letters if name != "i"]
    far = bool(letters) and bool((_kinds(a) | _kinds(b)) & _PIECEWISE)
    for real in (False,) if imaginary else (True, False):
        # The first two points are positive, where roots and logarithms have values.
        near_points = [(index, index >= 2, 1, False) for index in range(_MAX_TRIES if letters else 1)]
        far_points = [(i, signed, scale, whole) for i, (scale, whole) in enumerate(_FAR_POINTS) for signed in (0, 1)]
        for group, wanted in ((near_points, _NUM_POINTS), (far_points if far else [], len(far_points))):
            num_here = 0
            for settings in group:

                def point(settings: tuple[int, int, int, bool] = settings) -> Point:
                    return _point(letters, *settings)

                with mp.workdps(digits):
                    here = point()
                    try:
                        values = evaluate(a, here, real), evaluate(b, here, real)
                    except Undefined:
                        continue
                    except TooLarge:
                        # The point is too far from zero for this expression; near zero it must have a value.
                        if group is far_points:
                            continue
                        raise
                yield point, real, *values
                num_found += 1
                num_here += 1
                if num_here == wanted:
                    break
        if num_found:
            return


def _point(names: Sequence[str], index: int, signed: int, scale: int, whole: bool) -> Point:
    if scale == 1:
        return {name: coordinate(name, index, bool(signed)) for name in names}
    # Far from zero all coordinates are positive, or with `signed` all are negative.
    return {name: (-1 if signed else 1) * coordinate(name, index, False, scale, whole) for name in names}


def _kinds(tree: Node) -> set[str]:
    return {tree.kind}.union(*map(_kinds, tree.children))


def names(tree: Node) -> set[str]:
    """The letters in a tree that are no constants; "i" is among them."""
    if tree.kind == "name":
        return set() if tree.text in ("e", r"\pi", r"\infty") else {tree.text}
    return set().union(*map(names, tree.children)) if tree.children else set()
