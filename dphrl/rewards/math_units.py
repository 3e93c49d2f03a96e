r"""Finds the unit of an answer, and numbers that are written as words.

Which words are a unit, `math_unit_names` says. Texts are tidied (`exact.tidy`) before they come here. The only thing
that is computed is "5 million".
"""

from __future__ import annotations

import re
from fractions import Fraction

from dphrl.rewards.math_unit_names import unit_name

_COMMAND = r"\\(?P<font>text(?:bf|rm|normal|it|up)?|mbox|hbox|math(?:rm|bf|sf|it)|operatorname|rm|si|unit)\s*\{"
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree(?![A-Za-z])")
_SCALE = re.compile(r"\s*\{?\s*(?:\\(?:text|mathrm|mbox)\s*\{)?\s*(?:(C|[Cc]elsius)|F|[Ff]ahrenheit)\s*\}{0,2}$")
_ANGLE_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc")
_AMOUNT_IN_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{(\s*[-+\d.,/][^{}]*)\}")
# Where a unit may begin: a text command, a sign, a word, or a single letter after a blank.
_START = re.compile(
    rf"{_COMMAND}|\\frac\s*\{{\s*{_COMMAND.replace('?P<font>', '?:')}|\{{\s*\\rm(?![A-Za-z])"
    r"|\\(?:mu|Omega|ohm|cent|AA)(?![A-Za-z])|(?<![\\A-Za-z])(?:[A-Za-z]{2}|m/s)|(?<=\s)[A-Za-z](?![A-Za-z])"
    r"|[\u00b5\u03bc\u03a9\u2126\u00c5\u212b¢€£¥₹₩₽元%]"
)
_SINGLE = re.compile(r"(?<![\w-])[A-Za-z\u03a9\u00c5](?![\w-])")
_RATIO = re.compile(r"/|\^-")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_DIGITS = frozenset("0123456789")
_POWER_AT_END = re.compile(r"[A-Za-z}](?:\s*\^\s*-?\d|[23])$")
_BARE_POWER = re.compile(r"(?<![A-Za-z])([cdkm]?m|ft|in|yd)([23])(?!\d)")
_MAX_STARTS = 4
_MAX_UNIT_CHARS = 100
_EXPONENT = re.compile(r"\s*\^\s*(?:\{\s*([-+\u2212]?\s*\d)\s*\}|([-+\u2212]?\d))")
_SUPERSCRIPTS = str.maketrans("\u00b2\u00b3\u2074\u00b9\u207b", "2341-")
_SUPERSCRIPT = re.compile("\u207b?[\u00b9\u00b2\u00b3\u2074]")
_TEXT = re.compile(_COMMAND + r"([^{}]*)\}")
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SIGNS = {
    r"\mu": "\u00b5", "\u03bc": "\u00b5", r"\Omega": "\u03a9", r"\ohm": "\u03a9", "\u2126": "\u03a9",
    r"\cent": "\u00a2", r"\AA": "\u00c5", "\u212b": "\u00c5", r"\cdot": " ", "\u00b7": " ", "\u22c5": " ", "*": " ",
    "~": " ", r"\,": " ", r"\ ": " ", r"\rm ": " ", "\u2019": "'", ".": "", "per cent": "percent", "o'clock": "oclock",
}  # fmt: skip
_SIGN = re.compile("|".join(re.escape(sign) + ("(?!s)" if sign == r"\cdot" else "") for sign in _SIGNS))
_PREFIX_GAP = re.compile(r"(\u00b5|(?<![A-Za-z])[kKM](?=\s*\u03a9))\s+(?=[A-Za-z\u03a9])")
# A single letter is a unit only where it cannot be a variable: in a text command, or after a blank as in "5 m".
_PLAIN_LETTERS = frozenset("msghLNJWV\u03a9\u00c5")
_TEXT_LETTERS = frozenset([*"msghlLNJWVACF", "\u03a9", "\u00c5"])
# "5\text{ K}" may be five thousand and "5\text{ T}" five trillion; upright letters are the symbols of units.
_UPRIGHT = {"K": "kelvin", "T": "tesla", "H": "henry", "M": "molar"}
# Letters side by side, as in 60km; any other letters would be factors.
_WITHOUT_BLANK = re.compile(
    r"(?:mm|cm|km|dm|nm|ft|yd|mi|kg|mg|lbs?|oz|mph|kph|kmh|ml|mL|hrs?|mins?|secs?|rad|deg|pct|percent|percentage|in|am|pm"
    r"|km/hr?|cm/s|[kMG]?Hz|k?Pa|kWh?|kJ|[MGT]B|[Uu][Ss][Dd]|\u03a9|.*[^\x00-\x7f].*|m/s(?:\^2)?)(?:\^[23])?"
)
_EACH = re.compile(r"\b(?:an?|every)\s+(?=(?:second|minute|hour|day|night|week|month|year|person|piece|student)\b)")
_OF_VARIABLE = re.compile(r"(?<=values) (?:of|for) [a-z]$")
# "approximately 12" is 12.
_LEAD_WORDS = r"(?:approximately|approx\.?|about|roughly|exactly|total|so|thus|hence|therefore)"
_LEAD = re.compile(rf"\A(?:\\text\s*\{{\s*{_LEAD_WORDS}\s*[:,=]?\s*\}}\s*(?=\S)|{_LEAD_WORDS}\s+(?=[-\d]))", re.I)
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "dozen": 12, "lakh": 10**5, "crore": 10**7,
}  # fmt: skip
_MINUS = re.compile(
    r"\A(?:(?P<opened>\\(?:text|mathrm|mbox)\s*\{\s*(?:negative|minus)\s+(?=\d))"
    r"|\\(?:text|mathrm|mbox)\s*\{\s*(?:negative|minus)\s*\}\s*(?=\d|\\frac)|(?:negative|minus)\s+(?=\d|\\frac))",
    re.I,
)
_SCALED = re.compile(
    r"(?P<number>-?\d+(?:\.\d+)?)\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*)?"
    rf"(?P<scales>(?:{'|'.join(_SCALES)})(?:\s+(?:{'|'.join(_SCALES)}))?)(?P<rest>(?:\s[^{{}}]*)?)\}}?",
    re.IGNORECASE,
)


def split_unit(text: str) -> tuple[str, str]:
    """(core, unit): the unit by its full name, "" for none."""
    if text[-1:] in _DIGITS and not _POWER_AT_END.search(text):
        return text, ""
    if amount := _AMOUNT_IN_TEXT.fullmatch(text):
        text = amount[1].strip()
    if text.endswith("%") and text[:-1].strip():
        return text[:-1].strip(), "percent"
    bare = _DEGREES.sub("", text)
    if bare != text and bare.strip() and not _ANGLE_FUNCTION.search(bare):
        scale = _SCALE.search(bare)
        core = bare[: scale.start()].strip() if scale else bare.strip()
        if scale is None or not re.search(r"[\d)}]$", core):
            return bare.strip(), "degree"
        return core, "celsius_degree" if scale[1] else "fahrenheit_degree"
    for number, start in enumerate(_START.finditer(text, 1)):
        if number == _MAX_STARTS:
            break
        core, after = text[: start.start()], text[start.start() :]
        if len(after) <= _MAX_UNIT_CHARS and (unit := _unit_after(core, after)):
            return core.strip(), unit
    return text, ""


def differ(unit: str, other: str) -> bool:
    """Whether two units are both there and are not the same: an ounce may be a fluid ounce, but not a pound."""
    if not unit or not other or unit == other:
        return False
    return not (unit.endswith(f"_{other}") or other.endswith(f"_{unit}"))


def in_full(text: str) -> str:
    """5000000 for "5 million", whose following words stay as a unit, and -5 for "negative 5"; any other text as it
    is."""
    text = _LEAD.sub("", text)
    if "egative" in text or "inus" in text:
        text = _MINUS.sub(lambda sign: r"\text{-" if sign["opened"] else "-", text)
    match = _SCALED.fullmatch(text)
    if match is None:
        return text
    value = Fraction(match["number"])
    for scale in match["scales"].casefold().split():
        value *= _SCALES[scale]
    if value.denominator != 1:
        return text
    rest = match["rest"].strip()
    return f"{value}\\text{{{rest}}}" if rest else str(value)


# ------------------------------------------------------------ the text of a unit


def _unit_after(core: str, text: str) -> str:
    """The name of the unit that a text is from end to end; "" when it is none, or cannot follow this core."""
    has_blank, core = core[-1].isspace(), core.rstrip()
    in_text = "\\" in text and re.search(_COMMAND + r"|\\rm(?![A-Za-z])", text) is not None
    if in_text:
        if not re.search(r"[\d)}\]A-Za-z!]$", core):
            return ""
    # After an expression with letters, a word may be a factor.
    elif not re.search(r"[\d)}\]!]$|\\pi$", core) or _LETTER.search(core):
        return ""
    words = _OF_VARIABLE.sub("", _EACH.sub("per ", flat(text)))
    # Beside other units K is a kelvin: J/(kg K).
    letters = [letter for letter in _SINGLE.findall(words) if letter != "K" or not _RATIO.search(words)]
    if not in_text:
        if not has_blank and not _WITHOUT_BLANK.fullmatch(words):
            return ""
        if letters and not _are_units(core, words, letters):
            return ""
    elif not _TEXT_LETTERS.issuperset(letters):
        return ""
    return unit_name(words, core)


def _are_units(core: str, words: str, letters: list[str]) -> bool:
    """Whether plain letters after a blank are units: "5 m" and "5 m/s" are, "5 m n", "2 + 3 m" and "5 g^2" are not."""
    if letters[-1] in "CF" and words[:-1] in ("degrees ", "degree ", "deg "):
        return True
    if not _PLAIN_LETTERS.issuperset(letters) or re.search(r"[^\s({^][-+]|[-+]\s|,", core):
        return False
    is_product = " m" in words or words.find(" ") > 1  # N m and kW h
    return is_product or len(words) == 1 or words in ("m^2", "m^3") or "per" in words or bool(_RATIO.search(words))


def flat(text: str, keep_stops: bool = False) -> str:
    r"""m/s^2 for \mathrm{~m} / \mathrm{s}^{2}: the words, powers and slashes of a unit without its commands."""
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = _EXPONENT.sub(lambda match: "^" + (match[1] or match[2]).replace("\u2212", "-").replace(" ", ""), text)
    if "\\" in text:
        text = _FRACTION.sub(r"(\1)/(\2)", _TEXT.sub(_text_content, text))
    text = text.replace("{", "").replace("}", "")
    text = _SIGN.sub(lambda match: match[0] if keep_stops and match[0] == "." else _SIGNS[match[0]], text)
    text = _BARE_POWER.sub(r"\1^\2", text)
    return _PREFIX_GAP.sub(r"\1", " ".join(text.split()))


def _text_content(match: re.Match[str]) -> str:
    content = match[2].strip(" ~")
    if len(content) == 1:
        content = _UPRIGHT.get(content, content) if match["font"] in ("mathrm", "rm", "si", "unit") else content
        content = content if match["font"] not in ("operatorname", "mathbf", "mathit", "textit") else "?"
    # A blank before it, unless a prefix stands there: \mu\text{m}. A blank after it would part it from its power.
    return f" {content}"
