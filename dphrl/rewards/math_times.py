r"""Clock times, and amounts in several units such as 3 hours 20 minutes.

Texts are tidied (`exact.tidy`) before they come here. Times are compared as minutes of the day, amounts unit by unit;
no unit is converted into another.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dphrl.rewards.math_unit_names import measure_name
from dphrl.rewards.math_units import flat

_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?:[:.]\s?(?P<minute>[0-5]\d)(?::00)?)?\s*(?P<mark>[ap]\.?\s?m\b\.?|noon|midnight"
    r"|in the (?:morning|afternoon|evening)|at night|o'?clock)?",
    re.IGNORECASE,
)
_NAMED = {"noon": 720, "midnight": 0}
_NUMBER = r"-?\d+(?:\.\d+|/[1-9]\d*)?"
_PART = re.compile(rf"\s*(?:,\s*)?(?:and\s*)?({_NUMBER})\s*([A-Za-z][A-Za-z. ]*?)(?=[\s.,]*(?:\band\s*)?(?:\d|$))\.?")
_MAY_BE_AMOUNTS = re.compile(r"\d[^\d]*[A-Za-z][^\d]*\d")
_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_DATE = re.compile(
    rf"(?:(?P<month>{_MONTH})\s*(?P<day>\d{{1,2}})|(?P<other_day>\d{{1,2}})\s*(?:of\s+)?(?P<other_month>{_MONTH}))"
    r"(?:,?\s*(?P<year>\d{4}))?",
    re.IGNORECASE,
)
_HALF_DAY = 12 * 60


def same_time(answer: str, gold: str) -> bool | None:
    """Whether two clock times are the same; 9:30 may be 9:30 AM and 9:30 PM. None unless both are times, and at least
    one of them says which half of the day it means: 9:30 alone may be a ratio."""
    if not any(mark in text for text in (answer, gold) for mark in (":", "noon", "midnight")):
        return None
    clock = _clock(answer)
    gold_clock = _clock(gold) if clock else None
    if clock is None or gold_clock is None:
        return None
    (minutes, kind), (gold_minutes, gold_kind) = clock, gold_clock
    kinds = {kind, gold_kind}
    if not kinds & {"marked", "o'clock"}:
        return None
    if kinds & {"half", "o'clock"}:
        return minutes % _HALF_DAY == gold_minutes % _HALF_DAY
    return minutes == gold_minutes


def same_amounts(answer: str, gold: str) -> bool | None:
    """Whether two amounts of several units each agree unit by unit; None unless both are such amounts."""
    amounts = _amounts(answer)
    gold_amounts = _amounts(gold) if amounts else None
    return amounts == gold_amounts if amounts and gold_amounts else None


def same_date(answer: str, gold: str) -> bool | None:
    """Whether two days are the same, in either order of month and day; None unless both are days."""
    day = _day(answer)
    gold_day = _day(gold) if day else None
    return day == gold_day if day and gold_day else None


def _day(text: str) -> tuple[str, str, str] | None:
    if len(text) > 60 or (match := _DATE.fullmatch(flat(text, keep_stops=True).strip(" ."))) is None:
        return None
    month = (match["month"] or match["other_month"])[:3].casefold()
    return month, (match["day"] or match["other_day"]).lstrip("0"), match["year"] or ""


def _clock(text: str) -> tuple[int, str] | None:
    """(minutes of the day, kind): "marked" with AM or PM, "full" where the hour tells the half of the day, as in
    14:30, "half" or "o'clock" where it is open; None for no time."""
    text = flat(text, keep_stops=True).strip(" .")
    if text.casefold() in _NAMED:
        return _NAMED[text.casefold()], "marked"
    match = _CLOCK.fullmatch(text)
    if match is None or (match["minute"] is None and match["mark"] is None):
        return None
    hour, minute = int(match["hour"]), int(match["minute"] or 0)
    mark = (match["mark"] or "").casefold().replace(".", "").replace(" ", "")
    if not mark or mark[0] == "o":
        if hour > 24 or (not mark and "." in text):
            return None
        return hour % 24 * 60 + minute, "full" if not 1 <= hour <= 12 else "o'clock" if mark else "half"
    if not 1 <= hour <= 12 or (mark in _NAMED and (hour, minute) != (12, 0)):
        return None
    is_late = mark[0] == "p" or mark in ("noon", "intheafternoon", "intheevening", "atnight")
    return hour % 12 * 60 + minute + is_late * _HALF_DAY, "marked"


def _amounts(text: str) -> dict[str, Fraction] | None:
    """{"hour": 3, "minute": 20}; None unless there are two units of measurement or more, each with its number."""
    if len(text) > 200 or not _MAY_BE_AMOUNTS.search(text):
        return None
    text = flat(text, keep_stops=True)
    amounts: dict[str, Fraction] = {}
    position = 0
    while position < len(text):
        match = _PART.match(text, position)
        name = measure_name(match[2]) if match else ""
        if match is None or not name or name in amounts:
            return None
        amounts[name] = Fraction(match[1])
        position = match.end()
    return amounts if len(amounts) > 1 else None
