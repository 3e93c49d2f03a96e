r"""Sets of real numbers: reads an answer as one, and tells whether two are the same.

Covered: intervals, unions, intersections and differences of them, finite sets, \mathbb{R} and its halves, the empty
set; inequalities of one variable, with "and", "or" and \ne; sets given by such a condition (\{x \mid x<3\}); "all real
numbers except 1". End points are constants of any kind.
Not covered (read as no set, so that the entries decide): end points with letters, conditions that have to be solved
(x^2<4), sets of whole numbers, and expressions that mix \cup, \cap and \setminus without parentheses.

A set is a sorted list of cuts. A cut lies just before a number or just after it, and each one changes between outside
and inside; so (1, 2] is [after 1, after 2], and a set and its complement differ only in the cuts at infinity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cmp_to_key

from mpmath import mp

from dphrl.rewards import math_forms, math_values
from dphrl.rewards.exact import rational
from dphrl.rewards.math_evaluator import Undefined, evaluate
from dphrl.rewards.math_parser import Node, parse
from dphrl.rewards.math_tokens import NotAnExpressionError

_MAX_DEPTH, _MAX_CUTS = 8, 100
# Only texts with one of these need this module; two of the others are compared entry by entry.
_MARKS = re.compile(
    r"\\(?:cup|cap|setminus|backslash|smallsetminus|mid|ne|mathbb|Bbb|vee|wedge)(?![A-Za-z])|\\\{|except|^\s*\]|\[\s*$|[<>]|\\[lg]e(?![A-Za-z])"
)
_REALS = r"\\mathbb\s*\{\s*R\s*\}"
_MINUS = re.compile(
    r"(?<=[)\]}])\s*\\(?:backslash|smallsetminus)(?![A-Za-z])|(?<=\{R\})\s*(?:[-/]|\\\\|(?=\\\{))|-\s*(?=\\\{)"
)
_HALF = re.compile(rf"{_REALS}\s*(?:\^\s*\{{?\s*([+-])\s*\}}?|_\s*\{{\s*(<|>|\\le|\\ge)\s*0\s*\}})")
_CONDITION = re.compile(r"\\(?:mid|vert|colon)(?![A-Za-z])|[|:]|\\text\s*\{\s*(?:such that|s\.t\.|where)\s*\}")
_VARIABLE = re.compile(r"(?!e\b|i\b)[A-Za-z](?:_\{?\w\}?)?|\\(?!infty|pi|emptyset|frac|sqrt)[A-Za-z]+")
_MEMBER = re.compile(rf"({_VARIABLE.pattern})\s*\\in(?![A-Za-z])(.*)", re.DOTALL)
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:vee|lor)(?![A-Za-z])")
_AND = re.compile(r"\\text\s*\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:wedge|land)(?![A-Za-z])")
_TEXT = re.compile(r"\\text\s*(?=\{)|[{}]")
_ALL = re.compile(
    r"\\text\s*\{\s*(?:for )?all(?: real)?(?: numbers)?\s*\}|(?:for )?all(?: real)?(?: numbers)?\s+(?=[a-z](?![a-z]))"
)
_EXCEPT = re.compile(
    r"(?:the set of )?(?:all )?real(?:s| numbers| values)?(?: of)?(?: [a-z])?,? (?:except|excluding|other than|but)"
    r"(?: for)?(?: [a-z] =)? (.+)"
)


class _Unreadable(Exception):  # noqa: N818
    """The text is no set of real numbers, or nobody can tell which one."""


@dataclass(frozen=True, slots=True)
class Cut:
    """`end` is an infinity (-1 or 1, with 0 for numbers), the exact value if it is known, and the tree."""

    infinity: int
    value: Fraction | None
    tree: Node | None
    is_after: bool


@dataclass(frozen=True, slots=True)
class RealSet:
    """`cuts` in order, an even number of them. `variable` is the letter that an inequality is about, "" for none."""

    cuts: tuple[Cut, ...]
    variable: str


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
            _compare(a, b) == 0 for a, b in zip(one.cuts, other.cuts, strict=True)
        )
    except (_Unreadable, Undefined):
        return None


def read(text: str) -> RealSet | None:
    """The set that a tidied text describes; None for anything else. Raises TooLarge."""
    try:
        return _set(_MINUS.sub(r"\\setminus ", _without_all(text)), 0)
    except (_Unreadable, NotAnExpressionError, Undefined):
        return None


def _without_all(text: str) -> str:
    r"""x \ne 1 for "all x \ne 1"."""
    match = _ALL.match(text) if "except" not in text else None
    return text[match.end() :] if match else text


# ------------------------------------------------------------ reading


def _set(text: str, depth: int) -> RealSet:
    text = text.strip().rstrip(".,").strip()
    if depth > _MAX_DEPTH or not text:
        raise _Unreadable
    for pattern, operation in ((_OR, _union), (_AND, _intersection)):
        parts = _split(pattern, text)
        if len(parts) > 1:
            return operation([_set(part, depth + 1) for part in parts])
    operations = ((r"\cup", _union), (r"\cap", _intersection), (r"\setminus", _difference))
    found = [(operation, parts) for sign, operation in operations if len(parts := math_forms.split(text, sign)) > 1]
    if len(found) > 1:
        # \cup and \cap side by side have no order.
        raise _Unreadable
    if found:
        operation, parts = found[0]
        # \mathbb{R}\setminus 0 leaves the braces out.
        parts = parts if operation is not _difference else [parts[0], *map(_in_braces, parts[1:])]
        return operation([_set(part, depth + 1) for part in parts])
    return _simple(text, depth)


def _in_braces(number: str) -> str:
    return rf"\{{{number}\}}" if rational(number) is not None else number


def _simple(text: str, depth: int) -> RealSet:
    if re.fullmatch(_REALS, text) or text == r"(-\infty,\infty)":
        return _piece("(", r"-\infty", r"\infty", ")")
    if text in (r"\emptyset", r"\{\}"):
        return RealSet((), "")
    if half := _HALF.fullmatch(text):
        if half[2]:
            return RealSet(_relation(f"x {half[2]} 0").cuts, "")
        return _piece("(", "0", r"\infty", ")") if half[1] == "+" else _piece("(", r"-\infty", "0", ")")
    if excepted := _EXCEPT.fullmatch(" ".join(_TEXT.sub(" ", text).split())):
        return _difference([_simple(r"\mathbb{R}", depth), _points(math_forms.list_entries(excepted[1]))])
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
            raise _Unreadable
        return RealSet(inner.cuts, member[1])
    if text[0] in "([]" and text[-1] in ")][":
        inner_parts = math_forms.split(text[1:-1], ",")
        if len(inner_parts) == 2:
            return _piece(text[0], inner_parts[0], inner_parts[1], text[-1])
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
        raise _Unreadable
    found = _set(condition, depth + 1)
    if found.variable not in ("", variable):
        raise _Unreadable
    found_set = RealSet(found.cuts, "")
    return _intersection([found_set, _set(domain, depth + 1)]) if domain else found_set


def _relations_in_list(parts: list[str], depth: int) -> RealSet:
    """ "x<1, x>3" lists the pieces; in "x>0, x<3" and "x>0, x \\ne 1" both hold, because either one is all numbers."""
    are_members = [_MEMBER.fullmatch(part) is not None for part in parts]
    signs = [math_forms.relations(part)[1] for part in parts]
    if any(not is_member and each in ([], ["="]) for is_member, each in zip(are_members, signs, strict=True)):
        raise _Unreadable
    sets = [_set(part, depth + 1) for part in parts]
    either = _union(sets)
    return _intersection(sets) if any(are_members) or [r"\ne"] in signs or _is_all(either) else either


def _relation(text: str) -> RealSet:
    operands, signs = math_forms.relations(text)
    if not signs or len(signs) > 2 or not all(operands):
        raise _Unreadable
    if signs[0] in (">", r"\ge"):
        operands, signs = math_forms.mirrored(operands, signs)
    variables = [operand for operand in operands if _VARIABLE.fullmatch(operand)]
    if len(variables) != 1:
        raise _Unreadable
    (variable,) = variables
    where = operands.index(variable)
    if len(signs) == 2:
        if where != 1 or not set(signs) <= {"<", r"\le"}:
            raise _Unreadable
        found = _piece("(" if signs[0] == "<" else "[", operands[0], operands[2], ")" if signs[1] == "<" else "]")
    elif signs[0] in ("=", r"\ne"):
        found = _points([operands[1 - where]])
        found = found if signs[0] == "=" else RealSet(_complement(found.cuts), "")
    elif where == 0:
        found = _piece("(", r"-\infty", operands[1], ")" if signs[0] == "<" else "]")
    else:
        found = _piece("(" if signs[0] == "<" else "[", operands[0], r"\infty", ")")
    return RealSet(found.cuts, variable)


def _piece(opening: str, low: str, high: str, closing: str) -> RealSet:
    """One interval; ]1, 2[ is the French way to write (1, 2)."""
    lower, upper = _cut(low, opening in "(]"), _cut(high, closing == "]")
    if (lower.infinity and opening == "[") or (upper.infinity and closing == "]"):
        raise _Unreadable
    # (2, 1) and (1, 1) are points of the plane.
    if _compare(lower, upper) >= 0:
        raise _Unreadable
    return RealSet((lower, upper), "")


def _points(numbers: Sequence[str]) -> RealSet:
    sets = [RealSet((_cut(number, False), _cut(number, True)), "") for number in numbers]
    if not sets or any(each.cuts[0].infinity for each in sets):
        raise _Unreadable
    return _union(sets)


def _cut(text: str, is_after: bool) -> Cut:
    infinity = {r"\infty": 1, r"+\infty": 1, r"-\infty": -1}.get("".join(text.split()), 0)
    if infinity:
        return Cut(infinity, None, None, False)
    value = rational(text)
    if value is not None:
        return Cut(0, value, Node("div", (_whole(value.numerator), _whole(value.denominator))), is_after)
    tree = parse(text)
    if math_values.names(tree):
        raise _Unreadable
    return Cut(0, None, tree, is_after)


def _whole(number: int) -> Node:
    node = Node("number", text=str(abs(number)))
    return Node("neg", (node,)) if number < 0 else node


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


# ------------------------------------------------------------ operations


def _compare(a: Cut, b: Cut) -> int:
    """-1, 0 or 1. Raises _Unreadable where the end points have no order, and TooLarge."""
    if a.infinity or b.infinity:
        return (a.infinity > b.infinity) - (a.infinity < b.infinity)
    order = _compare_ends(a, b)
    return order or a.is_after - b.is_after


def _compare_ends(a: Cut, b: Cut) -> int:
    if a.value is not None and b.value is not None:
        return (a.value > b.value) - (a.value < b.value)
    if a.tree is None or b.tree is None:
        raise _Unreadable
    if a.tree == b.tree:
        return 0
    for digits in (40, 300):
        with mp.workdps(digits):
            low, high = evaluate(a.tree, {}, True), evaluate(b.tree, {}, True)
            if isinstance(low, tuple) or isinstance(high, tuple) or not (mp.isfinite(low) and mp.isfinite(high)):
                raise _Unreadable
            if abs(low - high) > mp.mpf(10) ** -30 * max(abs(low), abs(high)) or digits == 300:
                return 1 if low > high else -1
        if math_values.same_value(a.tree, b.tree):
            return 0
    raise AssertionError("the second look decides")


def _compare_changes(a: tuple[Cut, int], b: tuple[Cut, int]) -> int:
    return _compare(a[0], b[0])


def _combined(sets: Sequence[tuple[Cut, ...]], num_needed: int) -> tuple[Cut, ...]:
    """The numbers that lie in at least `num_needed` of the sets."""
    changes = [(cut, 1 - 2 * (index % 2)) for cuts in sets for index, cut in enumerate(cuts)]
    if len(changes) > _MAX_CUTS:
        raise _Unreadable
    changes.sort(key=cmp_to_key(_compare_changes))
    cuts: list[Cut] = []
    depth = 0
    for cut, change in changes:
        was_inside, depth = depth >= num_needed, depth + change
        if was_inside != (depth >= num_needed):
            # A piece that ends where the next one begins goes on.
            if cuts and _compare(cuts[-1], cut) == 0:
                cuts.pop()
            else:
                cuts.append(cut)
    return tuple(cuts)


def _union(sets: Sequence[RealSet]) -> RealSet:
    return RealSet(_combined([each.cuts for each in sets], 1), _common_variable(sets))


def _intersection(sets: Sequence[RealSet]) -> RealSet:
    return RealSet(_combined([each.cuts for each in sets], len(sets)), _common_variable(sets))


def _difference(sets: Sequence[RealSet]) -> RealSet:
    """The first set without the others."""
    cuts = [sets[0].cuts, *(_complement(each.cuts) for each in sets[1:])]
    return RealSet(_combined(cuts, len(cuts)), _common_variable(sets))


def _complement(cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
    low, high = Cut(-1, None, None, False), Cut(1, None, None, False)
    changed = cuts[1:] if cuts and cuts[0].infinity else (low, *cuts)
    return changed[:-1] if cuts and cuts[-1].infinity else (*changed, high)


def _is_all(found: RealSet) -> bool:
    return len(found.cuts) == 2 and all(cut.infinity for cut in found.cuts)


def _common_variable(sets: Sequence[RealSet]) -> str:
    variables = {each.variable for each in sets} - {""}
    if len(variables) > 1:
        raise _Unreadable
    return next(iter(variables), "")
