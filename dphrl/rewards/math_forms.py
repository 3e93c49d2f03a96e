r"""What an answer is made of, read from its text: a unit, an assignment, words, a list, an interval, relations.

Texts are tidied (`exact.tidy`) before they come here. Nothing is computed.
"""

from __future__ import annotations

import re

from dphrl.rewards.exact import canonical, unwrap_text
from dphrl.rewards.math_parser import FUNCTIONS

_OPEN, _CLOSE = "([{", ")]}"
# What may stand before "=" in an assignment: x, x_1, f(2), (x, y), V_1:V_2, \angle ABC, \text{Area}.
_NAME = (
    r"(?:\\text\s*\{[^{}]*\}|(?!\\(?:frac|sqrt|cdot|pm|begin|text))\\?[A-Za-z]|_(?:\{[A-Za-z0-9]{1,9}\}|[A-Za-z0-9])"
    r"|\^\{-1\}|\([\w,\s]{0,20}\)|[':\s])+"
)
_ASSIGNMENT = re.compile(rf"({_NAME})(?:=|(?<=[\s\w}}])\\in(?![A-Za-z]))")
_CONJUNCTION = re.compile(r"\\text\s*\{\s*(?:and|or),?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;|\\vee(?![A-Za-z])")
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>=]")
_MIRRORED = {r"\le": r"\ge", r"\ge": r"\le", "<": ">", ">": "<", "=": "=", r"\ne": r"\ne"}

_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree(?![A-Za-z])")
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
_TEXT_UNIT = re.compile(
    rf"(?P<core>.*[\d)}}\]A-Za-z])\s*\\(?:text|mbox|mathrm|textnormal|textbf|rm)\s*\{{(?P<unit>[^{{}}]*)\}}{_POWER}",
    re.DOTALL,
)
_PER = re.compile(r"(?<=[A-Za-z])\}\s*/\s*\\(?:text|mbox|mathrm|textnormal)\s*\{(?=\s*[A-Za-z])")
_AMOUNT_IN_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{(\s*[\d.,/]+\s+[^{}]*)\}")
_ABBREVIATIONS = (
    "mm|cm|km|dm|nm|ft|yd|mi|kg|mg|lbs?|oz|mph|kph|kmh|ml|mL|hrs?|mins?|secs?|rad|deg|pct|percent|percentage|in|m|s|g|h"
)
# Single letters only with the mark of a square or cube that ASCII lacks: 5m is 5 times m.
_PLAIN_UNIT = re.compile(
    rf"(?P<core>.*[\d)}}\]])(?:\s+(?P<words>[A-Za-z]{{2,}}(?:(?:\s+|/|\s+per\s+)[A-Za-z]{{1,}}){{0,3}})"
    rf"|\s*(?P<short>(?!m\b|s\b|g\b|h\b)(?:{_ABBREVIATIONS})))\.?{_POWER}",
    re.DOTALL,
)
_SUPERSCRIPT_UNIT = re.compile(r"(?P<core>.*\d)\s*(?P<unit>[a-z]{1,3})(?P<power>[\u00b2\u00b3])", re.DOTALL)
_NOT_UNITS = FUNCTIONS | {"pi", "sqrt", "mod", "e", "i", "or", "and", "to", "is", "choose", "infty", "times"}
_UNIT_NAMES = {
    "percent": ("%", "pct", "percentage", "percents"),
    "degree": ("deg",),
    "dollar": ("usd", "buck"),
    "cent": ("¢",),
    "centimeter": ("cm", "centimetre"),
    "millimeter": ("mm", "millimetre"),
    "kilometer": ("km", "kilometre"),
    "meter": ("m", "metre"),
    "inch": ("in", "inche"),
    "foot": ("ft", "feet"),
    "yard": ("yd",),
    "mile": ("mi",),
    "second": ("s", "sec"),
    "minute": ("min",),
    "hour": ("h", "hr"),
    "gram": ("g",),
    "kilogram": ("kg",),
    "liter": ("l", "litre"),
    "pound": ("lb",),
    "ounce": ("oz",),
    "mile per hour": ("mph", "miles per hour"),
    "kilometer per hour": ("kph", "kmh", "km/h", "kilometers per hour"),
    "radian": ("rad",),
}
_UNIT_OF = {other: name for name, others in _UNIT_NAMES.items() for other in (*others, name)}
_SQUARE = re.compile(r"^(?:square|sq\.?)\s+|\s+squared$")
_CUBIC = re.compile(r"^(?:cubic|cu\.?)\s+|\s+cubed$")

_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*\.?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]*")
_SHORT_WORDS = frozenset(["no", "up", "am", "pm"])
_ALL_REALS = re.compile(
    r"\\(?:mathbb|Bbb|mathbf)\s*\{?\s*R\s*\}?|(?:the set of )?all real(?:s| numbers)"
    r"|\\text\s*\{\s*(?:the set of )?all real(?:s| numbers)\.?\s*\}"
)
_REALS = r"(-\infty,\infty)"


def split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside every bracket; a half-open interval may close with the other bracket."""
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
    r"""(kind, entries): a bracket pair "()", "[)", ..., "set", "list" (commas, and/or, \pm), "union", "ratio", or
    "plain"."""
    text = text.strip()
    if _ALL_REALS.fullmatch(text):
        text = _REALS
    parts = list_entries(text)
    if len(parts) > 1:
        return "list", [signed for part in parts for signed in _plus_minus(part)]
    parts = split(text, r"\cup")
    if len(parts) > 1:
        return "union", parts
    inner = _inside_braces(text)
    if inner is not None:
        return "set", [signed for part in split(inner, ",") for signed in _plus_minus(part)]
    if text and text[0] in "([" and text[-1] in ")]" and _encloses(text):
        parts = split(text[1:-1], ",")
        if len(parts) > 1:
            return text[0] + text[-1], parts
    parts = split(text, ":")
    if len(parts) > 1:
        return "ratio", parts
    signed = _plus_minus(text)
    return ("list", signed) if len(signed) > 1 else ("plain", [text])


def list_entries(text: str) -> list[str]:
    return split(_CONJUNCTION.sub(",", text), ",")


def _inside_braces(text: str) -> str | None:
    r"""1, 2 for \{1, 2\}, and for {1, 2}, whose braces TeX would not show."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return text[2:-2]
    if text.startswith("{") and text.endswith("}") and _encloses(text) and "," in text:
        return text[1:-1]
    return None


def _plus_minus(text: str) -> list[str]:
    if text.count(r"\pm") != 1:
        return [text]
    return [text.replace(r"\pm", sign) for sign in ("+", "-")]


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


def strip_assignments(answer: str, gold: str) -> tuple[str, str]:
    """Drop "x =" where one side has it, or both have the same. x = 5 and y = 5 stay different, and so does an
    equation such as x^2 - 4 = 0 from its right side."""
    answer, gold = _without_approximation(answer), _without_approximation(gold)
    texts = (answer, gold)
    names = [_ASSIGNMENT.match(text) for text in texts]
    if any(is_equation(text) and not name for text, name in zip(texts, names, strict=True)):
        # A chain of numbers, "2 + 2 = 4", says what its last part says.
        if is_equation(answer) and not is_equation(gold) and not re.search(r"[A-Za-z,]", _without_numerals(answer)):
            return split(answer, "=")[-1], gold
        return answer, gold
    if names[0] and names[1] and canonical(names[0][1]) != canonical(names[1][1]):
        return answer, gold
    return _value_of(answer, names[0]), _value_of(gold, names[1])


def is_equation(text: str) -> bool:
    """Whether "=" stands outside all brackets; the one in a sum's bounds does not."""
    return "=" in text and len(split(text, "=")) > 1


def values_in_order(entries: list[str]) -> list[str] | None:
    """2 and 3 for x = 2 and y = 3, which is the tuple (2, 3); None where names are missing or in another order."""
    names = [_ASSIGNMENT.match(entry) for entry in entries]
    spelled = [canonical(name[1]) for name in names if name and is_equation(name.string)]
    if len(spelled) < len(entries) or spelled != sorted(set(spelled)):
        return None
    return [_value_of(entry, name) for entry, name in zip(entries, names, strict=True)]


def _without_approximation(text: str) -> str:
    r"""x = 1/3 for x = 1/3 \approx 0.33, and x = 11 for x \approx 11."""
    exact, sign, rough = text.partition(r"\approx")
    if not sign:
        return text
    return f"{exact}={rough}" if re.fullmatch(_NAME, exact) else exact


def _value_of(text: str, assignment: re.Match[str] | None) -> str:
    # "x = 1, y = 2" is a list, whose entries are stripped one by one.
    if assignment is None or (text.count("=") > 1 and len(list_entries(text)) > 1):
        return text
    # The last part: "x = 2 + 3 = 5" ends in its value.
    return (split(text[assignment.end() :], "=") or [text])[-1]


def _without_numerals(text: str) -> str:
    r"""Without the commands that numbers are written with."""
    return re.sub(r"\\(?:frac|cdot|div|sqrt|pi)(?![A-Za-z])", " ", text)


# ------------------------------------------------------------ words and units


def words(text: str) -> str | None:
    """The words of an answer that is words, in lower case; "C" for (C); None for mathematics."""
    plain = unwrap_text(text).strip()
    if choice := _CHOICE.fullmatch(plain):
        return choice[1]
    if "\\" in plain or not _WORDS.fullmatch(plain) or plain in FUNCTIONS:
        return None
    is_long = any(len(word) > 2 or word.casefold() in _SHORT_WORDS for word in re.split(r"[ .,'-]+", plain))
    return " ".join(plain.casefold().strip(" .").split()) if is_long or plain != text.strip() else None


def split_unit(text: str) -> tuple[str, str]:
    """(core, unit): the unit by its full name, "" for none."""
    if amount := _AMOUNT_IN_TEXT.fullmatch(text):
        text = amount[1].strip()
    bare = _DEGREES.sub("", text)
    if bare != text and bare.strip() and not any(name in bare for name in ("sin", "cos", "tan", "cot", "sec", "csc")):
        # "90 degrees" of temperature are as good as those of an angle.
        return re.sub(r"\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF])$", "", bare.strip()), "degree"
    if text.endswith("%"):
        return text[:-1].strip(), "percent"
    text = _PER.sub("/", text)
    if match := _SUPERSCRIPT_UNIT.fullmatch(text):
        return match["core"], _unit_name(match["unit"], "2" if match["power"] == "\u00b2" else "3")
    if match := _TEXT_UNIT.fullmatch(text):
        name = _unit_name(match["unit"], match["power"])
        return (match["core"].strip(), name) if name else (text, "")
    match = _PLAIN_UNIT.fullmatch(text)
    # Behind an expression with letters a word may be a factor.
    if match is None or re.search(r"(?<!\\)(?<![A-Za-z])[A-Za-z]", match["core"]):
        return text, ""
    name = _unit_name(match["words"] or match["short"], match["power"])
    return (match["core"].strip(), name) if name else (text, "")


def _unit_name(unit: str, power: str | None) -> str:
    """ "" where the words cannot be a unit."""
    unit = " ".join(unit.casefold().strip(" .~").split())
    if not unit or _NOT_UNITS.intersection(re.split(r"[^a-z]+", unit)):
        return ""
    for pattern, implied in ((_SQUARE, "2"), (_CUBIC, "3")):
        unit, num_found = pattern.subn("", unit)
        power = implied if num_found else power
    name = _UNIT_OF.get(unit) or _UNIT_OF.get(unit.rstrip("s")) or unit.rstrip("s")
    return f"{name}^{power}" if power else name
