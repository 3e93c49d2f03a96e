r"""The full name of a unit: "meter second^-1" for m/s, m s^-1 and meters per second.

A unit is a unit of measurement (`math_unit_table`), or a thing that is counted (`math_nouns`) with adjectives before
it, or a product, a quotient or a power of these. All other words may change the value of the number before them
(dozen, tenths, below zero, divided by two), so they are no unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dphrl.rewards.math_nouns import ADJECTIVES, IRREGULAR, NOUNS, SAME_IN_PLURAL, SUBSTANCES, TUPLES
from dphrl.rewards.math_unit_table import PHRASES, measure

_TOKEN = re.compile(
    r"\s*(?:(?P<word>[A-Za-z\u00b5\u03a9\u00c5][A-Za-z_'\u03a9-]*|[¢€£¥₹₩₽元%])|\^(?P<power>[-+]?\d)|(?P<sign>[/()]))"
)
_PERCENT = frozenset(["%", "percent", "percents", "pct", "percentage"])
# What says no more than the number does. But "5 left" and "5 units left" may be a direction.
_ALONE = re.compile(r"(?:in )?total|in all|altogether|each|apiece")
_AFTER = re.compile(r"\s+(?:(?:in )?total|in all|altogether|each|apiece|remaining|left(?: over)?)$")
_MOVES = re.compile(
    r"\b(?:unit|space|step|block|square|point|tile|position|place|\w*met(?:er|re)|feet|foot|yard|inche?|mile|[ckm]?m)s?"
    r"\s+left$"
)
_BEFORE = re.compile(r"^(?:additional|extra|more|full|whole|total|combined|such)\s+(?=\w)")
_SIZE = re.compile(r"\s+(?:long|tall|wide|high|deep|thick|old|apart|away)$")
# "6 pairs of integers" are six, while "6 pairs" may be twelve shoes.
_MATHEMATICAL = frozenset(["ordered", "unordered", "integer", "integers", "numbers", "points", "primes", "values"])
_HISSING = ("ses", "xes", "zes", "ches", "shes", "oes")
# berries, wolves and knives
_STEM_ENDS = {"i": ("y",), "v": ("f", "fe")}
_PHRASES = {" ".join(word.removesuffix("s") for word in phrase.split()): name for phrase, name in PHRASES.items()}

Factors = dict[str, int]


def unit_name(words: str, core: str) -> str:
    """The full name of a flat unit text: "meter second^-1" for "m/s"; "" when the words are no unit.

    core: the number before the unit; an apple needs a one or a fraction.
    """
    words = words.strip().strip("~")
    if _ALONE.fullmatch(words):
        return "item"
    if not _MOVES.search(words):
        words = _AFTER.sub("", _BEFORE.sub("", words))
    words = _SIZE.sub("", words)
    if words.casefold() in _PERCENT:
        return "percent"
    tokens = list(_tokens(words))
    if not tokens or "" in tokens:
        return ""
    factors = _quotient(tokens, core)
    if not factors:
        return ""
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(factors.items()) if power)


def _tokens(words: str) -> Iterator[str]:
    """Words, "/", parentheses and powers such as "^-2"; "" at the first character that no unit has."""
    position = 0
    while position < len(words):
        match = _TOKEN.match(words, position)
        if match is None:
            yield ""
            return
        position = match.end()
        yield f"^{match['power']}" if match["power"] else "/" if match["word"] == "per" else match[match.lastgroup or 0]


def _quotient(tokens: list[str], core: str) -> Factors | None:
    """The factors of parts with "/" or "per" between them."""
    parts: list[list[str]] = [[]]
    # A parenthesis that is not closed here was opened in the number: (3 cm, 4 cm).
    if tokens.count("(") != tokens.count(")"):
        return None
    for token in tokens:
        if token == "/":
            parts.append([])
        elif token not in "()":
            parts[-1].append(token)
    factors: Factors = {}
    for index, part in enumerate(parts):
        if not part and index == 0 and len(parts) > 1:
            continue  # "$5 per hour": the sign in front was the unit
        found = _product(part) or _counted(part, "1" if index else core)
        if not found:
            return None
        for name, power in found.items():
            factors[name] = factors.get(name, 0) + (power if index == 0 else -power)
    return factors


def _product(tokens: list[str]) -> Factors | None:
    """The factors of a product of units of measurement; None when a word is no such unit."""
    factors: Factors = {}
    last: Factors = {}
    factor = 1
    position = 0
    tokens = [part for token in tokens for part in _parts_of(token)]
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token in ("square", "sq", "cubic", "cu"):
            factor = 2 if token[0] == "s" else 3
            continue
        if token[0] == "^" or token in ("squared", "cubed"):
            power = int(token[1:]) if token[0] == "^" else 2 if token == "squared" else 3
            if not last or abs(power) > 4 or power == 0:
                return None
            for name in last:
                factors[name] += last[name] * (power - 1)
            last = {}
            continue
        if token == "of" and factors and factor == 1:
            return factors if _is_substance(tokens[position:]) else None
        phrase = " ".join(word.casefold().removesuffix("s") for word in tokens[position - 1 : position + 1])
        if token == "in" and factors:
            return None  # "5 feet in ..." says more than a unit does
        if two_words := _PHRASES.get(phrase):
            last = {two_words: factor}
            position += 1
        elif found := measure(token):
            last = {name: power * factor for name, power in found.items()}
        elif token.casefold() in _PERCENT and not factors:
            last = {"percent": 1}
        else:
            return None
        factor = 1
        for name, power in last.items():
            factors[name] = factors.get(name, 0) + power
    return factors if factor == 1 else None


def _parts_of(token: str) -> list[str]:
    """foot and pounds for foot-pounds; a name with a hyphen of its own stays whole."""
    parts = token.split("-")
    # 5 m-s is a difference.
    is_product = token == "N-m" or (len(min(parts, key=len)) > 1 and measure(token) is None)
    return parts if len(parts) > 1 and is_product else [token]


def measure_name(words: str) -> str:
    """The full name of a unit of measurement; "" for all other words, counted things too."""
    factors = _product(list(_tokens(words.replace(".", ""))))
    return " ".join(sorted(factors)) if factors and set(factors.values()) == {1} else ""


# ------------------------------------------------------------ things that are counted


def _counted(tokens: list[str], core: str) -> Factors | None:
    """The thing that words such as "red marbles" or "bags of rice" name; None when they name none."""
    words = [token.casefold().removesuffix("'") for token in tokens]
    content: list[str] = []
    if "of" in words:
        position = words.index("of")
        words, content = words[:position], words[position + 1 :]
        if not _is_substance(content):
            return None
    if not 1 <= len(words) <= 5:
        return None
    *before, last = words
    thing = _thing(last, core)
    if thing is None or not all(_describes(word) for word in before):
        return None
    if thing in TUPLES and _MATHEMATICAL.isdisjoint([*before, *content]):
        return None
    if thing == "root" and before and before[-1] in ("square", "cube", "th", "nd", "rd"):
        return None
    return {"_".join([*before, thing]): 1}


def _thing(word: str, core: str) -> str | None:
    """The singular of a counted noun; None for other words, and for a singular after a number such as 5."""
    if (singular := _singular(word)) is not None:
        return singular
    if word in SAME_IN_PLURAL:
        return word
    is_one = core in ("1", "-1") or "frac" in core or "/" in core or core.startswith((".", "0."))
    return word if is_one and (word in NOUNS or word in TUPLES) else None


def _singular(word: str) -> str | None:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if not word.endswith("s"):
        return None
    stems = [word[:-1]]
    if word.endswith("es"):
        stems += [word[:-3] + end for end in _STEM_ENDS.get(word[-3:-2], ())]
    if word.endswith(_HISSING):
        stems.append(word[:-2])
    return next((stem for stem in stems if stem in NOUNS or stem in TUPLES), None)


def _describes(word: str) -> bool:
    return word in ADJECTIVES or word in NOUNS or word in SUBSTANCES or _singular(word) is not None


def _is_substance(words: list[str]) -> bool:
    """Whether "flour" or "blue marbles" stands after "of"."""
    words = [word.casefold() for word in words if word.casefold() not in ("the", "his", "her", "their")]
    return bool(words) and all(_describes(word) for word in words) and len(words) <= 4
