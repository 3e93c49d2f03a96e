r"""Reads amounts of money: \$5, USD 18.90, 5 €, ₹500, $5 per hour."""

from __future__ import annotations

import re

from dphrl.rewards.exact import rational, tidy
from dphrl.rewards.math_unit_table import NAMES, SYMBOLS
from dphrl.rewards.math_units import flat, in_full, split_unit

_DOLLARS = {
    "": "dollar", "US": "dollar", "A": "australian_dollar", "AU": "australian_dollar", "C": "canadian_dollar",
    "CA": "canadian_dollar", "NZ": "newzealand_dollar", "HK": "hongkong_dollar", "S": "singapore_dollar",
}  # fmt: skip
_COMMANDS = {
    r"\pounds": "sterling_pound", r"\euro": "euro", r"\yen": "yen", r"\cent": "cent", r"\rupee": "rupee",
    r"\textdollar": "dollar", r"\texteuro": "euro", r"\textsterling": "sterling_pound", r"\textyen": "yen",
}  # fmt: skip
_COMMAND = rf"(?:{'|'.join(map(re.escape, _COMMANDS))})(?![A-Za-z])"
_CODE = (
    "(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|NZD|CHF|HKD|SGD|KRW|MXN|RUB|SEK|NOK|DKK|PLN|THB|IDR|MYR|PHP|VND|ILS|AED|BDT"
    "|PKR|NGN|EGP|KES|TWD|HUF|CZK|Rs|Rp)(?![A-Za-z])"
)
_OTHER_SIGNS = "¢¥₹₩₽元₱₪₫฿₦₴₺\uffe5"
_SIGN = (
    rf"(?:(?P<country>US|U\.S\.\s?|AU?|CA?|NZ|HK|S)?\\?\$|(?P<sign>[€£{_OTHER_SIGNS}])|(?P<command>{_COMMAND})"
    rf"|(?P<code>{_CODE}))"
)
_MARK = re.compile(rf"[$€£{_OTHER_SIGNS}]|{_COMMAND}|(?<![A-Za-z]){_CODE}")
_BLANKS = r"(?:\\[,;: ]|[~\s])*"
_TEXT = r"(?:\\(?:text|mathrm|mbox|textrm)\s*\{\s*)?"
_BEFORE = re.compile(rf"\{{?(?P<minus>[-\u2212]\s*)?{_TEXT}{_SIGN}[.~]?\s*\}}?{_BLANKS}")
_AFTER = re.compile(rf"(?<=[\d}}]){_BLANKS}{_TEXT}{_SIGN}\s*\}}?\.?$")
_IS_NUMBER = re.compile(r"[-\u2212+{]?\s*(?:[\d.]|\\[dt]?frac)")
_RATE = re.compile(r"(-?[\d.]+)\s*(?=/|\\text|per\b|an?\b|each\b)")
# TeX's thin blanks part units: \mathrm{m\,s^{-1}} is no \mathrm{ms^{-1}}.
_THIN_BLANK = re.compile(r"(?<=[A-Za-z\d})])\\[,:;]\s*(?=[A-Za-z\\])")
_SIUNITX = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}\\]*)\}")
# 10_000, as in a program.
_UNDERSCORES = re.compile(r"(?<![\w.,])\d{1,3}(?:_000)+(?![\w{])")


_DOLLARS_AND_CENTS = re.compile(r"\$?(\d[\d,]*)\s*dollars?,?\s*(?:and\s*)?(\d{1,2})\s*cents?")


def tidy_amount(text: str) -> str:
    r"""The tidied text, with \$5 written as 5\text{dollar}, so that it differs from five cents."""
    if "\\" in text:
        text = _SIUNITX.sub(r"\1\\text{ \2}", text) if "{" in text else text
        text = _THIN_BLANK.sub(" ", text)
    if "_" in text:
        text = _UNDERSCORES.sub(lambda match: match[0].replace("_", ""), text)
    if _MARK.search(text) and (amount := _amount(text.strip())):
        return amount
    tidied = in_full(tidy(text))
    if "dollar" in tidied and "cent" in tidied and (both := _DOLLARS_AND_CENTS.fullmatch(flat(tidied))):
        return rf"{both[1]}.{int(both[2]):02}\text{{dollar}}"
    return tidied


def _amount(text: str) -> str | None:
    # A single dollar sign opens no formula, so it means money. Two are the ends of one.
    if text.startswith("$") and text.endswith("$") and len(text) > 1 and not text.endswith(r"\$"):
        text = text.strip("$")
    elif text.count("$") > 1 and text.count(r"\$") < text.count("$"):
        return None
    if sign := _BEFORE.match(text):
        rest = ("-" if sign["minus"] else "") + text[sign.end() :]
    elif sign := _AFTER.search(text):
        rest = text[: sign.start()]
    else:
        return None
    if not _IS_NUMBER.match(rest):
        return None
    rest = in_full(tidy(rest))
    unit = rf"\text{{{_unit(sign)}}}"
    if rational(rest) is not None:
        return rest + unit
    # "$5 per hour": what follows the number is a part of the unit, or the sign is left out.
    rate = _RATE.sub(lambda match: f"{match[1]}{unit} ", rest, count=1)
    return rate if split_unit(rate)[1] else None


def _unit(sign: re.Match[str]) -> str:
    if sign["command"]:
        return _COMMANDS[sign["command"]]
    if sign["code"]:
        return NAMES[sign["code"].casefold()]
    if sign["sign"]:
        return SYMBOLS.get(sign["sign"].replace("\uffe5", "¥"), "money")
    return _DOLLARS[(sign["country"] or "").replace(".", "").strip()]
