r"""Answers to multiple-choice questions, and words that say the same.

A choice is its letter: (C), C), option C and \textbf{(C)}\ 5 are the choice C. The text of the option counts where the
other side has no letter, and where both have a text. Answers are tidied (`exact.tidy`) before they come here.
"""

from __future__ import annotations

import re

from dphrl.rewards.exact import canonical, unwrap_text

_WORD = r"(?i:(?:the\s+)?(?:correct\s+)?(?:(?:answer\s+)?(?:option|choice)|answer)(?:\s+is)?\s*:?\s*)"
_CHOICE = re.compile(
    rf"(?:{_WORD}(?:\(\s*(?P<after_word>[A-Ja-j])\s*\)|(?P<plain>[A-Ja-j])(?:\s?\)|(?!\w)))"
    r"|[(\[]\s*(?P<closed>[A-Ja-e])\s*[)\]]|(?P<small>[a-e])\s?\)"
    r"|(?P<open>[A-J])(?:\s?\)|[.:](?=\s)|\s+-{2,3}(?=\s)|(?=\s{2,}[^\s+*/^_=<>!|-])|(?=\s+is\s+(?:the\s+)?(?:correct|right)\b)|$))"
    r"[.:]?(?P<text>.*)",
    re.DOTALL,
)
_FIRST = ("(", "[", r"\text", r"\math", r"\mbox", *"ABCDEFGHIJTtOoabcde")
# What follows the letter of a choice, and what makes the letter a part of an expression or of a list.
_IS_CORRECT = re.compile(r"\s*is\s+(?:the\s+)?(?:correct|right)(?:\s+(?:answer|option|choice))?", re.IGNORECASE)
_NO_OPTION = re.compile(
    r"\s*(?:[+*/^_=<>,;!|)&]|-\s|(?:and|or)\b|\\(?:cdot|div|pm|le|ge|ne|cup|in)(?![A-Za-z]))|[-(A-Za-z]"
)

# The set of the solutions that are not there.
_NO_SOLUTION = r"\emptyset"
_MEANINGS = {
    "no solution": _NO_SOLUTION, "no solutions": _NO_SOLUTION,
    "no solution exists": _NO_SOLUTION, "no solutions exist": _NO_SOLUTION,
    "there is no solution": _NO_SOLUTION, "there are no solutions": _NO_SOLUTION, "has no solution": _NO_SOLUTION,
    "no real solutions": "no real solution", "there are no real solutions": "no real solution",
    "there is no real solution": "no real solution", "dne": "does not exist", "doesn't exist": "does not exist",
    "the limit does not exist": "does not exist", "infinitely many solutions": "infinitely many",
    "infinite solutions": "infinitely many", "infinite number of solutions": "infinitely many",
    "an infinite number of solutions": "infinitely many", "there are infinitely many solutions": "infinitely many",
    "empty set": r"\emptyset", "the empty set": r"\emptyset", "null set": r"\emptyset",
    "all positive real numbers": r"(0,\infty)", "all negative real numbers": r"(-\infty,0)",
    "all non-negative real numbers": r"[0,\infty)", "all nonnegative real numbers": r"[0,\infty)",
    "all integers": r"\mathbb{Z}", "the set of all integers": r"\mathbb{Z}", "the set of integers": r"\mathbb{Z}",
    "all rational numbers": r"\mathbb{Q}", "all positive integers": r"\mathbb{Z}^+",
    "positive infinity": r"\infty", "plus infinity": r"\infty", "negative infinity": r"-\infty",
    "minus infinity": r"-\infty",
}  # fmt: skip
_WORD_OF_THREE = re.compile(r"[A-Za-z]{3}")
_LONGEST = max(map(len, _MEANINGS)) + 20
_INFINITY = re.compile(r"\\(?:text|mathrm)\s*\{\s*[Ii]nfinity\s*\}|(?<![\\A-Za-z])[Ii]nfinity(?![A-Za-z])")


def in_other_words(text: str) -> str:
    r"""The usual wording of a phrase: "no solution" for "no solutions", \infty for infinity."""
    if len(text) <= _LONGEST and _WORD_OF_THREE.search(text):
        phrase = " ".join(unwrap_text(text).casefold().split()).rstrip(".")
        if meaning := _MEANINGS.get(phrase):
            return meaning
    return _INFINITY.sub(lambda _: r"\infty", text) if "nfinity" in text else text


def as_choices(answer: str, gold: str) -> tuple[str, str]:
    """Both answers by their letters where both are choices, by their options' texts where one has no letter or where
    the texts of one letter differ; other answers as they are."""
    choice, gold_choice = _choice(answer), _choice(gold)
    # A small letter may be a variable, so (a) is a choice only beside one with a capital letter.
    if choice and gold_choice and (choice[0].isupper() or gold_choice[0].isupper()):
        (letter, text), (gold_letter, gold_text) = choice, gold_choice
        if letter.upper() == gold_letter.upper() and text and gold_text and canonical(text) != canonical(gold_text):
            return text, gold_text
        return letter.upper(), gold_letter.upper()
    if choice and choice[0].isupper() and choice[1] and choice[0] not in gold:
        return choice[1], gold
    if gold_choice and gold_choice[0].isupper() and gold_choice[1] and gold_choice[0] not in answer:
        return answer, gold_choice[1]
    return answer, gold


def _choice(text: str) -> tuple[str, str] | None:
    """(letter, text of the option or ""); None for anything but a choice. A letter after a word is a capital one."""
    if not text.startswith(_FIRST):
        return None
    match = _CHOICE.fullmatch(unwrap_text(text).strip())
    if match is None:
        return None
    named = match["after_word"] or match["plain"]
    letter = named.upper() if named else match["closed"] or match["open"] or match["small"]
    option = match["text"]
    if _IS_CORRECT.fullmatch(option):
        return letter, ""
    return None if _NO_OPTION.match(option) else (letter, option.strip())
