"""The math grader: typed verdicts, its child process, and agreement with the labelled cases."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dphrl.rewards import math_answer
from dphrl.rewards.math_answer import MathAnswerGrader
from dphrl.rewards.math_compare import compare, compare_cheaply
from dphrl.types import RewardResult, RewardStatus

C, W, U, R = RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.UNPARSABLE, RewardStatus.REFUSED

SLOW_HANDLER = "tests.unit.sandbox_handlers:make_slow_grader"


@pytest.fixture(scope="module")
def grader() -> Iterator[MathAnswerGrader]:
    shared = MathAnswerGrader("boxed")
    yield shared
    shared.close()


def grade_one(grader: MathAnswerGrader, text: str, gold: str) -> RewardResult:
    return grader.grade([(text, gold)])[0]


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
        ("((x+1)^{99})^{99}", "x", W),
        ("\\mathrm{__import__}('os')", "x", U),
        ("9^{9^{9^9}}", "42", R),
        ("f(@)", "x", U),
        ("1" * 3000, "42", R),
    ],
)
def test_verdicts(grader: MathAnswerGrader, answer: str, gold: str, status: RewardStatus) -> None:
    assert grade_one(grader, rf"thus \boxed{{{answer}}}", gold).status is status


def test_the_part_that_was_read_is_told_and_no_part_of_what_is_remembered() -> None:
    grader = MathAnswerGrader("auto")
    items = [(r"\boxed{5}", "5"), ("Answer: **5**", "5"), ("so **5** of 6", "5"), ("<think>4</think> 5", "5")]
    details = [result.detail for result in grader.grade(items)]
    assert details == [f"'5' equals '5' ({part})" for part in ("box", "after 'answer'", "bold", "whole text")]
    assert list(grader._verdicts) == [("5", "5")]
    grader.close()


@pytest.mark.parametrize("extraction", ["boxed", "auto"])
@pytest.mark.parametrize(
    ("text", "status"),
    [
        (r"<think>\boxed{4}</think>\boxed{5}", C),
        (r"\boxed{4}</think>\boxed{5}", C),
        (r"<think>\boxed{5}</think>\boxed{4}", W),
        (r"<think>\boxed{5}</think>I do not know.", U),
        (r"<think>\boxed{5}", U),
        (r"\boxed{5}</think>", U),
    ],
)
def test_thoughts_are_no_answer(text: str, status: RewardStatus, extraction: str) -> None:
    grader = MathAnswerGrader(extraction)
    assert grade_one(grader, text, "5").status is status
    grader.close()


def test_a_dressed_gold_equals_itself_and_what_it_dresses(grader: MathAnswerGrader) -> None:
    for gold in ("**7**", r"\(7\)", "`7`", r"\text{Answer: }7"):
        assert [r.status for r in grader.grade([(rf"\boxed{{{gold}}}", gold), (r"\boxed{7}", gold)])] == [C, C], gold


def test_a_batch_keeps_its_order(grader: MathAnswerGrader) -> None:
    items = [(r"\boxed{(x+1)^2}", "x^2+2x+1"), ("no box", "1"), (r"\boxed{2}", "2"), (r"\boxed{x}", "y")] * 20
    statuses = [result.status for result in grader.grade(items)]
    assert statuses == [C, U, C, W] * 20
    assert grader.grade([]) == []


def test_long_polynomials_are_answers_not_bombs(grader: MathAnswerGrader) -> None:
    polynomial = "+".join(f"x^{{{power}}}" for power in range(2, 60))
    reversed_terms = "+".join(reversed(polynomial.split("+")))
    assert grade_one(grader, rf"\boxed{{{reversed_terms}}}", polynomial).status is C
    assert grade_one(grader, rf"\boxed{{{reversed_terms}+x}}", polynomial).status is W


def test_the_child_starts_only_when_something_has_to_be_computed() -> None:
    grader = MathAnswerGrader("boxed")
    assert grade_one(grader, r"\boxed{\frac{2}{4}}", "0.5").status is C
    assert grade_one(grader, r"\boxed{\text{Yes}}", "no").status is W
    assert grader._sandbox is None
    assert grade_one(grader, r"\boxed{\sqrt{8}}", r"2\sqrt{2}").status is C
    assert grader._sandbox is not None
    grader.close()


def test_other_threads_grade_too(grader: MathAnswerGrader) -> None:
    results: dict[int, list[RewardStatus]] = {}

    def grade(i: int) -> None:
        items = [(rf"\boxed{{(x+{i})^2-{j}}}", f"x^2+{2 * i}x+{i * i}-{j}") for j in range(10)]
        results[i] = [result.status for result in grader.grade(items)]

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [C] * 10 for i in range(4)}


def test_a_time_limit_costs_one_item_and_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "_HANDLER", SLOW_HANDLER)
    grader = MathAnswerGrader("boxed", timeout_s=0.3)
    items = [(r"\boxed{x}", "y"), (r"\boxed{x+s+l+o+w}", "y"), (r"\boxed{x+d+i+e}", "y"), (r"\boxed{x+1}", "y")]
    statuses = [result.status for result in grader.grade(items)]
    assert statuses == [W, RewardStatus.TIMEOUT, RewardStatus.RESOURCE_LIMIT, W]
    assert {pair[0] for pair in grader._verdicts} == {"x", "x+1"}
    grader.close()


def test_a_verdict_is_remembered(grader: MathAnswerGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    item = (r"\boxed{a(b+c)}", "ab+ac")
    assert grader.grade([item])[0].status is C
    monkeypatch.setattr(grader, "_decided_by_child", lambda pairs: [RewardResult(W)] * len(pairs))
    assert grader.grade([item])[0].status is C
    monkeypatch.setattr(math_answer, "_CACHE_SIZE", 0)
    grader.grade([(r"\boxed{1}", "1")])
    assert grader.grade([item])[0].status is W


def test_a_fault_of_the_machinery_is_typed_and_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "_HANDLER", "tests.unit.sandbox_handlers:make_nothing")
    grader = MathAnswerGrader("boxed")
    simple, result = grader.grade([(r"\boxed{1}", "1"), (r"\boxed{x}", "y")])
    assert simple.status is C
    assert result.status is RewardStatus.INFRASTRUCTURE_ERROR
    assert result.score is None
    assert "no licence" in result.detail


def test_an_unknown_extraction_is_refused() -> None:
    with pytest.raises(ValueError, match="extraction='last'"):
        MathAnswerGrader("last")


# ------------------------------------------------------------ properties

FRAGMENTS = re.split(
    "  ",
    r"\frac  \sqrt  {  }  (  )  [  ]  1  2  x  ^  _  -  +  ,  \pm  \cup  |  !  \sin  \log  \pi  \infty  i  e  \text{cm}"
    r"  %  ^\circ  =  <  \in  \{  \}  \begin{pmatrix}  \end{pmatrix}  &  \\  \sum  \binom  f(  0  9^  .  \overline{3}"
    r"  :  \text{and}  \mathrm  $  >  \le  \lfloor  '  ;  \ne  \mathbb{R}  \approx  \setminus  \cap  \mid  \equiv"
    r"  \pmod  \mp  _{two}  base  \color{red}  \Large  \dot{3}  {,}000  "
    "\u00bd  \u00b2  \u2081  \u2212  \u221a  \u211d  ",
)
ANSWERS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=st.sampled_from(list(r"0123456789xyie+-*/^_!%()[]{}|,.:;=<> \'&~")), max_size=30),
    st.lists(
        st.sampled_from(FRAGMENTS),
        max_size=14,
    ).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(ANSWERS, ANSWERS)
@example("0^{-1}", r"\infty!")
def test_any_pair_has_a_verdict_and_order_does_not_matter(a: str, b: str) -> None:
    one, other = compare(a, b), compare(b, a)
    assert {one.status, other.status} <= {C, W, U, R}
    if R not in (one.status, other.status):
        assert (one.status is C) == (other.status is C)


@settings(max_examples=200, deadline=None)
@given(ANSWERS, ANSWERS)
def test_the_cheap_verdict_is_the_full_one(a: str, b: str) -> None:
    cheap = compare_cheaply(a, b)
    if cheap is not None:
        assert (cheap.status is C) == (compare(a, b).status is C)


EXPRESSIONS = st.recursive(
    st.sampled_from(["x", "y", "2", "3", r"\pi", r"\sqrt{2}", r"\frac{1}{3}"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: f"({p[0]}+{p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"{p[0]}\\cdot {p[1]}"),
        inner.map(lambda e: rf"\frac{{{e}}}{{7}}"),
        inner.map(lambda e: f"{{({e})}}^2"),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS)
def test_the_laws_of_arithmetic_hold_and_one_more_is_too_many(a: str, b: str) -> None:
    assert compare(rf"({a})({b})+{a}", rf"({a})+({b})({a})").status is C
    assert compare(rf"({a})(({b})+1)", rf"({a})({b})+{a}").status is C
    assert compare(rf"{a}+1", a).status is W
    assert compare(rf"{a}+10^{{-30}}", a).status is W


# ------------------------------------------------------------ labelled cases


def rows(data_root: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (data_root / "labels" / name).read_bytes().splitlines()]


def test_agreement_with_the_labelled_cases(data_root: Path) -> None:
    grader = MathAnswerGrader("auto")
    cases = rows(data_root, "math_grading.jsonl")
    results = grader.grade([(str(row["prediction"]), str(row["gold"])) for row in cases])
    grader.close()
    assert [
        row["id"] for row, result in zip(cases, results, strict=True) if (result.status is C) != row["expected"]
    ] == []


@pytest.mark.parametrize("extraction", ["auto", "boxed"])
def test_hostile_answers_are_turned_down_at_once(data_root: Path, extraction: str) -> None:
    grader = MathAnswerGrader(extraction)
    grade_one(grader, r"\boxed{x}", "y")
    for row in rows(data_root, "hostile_math.jsonl"):
        text = str(row["prediction"])
        if "repeat" in row:
            repeat = row["repeat"]
            assert isinstance(repeat, dict)
            text = text.replace(repeat["placeholder"], repeat["unit"] * repeat["n"])
        if extraction == "boxed" and r"\boxed" not in text:
            text = rf"\boxed{{{text}}}"
        started = time.perf_counter()
        result = grade_one(grader, text, str(row["gold"]))
        assert time.perf_counter() - started < 2, row["id"]
        # By inspection, not by running into a limit.
        assert result.status in (C, W, U, R), (row["id"], result)
        assert not (row["must_not_accept"] and result.status is C), row["id"]
    grader.close()


def test_gold_answers_equal_themselves_respelled(data_root: Path) -> None:
    for line in (data_root / "math" / "math500.jsonl").read_text().splitlines():
        gold = json.loads(line)["answer"]
        for answer in (gold, f"${gold}.$", rf"\displaystyle {gold}", gold.replace(r"\frac", r"\dfrac"), f" {gold}. "):
            assert compare(answer, gold).status is C, (answer, gold)
