r"""Takes off a gold what people and programs put around it: `$70$`, `\boxed{70}`, `['70']`, `**70**`."""

from __future__ import annotations

import re

# Longer golds are refused by the grader, so their decoration does not matter.
_MAX_CHARS = 10_000


def _around(before: str, after: str) -> re.Pattern[str]:
    return re.compile(rf"{before}(?P<gold>.*){after}", re.DOTALL)


_NOTHING = re.compile("(?!)")
# From the name of a decoration to its pattern, and to what the gold inside may not hold: with that, the two ends do not
# belong together, as in "$3$ and $4$".
_DECORATIONS: dict[str, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "['..']": (_around(r"\[\s*'", r"'\s*,?\s*\]"), re.compile("'")),
    '[".."]': (_around(r'\[\s*"', r'"\s*,?\s*\]'), re.compile('"')),
    "[number]": (re.compile(r"\[\s*(?P<gold>-?\d+(?:\.\d+)?(?:/\d+)?)\s*\]"), _NOTHING),
    "$$..$$": (_around(r"\$\$", r"\$\$"), re.compile(r"\$\$|\\\Z")),
    "$..$": (_around(r"\$", r"\$"), re.compile(r"(?<!\\)\$|\\\Z")),
    r"\(..\)": (_around(r"\\\(", r"\\\)"), re.compile(r"\\[()]")),
    r"\[..\]": (_around(r"\\\[", r"\\\]"), re.compile(r"(?<!\\)\\[\[\]]")),
    r"\boxed{}": (_around(r"\\(?:boxed|fbox)\s*\{", r"\}"), _NOTHING),
    "<answer>": (_around("<answer>", "</answer>"), re.compile("</?answer>")),
    "**..**": (_around(r"\*\*", r"\*\*"), re.compile(r"\*\*")),
    "__..__": (_around("__", "__"), re.compile("__")),
    "`..`": (_around("`", "`"), re.compile("`")),
    '".."': (_around('"', '"'), re.compile('"')),
    "'..'": (_around("'", "'"), re.compile("'")),
    "\u201c..\u201d": (_around("\u201c", "\u201d"), re.compile("[\u201c\u201d]")),
    "\u2018..\u2019": (_around("\u2018", "\u2019"), re.compile("[\u2018\u2019]")),
    '"Answer:"': (
        re.compile(r"(?i:(?:the\s+)?(?:final\s+)?answer(?:\s+is\b\s*:?|\s*[:=]))\s*(?P<gold>.+)", re.DOTALL),
        _NOTHING,
    ),
    # That of \right. is a part of TeX, and that of "p.m." of the word.
    "full stop": (re.compile(r"(?P<gold>.*[^\s.])\s*\.", re.DOTALL), re.compile(r"(?:\\right|[A-Za-z]\.[A-Za-z])\Z")),
}
_LISTS = ("['..']", '[".."]')
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DOUBLED = re.compile(r"(?:[^\\]|\\\\)*")


def clean_gold(gold: str) -> tuple[str, list[str]]:
    """The gold without what certainly does not belong to it, and the names of the decorations that were taken off.

    "$5" keeps its sign, which means money; "(70)", "{70}" and "[1, 2]" keep their brackets, which may mean something.
    """
    names: list[str] = []
    gold = gold.strip().strip("\ufeff\u200b").strip()
    while len(gold) <= _MAX_CHARS and (found := _outermost(gold)) is not None:
        name, gold = found
        names.append(name)
    return gold, names


def _outermost(gold: str) -> tuple[str, str] | None:
    for name, (pattern, foreign) in _DECORATIONS.items():
        match = pattern.fullmatch(gold)
        if match is None or foreign.search(match["gold"]) or not _is_balanced(match["gold"]):
            continue
        inner = match["gold"].strip()
        # A list that Python or JSON wrote has two backslashes for one.
        if name in _LISTS and _DOUBLED.fullmatch(inner):
            inner = inner.replace("\\\\", "\\")
        return name, inner
    return None


def _is_balanced(text: str) -> bool:
    r"""Whether braces belong together: those inside the outer ones of \boxed{1} + \boxed{2} do not."""
    depth = 0
    for mark in _BRACE.finditer(text):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth < 0:
            return False
    return depth == 0
