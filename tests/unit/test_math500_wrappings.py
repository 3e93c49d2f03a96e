r"""The gold answers of MATH-500 inside what models write around an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dphrl.rewards.math_answer import MathAnswerGrader
from dphrl.types import RewardStatus

MIN_ACCEPTED = 499
# Superscripts only after a letter or a digit: after a bracket it may be the degree sign or a command.
UNICODE = {
    r"\\pi(?![A-Za-z])": "π",
    r"\\infty(?![A-Za-z])": "∞",
    r"\\cup(?![A-Za-z])": "\u222a",
    r"\\(?:leq?|leqslant)(?![A-Za-z])": "≤",
    r"\\(?:geq?|geqslant)(?![A-Za-z])": "≥",
    r"\\(?:cdot|times)(?![A-Za-z])": "×",
    r"\\theta(?![A-Za-z])": "θ",
    r"\^\{?\\circ\}?": "°",
    r"(?<=[A-Za-z0-9])\^(?:2|\{2\})(?!\d)": "²",
    r"(?<=[A-Za-z0-9])\^(?:3|\{3\})(?!\d)": "³",
    r"\\[dt]?frac\{1\}\{2\}": "½",
    r"\\[dt]?frac\{3\}\{4\}": "¾",
    r"\\sqrt\{(\d+)\}": r"√(\1)",
    r"(?<![A-Za-z{])-": "−",
}


def in_unicode(gold: str) -> str:
    for pattern, sign in UNICODE.items():
        gold = re.sub(pattern, sign, gold)
    return gold


def with_unit(gold: str) -> str:
    return rf"{gold}\text{{ meters}}" if re.fullmatch(r"-?\d+(?:\.\d+)?", gold) else gold


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "thoughts before": lambda gold: rf"<think>Is the answer 1234567? \boxed{{x-y}}? **7**.</think>So \boxed{{{gold}}}.",
    "delimiters in the box": lambda gold: rf"Thus \boxed{{\({gold}\)}}.",
    "dollars in the box": lambda gold: rf"Thus \boxed{{${gold}$}}.",
    "bold": lambda gold: rf"**Thus $\boxed{{**{gold}**}}$**",
    "Unicode": lambda gold: rf"Thus \boxed{{{in_unicode(gold)}}}.",
    "colour": lambda gold: rf"Thus \boxed{{\textcolor{{red}}{{{gold}}}}}.",
    "unit": lambda gold: rf"Thus \boxed{{{with_unit(gold)}}}.",
    "the word": lambda gold: rf"Answer: ${gold}$",
    "the word in the box": lambda gold: rf"\boxed{{\text{{Answer: }}{gold}}}",
    "tags": lambda gold: rf"So it is 1234567.\n<answer>{gold}</answer>",
    "tags around a formula": lambda gold: rf"<think>4</think><answer>\({gold}\)</answer>",
    "bold final": lambda gold: rf"We add 2 to it. **Final answer:** **${gold}$**",
}
NEEDS_AUTO = {"the word", "tags", "tags around a formula", "bold final"}
THOUGHTS: dict[str, Callable[[str], str]] = {
    "closed": lambda gold: rf"<think>The answer is \boxed{{{gold}}}.</think>I cannot say.",
    "opened by the prompt": lambda gold: rf"The answer is \boxed{{{gold}}}.</think>I cannot say.",
    "never closed": lambda gold: rf"<think>**Answer:** ${gold}$, \boxed{{{gold}}}",
    "nested": lambda gold: rf"<think><think>a</think>\boxed{{{gold}}}</think>I cannot say.",
    "in a tag": lambda gold: rf"<reasoning><answer>{gold}</answer> \boxed{{{gold}}}</reasoning>",
    "inside a box": lambda gold: rf"\boxed{{<think>{gold}</think>}}",
    "a wrong box after": lambda gold: rf"<think>\boxed{{{gold}}}</think>\boxed{{1234567}}",
    "an empty box after": lambda gold: rf"<think>\boxed{{{gold}}}</think>\boxed{{}}",
}


@pytest.fixture(scope="module")
def golds(data_root: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (data_root / "math" / "math500.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def graders() -> Iterator[dict[str, MathAnswerGrader]]:
    both = {extraction: MathAnswerGrader(extraction) for extraction in ("auto", "boxed")}
    yield both
    for grader in both.values():
        grader.close()


@pytest.mark.parametrize(
    ("name", "extraction"),
    [
        (name, extraction)
        for name in WRAPPINGS
        for extraction in ("auto", "boxed")
        if extraction == "auto" or name not in NEEDS_AUTO
    ],
)
def test_a_right_answer_is_right_in_every_wrapping(
    golds: list[str], graders: dict[str, MathAnswerGrader], name: str, extraction: str
) -> None:
    wrapped = [WRAPPINGS[name](gold) for gold in golds]
    results = graders[extraction].grade(list(zip(wrapped, golds, strict=True)))
    rejected = [
        (text, r.detail) for text, r in zip(wrapped, results, strict=True) if r.status is not RewardStatus.CORRECT
    ]
    assert len(golds) - len(rejected) >= MIN_ACCEPTED, rejected[:20]


@pytest.mark.parametrize("extraction", ["auto", "boxed"])
@pytest.mark.parametrize("name", THOUGHTS)
def test_a_right_answer_in_the_thoughts_alone_is_none(
    golds: list[str], graders: dict[str, MathAnswerGrader], name: str, extraction: str
) -> None:
    texts = [THOUGHTS[name](gold) for gold in golds]
    results = graders[extraction].grade(list(zip(texts, golds, strict=True)))
    accepted = [text for text, r in zip(texts, results, strict=True) if r.status is RewardStatus.CORRECT]
    assert accepted == []
