r"""Finds what an answer is made of from its text alone: an assignment, words, a list, an interval, relations.

Texts are tidied (`exact.tidy`) before they come here. Nothing is computed.
"""

from __future__ import annotations

import re

from dphrl.rewards.exact import canonical, rational, unwrap_text
from dphrl.rewards.math_tokens import FUNCTIONS

_OPEN, _CLOSE = "([{", ")]}"
# What may stand before "=" in an assignment: x, x_1, f(2), (x, y), V_1:V_2, \angle ABC, \text{Area}.
_NAME = (
    r"(?:\\text\s*\{[^{}]*\}|\|[A-Z]\||\\overline\s*\{[A-Z]{1,3}\}|(?!\\(?:frac|sqrt|cdot|pm|begin|text))\\?[A-Za-z]|_(?:\{[A-Za-z0-9]{1,9}\}|[A-Za-z0-9])"
    r"|\^\{-1\}|\([\w,\s]{0,20}\)|[':\s])+"
)
_ASSIGNMENT = re.compile(rf"({_NAME})(?:=|(?<=[\s\w}}])\\in(?![A-Za-z]))")
_CONJUNCTION = re.compile(r"\\text\s*\{\s*(?:and|or),?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;|\\vee(?![A-Za-z])")
_INEQUALITY = re.compile(r"\\(?:le|ge)(?![A-Za-z])|[<>]")
_BOTH = re.compile(r"(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:wedge|land)(?![A-Za-z])")
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>=]")
_MIRRORED = {r"\le": r"\ge", r"\ge": r"\le", "<": ">", ">": "<", "=": "=", r"\ne": r"\ne"}

_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_UPPER, _LOWER = {"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"}
_LETTER = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\{\w{1,9}\}|\w))?"
_TUPLE_OF_NAMES = re.compile(rf"\((\s*{_LETTER}\s*(?:,\s*{_LETTER}\s*){{1,9}})\)\s*=\s*(\(.*\))", re.DOTALL)
_POINT = re.compile(
    r"\A(?:\\(?:text|mathrm)\s*\{\s*)?[A-Z]'?\s*\}?\s*(?=\([^()]*(?:\([^()]*\)[^()]*)*,[^()]*(?:\([^()]*\)[^()]*)*\)\Z)"
)
_NAME_LAST = re.compile(rf"([^=]*\d[^=]*)=\s*((?![ei]\b|\\pi|\\infty){_LETTER})\s*")
_FUNCTION_OF_LETTER = re.compile(r"[A-Za-z]\(([a-xz])\)")
# Between a residue and its modulus.
_MODULO = (r"\text", r"\mathrm", r"\operatorname", r"\mbox", r"\p", r"\b", " ", "~", "(", "{", "\\", ",")

_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*\.?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]*")
_SHORT_WORDS = frozenset(["no", "up", "am", "pm"])
_ALL_REALS = re.compile(
    r"\\(?:mathbb|Bbb|mathbf)\s*\{?\s*R\s*\}?|(?:the set of )?all real(?:s| numbers)"
    r"|\\text\s*\{\s*(?:the set of )?all real(?:s| numbers)\.?\s*\}"
)
_REALS = r"(-\infty,\infty)"


def split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside all brackets. Brackets of different kinds may close each other, as in (1, 2]."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position].strip())
            position += len(separator)
            start = position
            continue
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        position += 1
    return [part for part in [*parts, text[start:].strip()] if part]


def compound(text: str) -> tuple[str, list[str]]:
    r"""(kind, entries): a bracket pair "()", "[)", ..., "set", "list" (commas, and/or, \pm), "conjunction" (of
    inequalities), "union", "ratio", or "plain"."""
    text = text.strip()
    if _ALL_REALS.fullmatch(text):
        text = _REALS
    parts = list_entries(text)
    if len(parts) > 1 and _BOTH.search(text) and all(_INEQUALITY.search(part) for part in parts):
        return "conjunction", parts
    if len(parts) > 1:
        return "list", [signed for part in parts for signed in both_signs(part)]
    parts = split(text, r"\cup")
    if len(parts) > 1:
        return "union", parts
    inner = _inside_braces(text)
    if inner is not None:
        return "set", [signed for part in split(inner, ",") for signed in both_signs(part)]
    if text and text[0] in "([" and text[-1] in ")]" and _encloses(text):
        # (1; 2) where a comma is the decimal sign.
        parts = split(text[1:-1], ",") if "," in text else split(text[1:-1], ";")
        if len(parts) > 1:
            points = both_signs(text) if text[0] + text[-1] == "()" else [text]
            return ("list", points) if len(points) > 1 else (text[0] + text[-1], parts)
    parts = split(text, ":")
    if len(parts) > 1:
        return "ratio", parts
    signed = both_signs(text)
    return ("list", signed) if len(signed) > 1 else ("plain", [text])


def list_entries(text: str) -> list[str]:
    """The entries of a list that commas, semicolons, "and" or "or" separate; one entry for any other text."""
    return split(_CONJUNCTION.sub(",", text), ",")


def _inside_braces(text: str) -> str | None:
    r"""1, 2 for \{1, 2\}, and for {1, 2}, whose braces TeX would not show."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return text[2:-2]
    if text.startswith("{") and text.endswith("}") and _encloses(text) and "," in text:
        return text[1:-1]
    return None


def both_signs(text: str) -> list[str]:
    r"""1 + \sqrt2 and 1 - \sqrt2 for 1 \pm \sqrt2. A \mp beside a \pm takes the other sign; whether two \pm go together
    is not known."""
    signs = _SIGNS.findall(text)
    if not signs or len(signs) > len(set(signs)):
        return [text]
    *before, last = _SIGNS.split(text)
    pairs = list(zip(before[::2], before[1::2], strict=True))
    return ["".join(part + signs[kind] for part, kind in pairs) + last for signs in (_UPPER, _LOWER)]


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character and not before."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return position == len(text) - 1
    return False


# ------------------------------------------------------------ relations and assignments


def relations(text: str) -> tuple[list[str], list[str]]:
    """(operands, signs): ["x", "5"], ["<"]; one operand and no sign where there is no relation outside brackets."""
    operands, signs, start, depth = [], [], 0, 0
    position = 0
    while position < len(text):
        match = _RELATION.match(text, position) if depth == 0 else None
        if match:
            operands.append(text[start:position].strip())
            signs.append(match[0])
            start = position = match.end()
            continue
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        position += 1
    return [*operands, text[start:].strip()], signs


def mirrored(operands: list[str], signs: list[str]) -> tuple[list[str], list[str]]:
    """The same chain read from its other end."""
    return operands[::-1], [_MIRRORED[sign] for sign in reversed(signs)]


def interval(text: str) -> str | None:
    r"""The interval that an inequality of one variable stands for: [-2,7) for -2 \le x < 7; None for anything else."""
    operands, signs = relations(text)
    if not signs or not set(signs) <= {"<", ">", r"\le", r"\ge"} or len(signs) > 2:
        return None
    if signs[0] in (">", r"\ge"):
        operands, signs = mirrored(operands, signs)
    if not set(signs) <= {"<", r"\le"} or not all(operands):
        return None
    is_variable = [re.fullmatch(r"\\?[A-Za-z]+(?:_\{?\w\}?)?", operand) is not None for operand in operands]
    is_variable = [seen and "infty" not in operand for seen, operand in zip(is_variable, operands, strict=True)]
    if is_variable == [False, True, False]:
        low, high = operands[0], operands[2]
        return ("(" if signs[0] == "<" else "[") + f"{low},{high}" + (")" if signs[1] == "<" else "]")
    if is_variable == [True, False]:
        return rf"(-\infty,{operands[1]}" + (")" if signs[0] == "<" else "]")
    if is_variable == [False, True]:
        return ("(" if signs[0] == "<" else "[") + rf"{operands[0]},\infty)"
    return None


def intersection(parts: list[str]) -> str | None:
    """(-1,1) for x > -1 and x < 1: a bound from below and one from above; None for anything else."""
    found = [interval(part) for part in parts]
    below = [each for each in found if each and each.endswith(r",\infty)")]
    above = [each for each in found if each and each.startswith(r"(-\infty,")]
    if len(parts) != 2 or len(below) != 1 or len(above) != 1:
        return None
    low, high = below[0].removesuffix(r",\infty)"), above[0].removeprefix(r"(-\infty,")
    ends = rational(low[1:]), rational(high[:-1])
    # Bounds in the wrong order leave no number between them.
    if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
        return None
    return f"{low},{high}"


def strip_assignments(answer: str, gold: str) -> tuple[str, str]:
    """Remove "x =" when only one of the texts has it, or when both have the same. So x = 5 and y = 5 stay different,
    and an equation such as x^2 - 4 = 0 stays different from its right side."""
    answer, gold = (_name_first(_without_approximation(text)) for text in (answer, gold))
    if answer.startswith("(") != gold.startswith("("):
        # The point A(1,2) is (1,2).
        answer, gold = (_POINT.sub("", text) for text in (answer, gold))
    texts = (answer, gold)
    names = [_ASSIGNMENT.match(text) for text in texts]
    if any(is_equation(text) and not name for text, name in zip(texts, names, strict=True)):
        # A chain of numbers, "2 + 2 = 4", stands for its last part.
        if is_equation(answer) and not is_equation(gold) and not re.search(r"[A-Za-z,]", _without_numerals(answer)):
            parts = split(answer, "=")
            return (parts[-1] if _agree(parts) else answer), gold
        return answer, gold
    if names[0] and names[1]:
        if not _same_name(canonical(names[0][1]), canonical(names[1][1])):
            return answer, gold
        # Beside x = 1, y = 2 the list x = 1, 2 has the name x twice.
        if (answer.count("=") == 1) != (gold.count("=") == 1):
            return _each_named(answer, names[0]), _each_named(gold, names[1])
    return _value_of(answer, names[0]), _value_of(gold, names[1])


def _each_named(text: str, name: re.Match[str]) -> str:
    if text.count("=") > 1:
        return text
    return ",".join(f"{name[0]}{entry}" for entry in list_entries(text[name.end() :]))


def _same_name(one: str, other: str) -> bool:
    """Whether two names stand for the same: y and f(x) do, because a graph has both."""
    functions = [_FUNCTION_OF_LETTER.fullmatch(name) for name in (one, other)]
    return one == other or ("y" in (one, other) and any(functions))


def _name_first(text: str) -> str:
    """x = 5 for 5 = x."""
    match = _NAME_LAST.fullmatch(text) if "=" in text else None
    return (
        f"{match[2]}={match[1].strip()}" if match and not re.search("[A-Za-z,]", _without_numerals(match[1])) else text
    )


def assignments(text: str) -> list[str] | None:
    """["a=1", "b=2"] for (a,b)=(1,2); None for anything else."""
    match = _TUPLE_OF_NAMES.fullmatch(text.strip())
    if match is None or not _encloses(match[2]):
        return None
    names, values = split(match[1], ","), split(match[2][1:-1], ",")
    return [f"{name}={value}" for name, value in zip(names, values, strict=True)] if len(names) == len(values) else None


def congruence(text: str) -> tuple[str, list[str], str] | None:
    r"""("x", ["1", "4"], "5") for x \equiv 1, 4 \pmod{5}, in any of its spellings; None for anything else."""
    head, modulo, tail = text.rpartition("mod")
    modulus = re.sub(r"^ulo(?![a-z])|[\s{}()~]", "", tail)
    if not modulo or not re.fullmatch(r"[A-Za-z0-9^\\]{1,30}", modulus):
        return None
    stripped = True
    while stripped:
        before = head
        for ending in _MODULO:
            head = head.removesuffix(ending)
        stripped = head != before
    left, sign, residues = head.partition(r"\equiv")
    if not sign:
        left, sign, residues = head.rpartition("=")
    if r"\equiv" in residues or "mod" in residues or any(head.count(a) != head.count(b) for a, b in ("()", "{}")):
        return None
    return left.strip(), [each for part in list_entries(residues) for each in both_signs(part)], modulus


def is_letter(text: str) -> bool:
    """Whether a text is nothing, or a letter that may stand on the left of an assignment."""
    return not text or re.fullmatch(_LETTER, text) is not None


def is_equation(text: str) -> bool:
    """Whether "=" stands outside all brackets; the "=" in the bounds of a sum stands inside."""
    return "=" in text and len(split(text, "=")) > 1


def values_in_order(entries: list[str]) -> list[str] | None:
    """2 and 3 for x = 2 and y = 3, which is the tuple (2, 3); None where names are missing or not in alphabet order."""
    names = [_ASSIGNMENT.match(entry) for entry in entries]
    spelled = [canonical(name[1]) for name in names if name and is_equation(name.string)]
    if len(spelled) < len(entries) or spelled != sorted(set(spelled)):
        return None
    return [_value_of(entry, name) for entry, name in zip(entries, names, strict=True)]


def in_order_of_names(entries: list[str], gold_entries: list[str]) -> tuple[list[str], list[str]] | None:
    """The values of a = 2, b = 1 beside the plain list 2, 1, both in the order that the names give; None where both
    lists have names or none has, and for names such as x_1 and x_2, which may be exchanged."""
    named, gold_named = _by_name(entries), _by_name(gold_entries)
    if (named is None) == (gold_named is None) or any(map(is_equation, gold_entries if named else entries)):
        return None
    return named or entries, gold_named or gold_entries


def _by_name(entries: list[str]) -> list[str] | None:
    names = [_ASSIGNMENT.match(entry) if is_equation(entry) else None for entry in entries]
    found = {canonical(name[1]): _value_of(name.string, name) for name in names if name}
    if len(found) < len(entries) or len({name.partition("_")[0] for name in found}) < len(entries):
        return None
    return [found[name] for name in sorted(found)]


def _without_approximation(text: str) -> str:
    r"""x = 1/3 for x = 1/3 \approx 0.33, and x = 11 for x \approx 11."""
    exact, sign, rough = text.partition(r"\approx")
    if not sign:
        return text
    if not exact.strip():
        return rough
    values = rational(exact), rational(rough)
    if values[0] is not None and values[1] is not None and abs(values[0] - values[1]) * 10 > abs(values[0]):
        return text  # 5 is not about 6
    return f"{exact}={rough}" if re.fullmatch(_NAME, exact) else exact


def _value_of(text: str, assignment: re.Match[str] | None) -> str:
    # "x = 1, y = 2" is a list; its entries are stripped one by one.
    if assignment is None or (text.count("=") > 1 and len(list_entries(text)) > 1):
        return text
    # The last part: "x = 2 + 3 = 5" ends in its value.
    parts = split(text[assignment.end() :], "=") or [text]
    return parts[-1] if _agree(parts) else text


def _agree(parts: list[str]) -> bool:
    """Whether all numbers in a chain are equal: a chain such as 4 = 5 has no value, nor has "-=6"."""
    if not all(re.search(r"\w", part) for part in parts):
        return False
    values = {value for part in parts if (value := rational(part)) is not None} if len(parts) > 1 else set()
    return len(values) <= 1


def _without_numerals(text: str) -> str:
    r"""Without the commands that numbers are written with."""
    return re.sub(r"\\(?:frac|cdot|div|sqrt|pi)(?![A-Za-z])", " ", text)


# ------------------------------------------------------------ words


def words(text: str) -> str | None:
    """The text, in lower case, of an answer that consists of words; "C" for (C); None for mathematics."""
    plain = unwrap_text(text).strip()
    if choice := _CHOICE.fullmatch(plain):
        return choice[1]
    if "\\" in plain or not _WORDS.fullmatch(plain) or plain in FUNCTIONS:
        return None
    is_long = any(len(word) > 2 or word.casefold() in _SHORT_WORDS for word in re.split(r"[ .,'-]+", plain))
    return " ".join(plain.casefold().strip(" .").split()) if is_long or plain != text.strip() else None
