"""Rational numbers read exactly, and one spelling for what TeX spells in many ways."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dphrl.rewards.exact import TooLarge, canonical, rational, tidy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1,234,567", Fraction(1234567)),
        (r"11,\! 111,\! 100", Fraction(11111100)),
        ("-0.50", Fraction(-1, 2)),
        (r"\$5.10", Fraction(51, 10)),
        (r"-\frac{2}{3}", Fraction(-2, 3)),
        (r"\frac12", Fraction(1, 2)),
        (r"\dfrac1{3}", Fraction(1, 3)),
        (r"2\frac{3}{4}", Fraction(11, 4)),
        ("2 3/4", Fraction(11, 4)),
        ("2^{2^3}", Fraction(256)),
        ("-2^2", Fraction(-4)),
        ("(-2)^2", Fraction(4)),
        ("2^{-99}", Fraction(1, 2**99)),
        (r"2^{99}\cdot 2", Fraction(2**100)),
        ("5!/3", Fraction(40)),
        ("12(3+1)", Fraction(48)),
        ("1/0", None),
        ("0^0", None),
        ("2^{1/2}", None),
        ("3 4", None),
        ("(1,200)", None),
        ("x", None),
        ("1.5e3", Fraction(1500)),
        ("2E-7", Fraction(2, 10**7)),
        (r"1.5 \times 10^3", Fraction(1500)),
        ("1 000 000", Fraction(1_000_000)),
        (r"14{ , }916", Fraction(14916)),
        (r"{3 \over 4}", Fraction(3, 4)),
        ("1 2", None),
        ("2e^5", None),
        ("((1)", None),
    ],
)
def test_rational_reads_exactly(answer: str, expected: Fraction | None) -> None:
    assert rational(tidy(answer)) == expected


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "10^{10^{10}}", "99999999!", "(2^{9999})^{9999}", "2^{-10^9}"])
def test_a_number_bomb_is_recognised_before_it_is_computed(answer: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TooLarge):
        rational(tidy(answer))
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\left( 1 , 2 \right)", "(1,2)"),
        (r"\tfrac{1}{2}", r"\frac12"),
        ("x_{1}", "x_1"),
        (r"\text{odd}", "odd"),
        (r"a \leq b", "a<=b"),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_canonical_spelling(left: str, right: str) -> None:
    assert canonical(tidy(left)) == canonical(tidy(right))


@given(st.fractions(), st.integers(min_value=0, max_value=6))
def test_every_spelling_of_a_fraction_has_its_value(value: Fraction, num_zeros: int) -> None:
    numerator, denominator = value.numerator, value.denominator
    spellings = [
        str(value),
        rf"\dfrac{{{numerator}}}{{{denominator}}}",
        rf"-\frac{{{-numerator}}}{{{denominator}}}",
        rf"\left( {numerator} \right) / {denominator}.{'0' * num_zeros}",
        f"{numerator:,}" + rf" \div {denominator:,}",
    ]
    assert [rational(tidy(spelling)) for spelling in spellings] == [value] * len(spellings)


@given(st.text(max_size=100))
def test_any_text_can_be_tidied(text: str) -> None:
    canonical(tidy(text))
