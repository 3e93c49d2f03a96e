r"""Answers as models write them, beside what only looks like them: dressed formulas, signs that lead to a result, names
that order their values, numerals, dates, bounds in prose."""

from __future__ import annotations

import pytest

from dphrl.rewards.extraction import find_auto
from dphrl.rewards.math_compare import compare
from dphrl.types import RewardStatus
from tests.unit.answer_pairs import both_ways

# (one answer, another), equal in both directions.
EQUAL = {
    "fonts around formulas": [
        (r"\mathbf{\frac34}", "0.75"), (r"\text{$\frac34$}", "3/4"), (r"\textbf{$x^2$}", "x^2"),
        (r"\rm{\frac12}", "0.5"),
        (r"\mathbf{y=2x+1}", "y=2x+1"), (r"x=\mathbf{\frac34}", r"\frac34"), (r"\mathbf{\{1,2\}}", r"\{1,2\}"),
        (r"\mathbf{5\text{ cm}}", "5"), (r"\textcolor{red}{\mathbf{\sqrt2}}", r"\sqrt2"), ("{(1,2)}", "(1,2)"),
        (r"{\Large (1,2)}", "(1,2)"), ("{[1,2)}", "[1,2)"),
        (r"\style{color:red}{7}", "7"), (r"\class{a}{7}", "7"), (r"\framebox{7}", "7"),
        (r"\enclose{box}{\frac12}", "0.5"), ("5\\ ", "5"), (r"5\text{.}", "5"), (r"\>5", "5"),
    ],
    "environments of one line": [
        (r"\begin{aligned} 7 \end{aligned}", "7"), (r"\begin{equation}\frac34\end{equation}", "0.75"),
        (r"\begin{array}{c}(1,2)\end{array}", "(1,2)"), (r"\begin{center}7\end{center}", "7"),
    ],
    "signs that lead to a result": [
        ("=6", "6"), ("&= 6", "6"), (r"\implies x=6", "6"), (r"\Rightarrow (1,2)", "(1,2)"), (r"\\ 6", "6"),
        (r"\ge 3", r"x\ge 3"), (r"\le 3", r"\leq 3"),
    ],
    "names": [
        ("a=1,b=2", "1,2"), ("b=2,a=1", "1,2"), ("x=1,2", "x=2,x=1"), ("x_1=2,x_2=3", "3,2"), ("A(1,2)", "(1,2)"),
        ("(1;2)", "(1,2)"), (r"\{(1,2)\}", "(1,2)"), ("x^2C_1", "C_1x^2"),
    ],
    "numbers": [
        ("C(5,2)", "10"), ("^5C_2", "10"), ("{}^5C_2", "10"), ("{}_{5}C_{2}", "10"), ("5C2", "10"), ("^5P_2", "20"),
        ("negative 5", "-5"), (r"\text{minus }5", "-5"), (r"\text{negative 5 meters}", "-5"), ("0b1010", "1010_2"),
        ("0xA3", "A3_{16}"), ("a3_{16}", "A3_{16}"), ("01010_2", "1010_2"), (r"\text{1010 in binary}", "1010_2"),
        ("18 dollars and 90 cents", "18.90"), (r"18\text{ dollars and }9\text{ cents}", r"\$18.09"),
        ("12 more apples", "12"), (r"\text{approximately }12", "12"), ("about 12", "12"),
        ("1.5 x 10^8", r"1.5\cdot10^8"),
        (r"12\text{th}", "12"), (r"|A|=12", "12"), (r"\overline{AB}=12", "12"), (r"12\;345", "12345"),
    ],
    "words": [
        ("no solution", r"\emptyset"), ("no solutions", r"\{\}"), ("20 June", "June 20th"),
        ("June 20, 2020", "20 June 2020"),
        ("all positive real numbers", r"(0,\infty)"), ("all integers", r"\mathbb{Z}"), (r"D\quad 4", "D"),
    ],
    "sets": [
        (r"(-\infty,1),(1,\infty)", r"(-\infty,1)\cup(1,\infty)"), (r"(-\infty,1)U(1,\infty)", r"x\ne1"),
    ],
    "absolute values": [
        ("|x|", r"\sqrt{x^2}"), (r"2\ln|x|", r"\ln x^2"), ("|x^2+1|", "x^2+1"),
    ],
}  # fmt: skip

UNEQUAL = {
    "dress that means something": [
        ("{1,2}", "(1,2)"), ("{(1,2),(3,4)}", "(1,2,3,4)"), (r"\mathbf{\frac34}", r"\frac43"), (r"\mathrm{3x}", "3"),
        (r"\begin{array}{c}1\\2\end{array}", "12"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\text{x}", "5"),
    ],
    "signs that are no lead": [
        (r"\ne 6", "6"), (r"\ge 6", "6"), ("> 6", "6"), (r"\to 6", "6"), (r"\ge 3", "> 3"), (r"\ge 3", r"x\le 3"),
        (r"5\approx 6", "5"),
    ],
    "names": [
        ("a=1,b=2", "2,1"), ("x=1,y=2", "x=1,2"), ("x=1,y=2", "2,1"), ("A(1,2)", "B(1,2)"), ("A(1,2)", "(2,1)"),
        ("x^2C_1", "2x"), ("5C_1", "5"), ("f(1,2)", "(1,2)"),
    ],
    "numbers": [
        ("C(5,2)", "20"), ("5C2", "5"), ("negative 5", "5"), ("0b1010", "1010"), ("A3_{16}", "A4_{16}"),
        ("18 dollars and 9 cents", "18.90"), ("5 more than 6", "5"), ("5 more dozen", "5"),
        (r"12\;13", "1213"), (r"\text{at least }12", "12"), ("-=6", "6"),
    ],
    "words": [
        ("no solution", "0"), ("20 June", "June 21"), ("20 June", "20 July"), ("June 20, 2020", "June 20, 2021"),
        ("all positive real numbers", r"\mathbb{R}"),
    ],
    "sets": [
        (r"\{1\},\{2\}", r"\{1,2\}"), (r"\{(1,2)\}", r"\{1,2\}"), (r"(1,2),(3,4)", r"(1,2)\cup(3,5)"),
    ],
    "absolute values": [
        (r"|\frac{b+6}{b+7}|", r"\frac{b+6}{b+7}"), ("|x^2-9x+20|", "x^2-9x+20"), (r"\ln|x|+C", r"\ln x+C"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), both_ways(EQUAL))
def test_the_same_in_another_spelling(answer: str, gold: str) -> None:
    assert compare(answer, gold).status is RewardStatus.CORRECT


@pytest.mark.parametrize(("answer", "gold"), both_ways(UNEQUAL))
def test_what_only_looks_the_same(answer: str, gold: str) -> None:
    assert compare(answer, gold).status is not RewardStatus.CORRECT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is at least 5.", "at least 5"),
        ("The answer is over 5 miles", "over 5 miles"),
        ("The answer is that over 4 weeks she ran 40 miles", "40"),
        ("The answer is 5 apples and six oranges.", "5 apples and six oranges"),
        ("She has 5 apples and six oranges.", None),
        ("The answer cannot be 5", None),
        ("5 is not the answer", None),
        ("A total of 5 dozen", "5 dozen"),
        ("That makes 60 / 12 = 5 dozen", "5"),
        ("We now turn to\n### Step 5", None),
        ("#### Step 5", None),
        ("=> 7", "7"),
        ("The correct option is B.", "B"),
        ("The correct answer is option B: 5", "option B: 5"),
    ],
)
def test_a_bound_or_a_denial_is_not_the_number_in_it(text: str, answer: str | None) -> None:
    found = find_auto(text)
    assert (found.text if found else None) == answer
