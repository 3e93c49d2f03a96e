r"""Reads an answer as a set of real numbers, and tells whether two are the same.

Covered: intervals, unions, intersections and differences of them, finite sets, \mathbb{R} and its halves, the empty
set; inequalities of one variable, with "and", "or" and \ne; sets given by such a condition (\{x \mid x<3\}); "all real
numbers except 1". End points are constants of any kind.
Not covered (read as no set, so that the entries decide): end points with letters or units, conditions that have to be
solved (x^2<4; but |x-2|<3 is read), sets of whole numbers, and expressions that mix \cup, \cap and \setminus without
parentheses.
"""

from __future__ import annotations

import re

from dphrl.rewards import math_forms
from dphrl.rewards.exact import rational
from dphrl.rewards.math_evaluator import Undefined
from dphrl.rewards.math_sets import (
    NoSetError,
    RealSet,
    compare,
    complement,
    difference,
    intersection,
    is_all,
    piece,
    points,
    union,
)  # fmt: skip
from dphrl.rewards.math_tokens import NotAnExpressionError

_MAX_DEPTH = 8
# Only texts with one of these need this module; two of the others are compared entry by entry.
_MARKS = re.compile(
    r"\\(?:(?:big)?c[ua]p|(?:small)?setminus|backslash|mid|ne|le|ge|mathbb|vee|wedge)(?![A-Za-z])"
    r"|\\\{|except|^\s*\]|\[\s*$|[<>]"
)
_REALS = r"\\mathbb\s*\{\s*R\s*\}"
_MINUS = re.compile(
    r"(?<=[)\]}])\s*\\(?:backslash|smallsetminus)(?![A-Za-z])|(?<=\{R\})\s*(?:[-/]|\\\\|(?=\\?\{))|-\s*(?=\\\{)"
)
_BIG = re.compile(r"\\big(?=c[ua]p(?![A-Za-z]))")
_PLAIN_REALS = re.compile(r"(?<![\w{\\])R(?=\s*\\(?:setminus|backslash)(?![A-Za-z]))")
_HALF = re.compile(rf"{_REALS}\s*(?:\^\s*\{{?\s*([+*-]|\\cdot)\s*\}}?|_\s*\{{\s*(<|>|\\le|\\ge)\s*0\s*\}})")
_CONDITION = re.compile(r"\\(?:mid|vert|colon)(?![A-Za-z])|[|:]|\\text\s*\{\s*(?:such that|s\.t\.|where)\s*\}")
_VARIABLE = re.compile(r"(?!e\b|i\b)[A-Za-z](?:_\{?\w\}?)?|\\(?!infty|pi|emptyset|frac|sqrt)[A-Za-z]+")
_DISTANCE = re.compile(
    rf"(?:\||\\l?vert(?![A-Za-z]))\s*(?P<variable>{_VARIABLE.pattern})\s*(?P<minus>[-+][^|]*?)?\s*(?:\||\\r?vert(?![A-Za-z]))"
)
_MEMBER = re.compile(rf"({_VARIABLE.pattern})\s*\\in(?![A-Za-z])(.*)", re.DOTALL)
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:vee|lor)(?![A-Za-z])")
_AND = re.compile(r"\\text\s*\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:wedge|land)(?![A-Za-z])")
_TEXT = re.compile(r"\\text\s*(?=\{)|[{}]")
_ALL = re.compile(
    r"\\text\s*\{\s*(?:for )?all(?: real)?(?: numbers)?\s*\}|(?:for )?all(?: real)?(?: numbers)?\s+(?=[a-z](?![a-z]))"
)
_EXCEPT = re.compile(
    r"(?:(?:the set of )?(?:all )?real(?:s| numbers| values)?(?: of)?(?: [a-z])?,?|\\mathbb R)"
    r" (?:except|excluding|other than|but)(?: for)?(?: [a-z] =)? (.+)",
    re.IGNORECASE,
)


def same(answer: str, gold: str) -> bool | None:
    """Whether two tidied texts are the same set of real numbers; None where one of them is none, or where no operation
    on sets is in either, so that comparing the entries is enough. Raises TooLarge."""
    if _MARKS.search(answer) is None and _MARKS.search(gold) is None:
        return None
    one, other = read(answer), read(gold)
    if one is None or other is None:
        return None
    if one.variable and other.variable and one.variable != other.variable:
        return False
    try:
        return len(one.cuts) == len(other.cuts) and all(
            compare(a, b) == 0 for a, b in zip(one.cuts, other.cuts, strict=True)
        )
    except (NoSetError, Undefined):
        return None


def read(text: str) -> RealSet | None:
    """The set that a tidied text describes; None for anything else. Raises TooLarge."""
    try:
        text = _PLAIN_REALS.sub(r"\\mathbb{R}", _BIG.sub(r"\\", _without_all(text)), count=1)
        return _set(_MINUS.sub(r"\\setminus ", text), 0)
    except (NoSetError, NotAnExpressionError, Undefined):
        return None


def _without_all(text: str) -> str:
    r"""x \ne 1 for "all x \ne 1"."""
    match = _ALL.match(text) if "except" not in text else None
    return text[match.end() :] if match else text


# ------------------------------------------------------------ reading


def _set(text: str, depth: int) -> RealSet:
    text = text.strip().rstrip(".,").strip()
    if depth > _MAX_DEPTH or not text:
        raise NoSetError
    for pattern, operation in ((_OR, union), (_AND, intersection)):
        parts = _split(pattern, text)
        if len(parts) > 1:
            return operation([_set(part, depth + 1) for part in parts])
    operations = ((r"\cup", union), (r"\cap", intersection), (r"\setminus", difference))
    found = [(operation, parts) for sign, operation in operations if len(parts := math_forms.split(text, sign)) > 1]
    if len(found) > 1:
        # \cup and \cap side by side have no order.
        raise NoSetError
    if found:
        operation, parts = found[0]
        # \mathbb{R}\setminus 0 leaves the braces out.
        parts = parts if operation is not difference else [parts[0], *map(_in_braces, parts[1:])]
        return operation([_set(part, depth + 1) for part in parts])
    return _simple(text, depth)


def _in_braces(number: str) -> str:
    return rf"\{{{number}\}}" if rational(number) is not None else number


def _simple(text: str, depth: int) -> RealSet:
    if re.fullmatch(_REALS, text) or text == r"(-\infty,\infty)":
        return piece("(", r"-\infty", r"\infty", ")")
    if text in (r"\emptyset", r"\{\}"):
        return RealSet((), "")
    if half := _HALF.fullmatch(text):
        if half[2]:
            return RealSet(_relation(f"x {half[2]} 0").cuts, "")
        positive, negative = piece("(", "0", r"\infty", ")"), piece("(", r"-\infty", "0", ")")
        return positive if half[1] == "+" else negative if half[1] == "-" else union([negative, positive])
    if excepted := _EXCEPT.fullmatch(" ".join(_TEXT.sub(" ", text).split())):
        return difference([_simple(r"\mathbb{R}", depth), _points(math_forms.list_entries(excepted[1]))])
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _braces(text[2:-2], depth)
    if text.startswith("{") and text.endswith("}"):
        return _braces(text[1:-1], depth)
    parts = math_forms.split(text, ",")
    if len(parts) > 1:
        return _relations_in_list(parts, depth)
    if member := _MEMBER.fullmatch(text):
        inner = _set(member[2], depth + 1)
        if inner.variable:
            raise NoSetError
        return RealSet(inner.cuts, member[1])
    if text[0] in "([]" and text[-1] in ")][":
        inner_parts = math_forms.split(text[1:-1], ",")
        if len(inner_parts) == 2:
            return piece(text[0], inner_parts[0], inner_parts[1], text[-1])
        if text[0] == "(" and text[-1] == ")":
            return _set(text[1:-1], depth + 1)
    return _relation(text)


def _braces(inner: str, depth: int) -> RealSet:
    """A finite set, or a set given by a condition on its members."""
    mark = _CONDITION.search(inner)
    if mark is None:
        return _points(math_forms.split(inner, ","))
    member, condition = inner[: mark.start()].strip(), inner[mark.end() :]
    variable, _, domain = (part.strip() for part in member.partition(r"\in"))
    if not _VARIABLE.fullmatch(variable):
        raise NoSetError
    found = _set(condition, depth + 1)
    if found.variable not in ("", variable):
        raise NoSetError
    found_set = RealSet(found.cuts, "")
    return intersection([found_set, _set(domain, depth + 1)]) if domain else found_set


def _points(numbers: list[str]) -> RealSet:
    return points([signed for number in numbers for signed in math_forms.both_signs(number)])


def _relations_in_list(parts: list[str], depth: int) -> RealSet:
    """ "x<1, x>3" lists the pieces; in "x>0, x<3" and "x>0, x \\ne 1" both hold, because either one is all numbers."""
    excluded = parts[0].partition(r"\ne")[0]
    if math_forms.relations(parts[0])[1] == [r"\ne"]:
        # x \ne 1, 2 leaves out both.
        parts = [parts[0], *(rf"{excluded}\ne {part}" if rational(part) is not None else part for part in parts[1:])]
    are_members = [_MEMBER.fullmatch(part) is not None for part in parts]
    signs = [math_forms.relations(part)[1] for part in parts]
    if any(not is_member and each in ([], ["="]) for is_member, each in zip(are_members, signs, strict=True)):
        raise NoSetError
    sets = [_set(part, depth + 1) for part in parts]
    either = union(sets)
    return intersection(sets) if any(are_members) or [r"\ne"] in signs or is_all(either) else either


def _within(distance: re.Match[str], radius: str, is_less: bool, is_strict: bool) -> RealSet:
    """The numbers whose distance from another one is less than a radius, or greater."""
    middle = f"-({distance['minus'] or 0})"
    # The numbers that are too far away are those outside, so the ends belong to the other side.
    opening, closing = "()" if is_less == is_strict else "[]"
    inside = piece(opening, f"{middle}-({radius})", f"{middle}+({radius})", closing)
    return RealSet(inside.cuts if is_less else complement(inside.cuts), distance["variable"])


def _relation(text: str) -> RealSet:
    operands, signs = math_forms.relations(text)
    if not signs or len(signs) > 2 or not all(operands):
        raise NoSetError
    if signs[0] in (">", r"\ge"):
        operands, signs = math_forms.mirrored(operands, signs)
    if len(signs) == 1 and signs[0] in ("<", r"\le"):
        for index, operand in enumerate(operands):
            if distance := _DISTANCE.fullmatch(operand):
                return _within(distance, operands[1 - index], is_less=index == 0, is_strict=signs[0] == "<")
    variables = [operand for operand in operands if _VARIABLE.fullmatch(operand)]
    if len(variables) != 1:
        raise NoSetError
    (variable,) = variables
    where = operands.index(variable)
    if len(signs) == 2:
        if where != 1 or not set(signs) <= {"<", r"\le"}:
            raise NoSetError
        found = piece("(" if signs[0] == "<" else "[", operands[0], operands[2], ")" if signs[1] == "<" else "]")
    elif signs[0] in ("=", r"\ne"):
        found = _points([operands[1 - where]])
        found = found if signs[0] == "=" else RealSet(complement(found.cuts), "")
    elif where == 0:
        found = piece("(", r"-\infty", operands[1], ")" if signs[0] == "<" else "]")
    else:
        found = piece("(" if signs[0] == "<" else "[", operands[0], r"\infty", ")")
    return RealSet(found.cuts, variable)


def _split(separator: re.Pattern[str], text: str) -> list[str]:
    """Split where the separator stands outside brackets; commas before it go with it."""
    parts, start, depth, position = [], 0, 0, 0
    for match in separator.finditer(text):
        between = text[position : match.start()]
        depth += sum(between.count(c) for c in "([{") - sum(between.count(c) for c in ")]}")
        position = match.end()
        if depth == 0:
            parts.append(text[start : match.start()].rstrip(" ,"))
            start = match.end()
    return [*parts, text[start:]]
