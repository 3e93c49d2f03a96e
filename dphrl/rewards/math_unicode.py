r"""Writes an answer's Unicode characters as TeX, so that the rest of the grader reads ASCII.

Covered: characters that do not show; raised and lowered characters (2¹⁰, a₁, xⁿ); fractions (½, 2½, ¹⁄₂); roots (√2,
∛8, ³√8); lines and dots over digits (0.3̅) and arrows over letters; dashes; full-width, bold and other forms of letters
and digits; digits of any script; Greek letters; signs of arithmetic, comparison and sets; brackets; the full stop 。.
Not covered, and left as they are: circled numbers (①), numbers and their parentheses in one character (⑴), accents.

What a character means is decided before NFKC gets it: NFKC would make 210 of 2¹⁰ and R of ℝ.
"""

# ruff: noqa: RUF001, RUF002

from __future__ import annotations

import re
import unicodedata
from itertools import chain

# Zero-width characters, directions of writing, joiners, selectors of a glyph, and applied functions.
_INVISIBLE = dict.fromkeys(
    chain(
        [0xAD, 0x61C, 0xFEFF],
        *(range(0x200B, 0x2010), range(0x202A, 0x202F), range(0x2060, 0x2061), range(0x2065, 0x2070)),
        range(0xFE00, 0xFE10),
    )
)


def _shifted(tag: str) -> dict[str, str]:
    """The characters that Unicode defines as raised ("<super>") or lowered ("<sub>") forms of one character."""
    ranges = range(0xB2, 0xBA), range(0x2B0, 0x2E5), range(0x1D2C, 0x1DC0), range(0x2070, 0x20A0), range(0x2C7C, 0x2C7E)
    found = {chr(code): unicodedata.decomposition(chr(code)).split() for code in chain(*ranges)}
    return {char: chr(int(parts[1], 16)) for char, parts in found.items() if parts[:1] == [tag] and len(parts) == 2}


_RAISED, _LOWERED = _shifted("<super>"), _shifted("<sub>")
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")
_RAISED_DIGITS, _LOWERED_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉"
_BUILT_FRACTION = re.compile(f"(?<![{_RAISED_DIGITS}])([{_RAISED_DIGITS}]+)[⁄∕/]([{_LOWERED_DIGITS}]+)")
_FRACTION = re.compile("[¼½¾⅐-⅞↉]")
# A raised number is the root's index where it cannot be the power of what stands before it.
_ROOT = re.compile(rf"(?:(?<![\w)\]}}])([{_RAISED_DIGITS}]+))?([√∛∜])\s*(?:\(([^()√∛∜]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))?")
_DEGREE = re.compile("[º˚]|(?<=\\d)ᵒ")
# A full-width comma separates entries, except in a number that is full-width itself.
_WIDE_THOUSANDS = re.compile("(?<=[０-９])，(?=[０-９]{3}(?![０-９]))")
_OVERLINED = re.compile("(?:\\d[\u0304\u0305])+")
_DOTTED = re.compile("(\\d)\u0307")
_ARROWED = re.compile("([A-Za-z])\u20d7")

_SIGNS = {
    "‐‑‒–—―−﹣": "-", "⋅·∙•×✕✖⨯⨉\u2062": r"\cdot ", "∗": "*", "∕⁄": "/", "÷": r"\div ", "∶": ":", "±": r"\pm ",
    "∓": r"\mp ", "\u2061": " ", "\u2063": ", ", "\u2064": "+", "。｡": ".", "、，﹐": ", ", "′’‘ʹ": "'", "″": "''",
    "“”": '"', "～〜∼": r"\sim ", "≤⩽≦": r"\le ", "≥⩾≧": r"\ge ", "≠": r"\ne ", "≈≃": r"\approx ", "≅": r"\cong ",
    "≡": r"\equiv ", "∝": r"\propto ", "∞": r"\infty ", "∅": r"\emptyset ", "∈": r"\in ", "∉": r"\notin ",
    "∪⋃": r"\cup ", "∩⋂": r"\cap ", "∖": r"\setminus ", "⊂": r"\subset ", "⊆": r"\subseteq ", "∣": r"\mid ",
    "∥": r"\parallel ", "⊥": r"\perp ", "∧": r"\wedge ", "∨": r"\vee ", "→⟶": r"\to ", "⇒⟹": r"\implies ",
    "⇔⟺": r"\iff ", "∀": r"\forall ", "∃": r"\exists ", "¬": r"\neg ", "∴": "", "∘": r"\circ ", "∠": r"\angle ",
    "△": r"\triangle ", "∂": r"\partial ", "∇": r"\nabla ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨〈": r"\langle ", "⟩〉": r"\rangle ",
    "‖": r"\|", "ℝ": r"\mathbb{R}", "ℕ": r"\mathbb{N}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "ℓ": r"\ell ", "ℏ": r"\hbar ", "…⋯": r"\ldots ", "＼": "＼", "Ω": r"\Omega ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "δ": r"\delta ", "εϵ": r"\epsilon ", "ζ": r"\zeta ", "η": r"\eta ", "θϑ": r"\theta ",
    "ι": r"\iota ", "κ": r"\kappa ", "λ": r"\lambda ", "μµ": r"\mu ", "ν": r"\nu ", "ξ": r"\xi ", "ο": "o",
    "π": r"\pi ", "ρϱ": r"\rho ", "σς": r"\sigma ", "τ": r"\tau ", "υ": r"\upsilon ", "φϕ": r"\phi ", "χ": r"\chi ",
    "ψ": r"\psi ", "ω": r"\omega ", "Γ": r"\Gamma ", "Δ∆": r"\Delta ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Ξ": r"\Xi ",
    "Π": r"\Pi ", "Σ": r"\Sigma ", "Υ": r"\Upsilon ", "Φ": r"\Phi ", "Ψ": r"\Psi ",
}  # fmt: skip
# Greek capitals that look like Latin ones are Latin ones in TeX.
_SIGNS.update(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧ", "ABEZHIKMNOPTX", strict=True))
_MEANING_KEPT = frozenset(["<font>", "<wide>", "<narrow>", "<small>", "<noBreak>", "<compat>"])


class _Characters(dict[int, str]):
    """A table for `str.translate`; characters that it does not hold are written by their compatible form."""

    def __missing__(self, code: int) -> str:
        # Nothing is stored: hostile texts would fill the table.
        char = chr(code)
        if char.isdecimal():
            return str(unicodedata.decimal(char))
        tag = unicodedata.decomposition(char).partition(" ")[0]
        form = unicodedata.normalize("NFKC", char)
        if tag == "<square>":  # units: ㎡ is m2 to NFKC
            return re.sub(r"(?<=[a-z])([23])$", r"^\1", form)
        # ⑴ and ⒈ are no digits: "5⑴" is not "5(1)".
        if tag not in _MEANING_KEPT or (
            tag == "<compat>" and any(c.isdigit() or unicodedata.combining(c) for c in form)
        ):
            return char
        return "".join(self.get(ord(c), c) for c in form)


_CHARACTERS = _Characters(
    {code: chr(code) for code in range(0x80)} | {ord(char): tex for chars, tex in _SIGNS.items() for char in chars}
)


def to_tex(text: str) -> str:
    """The text with TeX in place of its mathematical characters; a text in ASCII comes back as it is."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text.translate(_INVISIBLE))
    text = _WIDE_THOUSANDS.sub(",", _DEGREE.sub("°", text))
    text = _OVERLINED.sub(lambda m: rf"\overline{{{m[0][::2]}}}", text)
    text = _ARROWED.sub(r"\\vec{\1}", _DOTTED.sub(r"\\dot{\1}", text))
    text = _BUILT_FRACTION.sub(lambda m: rf"\frac{{{_level(m[1], _RAISED)}}}{{{_level(m[2], _LOWERED)}}}", text)
    text = _FRACTION.sub(_vulgar, text)
    text = _ROOT.sub(_root, text)
    text = _RAISED_RUN.sub(lambda m: _script("^", _level(m[0], _RAISED), text[m.end() : m.end() + 1]), text)
    text = _LOWERED_RUN.sub(lambda m: _script("_", _level(m[0], _LOWERED), ""), text)
    return text.translate(_CHARACTERS)


def _level(run: str, forms: dict[str, str]) -> str:
    """The run at the height of the line."""
    return "".join(forms[char] for char in run).replace("\u2212", "-")


def _script(mark: str, run: str, following: str) -> str:
    # cm^2 without braces is how units are written.
    if mark == "^" and run in ("2", "3") and not (following.isalnum() or following == "."):
        return f"^{run}"
    return f"{mark}{{{run}}}"


def _vulgar(match: re.Match[str]) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _root(match: re.Match[str]) -> str:
    raised, sign, group, token = match.groups()
    index = {"√": "", "∛": "[3]", "∜": "[4]"}[sign]
    if raised:
        if index:
            return match[0]
        index = f"[{_level(raised, _RAISED)}]"
    radicand = group if group is not None else token
    return rf"\sqrt{index}" + (f"{{{radicand}}}" if radicand is not None else "")
