r"""Finds the unit of an answer, and numbers that are written as words.

Texts are tidied (`exact.tidy`) before they come here. The only thing that is computed is "5 million".
"""

from __future__ import annotations

import re
from fractions import Fraction

from dphrl.rewards.math_parser import FUNCTIONS

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
# Single letters are no units here, because 5m is 5 times m; _SUPERSCRIPT_UNIT takes them with a superscript 2 or 3.
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
# Words after a number that are part of the number, or that say something about it. Text with one of them is no unit.
_NUMBER_WORDS = (
    "hundred thousand million billion trillion half halves third quarter fourth fifth sixth seventh eighth ninth tenth "
    "squared cubed square cubic factorial plus minus over more less than greater fewer not maybe perhaps about least "
    "most possibly probably either neither both"
)
_NO_UNITS = frozenset(form for word in _NUMBER_WORDS.split() for form in (word, f"{word}s"))
# Units of one or two letters, besides those in _UNIT_NAMES. All others are factors: 4 xy and 4\mathrm{x} are products.
_SHORT_UNITS = frozenset([*"msghLlNJWVKCF", "Hz", "hz", "Pa", "kJ", "kW", "eV", "ms", "cc", "mL", "am", "pm"])
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(
    r"(?P<number>-?\d+(?:\.\d+)?)\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*)?"
    rf"(?P<scale>{'|'.join(_SCALES)})(?P<rest>(?:\s[^{{}}]*)?)\}}?",
    re.IGNORECASE,
)
_SQUARE = re.compile(r"^(?:square|sq\.?)\s+|\s+squared$")
_CUBIC = re.compile(r"^(?:cubic|cu\.?)\s+|\s+cubed$")


def split_unit(text: str) -> tuple[str, str]:
    """(core, unit): the unit by its full name, "" for none."""
    if amount := _AMOUNT_IN_TEXT.fullmatch(text):
        text = amount[1].strip()
    bare = _DEGREES.sub("", text)
    if bare != text and bare.strip() and not any(name in bare for name in ("sin", "cos", "tan", "cot", "sec", "csc")):
        # Degrees of temperature and degrees of an angle count as the same unit.
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
    # After an expression with letters, a word may be a factor.
    if match is None or re.search(r"(?<!\\)(?<![A-Za-z])[A-Za-z]", match["core"]):
        return text, ""
    name = _unit_name(match["words"] or match["short"], match["power"])
    return (match["core"].strip(), name) if name else (text, "")


def in_full(text: str) -> str:
    """5000000 for "5 million"; the words that follow stay as a unit. Any other text is returned as it is."""
    match = _SCALED.fullmatch(text)
    value = Fraction(match["number"]) * _SCALES[match["scale"].casefold()] if match else Fraction(1, 2)
    if match is None or value.denominator != 1:
        return text
    rest = match["rest"].strip()
    return f"{value}\\text{{{rest}}}" if rest else str(value)


def _unit_name(unit: str, power: str | None) -> str:
    """The full name of a unit, with its power if it has one; "" when the words cannot be a unit."""
    unit = " ".join(unit.strip(" .~").split())
    if len(unit) <= 2 and unit.isascii() and unit.isalpha() and unit not in _SHORT_UNITS and unit not in _UNIT_OF:
        return ""
    unit = unit.casefold()
    if not unit or re.search(r"[\d()]", unit):
        return ""
    for pattern, implied in ((_SQUARE, "2"), (_CUBIC, "3")):
        unit, num_found = pattern.subn("", unit)
        power = implied if num_found else power
    if (_NOT_UNITS | _NO_UNITS).intersection(re.split(r"[^a-z]+", unit)):
        return ""
    name = _UNIT_OF.get(unit) or _UNIT_OF.get(unit.rstrip("s")) or unit.rstrip("s")
    return f"{name}^{power}" if power else name
