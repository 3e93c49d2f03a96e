"""How answers are written: pairs that are the same in another notation, and pairs that only look alike."""

# ruff: noqa: RUF001

from __future__ import annotations

import time

import pytest

from dphrl.rewards.exact import tidy
from dphrl.rewards.math_compare import compare, compare_cheaply
from dphrl.rewards.math_unicode import to_tex
from dphrl.types import RewardStatus
from tests.unit.answer_pairs import both_ways

# (one answer, another), equal in both directions.
EQUAL = {
    "raised and lowered": [
        ("2¹⁰", "1024"), ("xⁿ", "x^n"), ("5⁻¹", "1/5"), ("10⁻³", "0.001"), ("a₁", "a_1"), ("x₁²", "x_1^2"),
        ("x²y³", "x^2y^3"), ("e⁻ˣ", "e^{-x}"), ("x² + 2x + 1", "(x+1)^2"), ("log₂8", "3"), ("2ⁿ⁺¹", "2^{n+1}"),
        ("f⁻¹(x)=x-1", "f^{-1}(x)=x-1"), ("sin⁻¹(1)", r"\frac{\pi}{2}"), ("110₂", "110_2"), ("x₁ = 2, x₂ = 3", "2,3"),
        ("1.5×10⁻⁷", r"1.5\times 10^{-7}"), ("4²³", "4^{23}"), ("aₙ₊₁", "a_{n+1}"), ("x¹²", "x^{12}"), ("5ᵗʰ", "5"),
        ("Aᵀ", "A^T"),
    ],
    "fractions in one character": [
        ("½", "0.5"), ("−½", "-0.5"), ("2½", "2.5"), ("2⅓", "7/3"), ("-2½", "-5/2"), ("¾", "0.75"), ("⅛", r"\frac18"),
        ("⅞", "0.875"), ("½x", r"\frac{x}{2}"), ("x^½", r"\sqrt{x}"), ("2¹⁄₂", "5/2"), ("¹⁄₂", "1/2"), ("³/₄", "0.75"),
        ("1⁄2", "1/2"), ("2 ½", "2.5"), ("√½", r"\frac{\sqrt2}{2}"), ("½, ¼", "0.25, 0.5"), ("(½, 2)", "(0.5, 2)"),
        ("↉", "0"), ("12½%", "12.5%"),
    ],
    "signs": [
        ("–5", "-5"), ("—5", "-5"), ("−5", "-5"), ("‐5", "-5"), ("3 – 2", "1"), ("±2", r"\pm2"),
        ("1±√2", r"1\pm\sqrt2"), ("2⋅3", "6"), ("2×3", "6"), ("2·3", "6"), ("6∕3", "2"), ("6⁄3", "2"), ("6÷3", "2"),
        ("2∗3", "6"), ("3∶4", "3:4"), ("x ≤ 3", r"x\le 3"), ("x≥3", "3 <= x"), ("x≠1", r"x \neq 1"),
        ("x ≠ 1", r"x \ne 1"), ("≈7", "7"), ("∞", r"\infty"), ("−∞", r"-\infty"), ("∅", r"\emptyset"),
        ("∆x", r"\Delta x"), ("1, 2, …, n", r"1,2,\dots,n"), ("∣−5∣", "5"), ("sin\u2061x", r"\sin x"), ("2π", r"2\pi"),
        ("2πr", r"2\pi r"), ("90º", "90"), ("90°", "90"), ("90˚", "90"), ("∠ABC", r"\angle ABC"),
        ("x∈{1,2}", r"\{1,2\}"), ("f′(x)=2", "f'(x)=2"), ("x ≡ 5 (mod 7)", r"x\equiv5\pmod{7}"),
        ("1∓√2", r"1\pm\sqrt2"),
    ],
    "letters and digits of other forms": [
        ("α+β", r"\alpha+\beta"), ("θ/2", r"\frac{\theta}{2}"), ("φ", r"\phi"), ("φ", r"\varphi"), ("Δx", r"\Delta x"),
        ("𝑥+1", "x+1"), ("𝟓", "5"), ("５", "5"), ("٣", "3"), ("5，6", "5,6"), ("（1，2）", "(1,2)"),
        ("［1，2］", "[1,2]"), ("｛1，2｝", r"\{1,2\}"), ("5。", "5"),
        ("１２．５", "12.5"), ("1、2", "1,2"), ("５８，５００", "58500"),
        ("1，234", "1, 234"), ("ＡＢＣ", "ABC"), ("\u200b5", "5"), ("5\ufeff", "5"), ("1\u202f000", "1000"),
        ("1\u2009234\u2009567", "1234567"), ("5\xa0cm", "5"), ("1\u20640", "1"), ("Σ", r"\Sigma"), ("ℓ", r"\ell"),
    ],
    "roots and brackets": [
        ("√2", r"\sqrt2"), ("√12", r"2\sqrt3"), ("3√2", r"3\sqrt{2}"), ("√(x+1)", r"\sqrt{x+1}"),
        ("√(2+√3)", r"\sqrt{2+\sqrt{3}}"), ("∛8", "2"), ("∛(27)", "3"), ("∜16", "2"), ("³√8", "2"),
        ("√π", r"\sqrt{\pi}"), ("⌊3.7⌋", "3"), ("⌈3.2⌉", "4"), (r"\abs{-5}", "5"), (r"\floor{3.7}", "3"),
        ("⌊x⌋", r"\lfloor x\rfloor"), ("⟨1,2⟩", "(1,2)"), ("√2.25", "1.5"),
    ],
    "letters for sets": [
        ("ℝ", r"\mathbb{R}"), ("ℝ", r"(-\infty,\infty)"), ("ℝ∖{1}", r"(-\infty,1)\cup(1,\infty)"),
        ("(−∞,1)∪(1,∞)", r"(-\infty,1)\cup(1,\infty)"), ("[1,3]∩[2,4]", "[2,3]"), ("x∈ℝ", r"\mathbb R"),
    ],
    "commands that dress": [
        (r"\color{red}{6}", "6"), (r"\textcolor{red}{6}", "6"), (r"{\color{blue} 6}", "6"), (r"\color{red}6", "6"),
        (r"\textcolor[rgb]{1,0,0}{6}", "6"), (r"\colorbox{yellow}{6}", "6"), (r"\textcolor{red}{\frac12}", "0.5"),
        (r"x=\textcolor{red}{\frac{1}{2}}", "0.5"), (r"\textcolor{red}{x}+1", "x+1"),
        (r"\textcolor{red}{(1,2)}", "(1,2)"), (r"\textcolor{red}{\text{yes}}", "yes"), (r"\Large{6}", "6"),
        (r"\large 6", "6"), (r"{\Large 6}", "6"), (r"\mathbf 5", "5"), (r"\mathbf{5}", "5"), (r"\mathbf{5.0}", "5"),
        (r"\boldsymbol{6}", "6"), (r"\bm{6}", "6"), (r"\mathit{6}", "6"), (r"\emph{6}", "6"), (r"\mathsf{12}", "12"),
        (r"\texttt{12}", "12"), (r"\underline{6}", "6"), (r"\emph{no} solution", "no solution"),
        (r"\textsf{yes}", "yes"), (r"{\bf 6}", "6"), (r"5{\rm\ cm}", "5"), (r"\mathbf{x}+1", "x+1"),
        (r"\boldsymbol\alpha", r"\alpha"), (r"\textstyle\frac12", ".5"), (r"\displaystyle \frac12", ".5"),
        (r"\biggl(1,2\biggr)", "(1,2)"), (r"\Bigl[1,2\Bigr)", "[1,2)"), (r"\big|x\big|", "|x|"),
        (r"\left|x\right|", "|x|"), (r"6\hspace{1cm}", "6"), (r"\hspace{1em} 6", "6"), (r"6\vspace{2pt}", "6"),
        (r"\phantom{-}5", "5"), (r"\smash{6}", "6"), (r"5\hbox{ cm}", "5"), (r"\left. 6 \right.", "6"),
        (r"\mathbf{\textcolor{red}{6}}", "6"), (r"\angle{ABC}", r"\angle ABC"), (r"\mathstrut 6", "6"),
        (r"\boxed{6}", "6"), (r"6 \tag{1}", "6"), (r"\sum\limits_{k=1}^{n} k", r"\sum_{k=1}^n k"),
        (r"\vec v", r"\vec{v}"), (r"\overrightarrow{AB}", r"\vec{AB}"), (r"\bar{x}+1", r"1+\bar x"),
        (r"\widehat{p}", r"\widehat p"), (r"\mathcal L", r"\mathcal{L}"),
    ],
    "braces left out": [
        (r"\nicefrac12", ".5"), (r"\nicefrac{1}{2}", ".5"), (r"\sfrac{1}{2}", ".5"), (r"\tfrac12", ".5"),
        (r"\frac 1 2", ".5"), (r"\frac1{2}", ".5"), (r"\frac{1}2", ".5"), (r"\frac a b", r"\frac{a}{b}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"), (r"\sqrt2", r"\sqrt{2}"), (r"\sqrt x", r"\sqrt{x}"),
        (r"\sqrt[3]2", "2^{1/3}"), (r"\binom52", "10"), (r"\dbinom{5}{2}", "10"), (r"\tbinom nk", r"\binom{n}{k}"),
        ("x^10", "x^{10}"), (r"2^\frac12", r"\sqrt2"), (r"e^x", "e^{x}"), (r"\log_28", "3"),
        (r"{10 \choose 3}", "120"), (r"{1\over2}", "0.5"),
    ],
    "thousands": [
        (r"1{\,}000", "1000"), (r"1\text{,}000", "1000"), (r"1\,000", "1000"), (r"1\;000", "1000"),
        (r"1\ 000", "1000"), ("10_000", "10000"), (r"1\_000\_000", "1000000"), ("1{,}000{,}000", "1000000"),
        (r"(1{,}000, 2)", "(1000,2)"), (r"3,\!000", "3000"), ("1,234.5", "1234.5"), (r"1\mathord{,}000", "1000"),
    ],
    "repeating decimals": [
        (r"0.\dot{3}", "1/3"), (r"0.\dot3", "1/3"), (r"0.\overline{3}", "1/3"), (r"0.\overline3", "1/3"),
        (r"0.\bar{3}", "1/3"), ("0.3̅", "1/3"), ("0.3̇", "1/3"), ("0.(3)", "1/3"), (r"0.1\dot{6}", "1/6"),
        (r"0.\dot{1}4285\dot{7}", "1/7"), (r"0.\dot{1}\dot{2}", "4/33"), (r"0.\overline{142857}", "1/7"),
        ("0.1̅2̅", "4/33"), (r"2.\overline{9}", "3"), (r"-0.\overline{3}", "-1/3"), (r"0.3\overline{3}", "1/3"),
        (r"1.1\overline{6}", "7/6"), (r"0.\overline{3}", r"0.\overline{33}"),
    ],
    "factorials": [
        (r"2 \cdot 3! 2!", "24"), ("3! 2!", "12"), ("3!2!", "12"), (r"\frac{6!}{2!2!2!}", "90"),
        (r"\frac{10!}{3!7!}", "120"), ("(3!)(2!)", "12"), (r"5!\frac{1}{2}", "60"), (r"5!\pi", r"120\pi"),
        ("n!m!", r"n! \cdot m!"), ("3! 2^2", "24"), ("5!!", "15"), ("6!!", "48"), ("(3!)!", "720"),
        ("3!4!5!", "17280"), (r"\frac{n!}{2!(n-2)!}", r"\binom{n}{2}"),
    ],
    "bases": [
        ("1010_2", "1010_{2}"), (r"110_{\text{two}}", "110_2"), (r"1010_{two}", "1010_2"), (r"1010_{(2)}", "1010_2"),
        ("(1010)_2", "1010_2"), (r"1010\text{ in base }2", "1010_2"), ("1010 base 2", "1010_2"),
        (r"1010 \text{ (base } 2)", "1010_2"), (r"1010_{\text{base }2}", "1010_2"), (r"1010_\text{two}", "1010_2"),
        (r"1{,}010_2", "1010_2"), ("1010 in base two", "1010_2"), (r"1010_{\mathrm{two}}", "1010_2"),
        (r"2A_{\text{sixteen}}", "2A_{16}"), (r"2A_{\text{hex}}", "2a_{16}"), (r"101_{\text{binary}}", "101_2"),
        ("5 base eight", "5_8"), (r"12_{10}", "12"), ("1111 0000_2", "11110000_2"),
    ],
    "congruences": [
        (r"x\equiv 5\pmod{7}", r"x \equiv 5 \pmod 7"), (r"x\equiv 5\pmod{7}", r"x\equiv 5\mod 7"),
        (r"x\equiv 5\pmod{7}", r"x\equiv5(\text{mod }7)"), (r"x\equiv 5\pmod{7}", r"x \equiv 5 \bmod 7"),
        (r"x\equiv 5\pmod{7}", r"x\equiv 5 (\mathrm{mod}\ 7)"), (r"x\equiv 5\pmod{7}", r"x\equiv 5 (mod 7)"),
        (r"x\equiv 5\pmod{7}", r"x\equiv 5 \text{ (mod 7)}"), (r"x\equiv 5\pmod{7}", r"x \equiv -2 \pmod{7}"),
        (r"x\equiv 5\pmod{7}", r"x \equiv 12 \pmod{7}"), (r"5\pmod{7}", r"x\equiv 5 \pmod 7"),
        (r"x\equiv 1,4\pmod 5", r"x \equiv 4, 1 \pmod{5}"), (r"x\equiv\pm1\pmod 5", r"x\equiv 1, 4 \pmod 5"),
        (r"x\equiv a\pmod n", r"x\equiv a \pmod{n}"),
        (r"x\equiv 1 \pmod 2, x \equiv 2 \pmod 3", r"x\equiv 2 (\text{mod }3), x\equiv 1 (\text{mod }2)"),
    ],
    "sets and lists": [
        (r"\{1,2,2\}", r"\{1,2\}"), (r"\{1,1\}", r"\{1\}"), (r"\{\frac12,0.5\}", r"\{0.5\}"), (r"\{1,2,2\}", "1,2,2"),
        (r"\{a,b,a\}", r"\{b,a\}"), (r"\{\sqrt4, 2\}", r"\{2\}"), (r"\{(1,2),(1,2)\}", r"\{(1,2)\}"),
        (r"\{1,1,2\}", r"\{1,2,2\}"), (r"\{10\%,20\%\}", r"\{10,20\}"), (r"\{30^\circ\}", r"\{30\}"),
        (r"1 \mp \sqrt2", r"1\pm\sqrt2"), (r"\pm1, \pm2", "1,-1,2,-2"), (r"(\pm1, 2)", "(1,2),(-1,2)"),
        (r"\pm a \mp b", "a-b, b-a"), (r"x = 1 \mp 2", "-1, 3"),
    ],
    "assignments": [
        ("(a,b,c)=(1,2,3)", "a=1,b=2,c=3"), ("(a,b,c)=(1,2,3)", "c=3,b=2,a=1"),
        ("(x,y)=(1,2)", r"x=1 \text{ and } y=2"), ("(x,y)=(1,2)", "(y,x)=(2,1)"), ("5=x", "5"), (r"\frac12=x", "0.5"),
        ("5=x", "x=5"), ("f(x)=2x+1", "y=2x+1"), ("f(x)=2x+1", "y = 1+2x"), ("g(t)=t^2", "y=t^2"), (r"5=\theta", "5"),
        (r"\begin{cases}x=1\\y=2\end{cases}", "x=1,y=2"),
        (r"\left\{\begin{aligned}x&=1\\y&=2\end{aligned}\right.", "(1,2)"), ("x_1=2,x_2=3", "(x_1,x_2)=(2,3)"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1 \\[4pt] 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1 \\ [0.5em] 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\cr 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{bmatrix}1&2\\[2ex]3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\left[\begin{array}{cc}\hline 1&2\\3&4\\\hline\end{array}\right]", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ],
    "sets of reals": [
        (r"[1,2]\cup[2,3]", "[1,3]"), (r"(1,2]\cup(2,3)", "(1,3)"), (r"[1,3]\cup[2,5]", "[1,5]"),
        (r"[2,3]\cup[0,1]", r"[0,1]\cup[2,3]"), (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
        (r"\mathbb{R}\setminus\{1\}", r"x\ne1"), (r"\mathbb R - \{1\}", r"x\neq 1"),
        (r"|x|\ge1", r"(-\infty,-1]\cup[1,\infty)"), ("|x-2|<3", "(-1,5)"), (r"\mathbb{R}^*", r"x\ne0"),
        (r"3 > |x+1|", "-4<x<2"), (r"|x|>\sqrt2", r"\mathbb{R}\setminus[-\sqrt2,\sqrt2]"),
        (r"\mathbb{R}\backslash\{0,1\}", r"(-\infty,0)\cup(0,1)\cup(1,\infty)"), (r"\{x \mid x<3\}", "x<3"),
        (r"\{x \mid x<3\}", r"(-\infty,3)"), (r"\{x : x<3\}", r"(-\infty,3)"),
        (r"\{x \in \mathbb{R} \mid x<3\}", "x<3"), (r"\{t | t<3\}", r"\{x|x<3\}"),
        (r"\{x \mid x \ne 2\}", r"\mathbb{R}\setminus\{2\}"), (r"\{x \mid 1<x\le2\}", "(1,2]"),
        (r"\{x \mid x<1 \text{ or } x>3\}", r"(-\infty,1)\cup(3,\infty)"),
        (r"\{x \mid x\in\mathbb{R}, x\ne 1\}", r"(-\infty,1)\cup(1,\infty)"),
        (r"x\ne1, x\ne2", r"\mathbb{R}\setminus\{1,2\}"), (r"x \in \mathbb{R}, x\ne1", r"x \neq 1"),
        (r"x\ne \pm 1".replace(r" \pm 1", "1") + r" \text{ and } x \ne -1", r"\mathbb{R}\setminus\{-1,1\}"),
        (r"[0,3)\cap[1,5]", "[1,3)"), (r"[0,5]\setminus(1,2)", r"[0,1]\cup[2,5]"),
        (r"(0,\sqrt4]\cup[2,\pi)", r"(0,\pi)"), (r"\{1\}\cup(1,2)", "[1,2)"),
        (r"(-\infty,0)\cup\{0\}\cup(0,\infty)", r"\mathbb{R}"), (r"\mathbb{R}^+", r"(0,\infty)"),
        (r"\mathbb{R}_{\ge 0}", r"[0,\infty)"), (r"\text{all real numbers except } 1", r"x\ne 1"),
        (r"x<\frac12 \text{ or } x\ge 1", r"(-\infty,0.5)\cup[1,\infty)"), ("]1,2[", "1<x<2"),
        (r"(1,3)\setminus\{2\}", r"(1,2)\cup(2,3)"), (r"\{x \mid x>0\} \cap \{x \mid x\le 1\}", "(0,1]"),
        (r"x>1, x<3", "1<x<3"), (r"x<1, x>3", r"(-\infty,1)\cup(3,\infty)"),
        (r"[0,\frac{\pi}{2})\cup(\frac{\pi}{2},\pi]", r"[0,\pi]\setminus\{\frac{\pi}{2}\}"),
        (r"x \in [1,2]\cup[2,3]", "[1,3]"), (r"(-\infty,-2]\cup[2,\infty)", r"x \le -2 \text{ or } x \ge 2"),
    ],
}  # fmt: skip

# (one answer, another), different in both directions.
UNEQUAL = {
    "raised and lowered": [
        ("2¹⁰", "210"), ("2¹⁰", "20"), ("5⁻¹", "51"), ("5⁻¹", "-5"), ("5⁻¹", "5"), ("x²", "x2"), ("x²", "2x"),
        ("a₁", "a"), ("a₁", "a_2"), ("a₁", "a^1"), ("x₁", "x"), ("110₂", "110"), ("110₂", "110_3"), ("10³", "103"),
        ("10⁻³", "1000"), ("xⁿ", "x n"), ("xⁿ", "xn"), ("2²³", "4^3"), ("x¹²", "x^1 2"), ("2ⁿ⁺¹", "2^n+1"),
        ("log₂8", "log 28"), ("1/2⁹⁹", "1/2⁹⁸"), ("5²", "52"), ("H₂O", "H^2O"), ("4²", "4_2"),
    ],
    "fractions in one character": [
        ("½", "12"), ("½", "1"), ("½", "2"), ("−½", "½"), ("2½", "1"), ("2½", "21/2"), ("2½", "2/2"), ("-2½", "-1.5"),
        ("¾", "34"), ("⅓", "0.333"), ("⅔", "0.67"), ("2⅓", "2.33"), ("1¼", "1/4"), ("½x", "x/4"), ("2¹⁄₂", "21/2"),
        ("½½", "1"), ("x½", "x"),
    ],
    "signs": [
        ("–5", "5"), ("3–2", "-1"), ("±2", "2"), ("±2", "-2"), ("1±√2", "1+√2"), ("2⋅3", "23"), ("2×3", "5"),
        ("6÷3", "3/6"), ("x≤3", "x<3"), ("x≥3", "x≤3"), ("x≠1", "x=1"), ("≈7", "8"), ("∞", "-∞"), ("∅", "0"),
        ("∅", r"\{0\}"), ("90°", "9"), ("2π", "2"), ("2∘3", "6"), ("x∉{1}", r"x\in\{1\}"), ("1～234", "1234"),
        ("10–20", "10"), ("1，234", "1234"), ("∣−5∣", "-5"), ("1, 2, …", "1, 2"), ("0.333…", "1/3"), ("∠ABC", "∠ACB"),
        ("1∓√2", "1-√2"), ("f′(x)=2", "f(x)=2"), ("∪", "∩"),
    ],
    "letters and digits of other forms": [
        ("α", "β"), ("α", "a"), ("θ", "0"), ("Δx", "x"), ("５", "6"), ("5，6", "56"), ("5，6", "5.6"),
        ("（1，2）", "[1,2]"),
        ("（1，2）", "(2,1)"), ("［1，2）", "(1,2)"), ("5①", "51"), ("5⑴", "5(1)"), ("①", "2"), ("1\u2063234", "1234"),
        ("Σ", r"\Pi"), ("ρ", "p"), ("ν", "v"), ("1\u30002", "12"), ("1\u200b2", "1 2"), ("φ", "0"),
    ],
    "roots and brackets": [
        ("√2", "2"), ("√2", "1.41421356"), ("3√2", "√6"), ("∛8", "√8"), ("∛8", r"3\sqrt{8}"), ("³√8", "8^3"),
        ("2³√8", r"2\sqrt[3]{8}"), ("√(x+1)", "√x+1"), ("⌊x⌋", "⌈x⌉"), ("⌊x⌋", "x"), ("⟨1,2⟩", "⟨2,1⟩"),
        ("⟨1,2⟩", "[1,2]"), ("√12", "√1·2"),
    ],
    "letters for sets": [
        ("ℝ", "ℤ"), ("ℝ", "R"), ("ℝ∖{1}", "ℝ"), ("ℝ∖{1}", "ℝ∖{2}"), ("ℕ", "N"), ("ℂ", "C"), ("x∈ℤ", "x∈ℝ"),
        ("ℝ⁺", "ℝ"), ("ℝ∖{1}", r"\{1\}"),
    ],
    "commands that dress": [
        (r"\color{red}{6}", "7"), (r"\textcolor{red}{6}", r"\textcolor{red}{5}"), (r"2\textcolor{red}{3}", "6"),
        (r"2\mathbf{3}", "6"), (r"2{3}", "6"), ("{2}{3}", "6"), (r"\boxed{2}\boxed{3}", "6"), (r"\pi{2}", r"2\pi"),
        (r"2\mathrm{e}", "2"), (r"1\hspace{1cm}234", "1234"), (r"1\hspace{1cm}2", "12"), (r"1\quad 234", "1234"),
        (r"1\phantom{0}5", "15"), (r"\phantom{1}5", "15"), (r"\phantom{5}", "5"), (r"\cancel{5}", "5"),
        (r"5\left.6", "56"), (r"\biggl(1,2\biggr]", "(1,2)"), (r"\big|x\big|", "x"), (r"\overline{3}", "3"),
        (r"\bar{x}", "x"), (r"\hat{x}", "x"), (r"\overline{AB}", "AB"), (r"\mathcal{L}", "L"), (r"\mathbb{N}", "N"),
        (r"\mathbf 5", "50"), (r"{\bf 6}", "66"), (r"\textcolor{5}{6}", "5"),
        (r"\color{red}{6}7", "67".replace("67", "42")), (r"\emph{no} solution", "a solution"),
        (r"5{\rm m}", r"5\text{ cm}"), (r"4\mathbf{m}", "4"), (r"4\boldsymbol{x}", "4"), (r"\textbf{x}", "y"),
        (r"\dot{x}", r"\ddot{x}"), (r"\tag{6} 5", "6"), (r"\tag{6} 5", "65"), (r"\label{6}", "6"),
        (r"\underline{5}6", "5"),
    ],
    "braces left out": [
        (r"\nicefrac12", "12"), (r"\frac12", r"\frac21"), (r"\frac123", "1/23"), (r"\sqrt12", r"\sqrt{12}"),
        (r"\binom52", "52"), (r"\binom52", "5/2"), (r"x^10", "10x"), (r"\log_28", r"\log 28"),
        (r"\log_28", r"\log_82"), (r"\frac\pi2", r"\frac{2}{\pi}"), (r"\tfrac12", "2"),
        (r"\binom{5}{2}", r"\frac{5}{2}"), (r"x^23", "x^2 3"),
    ],
    "thousands": [
        ("10_000", "10_00"), ("1,2", "12"), ("1{,}2", "12"), ("1_00", "100"), ("10_2", "102"), ("x_100", "x100"),
        ("1,00", "100"), ("(1,000)", "1000"), ("[1,000]", "1000"), (r"\{1,000\}", r"\{1000\}"), ("1 2", "12"),
        ("1000_2", "1000"), ("10_000", "10"),
    ],
    "repeating decimals": [
        (r"0.\dot{3}", "0.3"), (r"0.\overline{3}", "0.33"), (r"0.\overline{3}", "0.333333333333"),
        (r"0.\bar{3}", "0.3"), ("0.3̅", "0.3"), ("0.(3)", "0"), ("0.(3)", "0.3"), (r"0.\dot{1}2", "0.12"),
        (r"0.1\overline{2}", r"0.\overline{12}"), (r"0.\dot{1}\dot{2}", "0.12"), (r"1\overline{3}", "4/3"),
        (r"0.\overline{12}", r"0.\overline{21}"), ("2.5(4)", "2.5444"), (r"0.\overline{9}", "0.9"),
        ("0.333...", "1/3"),
    ],
    "factorials": [
        ("3! 2!", "32"), ("3! 2!", "8"), ("3! 2", "12"), ("3 2!", "6"), ("5!!", "120"), ("5!!", "(5!)!"),
        ("3!!!", "6"), (r"\frac{6!}{2!2!}", "90"), ("4!", "4"), ("3! 2!", "3!, 2!"), ("3!.5", "3"),
    ],
    "bases": [
        ("1010_2", "1010"), ("1010_2", "10"), ("1010_2", "1010_3"), (r"110_{\text{two}}", r"110_{\text{three}}"),
        ("5 base eight", "5"), ("5 in base 7", "5"), ("1010_2", "1011_2"), ("101_2", "10_12"),
        (r"1010_{(2)}", "1010_{(3)}"), ("1010 base 2", "2 base 1010"), ("12_{10}", "12_{9}"), ("x_{(2)}", "x"),
        ("12 base 5", "125"), ("204_5", "54_{10}"), ("base 5", "5"), ("10_2", "2"), ("1 010_2, 2", "1010_2"),
    ],
    "congruences": [
        (r"x\equiv 5\pmod{7}", r"x\equiv 6\pmod{7}"), (r"x\equiv 5\pmod{7}", r"x\equiv 5\pmod{8}"),
        (r"x\equiv 5\pmod{7}", r"y\equiv 5\pmod{7}"), (r"x\equiv 5\pmod{7}", "5"), (r"x\equiv 5\pmod{7}", "x=5"),
        ("5 mod 7", "5"), (r"5\text{ mod 7}", "5"), (r"x\equiv -5\pmod{7}", r"x\equiv 5\pmod{7}"),
        (r"x\equiv 1,4\pmod 5", r"x\equiv 1\pmod 5"), (r"x\equiv \frac12\pmod 7", r"x\equiv 4\pmod 8"),
        (r"x\equiv a\pmod n", r"x\equiv b\pmod n"), (r"2x\equiv 5\pmod{7}", r"x\equiv 5\pmod{7}"),
        (r"x\equiv 5\pmod{7}", r"x\equiv 7\pmod{5}"),
    ],
    "sets and lists": [
        (r"\{1,2,2\}", r"\{1,2,3\}"), (r"\{1,2\}", "1,2,2"), ("1,2,2", "1,2"), ("1,1", "1"), (r"\{1,1\}", "1,1,1"),
        (r"\{1\}", r"\{1,2\}"), (r"\{\frac12,0.5\}", r"\{0.5,0.25\}"), (r"\{(1,2)\}", r"\{(2,1)\}"),
        ("(1,1,2)", "(1,2)"), ("(1,2,2)", r"\{1,2\}"), (r"1\mp\sqrt2", r"1+\sqrt2"), (r"\pm a \mp b", "a+b, -a-b"),
        (r"(\pm1,2)", "(1,2)"), (r"(\pm1,2)", "(1,2),(1,-2)"), (r"\pm1\pm2", "3,-3"), (r"[\pm1,2]", "[1,2],[-1,2]"),
        (r"\{\{1\},\{1\}\}", r"\{1\}"), (r"\mp 3", "3"), (r"\{1,2,3\}", r"\{1,2,3,4\}"),
        (r"\{1.0,1.00000001\}", r"\{1\}"),
    ],
    "assignments": [
        ("(a,b,c)=(1,2,3)", "a=1,b=3,c=2"), ("(a,b)=(1,2)", "(b,a)=(1,2)"), ("(x,y)=(1,2)", "x=2,y=1"),
        ("(a,b,c)=(1,2,3)", "a=1,b=2"), ("5=x", "6"), ("5=x", "5=y"), ("5=x", "x=-5"), ("f(x)=2x+1", "y=2x-1"),
        ("f(x)=2x+1", "g(x)=2x+1"), ("f(2)=5", "y=5"), ("P(A)=5", "y=5"), ("f(y)=2", "y=2"), ("f(x)=5", "x=5"),
        ("5=x+1", "5"), ("7=11a+c", "11a+c"), ("5=e", "5"), (r"5=\pi", "5"), ("x^2-12=0", "12"),
        (r"\begin{cases}x=1\\y=2\end{cases}", "x=2,y=1"), (r"\begin{cases}x & x>0\\-x & x<0\end{cases}", "x"),
        ("0=x^2-4", "0"), ("5<x", "5"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1 \\[4pt] 2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\begin{pmatrix}1 \\[4pt] 2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\[4] 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}", "(1,2)"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ],
    "sets of reals": [
        (r"(1,2)\cup(2,3)", "(1,3)"), (r"[1,2]\cup[2,3]", "(1,3)"), (r"[1,2]\cup[2,3]", "[1,2]"),
        (r"[1,2)\cup(2,3]", "[1,3]"), (r"\mathbb{R}\setminus\{1\}", r"\mathbb{R}"),
        (r"\mathbb{R}\setminus\{1\}", r"x\ne2"), (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1]\cup[1,\infty)"),
        (r"\{x\mid x<3\}", r"x\le3"), (r"\{x\mid x<3\}", r"(3,\infty)"), (r"\{x\mid x<3\}", "3"),
        (r"\{x\mid x<3\}", r"\{3\}"), (r"\{x\mid x<3\}", r"\{x,3\}"), ("x<3", "y<3"), (r"x\ne1", r"y\ne1"),
        (r"x\ne1", "1"), (r"|x|\ge1", r"(-\infty,-1)\cup(1,\infty)"), ("|x-2|<3", "(-5,1)"), (r"|x-2|\le3", "(-1,5)"),
        ("|x|<3", "|y|<3"), ("|x|<3", "x<3"), ("|x|>3", "(-3,3)"), (r"x\ne1", r"x\ne1, x\ne 2"),
        (r"[1,2]\cup[3,4]", "[1,4]"), (r"[1,2]\cup[3,4]", r"[1,2]\cup[3,4)"), (r"[1,2]\cap[3,4]", r"[1,2]\cup[3,4]"),
        (r"[0,3]\cap[1,5]", "[0,5]"), (r"[0,5]\setminus(1,2)", r"[0,5]\setminus[1,2]"),
        (r"(1,2)\cup(3,4)", r"(2,1)\cup(4,3)"), (r"(2,1)\cup(4,3)", r"(3,1)\cup(5,2)"),
        (r"(1,2)\cup(2,3)", r"(1,2],(2,3)"), (r"\{1,2\}", "[1,2]"), (r"\{1\}\cup\{2\}", "[1,2]"),
        (r"\mathbb{R}^+", r"[0,\infty)"), (r"\mathbb{R}^+", r"\mathbb{R}^-"), (r"\mathbb{R}^*", r"\mathbb{R}"),
        (r"\{x\in\mathbb{Z}\mid 0<x<3\}", "(0,3)"), (r"\{n \mid n \in \mathbb{N}\}", r"\mathbb{R}"),
        (r"\text{all real numbers except } 1", r"\mathbb{R}"),
        (r"(0,\frac13)\cup(\frac13,1)", r"(0,0.333)\cup(0.333,1)"),
        (r"(0,\pi)\cup(\pi,4)", r"(0,3.14159265358979)\cup(3.14159265358979,4)"),
        (r"(0,2^{-99})\cup(1,2)", r"(0,2^{-98})\cup(1,2)"), (r"x<1 \text{ and } x>3", r"(-\infty,1)\cup(3,\infty)"),
        (r"x>1 \text{ or } x<3", "(1,3)"), (r"(1,2)\cup(3,4)", "(1,2),(3,4),(5,6)"), (r"\emptyset", r"\mathbb{R}"),
        (r"[1,2]\cup\emptyset", "[1,2)"), (r"(a,b)\cup(b,c)", "(a,c)"), (r"[-\infty,3)", r"x<3"),
        (r"\{x \mid x^2<4\}", r"(-\infty,4)"), (r"\mathbb{R}\setminus\mathbb{Z}", r"\mathbb{R}"),
        (r"x\ne\pm1", r"x\ne1"), (r"\mathbb{C}\setminus\{1\}", r"\mathbb{R}\setminus\{1\}"), ("]1,2[", "[1,2]"),
        (r"[1,2[\cup]2,3]", "[1,3]"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), both_ways(EQUAL))
def test_the_same_in_another_notation(answer: str, gold: str) -> None:
    assert compare(answer, gold).status is RewardStatus.CORRECT


@pytest.mark.parametrize(("answer", "gold"), both_ways(UNEQUAL))
def test_what_only_looks_alike(answer: str, gold: str) -> None:
    assert compare(answer, gold).status in (RewardStatus.WRONG, RewardStatus.UNPARSABLE, RewardStatus.REFUSED)


@pytest.mark.parametrize("answer", sorted({answer for answer, _ in both_ways(EQUAL) + both_ways(UNEQUAL)}))
def test_every_answer_equals_itself(answer: str) -> None:
    assert compare(f" {answer} ", answer).status in (RewardStatus.CORRECT, RewardStatus.UNPARSABLE)


# Openings without an end, long runs, and pairs of them, each as long as an answer may be.
HOSTILE = [
    "\\\\", "{", "\\{", "(", "_{", "1_{{", "1_", "1_000", r"\text{", r"\mathbf{", r"\emph{a", r"\color{",
    r"\textcolor[", r"\hspace{{}", r"{\bf ", r"\vec", r"\frac", r"\frac1", r"{a\over", r"\over", "1", "1,", "1 ",
    "1{,}", r"\quad", r"\\[", r"\\[1", "x<1,", r"\pm", "mod", "5=", "(a,b)=", r"\begin{cases}", r"\\&=", "√", "√(",
    "²", "¹", "¹½", "₁", "½", "³√", "0.3̅", "1̅", "ᵒ", "ℝ∖", "1 base ", "0.(", "3! ", r"\{x|", r"\dot{1}", r"0.1\dot{",
    "{}", r"\cup", r"\tag{", r"\kern1", r"\log_1", "\u200b",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_texts_are_read_in_linear_time(unit: str) -> None:
    started = time.process_time()
    for start in ("", "1", "x=", "(1,2)"):
        compare_cheaply((start + unit * 2_000)[:2_000], "5")
        tidy((start + unit * 20_000)[:20_000])
    # A search that takes quadratic time needs minutes for these 20,000 characters.
    assert time.process_time() - started < 5


@pytest.mark.parametrize("text", ["", "5", r"\frac{1}{2}", "x^2", "1~2", r"\ {}"])
def test_ascii_has_no_other_characters_to_write(text: str) -> None:
    assert to_tex(text) is text
