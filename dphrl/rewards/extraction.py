r"""Finds the final answer in what a completion says (`thinking.spoken`), and tells which part of it that is.

Every search here takes time linear in the text, because completions of several megabytes are graded, and a model may
write a million opening braces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dphrl.config.marks import THINKING_MARKS
from dphrl.rewards import prose
from dphrl.rewards.thinking import spoken, tagged

_BOXES = ("\\boxed", "\\fbox")
_BRACE = re.compile(r"\s*\{")
_STRUCTURE = re.compile(r"\\.|[{}]", re.DOTALL)
# \boxed7, \boxed -5, \boxed\frac{1}{2}, \boxed C: a box without braces, but not the next word of a text about \boxed.
_COMMAND_START = r"\\(?!boxed|fbox)[A-Za-z]"
_BARE_BOX = re.compile(
    rf"\s*+((?:[-+]?(?:\d|\.\d|[(\[][-+\d])|{_COMMAND_START}|(?<=\s)[A-Za-z](?![A-Za-z]))"
    rf"(?:[^\s${{}}\\]|{_COMMAND_START}|(?<=[\w}}])\{{[^{{}}]{{0,100}}\}}){{0,100}})"
)
_ANSWER_TAG = re.compile(r"<(?i:/?(?:answer|final[_ ]answer|solution)>|\|(?:begin|end)_of_box\|>)")
_HASHES = "####"
# Four hashes also make a heading in Markdown, so some of them are passed over.
_MAX_HEADINGS = 20
_NUMBERED = re.compile(r"\d{1,3}[.)]\s")
_VALUE_START = re.compile(r"[-+\u2212]?\s?[\d.$\u20ac\u00a3(\[\\]")
_CHOICE = re.compile(r"\(?[A-J]\)?\.?")
_ANSWER_PHRASE = re.compile(
    r"(?:\b[Ff]inal\s{1,9}[Aa]nswer\b|\bFINAL ANSWER\b|\bA(?:nswer|NSWER)\b)(?:\s{1,9}is\b)?"
    r"|\b(?:correct|right)\s{1,9}(?:option|choice)\s{1,9}is\b|\banswer\s{1,9}is\b(?!\s{1,9}(?:correct|right)\b)"
    r"|\u7b54\u6848(?:\u5e94\u8be5|\u61c9\u8a72|\u5c31)?[\u662f\u4e3a\u70ba\u9009\u9078]?|\u6545[\u9009\u9078]"
)
# Every phrase holds one of these. To look for them first is faster by far.
_PHRASE_SIGNS = ("nswer", "NSWER", "option", "choice", "\u7b54\u6848", "\u6545")
# Only this much after a phrase, or at the end of a text, is searched for formulas and numbers.
_TAIL = 20_000


class Found(NamedTuple):
    """An answer as the completion spells it, and a short name of the part of the completion that it is."""

    text: str
    part: str


def find_boxed(text: str) -> Found | None:
    r"""Content of the last \boxed{} or \fbox{} (the innermost of nested ones); None without one or if it is cut off."""
    start = _last_box(text)
    content = None if start is None else _box_content(text, start)
    return Found(content, "box") if content else None


def find_auto(text: str) -> Found | None:
    """The final answer of free text: a box or an answer tag, whichever is the last; else "####"; else
    "Answer"/"answer is"; else the last formula, or what is bold beside or after it; else the whole text when it is a
    bare answer; else its last number. None when there is none of these."""
    box = _last_box(text)
    end, content = next(tagged(text, _ANSWER_TAG), (-1, ""))
    if end > (-1 if box is None else box):
        answer = _in_tag(content)
        return Found(answer, "answer tag") if answer else None
    if box is not None:
        return find_boxed(text)
    if found := _after_sign(text):
        return found
    answer_and_part = prose.final_answer(text[-_TAIL:])
    return Found(*answer_and_part) if answer_and_part else None


FINDERS: Mapping[str, Callable[[str], Found | None]] = {"boxed": find_boxed, "auto": find_auto}


def extract_boxed(text: str) -> str | None:
    """The content of the last box of a text that may hold thoughts, such as a worked solution; None without one."""
    own = spoken(text, THINKING_MARKS)
    found = None if own is None else find_boxed(own)
    return found.text if found else None


def _last_box(text: str) -> int | None:
    """The position after the command of the last box; a box with braces goes before one without. None without a box."""
    braced: list[int] = []
    bare: list[int] = []
    for command in _BOXES:
        start = text.rfind(command)
        while start >= 0:
            after = start + len(command)
            if _BRACE.match(text, after):
                braced.append(after)
                break
            if not bare and _BARE_BOX.match(text, after):
                bare.append(after)
            start = text.rfind(command, 0, start)
    return max(braced or bare, default=None)


def _box_content(text: str, start: int) -> str | None:
    brace = _BRACE.match(text, start)
    if brace is None:
        bare = _BARE_BOX.match(text, start)
        return bare[1].rstrip(".,;:") or None if bare else None
    start = brace.end()
    depth = 1
    # An escaped brace is a symbol of the answer, not structure.
    for mark in _STRUCTURE.finditer(text, start):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return text[start : mark.start()].strip() or None
    return None


def _in_tag(content: str) -> str | None:
    found = find_boxed(content) or _after_sign(content)
    if found:
        return found.text
    if prose.is_bare(content):
        return prose.trim(content)
    if "\n" not in content:
        return prose.after_phrase(content)
    answer_and_part = prose.final_answer(content[-_TAIL:])
    return answer_and_part[0] if answer_and_part else None


def _after_sign(text: str) -> Found | None:
    """What follows "####" or "the answer is"."""
    if answer := _after_hashes(text):
        return Found(answer, _HASHES)
    phrases = _ANSWER_PHRASE.finditer(text) if any(sign in text for sign in _PHRASE_SIGNS) else ()
    after = max((phrase.end() for phrase in phrases), default=None)
    if after is not None and (answer := prose.after_phrase(text[after : after + _TAIL])):
        return Found(answer, "after 'answer'")
    return None


def _after_hashes(text: str) -> str | None:
    """The line after the last "####" that is no heading: it begins with a value, or is one, or ends the text."""
    start = len(text)
    for _ in range(_MAX_HEADINGS):
        start = text.rfind(_HASHES, 0, start)
        if start < 0:
            break
        rest = text[start + len(_HASHES) : start + _TAIL].lstrip()
        line = prose.first_line(rest)
        bare, ends_the_text = prose.is_bare(line), not rest[len(line) :].strip()
        if prose.is_step(line):
            continue
        has_value = (_VALUE_START.match(line) or (bare and prose.has_value(line))) and not _NUMBERED.match(line)
        if has_value or _CHOICE.fullmatch(line) or ends_the_text:
            return prose.trim(line) if bare or not prose.has_value(line) else prose.after_phrase(line)
    return None


# ------------------------------------------------------------ what is around an answer

# Most answers hold none of these, and one look at them is fast.
_DRESSED = re.compile(r"""\\[(\[]|\\\\\s*\Z|[<*`"\u201c]|^\s*[_']|[Aa]ns|ANS|\u7b54\u6848""")
# Below what is taken off there may be more.
_MAX_LAYERS = 8
_MATH_DELIMITERS = re.compile(r"(?<!\\)\\\((.*?)(?<!\\)\\\)|(?<!\\)\\\[(.*?)(?<!\\)\\\]", re.DOTALL)
_WRAPPED = re.compile(r"(?P<quote>\*{1,3}|_{1,2}|`{1,3}|[\"'])(?![*_`\s])(?P<inside>.*[^*_`\s])(?P=quote)", re.DOTALL)
_CURLY_QUOTES = re.compile(r"\u201c([^\u201c\u201d]*)\u201d")
# Half of an emphasis, whose other half is outside of the box, and line breaks of TeX: no value begins or ends so.
_LOOSE_ENDS = re.compile(r"\A\*{1,3}(?=[^*\s])|(?<=[^*\s^])\*{2,3}\Z|(?:\s*\\\\)+\s*\Z")
_LEAD = (
    r"\s*(?:(?:the\s+)?(?:final\s+)?ans(?:wer)?\b\.?(?:\s+is\b)?|(?:\u6700\u7ec8|\u6700\u7d42)?\u7b54\u6848[\u662f\u4e3a\u70ba]?)"
    r"\s*[:=\uff1a]?\s*"
)
_LEAD_IN_TEXT = re.compile(rf"\\(?:text\w*|mbox|math(?:rm|bf|sf))\s*\{{{_LEAD}([^{{}}]*)\}}\s*[:=]?", re.I)
_PLAIN_LEAD = re.compile(_LEAD, re.I)


def undress(answer: str) -> str:
    r"""An answer without what only shows that it is one: delimiters of formulas, emphasis and quotes of Markdown around
    it, and the words "the answer is". \(7\), **7**, `7` and \text{Answer: }7 are 7."""
    if _DRESSED.search(answer) is None:
        return answer
    for _ in range(_MAX_LAYERS):
        bare = _without_layer(answer.strip())
        if bare == answer:
            break
        answer = bare
    return answer


def _without_layer(answer: str) -> str:
    if "\\(" in answer or "\\[" in answer:
        answer = _MATH_DELIMITERS.sub(lambda match: match[1] if match[1] is not None else match[2], answer)
    answer = prose.without_emphasis(answer)
    if curly := _CURLY_QUOTES.fullmatch(answer):
        return curly[1]
    if wrapped := _WRAPPED.fullmatch(answer):
        # 2*3 between stars would be a list of emphases; nothing is certain then.
        return wrapped["inside"] if wrapped["quote"] not in wrapped["inside"] else answer
    for lead in (_LEAD_IN_TEXT, _PLAIN_LEAD):
        if match := lead.match(answer):
            words = match[1].strip() if lead is _LEAD_IN_TEXT else ""
            rest = answer[match.end() :].strip()
            kept = (f"\\text{{{words}}}" if words else "") + rest
            return kept or answer
    return _LOOSE_ENDS.sub("", answer)
