"""Pairs of answers, written to be equal or to be near misses, by kind; what each kind counts as equal shows in it."""

from __future__ import annotations

import pytest

from dphrl.rewards.math_compare import compare
from dphrl.types import RewardStatus
from tests.unit.answer_pairs import both_ways

# (one answer, another), equal in both directions.
EQUAL = {
    "integers": [
        ("42", "42."), ("42", "+42"), ("-7", "\u22127"), ("8", "2^3"), ("12", r"3 \cdot 4"), ("12", r"3\times4"),
        ("120", "5!"), ("0", "-0"), ("7", "07"), ("7", "7.00"), ("6", r"\frac{12}{2}"), ("10", r"\binom{5}{2}"),
        ("1000", "10^3"), ("-5", "-(5)"), ("5", "|-5|"), ("3", r"\lfloor 3.7 \rfloor"), ("4", r"\lceil\pi\rceil"),
        ("12", r"{4 \choose 2}+6"), ("9", r"\left(9\right)"), ("11", "{11}"), ("13", "$13$"),
    ],
    "thousands": [
        ("1,234,567", "1234567"), ("1{,}234", "1234"), (r"10,\!080", "10080"), ("1 000 000", "1000000"),
        (r"12\,345", "12345"), ("-12,345.5", "-12345.5"), (r"\$1,200", "1200"), ("1.5e3", "1,500"),
    ],
    "fractions": [
        (r"\frac{3}{4}", "0.75"), (r"\frac34", "3/4"), (r"\frac{6}{8}", r"\dfrac{3}{4}"), (r"\tfrac1{2}", ".5"),
        (r"-\frac{1}{2}", r"\frac{1}{-2}"), (r"{1 \over 3}", r"\frac{1}{3}"), (r"\frac{1}{3}", r"0.\overline{3}"),
        (r"0.1\overline{6}", r"\frac16"), (r"\frac{1/2}{3}", r"\frac{1}{6}"), (r"\frac{\sqrt{3}}2", r"\frac12\sqrt3"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"-\frac{a}{b}", r"\frac{-a}{b}"), ("(1)/(3)", "1/3"),
    ],
    "mixed numbers": [
        (r"2\frac{1}{3}", r"\frac{7}{3}"), ("2 1/3", "7/3"), (r"-2\frac12", "-2.5"), (r"12\frac{1}{2}\%", r"12.5\%"),
        (r"3 \dfrac{1}{4}", "13/4"), (r"1\frac{4}{5}", "1.8"),
    ],
    "scientific": [
        (r"1.5 \times 10^3", "1500"), ("2e-7", r"2\cdot10^{-7}"), ("6.02E23", r"6.02\times 10^{23}"),
        (r"8.404 \times 10^{1}", "84.04"), (r"1.0\times10^{-2}", "0.01"),
    ],
    "units": [
        (r"5\text{ cm}", "5"), (r"5\text{ cm}", r"5 \text{ centimeters}"), (r"15\mbox{ cm}^2", r"15\text{ square cm}"),
        (r"12\,\mathrm{m}", "12 meters"), ("3 hours", "3"), ("5 cm", "5cm"), ("9 square units", "9"),
        (r"30\text{ mph}", r"30\text{ miles per hour}"), (r"12\text{ inches}", r"12\text{ in}"), ("7.5 m\xb2", "7.5"),
        (r"\frac{5}{2}\text{ feet}", "2.5"), (r"3\sqrt{2}\text{ ft}", r"3\sqrt2"), (r"2\pi\text{ rad}", r"2\pi"),
        (r"6.6\mathrm{~mi} / \mathrm{hr}", "6.6"), (r"864 \mbox{ inches}^2", "864"),
        (r"4 \text{ feet}", r"4\text{ ft}"),
    ],
    "currency": [
        (r"\$18.90", "18.90"), ("$5", "5"), (r"\$36", r"36\text{ dollars}"), ("5 dollars", r"\$5.00"), ("\u20ac7", "7"),
        (r"\$10{,}000", "10000"),
    ],
    "degrees": [
        (r"60^\circ", "60"), (r"60^{\circ}", "60\xb0"), (r"45\text{ degrees}", r"45^\circ"),
        (r"30\degree", "30 degrees"), (r"\angle ABC = 60^\circ", "60"), (r"\sin 30^\circ", r"\frac12"),
        (r"72.5^{\circ}", r"\frac{145}{2}"),
    ],
    "percent": [
        (r"25\%", "25"), (r"25\%", r"\frac14"), (r"0.5\%", r"\frac{1}{200}"), ("28 percent", r"28\%"),
        ("28 pct", r"28\%"), (r"\frac{50}{3}\%", r"16\frac23\%"), (r"150\%", "1.5"),
    ],
    "words": [
        (r"\text{Evelyn}", "evelyn"), ("(C)", "C"), (r"\text{(E)}", "E"), (r"\text{no solution}", "No Solution"),
        (r"\textbf{(B)}", r"\text{B}"), (r"\text{Even}", "even."), (r"\varnothing", r"\emptyset"),
        ("Yes", r"\mbox{yes}"), (r"\mathbb{R}", r"(-\infty,\infty)"), (r"\text{all real numbers}", r"\mathbb{R}"),
    ],
    "radicals": [
        (r"\sqrt{12}", r"2\sqrt{3}"), (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"), (r"\sqrt[3]{-8}", "-2"), ("(-8)^{1/3}", "-2"),
        (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"), (r"\frac{6}{\sqrt{3}}", r"2\sqrt{3}"),
        (r"\sqrt2+\sqrt3", r"\sqrt{5+2\sqrt6}"), ("\u221a5", r"\sqrt{5}"), ("sqrt(5)/2", r"\frac{\sqrt{5}}{2}"),
        (r"\sqrt{x}", "x^{1/2}"), (r"x\sqrt{x}", r"x^{\frac32}"), (r"\sqrt[4]{a^5}", r"a\sqrt[4]{a}"),
        (r"\sqrt{2}-\sqrt{2}", "0"), (r"(\sqrt2+1)(\sqrt2-1)", "1"), (r"\frac{1}{n^{3/4}}", r"n^{-\frac{3}{4}}"),
        (r"\sqrt{7+4\sqrt{3}}", r"2+\sqrt{3}"),
    ],
    "constants": [
        (r"2\pi", r"\pi\cdot 2"), (r"\frac{\pi}{4}", r"0.25\pi"), (r"\ln 8", r"3\ln 2"), (r"\log_2 8", "3"),
        (r"e^{\ln 5}", "5"), (r"\log 100", "2"), (r"\ln(e^2)", "2"), (r"\frac{1}{e}", "e^{-1}"),
        (r"\cos\frac{\pi}{3}", r"\frac12"), ("pi/6", r"\frac\pi6"), (r"\arctan 1", r"\frac{\pi}{4}"),
        (r"\tan^{-1}(1)", r"\frac{\pi}{4}"), (r"\log_{10} 5", r"\lg 5"), (r"\sin\pi", "0"),
        (r"4\arctan\frac15-\arctan\frac{1}{239}", r"\frac{\pi}{4}"), (r"\exp(2)", "e^2"), (r"3+\ln2", r"\ln(2e^3)"),
    ],
    "complex": [
        ("2+3i", "3i+2"), (r"\frac{1}{i}", "-i"), ("(1+i)^2", "2i"), (r"e^{i\pi}", "-1"), (r"\sqrt{-3}", r"i\sqrt{3}"),
        (r"\frac{4-6i}{13}", r"\frac{4}{13}-\frac{6}{13}i"), ("1+274i", "274i+1"), (r"3 i \sqrt{5}", r"3\sqrt{5}i"),
    ],
    "algebra": [
        ("(x+1)^2", "x^2+2x+1"), ("x(x-3)", "x^2-3x"), (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac27"), ("2k+2", "2(k+1)"), ("-(2t-5)", "5-2t"), ("p-q", "-q+p"),
        (r"\frac{a}{b}", "ab^{-1}"), ("x^{2}y", "yx^2"), ("xyz", "zyx"), (r"\tan^2 y+1", r"\sec^2(y)"),
        (r"\sin 2x", r"2\sin x\cos x"), (r"\ln(x^2)", r"2\ln x"), ("2^{n+1}", r"2\cdot2^n"),
        (r"\frac{x^{30} z^{6}}{16 y^{4}}", r"\frac{1}{16}x^{30}y^{-4}z^6"), ("a_1+a_2", "a_{2}+a_{1}"),
        (r"\theta/2", r"\frac{1}{2}\theta"), (r"\frac{5\sqrt{3xy}}{12y^2}", r"\frac{5}{12}\frac{\sqrt{3xy}}{y^2}"),
        ("n!", "n(n-1)!"), ("f(x+1)", "f(1+x)"), ("|x-2|", "|2-x|"), (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"),
        (r"\frac{1}{3\sqrt[3]{x}^2}", r"\frac{1}{3x^{2/3}}"), (r"\sum_{k=1}^{n} k^2", r"\sum_{k=1}^n k\cdot k"),
        (r"\mathrm{e}^x", "e^x"), (r"\operatorname{arctan}(x)", r"\arctan x"),
    ],
    "equations": [
        ("y=2x+3", "y = 3+2x"), ("x^2-12=0", "x^2=12"), ("3x+4y=12", "6x+8y-24=0"),
        ("5x - 7y + 11z + 4 = 0", "7y=5x+11z+4"), ("x=5", "5=x"), ("x = 2 + 3 = 5", "5"), (r"x\approx 11", "11"),
        (r"x=\frac13\approx0.33", "1/3"), ("f(x)=x^2", "x^2"), (r"\text{Area} = 12", "12"),
        ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}"), ("f^{-1}(x)=x-1", "x-1"), ("A_1 = 3", "3"),
        (r"\frac{x^2}{4}+\frac{y^2}{3}=1", "3x^2+4y^2=12"), ("(x, y) = (3, 4)", "(3,4)"),
        (r"x \in \{1,2\}", r"\{2,1\}"),
    ],
    "tuples": [
        ("(3,4)", r"\left( 3, 4 \right)"), (r"(\frac12, 2)", r"(0.5, \sqrt{4})"), ("(1,-16,-4,43)", "(1, -16, -4, 43)"),
        ("(1,200)", "(1, 200)"), ("(1,2),(3,4)", "(3,4),(1,2)"), (r"\langle 1,2\rangle", "(1,2)"),
        ("(x+x,1)", "(2x,1)"),
    ],
    "named": [
        ("(2,3)", "x=2, y=3"), (r"x=1 \text{ and } y=\frac12", "(1, 0.5)"), ("4th", "4"), (r"21^{\text{st}}", "21"),
        (r"\text{5 apples}", "5"), (r"\vec{v}", r"\mathbf{v}"),
    ],
    "intervals": [
        (r"(2,\infty)", r"(2, +\infty)"), ("[-2,7]", r"-2 \le x \le 7"), (r"(5,\infty)", "x>5"),
        (r"(-\infty,3]", r"x \leq 3"), (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>1"),
        (r"(0,9)\cup(9,36)", r"(9,36)\cup(0,9)"), ("(1,5]", r"5\ge x>1"),
        (r"\left(\frac35,\frac83\right]", r"(0.6, \frac{8}{3}]"), (r"[0,\frac{\pi}{2})", r"[0, 0.5\pi)"),
        (r"x\in(2,3)", "(2,3)"),
    ],
    "sets and lists": [
        (r"\{1,2,3\}", r"\{3,1,2\}"), ("1,2,3", "3, 2, 1"), (r"\{1\pm\sqrt5,-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
        (r"\pm 3", "3,-3"), (r"1 \text{ and } 2", "1,2"), (r"x=1 \text{ or } x=-1", r"\pm1"),
        ("19, 46, and 82", r"19, 46, \text{ and } 82"), ("1;2", "1,2"), ("{1,2}", r"\{1,2\}"),
        (r"\pm 2021", r"\{-2021, 2021\}"), ("2:3", "2 : 3"), (r"\frac12,0.25", "1/4, 1/2"),
    ],
    "inequalities": [
        ("x>5", "5<x"), (r"x\ge2", r"x \geqslant 2"), ("-x>-1", "x<1"), ("2x<6", "x<3"), ("1<x<2", "2>x>1"),
        (r"x\ne3", r"x \neq 3"), (r"-2 \leqslant n \leqslant 4", r"-2 \le n \le 4"), ("a<b", "b>a"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \\ \end{bmatrix}"),
        (r"\begin{pmatrix}\frac12\\0\end{pmatrix}", r"\left(\begin{array}{c} 0.5 \\ 0 \end{array}\right)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}3\\4\end{pmatrix}", r"\begin{pmatrix}4\\6\end{pmatrix}"),
        (r"\frac12\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}0&1\\1&0\end{pmatrix}^2", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
    ],
    "numerals": [
        ("204_5", "204_{5}"), ("4343_6", "4343_{6}"), ("2A_{16}", "2A_{16}"),
    ],
    "numbers in words, asides, bounds": [
        ("4 million", "4,000,000"), (r"5\text{ thousand}", "5000"), (r"18\mathrm{g}", "18"), ("12 apples", "12"),
        (r"x>-1 \text{ and } x<1", "-1<x<1"), (r"\approx 7", "7"), (r"2\frac{-1}{2}", "-1"), (r"\sqrt{x^2}", "|x|"),
        ("40 mph", "40"), (r"9\text{ cm}^2", "9"), ("x = 2+2 = 4", "4"),
    ],
}  # fmt: skip

# (one answer, another), different in both directions.
UNEQUAL = {
    "integers": [
        ("42", "-42"), ("42", "24"), ("9", "2^3"), ("12", "1 2"), ("100", "10"), ("6", r"\frac{12}{3}"), ("5", "5!"),
        ("4", r"\pm4"), ("3", r"3 \text{ or } 4"), ("3", "3, 4"), ("7", "x"), ("0", r"\emptyset"), ("1", "True"),
        ("10", r"\binom{5}{1}"), ("999999999999", "1000000000000"), ("2", r"\text{two or three}"), ("32349", "32, 349"),
        ("30,000", "30,000,000"),
    ],
    "fractions": [
        (r"\frac{1}{3}", "0.333"), (r"\frac{2}{3}", "0.67"), (r"\frac{3}{4}", r"\frac{4}{3}"), (r"\frac{1}{2}", "12"),
        (r"5\frac12", r"\frac52"), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), ("0.1", "0.10000001"),
        (r"\frac{355}{113}", r"\pi"), ("3.14159265358979", r"\pi"), ("10^{-7}", r"2\cdot10^{-7}"),
        (r"2\sqrt{2}\cdot 2^{-200}", r"\sqrt{2}\cdot2^{-200}"), ("1.5e3", "1.5e4"), ("1.41421356", r"\sqrt{2}"),
        (r"\sqrt{2}+2^{-150}", r"\sqrt{2}"), (r"2.5\times10^3", r"2.5\times10^{-3}"),
    ],
    "units": [
        (r"5\text{ cm}", r"5\text{ m}"), ("5 cents", r"\$5"), (r"10\text{ units}", "100"), ("3 hours", "3 minutes"),
        (r"5\text{ cm}^2", r"5\text{ cm}^3"), (r"60^\circ", r"6^\circ"), (r"25\%", "2.5"), ("0.25", "25"),
        (r"25\%", r"75\%"), ("3x", "3"), ("5m", "5"), ("2 pi", "2"), (r"\$16", r"\$16.01"),
        (r"7 \text{ dollars}", r"7\text{ euros}"), (r"50\%", r"50^\circ"),
    ],
    "words": [
        (r"\text{Yes}", r"\text{No}"), ("A", "B"), (r"\text{(C)}", r"\text{(D)}"),
        (r"\text{June 20}", r"\text{June 2}"), (r"\text{no solution}", "3"), (r"\text{even}", r"\text{odd}"),
        ("12:00", "1:00"), (r"4:30\text{ p.m.}", r"4:30\text{ a.m.}"), (r"\mathbb{R}", r"\mathbb{Z}"),
    ],
    "radicals and constants": [
        (r"\sqrt[3]{2}", r"3\sqrt{2}"), (r"\sqrt{8}", "4"), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}"), (r"4\sqrt{2}", "4"),
        (r"2\sqrt5-1", r"2\sqrt{5-1}"), (r"\log_23", r"\log_32"), ("e^2", "2^e"), (r"\ln 2", r"\log 2"),
        (r"\pi^2", r"2\pi"), (r"e^{\pi}", r"\pi^e"), (r"\cos\frac{\pi}{3}", r"\cos\frac{\pi}{6}"),
        (r"e^{\pi\sqrt{163}}", "640320^3+744"), (r"\sqrt{x^2}", "x"), ("|x|", "x"), (r"\sqrt{16}", r"\pm 4"),
        ("i", "-i"), ("3-4i", "3+4i"), ("2i", "2"), (r"\infty-\infty", "0"), (r"\infty", r"-\infty"), ("0^0", "1"),
    ],
    "algebra": [
        ("(x+1)^2", "x^2+1"), ("2x+3", "2(x+3)"), ("-x^2", "(-x)^2"), ("x^2", "x^3"), (r"\sin^2x", r"\sin x^2"),
        (r"2\sin x", r"\sin 2x"), ("a_n", "a_{n+1}"), ("ab", "a+b"), ("x", "y"), ("x-y", "y-x"),
        (r"\frac{a}{b+c}", r"\frac{a}{b}+c"), ("2^{n+1}", "2^n+1"), ("x+2n+1", "x+1"), ("(a+5)(b+2)", "(+5)(b+2)"),
        ("5-2t", "5-2"), ("n!", "n"), (r"\sum_{k=1}^{n} k", r"\sum_{k=0}^{n-1} k"), ("f(x)+1", "f(x+1)"),
        ("x^{2y}", "x^2y"), (r"\frac{1}{2}x", r"\frac{1}{2x}"), ("4x+1", "4x-1"), ("3R^2", "3r^2"),
    ],
    "equations": [
        ("x=5", "y=5"), ("x=5", "x=-5"), ("y=2x+3", "y=2x-3"), ("x^2-12=0", "0"), ("7=11a+c", "11a+c"), ("2x+z=1", "1"),
        ("x^2=4", "x=2"), ("x=5", r"x\ne5"), ("x+y=1", "x-y=1"), ("x>5", "x<5"), ("x>5", r"x\ge5"), ("x<1", "x>-1"),
        ("1<x<2", r"1\le x<2"), (r"x\ne3", r"x\ne-3"), ("x>5", "5"), ("x=1, y=2", "x=2, y=1"), ("3x-y-7=0", "y=3x+7"),
    ],
    "compound": [
        ("(3,2)", "x=2, y=3"), ("(2,3)", "y=2, x=3"),
        ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[0,1)", "(0,1)"), ("(1,2)", "1,2"), ("(1,2)", r"\{1,2\}"),
        (r"\{1,2\}", r"\{1,2,3\}"), ("1,2", "12"), ("1,1", "1,2"), ("2:3", "3:2"), (r"(2,\infty)", r"x\ge2"),
        ("[-2,7]", "-2<x<7"), (r"(-\infty,-1)\cup(1,\infty)", "(-1,1)"), ("(1,2,3)", "(1,2)"), ("(0,9)", "[0,9)"),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"), ("1, 2, 3, ...", "1, 2, 3"), ("(3,1)", "{1,3}"), ("-[0,1)", "1"),
        ("204_5", "204_6"), ("204_5", "204"), (r"(3,\frac{\pi}{2})", r"(3,-\frac{\pi}{2})"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
        (r"\begin{pmatrix}10^{30}\\1\end{pmatrix}", r"\begin{pmatrix}10^{30}\\2\end{pmatrix}"),
    ],
    "functions made of pieces": [
        ("|x-5|", "5-x"), (r"\sqrt{(x-3)^2}", "3-x"), (r"\lfloor n/3\rfloor", r"\lfloor n/4\rfloor"),
        (r"\lceil n/3\rceil", r"\lceil n/4\rceil"), (r"\lfloor\sqrt n\rfloor", r"\lfloor\sqrt[3]{n}\rfloor"),
        ("|n-10|+n", "10"), (r"\frac{x+|x-9|}{2}", "4.5"), ("y=|x-5|", "y=5-x"), ("0", r"\lfloor |x|/100\rfloor"),
    ],
    "words that are no units": [
        ("4", r"4\mathrm{x}"), ("4", r"4\textbf{x}"), ("4", r"4\text{ x}"), ("4", "4 xy"), ("4", "4 ab"),
        ("4", r"4\text{ 5}"), ("4", "4 thousand"), ("4", r"4\text{ million}"), ("4", "4 thirds"), ("4", "4 squared"),
        ("4", r"4\text{ halves}"), ("4", "4 cubed"), ("4", "4 factorial"), ("4", "4 less than x"), ("4", "4 maybe"),
        ("4", r"4\text{ (not 5)}"), ("4", r"4\text{ at least}"), ("3", r"3\mathrm{xy}"), (r"\$5\text{ million}", "5"),
    ],
    "chains, orders, tails": [
        ("5", "4=5"), ("5", "x=4=5"), ("BCD", "BDC"), ("ABCD", "ABDC"), (r"\pi", r"\pi+10^{-200}"),
        ("x", r"x+e^{-300}"), (r"2-\frac12", r"2\frac{-1}{2}"),
        (r"(-\infty,1)\cup(3,\infty)", r"x<1 \text{ and } x>3"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), both_ways(EQUAL))
def test_equal(answer: str, gold: str) -> None:
    assert compare(answer, gold).status is RewardStatus.CORRECT


@pytest.mark.parametrize(("answer", "gold"), both_ways(UNEQUAL))
def test_unequal(answer: str, gold: str) -> None:
    assert compare(answer, gold).status in (RewardStatus.WRONG, RewardStatus.UNPARSABLE, RewardStatus.REFUSED)


@pytest.mark.parametrize("answer", sorted({answer for answer, _ in both_ways(EQUAL) + both_ways(UNEQUAL)} - {"0^0"}))
def test_every_answer_equals_itself(answer: str) -> None:
    assert compare(f" {answer} ", answer).status is RewardStatus.CORRECT
