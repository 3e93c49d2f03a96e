"""Where in a completion the answer stands."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dphrl.rewards.extraction import EXTRACTORS, extract_auto, extract_boxed


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
        (r"so \boxed 5.", "5"),
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
        (r"The answer is $x = 3$ or $x = 4$.", "x = 3, x = 4"),
        ("so the total is $5 + $6 = $11.", "$11"),
        ("The answer is about 3.14.", "3.14"),
        ("My answer is 5 because 2 + 4 = 6", "5"),
        (r"So x = \sqrt{2}", r"x = \sqrt{2}"),
        ("The answer is `12`.", "12"),
        ("Answer = 10", "10"),
        ("the answer is 42 apples.", "42 apples"),
        ("the seat is K2", None),
        ("__import__('os') or 42", None),
        ("x.__class__ is 42", None),
        ("the answer to this I do not know", None),
        ("I could not solve this problem.", None),
        ("", None),
    ],
)
def test_extract_auto(text: str, expected: str | None) -> None:
    assert extract_auto(text) == expected


@pytest.mark.parametrize("extraction", sorted(EXTRACTORS))
@pytest.mark.parametrize(
    "unit",
    [
        "lorem ipsum ",
        "{",
        "\\",
        "$",
        "$$",
        r"\(",
        r"\boxed",
        r"\boxed{",
        "####",
        "answer is ",
        "Answer: $",
        "$1$ or ",
        "1,",
        "so ",
    ],
)
def test_megabytes_take_no_time(unit: str, extraction: str) -> None:
    extract = EXTRACTORS[extraction]
    text = unit * (2_000_000 // len(unit))
    started = time.perf_counter()
    extract(text)
    extract(rf"\boxed{{{text}")
    assert extract(rf"{'lorem ipsum ' * 200_000}\boxed{{42}}") == "42"
    assert time.perf_counter() - started < 4


@given(st.text(max_size=60), st.sampled_from(["42", r"\frac{1}{2}", "(1, 2)", r"\{1\}", "x^{2}"]))
def test_a_box_at_the_end_is_found(text: str, answer: str) -> None:
    assert extract_boxed(rf"{text.replace('<', ' ')} \boxed{{{answer}}} done") == answer


@settings(max_examples=300)
@given(st.text(alphabet=st.sampled_from(list("aA1 .,$\\{}()[]#=*\n")), max_size=80))
def test_any_text_is_read(text: str) -> None:
    for extract in EXTRACTORS.values():
        answer = extract(text)
        assert answer is None or answer.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5, not 6.", "5"),
        ("The answer is 5 (since 2+3=5).", "5"),
        ("The answer is either 3 or 4", "either 3 or 4"),
        ("the answer is not 12", "not 12"),
        ("The answer is 3 or 4.", "3 or 4"),
    ],
)
def test_a_hedge_is_no_answer_and_an_aside_no_part_of_one(text: str, answer: str) -> None:
    assert extract_auto(text) == answer
