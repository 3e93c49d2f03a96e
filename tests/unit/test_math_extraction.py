"""Where in a completion the answer stands."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dphrl.config.marks import THINKING_MARKS
from dphrl.rewards.extraction import FINDERS, extract_boxed, undress
from dphrl.rewards.thinking import spoken


def extract_auto(text: str) -> str | None:
    return extract("auto", text)


def extract(extraction: str, text: str) -> str | None:
    said = spoken(text, THINKING_MARKS)
    found = None if said is None else FINDERS[extraction](said)
    return found.text if found else None


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
        (r"so $\boxed7$.", "7"),
        (r"so \boxed-7, as said", "-7"),
        (r"so $\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"so \(\boxed\pi\)", r"\pi"),
        (r"so \boxed{7} and \boxed8", "7"),
        (r"so \boxed C", "C"),
        (r"I write \boxed and then \fbox.", None),
        (r"Mark it with \boxed \boxed{5}", "5"),
        (r"<think>\boxed{4}</think> \boxed{5}", "5"),
        (r"<think>\boxed{4}</think> 5", None),
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
        # tags
        ("<answer>5</answer>", "5"),
        ("It is 4. <Answer> 5 </Answer> It is 6.", "5"),
        ("<answer>4</answer> wait <answer>5</answer>", "5"),
        (r"<answer>We get \boxed{5} from 6</answer>", "5"),
        (r"\boxed{4} <answer>5</answer>", "5"),
        (r"<answer>4</answer> no, \boxed{5}", "5"),
        (r"<answer>$\frac{1}{2}$ of 3</answer>", r"\frac{1}{2}"),
        ("<answer>There are **5** of 7.</answer>", "5"),
        ("<answer>There are 5 apples, not 6.</answer>", "5"),
        ("<answer>5!</answer>", "5!"),
        ("<answer>no solution exists</answer>", "no solution exists"),
        ("<answer>\nFirst 4.\nThen it is **5** of 7.\n</answer>", "5"),
        ("so <answer>5", "5"),
        ("<SOLUTION>5</SOLUTION>", "5"),
        ("<final_answer>5</final_answer>", "5"),
        ("<|begin_of_box|>5<|end_of_box|> of 6", "5"),
        ("It is 5. I used `<answer>` for it.", "5"),
        ("<answer></answer> It is 5.", "5"),
        # bold finals
        ("There are **5** apples in 3 boxes.", "5"),
        ("There are <b>5</b> apples in 3 boxes.", "5"),
        ("**Final answer:** 5", "5"),
        ("**The final answer is: 5**", "5"),
        ("So the answer is **(B) 5**.", "(B) 5"),
        ("The answer is that **5** of 7 are left.", "5"),
        ("We get **12** because $a=3$ and $b=4$.", "12"),
        ("Let **3** be it.\nThen $x = 4$.", "x = 4"),
        ("**Step 1:** compute\n**2.** add up to 7", "7"),
        ("**Result:** it is 7", "7"),
        ("It grew by **25**% in 3 years", "25%"),
        ("This is **impossible**.", "impossible"),
        ("This is **not** right, it is 7", "7"),
        ("2**3 + 4**5 is 1032", "1032"),
        ("***5*** of 6", "5"),
        ("Thus we obtain **p - q**.", "p - q"),
        ("Thus we obtain p - q.", "p - q"),
        ("The answer is 5! + 1.", "5! + 1"),
        ("The answer is 5! It was easy.", "5"),
        (r"The answer is 11,\! 111.", r"11,\! 111"),
        ("x = **3** or **4**", "x = 3 or 4"),
        # "####" as a heading
        ("#### Final Answer\n\n12", "12"),
        ("#### 5\n\n#### Explanation\nIt is 2 + 3.", "5"),
        ("#### 1. Setup\nSo it is 7", "7"),
        ("#### Step 3: compute\nSo it is 7", "7"),
        ("#### 5, not 6", "5"),
        ("#### no solution", "no solution"),
        ("#### B\nas said, 3", "B"),
        # Chinese
        ("\u7b54\u6848\u662f 5", "5"),
        ("\u7b54\u6848\uff1a5\u3002", "5"),
        ("\u6700\u7ec8\u7b54\u6848\u4e3a\uff1a**5**", "5"),
        ("\u6240\u4ee5\u7b54\u6848\u4e3a$\\frac{1}{2}$\u3002\u5171 3 \u6b65", r"\frac{1}{2}"),
        ("\u7b54\u6848\u662f5\u4e2a\u82f9\u679c\u3002", "5"),
        ("\u6240\u4ee5\u4e00\u5171\u67095\u4e2a\u82f9\u679c", "5"),
        ("\u4e0d\u5b58\u5728", "\u4e0d\u5b58\u5728"),
        ("\u7b54\u6848\u662f4\uff0c\u4e0d\u662f5", "4"),
        ("\u7b54\u6848\u4e0d\u662f5", "\u4e0d\u662f5"),
        ("\u6545\u9009\uff1aB", "B"),
        ("\u56e0\u6b64\u9009 **B**\u3002", "B"),
        ("The answer is correct, so 5.", "5"),
        ("The final answer \u2192 5", "5"),
        ("The answer is between 4 and 5.", "between 4 and 5"),
        ("It could be 5 or 6.", None),
        ("It is surely **not 5**.", None),
        ("So it is 5 plus one.", None),
        ("The answer is 5 to the power of two.", "5 to the power of two"),
        ("The answer is 5 and a half.", "5 and a half"),
        ("The answer is 5 million people.", "5 million people"),
        ("so that is 4 plus 3, or 84/12 = 7 dozen eggs", "7"),
        ("The answer is 5 degrees below zero.", "5 degrees below zero"),
        ("The answer is 5 months by symmetry.", "5"),
        ("In the end they give $18 to the man.", "$18"),
        ("The answer is 5 and that is it.", "5"),
        ("", None),
    ],
)
def test_extract_auto(text: str, expected: str | None) -> None:
    assert extract_auto(text) == expected


@pytest.mark.parametrize("extraction", sorted(FINDERS))
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
        "<think>",
        "</think>",
        "<think></think>",
        "`<think>` tag ",
        "```\n<think>",
        "<",
        "<answer>",
        "<answer>1",
        "**",
        "**1** ",
        "<b>1",
        "#### a\n",
        r"\boxed7",
        r"\boxed a ",
        "\u7b54\u6848",
    ],
)
def test_megabytes_take_no_time(unit: str, extraction: str) -> None:
    text = unit * (2_000_000 // len(unit))
    started = time.process_time()
    extract(extraction, text)
    extract(extraction, rf"\boxed{{{text}")
    assert extract(extraction, rf"{'lorem ipsum ' * 200_000}\boxed{{42}}") == "42"
    assert time.process_time() - started < 4


@given(st.text(max_size=60), st.sampled_from(["42", r"\frac{1}{2}", "(1, 2)", r"\{1\}", "x^{2}"]))
def test_a_box_at_the_end_is_found(text: str, answer: str) -> None:
    assert extract_boxed(rf"{text.replace('<', ' ')} \boxed{{{answer}}} done") == answer


@settings(max_examples=300)
@example("**.**")
@example("**Answer:** **.**")
@given(st.text(alphabet=st.sampled_from(list("aA1 .,$\\{}()[]#=*\n")), max_size=80))
def test_any_text_is_read(text: str) -> None:
    for extraction in FINDERS:
        answer = extract(extraction, text)
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


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (r"\boxed{5} <b>6</b>", "box"),
        (r"<answer>\boxed{5}</answer>", "answer tag"),
        ("#### 5", "####"),
        ("Answer: 5", "after 'answer'"),
        ("**5** of 6", "bold"),
        ("so $5$ of 6", "formula"),
        ("5", "whole text"),
        ("so there are 5", "last number"),
    ],
)
def test_the_part_that_was_read_is_named(text: str, part: str) -> None:
    found = FINDERS["auto"](text)
    assert found is not None
    assert found.part == part


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        ("**7**", "7"),
        ("*7*", "7"),
        ("***7***", "7"),
        ("__7__", "7"),
        ("_7_", "7"),
        ("`7`", "7"),
        (r"\(7\)", "7"),
        (r"\[7\]", "7"),
        (r"**\(7\)**", "7"),
        (r"\(\frac{1}{2}\) or \(3\)", r"\frac{1}{2} or 3"),
        ("**(A)**", "(A)"),
        ("<b>7</b>", "7"),
        ('"7"', "7"),
        ("'7'", "7"),
        ("\u201c7\u201d", "7"),
        ("**7", "7"),
        ("*7", "7"),
        ("7**", "7"),
        (r"7\\", "7"),
        (r"\text{Answer: } 7", "7"),
        (r"\text{The final answer is }7", "7"),
        (r"\text{Answer}: 7", "7"),
        (r"\text{Ans.} 7", "7"),
        (r"\textbf{Answer: 7 cm}", r"\text{7 cm}"),
        ("Answer: **7**", "7"),
        ("\u7b54\u6848\uff1a7", "7"),
        # What belongs to the answer stays.
        ("7", "7"),
        ("2*3", "2*3"),
        ("*2*3*", "*2*3*"),
        ("2**3*4**2", "2**3*4**2"),
        ("2**3**-1", "2**3**-1"),
        ("z^*", "z^*"),
        ("z^{**}", "z^{**}"),
        ("z^**", "z^**"),
        ("f''", "f''"),
        (r"x \ ", r"x \ "),
        (r"\begin{pmatrix}1\\(2)\\[4pt]3\end{pmatrix}", r"\begin{pmatrix}1\\(2)\\[4pt]3\end{pmatrix}"),
        ("Answer", "Answer"),
        ("the answers", "the answers"),
        (r"\text{Answer}", r"\text{Answer}"),
        ("", ""),
    ],
)
def test_what_only_dresses_an_answer_is_taken_off(answer: str, bare: str) -> None:
    assert undress(answer) == bare
    assert undress(bare) == bare
