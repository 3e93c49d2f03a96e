"""Sets of real numbers: what is read, against membership of points; and texts that are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dphrl.rewards.exact import TooLarge, tidy
from dphrl.rewards.math_compare import compare
from dphrl.rewards.math_set_text import read, same
from dphrl.rewards.math_sets import Cut, RealSet
from dphrl.types import RewardStatus

# The ends of all sets below are halves, so points a quarter apart lie in every piece, on every end and between.
GRID = [Fraction(quarter, 4) for quarter in range(-18, 19)]


@dataclass(frozen=True)
class Spelled:
    text: str
    has: Callable[[Fraction], bool]

    def members(self) -> list[Fraction]:
        return [point for point in GRID if self.has(point)]


def members(found: RealSet) -> list[Fraction]:
    """A point is inside when the number of cuts before it is odd."""

    def is_before(cut: Cut, point: Fraction) -> bool:
        if cut.value is None:
            return cut.infinity < 0
        return cut.value < point or (cut.value == point and not cut.is_after)

    return [point for point in GRID if sum(is_before(cut, point) for cut in found.cuts) % 2]


def spell(number: Fraction, is_decimal: bool) -> str:
    return str(float(number)) if is_decimal else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


HALVES = st.integers(-8, 8).map(lambda n: Fraction(n, 2))


@st.composite
def intervals(draw: st.DrawFn) -> Spelled:
    low, high = sorted(draw(st.lists(HALVES, min_size=2, max_size=2, unique=True)))
    closed_low, closed_high, style = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 4))
    left, right = spell(low, draw(st.booleans())), spell(high, draw(st.booleans()))

    def above(x: Fraction) -> bool:
        return x > low or (closed_low and x == low)

    def below(x: Fraction) -> bool:
        return x < high or (closed_high and x == high)

    signs = (r"\le" if closed_low else "<"), (r"\le" if closed_high else "<")
    if style == 0:
        return Spelled(rf"(-\infty,{right}{']' if closed_high else ')'}", below)
    if style == 1:
        return Spelled(rf"\{{x \mid {left} {signs[0]} x\}}", above)
    if style == 2:
        return Spelled(rf"\{{t : {left} {signs[0]} t {signs[1]} {right}\}}", lambda x: above(x) and below(x))
    text = f"{'[' if closed_low else '('}{left}, {right}{']' if closed_high else ')'}"
    return Spelled(text, lambda x: above(x) and below(x))


POINTS = st.lists(HALVES, min_size=1, max_size=3).map(
    lambda found: Spelled(r"\{" + ", ".join(str(float(x)) for x in found) + r"\}", lambda x: x in found)
)
REALS = st.sampled_from([Spelled(r"\mathbb{R}", lambda x: True), Spelled(r"\emptyset", lambda x: False)])


def combined(parts: tuple[Spelled, Spelled, str]) -> Spelled:
    a, b, sign = parts
    decide: dict[str, Callable[[Fraction], bool]] = {
        r"\cup": lambda x: a.has(x) or b.has(x),
        r"\cap": lambda x: a.has(x) and b.has(x),
        r"\setminus": lambda x: a.has(x) and not b.has(x),
    }
    return Spelled(rf"({a.text} {sign} {b.text})", decide[sign])


SETS = st.recursive(
    st.one_of(intervals(), POINTS, REALS),
    lambda inner: st.tuples(inner, inner, st.sampled_from([r"\cup", r"\cap", r"\setminus"])).map(combined),
    max_leaves=7,
)


@settings(max_examples=250, deadline=None)
@given(SETS)
def test_a_set_has_the_members_that_its_text_says(spelled: Spelled) -> None:
    found = read(tidy(spelled.text))
    assert found is not None, spelled.text
    assert members(found) == spelled.members()


@settings(max_examples=250, deadline=None)
@given(SETS, SETS)
def test_two_sets_are_the_same_where_their_members_are(a: Spelled, b: Spelled) -> None:
    found = same(tidy(a.text), tidy(b.text))
    assert found is None or found == (a.members() == b.members())


@settings(max_examples=100, deadline=None)
@given(SETS)
def test_a_set_differs_from_itself_without_a_point(spelled: Spelled) -> None:
    inside = spelled.members()
    double = tidy(rf"{spelled.text} \cup {spelled.text}")
    assert same(double, tidy(spelled.text)) is True
    if inside:
        assert same(double, tidy(rf"{spelled.text} \setminus \{{{inside[0]}\}}")) is False


# (one text, another): the same set, in both directions.
SAME = [
    (r"x\ne\pm1", r"\mathbb{R}\setminus\{-1,1\}"), (r"x\neq -1, 1", r"\mathbb{R}\setminus\{-1,1\}"),
    (r"x \neq 0, 2", r"(-\infty,0)\cup(0,2)\cup(2,\infty)"), (r"\mathbb{R}\setminus\{\pm1\}", r"x\ne -1,1"),
    (r"\text{all real numbers except } x = 1", r"x\ne1"), (r"\mathbb{R} \text{ except } 1", r"x\ne 1"),
    (r"\text{All real numbers except 1 and 2}", r"x\ne1,2"), (r"(-\infty,\infty) \setminus \{1\}", r"x\ne1"),
    (r"R\setminus\{1\}", r"x\ne 1"), (r"\mathbb{R}/\{1\}", r"x\ne1"), (r"\mathbb{R}\setminus 1", r"x\ne1"),
    (r"\text{all } x \ne 1", r"x\ne1"), (r"(-\infty, 1) \bigcup (1,\infty)", r"x\ne 1"), ("[2,2]", r"\{2\}"),
    (r"\{1,2\}\cup\{2,3\}", r"\{1,2,3\}"), (r"\{x \mid x=2\}", r"\{2\}"), (r"x = 1, 2", r"\{1,2\}"),
    (r"(-\infty,-\sqrt2)\cup(\sqrt2,\infty)", r"|x|>\sqrt2"), (r"\{x\in[0,5] \mid x>2\}", "(2,5]"),
]  # fmt: skip
DIFFERENT = [
    (r"x\ne\pm1", r"x\ne1"), (r"x\ne 1,2", "1,2"), (r"x\ne 1,2", r"x\ne 1"), (r"x\ne 1,2", r"\mathbb{R}\setminus[1,2]"),
    (r"x\ne 1, y", r"\mathbb{R}\setminus\{1\}"), (r"\{1,2\}\cup\{2,3\}", r"\{1,3\}"), ("[2,2]", "(2,2)"),
    ("R", r"\mathbb{R}"), (r"(-\infty,1)\cup(1,\infty)", r"\mathbb{Q}\setminus\{1\}"), (r"x^2\ne1", r"x\ne1"),
    (r"2x\ne 2", r"x\ne 2"), (r"\{x \mid x<3\}", r"\{x \mid x<3, x>0\}"), ("x<1, x>3", "x>3"),
    (r"R\setminus\{1\}", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "expected"), [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_texts_of_sets(a: str, b: str, expected: bool) -> None:
    assert (compare(a, b).status is RewardStatus.CORRECT) is expected
    assert (compare(b, a).status is RewardStatus.CORRECT) is expected


@pytest.mark.parametrize(
    "text",
    [
        "(2,1)", "[1,1)", "(1,1)", r"(1,2)\cup(2,1)", r"[-\infty,3)", r"(3,\infty]", "(a,b)", r"(a,b)\cup(b,c)", "5",
        "x", "x=", r"\mathbb{Z}", r"\mathbb{R}\setminus\mathbb{Z}", r"\{n\in\mathbb{N} \mid n<3\}", "x^2<4", "|x|<-3",
        "|x|<y", "x<y", "1<x>2", r"\{x+1 \mid x<3\}", r"\{x \mid y<3\}", r"[1,2]\cup[3,4]\cap[0,9]",
        r"(1,2)\setminus(1,3)\cup(0,1)", r"(1,i)", r"(0,\frac{1}{0})\cup(1,2)", "x<1 or y>3", "1,2", "x=1, x=2",
        r"\cup", "", "(1,2,3)", r"x \ne", "not 5", r"\{\frac\}",
    ],
)  # fmt: skip
def test_texts_that_are_no_set_of_real_numbers(text: str) -> None:
    found = read(text)
    assert found is None


def test_ends_are_compared_without_tolerance() -> None:
    assert same(r"(0,\sqrt{8})\cup(3,4)", r"(0,2\sqrt{2})\cup(3,4)") is True
    assert same(r"(0,\sqrt{2})\cup(3,4)", r"(0,\sqrt{2}+10^{-50})\cup(3,4)") is False
    assert same(r"(0,\pi]\cup(\pi,4)", "(0,4)") is True
    assert same(r"(0,\pi)\cup(\pi+10^{-100},4)", r"(0,4)\setminus\{\pi\}") is False


def test_a_union_of_many_pieces_ends_soon() -> None:
    pieces = r"\cup".join(rf"(\sqrt{{{n}}},\sqrt{{{n + 1}}}]" for n in range(40))
    assert compare(pieces, r"(0,\sqrt{40}]").status is RewardStatus.CORRECT
    assert read(r"\cup".join(f"({n},{n + 1})" for n in range(60))) is None
    with pytest.raises(TooLarge):
        read(r"(0,9^{9^9})\cup(1,2)")
