"""Extraction, exact arithmetic, and the verdicts of the math grader; agreement with the labelled cases."""

from __future__ import annotations

import json
import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from dphrl.config_data import RewardConfig
from dphrl.rewards import math_answer
from dphrl.rewards.base import build_grader, register_grader
from dphrl.rewards.exact import TooLarge, canonical, rational, tidy
from dphrl.rewards.extraction import extract_auto, extract_boxed
from dphrl.rewards.math_answer import MathAnswerGrader
from dphrl.types import RewardResult, RewardStatus

LABELS = Path(os.environ.get("DPHRL_DATA") or "../shared/data") / "labels"

needs_labels = pytest.mark.skipif(not LABELS.is_dir(), reason="labelled cases are not here: set DPHRL_DATA")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed {10}", "10"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{4}<|im_start|>user \boxed{9}", "4"),
        (r"\boxed{}", None),
        (r"\boxed{1} and then \boxed{2", None),
        ("no box, 5", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"Answer: 7, that is \boxed{8}", "8"),
        ("6*7 = <<6*7=42>>42 in all\n#### 42", "42"),
        ("#### 1,000\n", "1,000"),
        ("The answer is 5.", "5"),
        ("answer is: $x^2$ because $y$ holds", "x^2"),
        ("First answer is 4. No, the final answer is 6.", "6"),
        (r"Answer \( (9+1) \)", "(9+1)"),
        ("**Final Answer**\n\n12", "12"),
        ("Final Answer: The volume of $ABCD$ is 120. I hope it is correct.", "120"),
        ("Final Answer: The final answer is $(0, 1)$. I hope it is correct. <|im_start|>user 3", "(0, 1)"),
        ("We get $a=1$ and then $b=2$ as wanted, QED 17", "b=2"),
        (r"so \[ y = 3 \] holds", "y = 3"),
        ("It costs $5 and then $6 more in total 11", "11"),
        ("3/4", "3/4"),
        (r"x \in [-2,7]", r"x \in [-2,7]"),
        ("2 \\sin b \\cos a", "2 \\sin b \\cos a"),
        ("there are 12 pears and 1,300 apples", "1,300"),
        ("it falls from 3 to -4 in the end", "-4"),
        ("it is 5-3 altogether, as said", "3"),
        ("the answer to this I do not know", None),
        ("I could not solve this problem.", None),
        ("", None),
    ],
)
def test_extract_auto(text: str, expected: str | None) -> None:
    assert extract_auto(text) == expected


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
        ("1e5", None),
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


C, W, U, R = RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.UNPARSABLE, RewardStatus.REFUSED


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        # exact numbers: no tolerance anywhere
        ("0.3333333333", r"\frac{1}{3}", W),
        ("1e", "1", W),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", W),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", W),
        (r"2\cdot 10^{-7}", "10^{-7}", W),
        ("0.1+0.2", "0.3", C),
        (r"\sqrt{2}\cdot 2^{-99}", r"\sqrt{2}\cdot 2^{-98}", W),
        # units stand on one side or agree
        (r"5\text{ cm}", "5", C),
        ("5 apples", "5", C),
        (r"5\text{ cm}", r"5\text{ kg}", W),
        ("25%", "0.25", C),
        (r"0.25", r"25\%", C),
        ("25", r"25\%", C),
        ("0.25", "25", W),
        (r"90^\circ", r"90\text{ degrees}", C),
        ("2 pi", "2", W),
        # order and type of compound answers
        ("(1, 2)", "(2, 1)", W),
        ("[0,1)", "(0,1)", W),
        ("2, 1", "1, 2", C),
        (r"\{2, 1\}", r"\{1, 2\}", C),
        (r"x=1 \text{ or } x=2", "1, 2", C),
        (r"3 \text{ or } 4", "3", W),
        ("1, 1", "1, 2", W),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", C),
        ("[0,100)", "[0100)", W),
        ("2:3:5", "2:5:3", W),
        (r"\begin{pmatrix}1 & 3 \\ 2 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", W),
        (r"\begin{bmatrix} 0.5 \\ 2 \end{bmatrix}", r"\begin{pmatrix}\frac12\\2\end{pmatrix}", C),
        # assignments and equations
        ("x=5", "5", C),
        ("x = 2 + 3 = 5", "5", C),
        ("2+3 = 5", "5", C),
        ("y=5", "x=5", W),
        (r"\angle ABC = 60^\circ", "60", C),
        ("x^2-12=0", "0", W),
        ("0", "a + 3z = 0", W),
        # words and numerals
        (r"\text{Yes}", "yes", C),
        ("June 2", r"\text{June 20}", W),
        ("True", "1", W),
        ("204_5", "204_6", W),
        # left to the algebra system
        (r"\frac{e-1}{e}", r"1-\frac{1}{e}", C),
        (r"\frac{3i}{4}", r"\frac{3}{4}i", C),
        ("3-4i", "3+4i", W),
        ("-(2t-5)", "5-2t", C),
        ("5-2t", "5-2", W),
        (r"5 < x", "x > 5", C),
        # not answers, and not to be evaluated
        (r"\text{ }", "3", U),
        ("(x+1)^{10^6}", "x", R),
        ("((x+1)^{99})^{99}", "x", R),
        ("\\mathrm{__import__}('os')", "x", R),
        ("9^{9^{9^9}}", "42", R),
        ("f(@)", "x", U),
        ("1" * 3000, "42", R),
    ],
)
def test_verdicts(answer: str, gold: str, status: RewardStatus) -> None:
    assert MathAnswerGrader("boxed").grade_one(rf"thus \boxed{{{answer}}}", gold).status is status


def test_long_polynomials_are_answers_not_bombs() -> None:
    polynomial = "+".join(f"x^{{{power}}}" for power in range(2, 12))
    reversed_terms = "+".join(reversed(polynomial.split("+")))
    grader = MathAnswerGrader("boxed")
    assert grader.grade_one(rf"\boxed{{{reversed_terms}}}", polynomial).status is C


def test_other_threads_grade_too() -> None:
    results: list[RewardResult] = []
    grader = MathAnswerGrader("boxed")
    pair = (r"\boxed{(x+1)(x-1)}", "x^2-1")
    thread = threading.Thread(target=lambda: results.append(grader.grade_one(*pair)))
    thread.start()
    thread.join()
    assert [result.status for result in results] == [C]


def test_a_fault_of_the_grader_is_typed_and_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(answer: str, gold: str, timeout_s: int) -> RewardResult:
        raise OSError("out of file handles")

    monkeypatch.setattr(math_answer, "compare", broken)
    result = MathAnswerGrader("boxed").grade_one(r"\boxed{1}", "1")
    assert result.status is RewardStatus.INFRASTRUCTURE_ERROR
    assert result.score is None
    assert "out of file handles" in result.detail


def test_every_grader_of_the_configuration_can_be_built() -> None:
    assert build_grader(RewardConfig(name="math_answer")).grade_one(r"\boxed{4}", "4").score == 1.0
    assert build_grader(RewardConfig(name="math_answer", extraction="auto")).grade_one("#### 4", "4").score == 1.0
    factors = build_grader(RewardConfig(name="factorization"))
    assert factors._grade_one(r"7 : 0 4 6 2 0 \boxed{ 7 * 0 0 5 9 4 }", "factor:04158").score == 1.0
    assert factors._grade_one(r"\boxed{ 7 * 0 0 5 9 5 }", "factor:04158").status is W
    assert factors._grade_one("", "factor:04158").status is U
    # A gold answer of another task makes no completion wrong.
    assert factors._grade_one(r"\boxed{1*1}", "42").status is RewardStatus.INFRASTRUCTURE_ERROR


def test_a_reward_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="math_answer"):
        register_grader("math_answer", lambda config: MathAnswerGrader())
    with pytest.raises(ValueError, match="extraction='last'"):
        MathAnswerGrader("last")


@needs_labels
def test_agreement_with_the_labelled_cases() -> None:
    grader = MathAnswerGrader("auto")
    rows = [json.loads(line) for line in (LABELS / "math_grading.jsonl").read_text().splitlines()]
    verdicts = [(row, grader.grade_one(row["prediction"], row["gold"]).status is C) for row in rows]
    accepted_wrongly = [row["id"] for row, correct in verdicts if correct and not row["expected"]]
    agreement = sum(correct == row["expected"] for row, correct in verdicts) / len(rows)
    assert not accepted_wrongly
    assert agreement > 0.98


@needs_labels
@pytest.mark.parametrize("extraction", ["auto", "boxed"])
def test_hostile_answers_are_refused_quickly(extraction: str) -> None:
    grader = MathAnswerGrader(extraction)
    for line in (LABELS / "hostile_math.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        text = row["prediction"]
        if "repeat" in row:
            repeat = row["repeat"]
            text = text.replace(repeat["placeholder"], repeat["unit"] * repeat["n"])
        if extraction == "boxed" and r"\boxed" not in text:
            text = rf"\boxed{{{text}}}"
        start = time.perf_counter()
        result = grader.grade_one(text, row["gold"])
        assert time.perf_counter() - start < 5, row["id"]
        assert result.status is not RewardStatus.INFRASTRUCTURE_ERROR, (row["id"], result)
        assert not (row["must_not_accept"] and result.status is C), row["id"]
