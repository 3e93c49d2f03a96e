r"""Sets of real numbers, their operations, and the order of their ends.

A set is a sorted list of cuts. A cut lies just before a number or just after it, and each one changes between outside
and inside; so (1, 2] is [after 1, after 2], and a set and its complement differ only in the cuts at infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cmp_to_key

from mpmath import mp

from dphrl.rewards import math_values
from dphrl.rewards.exact import rational
from dphrl.rewards.math_evaluator import evaluate
from dphrl.rewards.math_parser import Node, parse

_MAX_CUTS = 100
_UNITS = ("%", r"\circ", r"\degree", "\u00b0")


class NoSetError(Exception):
    """The text is no set of real numbers, or nobody can tell which one."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Just before or just after a number, given by its tree and, where it is rational, its value; or at an infinity (-1
    or 1; 0 for numbers), where both are None."""

    infinity: int
    value: Fraction | None
    tree: Node | None
    is_after: bool


@dataclass(frozen=True, slots=True)
class RealSet:
    """`cuts` in order, an even number of them. `variable` is the letter that an inequality is about, "" for none."""

    cuts: tuple[Cut, ...]
    variable: str


def piece(opening: str, low: str, high: str, closing: str) -> RealSet:
    """One interval; ]1, 2[ is the French way to write (1, 2)."""
    lower, upper = _cut(low, opening in "(]"), _cut(high, closing == "]")
    if (lower.infinity and opening == "[") or (upper.infinity and closing == "]"):
        raise NoSetError
    # (2, 1) and (1, 1) are points of the plane.
    if compare(lower, upper) >= 0:
        raise NoSetError
    return RealSet((lower, upper), "")


def points(numbers: Sequence[str]) -> RealSet:
    """A finite set."""
    sets = [RealSet((_cut(number, False), _cut(number, True)), "") for number in numbers]
    if not sets or any(each.cuts[0].infinity for each in sets):
        raise NoSetError
    return union(sets)


def _cut(text: str, is_after: bool) -> Cut:
    infinity = {r"\infty": 1, r"+\infty": 1, r"-\infty": -1}.get("".join(text.split()), 0)
    if infinity:
        return Cut(infinity, None, None, False)
    if any(unit in text for unit in _UNITS):
        raise NoSetError
    value = rational(text)
    if value is not None:
        return Cut(0, value, Node("div", (_whole(value.numerator), _whole(value.denominator))), is_after)
    tree = parse(text)
    if math_values.names(tree):
        raise NoSetError
    return Cut(0, None, tree, is_after)


def _whole(number: int) -> Node:
    node = Node("number", text=str(abs(number)))
    return Node("neg", (node,)) if number < 0 else node


# ------------------------------------------------------------ operations


def compare(a: Cut, b: Cut) -> int:
    """-1, 0 or 1. Raises NoSetError where the end points have no order, and TooLarge."""
    if a.infinity or b.infinity:
        return (a.infinity > b.infinity) - (a.infinity < b.infinity)
    order = _compare_ends(a, b)
    return order or a.is_after - b.is_after


def _compare_ends(a: Cut, b: Cut) -> int:
    if a.value is not None and b.value is not None:
        return (a.value > b.value) - (a.value < b.value)
    if a.tree is None or b.tree is None:
        raise NoSetError
    if a.tree == b.tree:
        return 0
    for digits in (40, 300):
        with mp.workdps(digits):
            low, high = evaluate(a.tree, {}, True), evaluate(b.tree, {}, True)
            if isinstance(low, tuple) or isinstance(high, tuple) or not (mp.isfinite(low) and mp.isfinite(high)):
                raise NoSetError
            if abs(low - high) > mp.mpf(10) ** -30 * max(abs(low), abs(high)) or digits == 300:
                return 1 if low > high else -1
        if math_values.same_value(a.tree, b.tree):
            return 0
    raise AssertionError("the second look decides")


def _compare_changes(a: tuple[Cut, int], b: tuple[Cut, int]) -> int:
    return compare(a[0], b[0])


def _combined(sets: Sequence[tuple[Cut, ...]], num_needed: int) -> tuple[Cut, ...]:
    """The numbers that lie in at least `num_needed` of the sets."""
    changes = [(cut, 1 - 2 * (index % 2)) for cuts in sets for index, cut in enumerate(cuts)]
    if len(changes) > _MAX_CUTS:
        raise NoSetError
    changes.sort(key=cmp_to_key(_compare_changes))
    cuts: list[Cut] = []
    depth = 0
    for cut, change in changes:
        was_inside, depth = depth >= num_needed, depth + change
        if was_inside != (depth >= num_needed):
            # A piece that ends where the next one begins goes on.
            if cuts and compare(cuts[-1], cut) == 0:
                cuts.pop()
            else:
                cuts.append(cut)
    return tuple(cuts)


def union(sets: Sequence[RealSet]) -> RealSet:
    return RealSet(_combined([each.cuts for each in sets], 1), _common_variable(sets))


def intersection(sets: Sequence[RealSet]) -> RealSet:
    return RealSet(_combined([each.cuts for each in sets], len(sets)), _common_variable(sets))


def difference(sets: Sequence[RealSet]) -> RealSet:
    """The first set without the others."""
    cuts = [sets[0].cuts, *(complement(each.cuts) for each in sets[1:])]
    return RealSet(_combined(cuts, len(cuts)), _common_variable(sets))


def complement(cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    low, high = Cut(-1, None, None, False), Cut(1, None, None, False)
    changed = cuts[1:] if cuts and cuts[0].infinity else (low, *cuts)
    return changed[:-1] if cuts and cuts[-1].infinity else (*changed, high)


def is_all(found: RealSet) -> bool:
    return len(found.cuts) == 2 and all(cut.infinity for cut in found.cuts)


def _common_variable(sets: Sequence[RealSet]) -> str:
    variables = {each.variable for each in sets} - {""}
    if len(variables) > 1:
        raise NoSetError
    return next(iter(variables), "")
