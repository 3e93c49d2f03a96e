r"""Exact reading of answers: one spelling for each form, and rational numbers as Fraction.

Most answers in mathematics data sets are rational numbers. For them a tolerance between floats would accept wrong
answers (1/2^99 is not 1/2^98), and a computer algebra system would be a thousand times slower than exact arithmetic.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import prod

from dphrl.rewards.math_notation import numerals, undressed, without_braces, without_system
from dphrl.rewards.math_unicode import to_tex

# A power whose value has more bits than this is no answer, and would only cost time. For comparison: 2004! has 19,049.
MAX_BITS = 40_000
MAX_FACTORIAL = 3_000
_MAX_DEPTH = 40

# Most answers are plain numbers, and these have one spelling.
_NUMERAL = re.compile(r"-?(?:\d+\.)?\d+", re.ASCII)
# A backslash before it is excluded, because `\\ ` ends a row of a matrix.
_SPACING = re.compile(
    r"(?<!\\)\\[!,;:> ]|\\left\s*[.<]|\\right\s*[.>]|\\(?:q?quad|enspace|thinspace|left|right|middle|[bB]igg?[lrm]?"
    r"|(?:display|text|script|scriptscript)style|(?:no)?limits|(?:math)?strut|[lL]arge|LARGE|[hH]uge|small|tiny"
    r"|normalsize|footnotesize|scriptsize|noindent|nonumber|notag|therefore|centering|hfill|newline)(?![A-Za-z])|~"
)
# Blanks part two numbers, unless a group of three digits follows: 12\;13, 1\;000.
_PARTED = re.compile(r"\d\\[,;:>]\s*(?!\d{3}(?!\d))\d")
_SCIENTIFIC_X = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname|textnormal|rm)\s*\{([^{}]*)\}")
# A result after the sign that leads to it: "= 5", "\\implies 5".
_LEADS = ("=", "&", "\\")
_LEAD = re.compile(
    r"\A(?:\s*(?:&|=(?!=)|\\\\|\\(?:implies|Rightarrow|Longrightarrow|Leftrightarrow|iff)(?![A-Za-z])))+\s*"
)
_ORDINAL = re.compile(
    r"(?<=\d)(?:\^\s*\{\s*\\(?:text|mathrm)\s*\{(?:st|nd|rd|th)\}\s*\}|\^\s*\{(?:st|nd|rd|th)\}"
    r"|\\text\s*\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th)(?![A-Za-z]))"
)
_EMPTY_SET = re.compile(r"\\\{\s*\\\}")
_FRACTION_NAMES = re.compile(r"\\(?:(?:[dtc]|nice|s|x)(frac)|[dt](binom))(?![A-Za-z])")
# \frac12 and \frac1{2}: TeX takes one token where there are no braces.
_FRACTION_BARE = re.compile(r"\\(frac|binom)\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SQRT_BARE = re.compile(r"\\sqrt\s*(\d|[A-Za-z](?![A-Za-z]))")
_LOG_BARE = re.compile(r"(\\log\s*_\s*)(\d)(?=\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{\s*,\s*\})\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,/]| \d)")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.^])")
# {a \over b} and {n \choose k}, the old way to write \frac and \binom.
_OVER = re.compile(r"\{([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*)\}")
_OVER_ALL = re.compile(r"([\w\s^.+-]+)\\(over|choose)(?![A-Za-z])([\w\s^.+-]+)")
_BRACKET = re.compile(r"[(\[]|\\\{|\\begin")
_MIXED = re.compile(r"(?<![\d.}])(\d+)\s+(\d+)/(\d+)(?![\d.])")
_WORDS = {
    r"\varnothing": r"\emptyset", r"\gt": ">", r"\lt": "<", r"\geq": r"\ge", r"\leq": r"\le", r"\neq": r"\ne",
    r"\geqslant": r"\ge", r"\leqslant": r"\le", r"\geqq": r"\ge", r"\leqq": r"\le", r"\not=": r"\ne ", "!=": r"\ne ",
    ">=": r"\ge ", "<=": r"\le ", ":=": "=", r"\times": r"\cdot", r"\ast": r"\cdot", r"\langle": "(", r"\rangle": ")",
    r"\lparen": "(", r"\rparen": ")", r"\lbrack": "[", r"\rbrack": "]", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\mid": "|", r"\vert": "|", r"\colon": ":", r"\ldots": "...", r"\dots": "...", r"\cdots": "...",
    r"\mathrm{e}": " e", r"\varepsilon": r"\epsilon", r"\varphi": r"\phi", r"\vartheta": r"\theta",
}  # fmt: skip
_WORD_PATTERN = re.compile(
    "|".join(re.escape(word) + ("(?![A-Za-z])" if word[-1].isalpha() and word[0] == "\\" else "")
             for word in sorted(_WORDS, key=len, reverse=True))
)  # fmt: skip


class TooLarge(Exception):  # noqa: N818  (a verdict on the answer, not a fault)
    """The value of an answer is larger than any answer needs to be."""


def tidy(answer: str) -> str:
    r"""One spelling for what TeX spells in many ways; keeps spaces, \text{} and units."""
    answer = answer.strip()
    if _NUMERAL.fullmatch(answer):
        return answer
    answer = to_tex(answer).strip().strip("$").strip()
    # Dollar signs are removed: \$ would end a formula, and the value of no answer depends on it.
    answer = answer.replace(r"\$", "").replace("$", "").replace(r"\%", "%")
    answer = answer.replace("\u20ac", "").replace("\u00a3", "")
    if r"\over" in answer or r"\choose" in answer:
        answer = _OVER.sub(_fraction, answer)
        if old := _OVER_ALL.fullmatch(answer):
            answer = _fraction(old)
    if "\\" in answer:
        answer = re.sub(r",\s*\\!\s*", ",", answer) if r"\!" in answer else answer
        answer = answer.rstrip("\\")  # "5\\ " without its blank, or a line break
        plain = _SPACING.sub(_space, answer).strip()
        # \Large{1,2} is a list, and {1,2} a set.
        plain = without_braces(plain) if answer.startswith("\\") and plain.startswith("{") else plain
        answer = without_system(undressed(plain))
    if answer.startswith("{"):
        answer = without_braces(answer, keep_lists=True)
    if answer.startswith(_LEADS):
        answer = _LEAD.sub("", answer)
    answer = numerals(answer.replace("~", " "))
    answer = _EMPTY_SET.sub(r"\\emptyset", answer)
    answer = _FRACTION_NAMES.sub(lambda m: rf"\{m[1] or m[2]}", answer)
    answer = _WORD_PATTERN.sub(lambda match: _WORDS[match[0]], answer)
    answer = _FRACTION_BARE.sub(lambda m: rf"\{m[1]}{{{m[2] or m[3] or ''}}}{{{m[4] or m[5] or ''}}}", answer)
    answer = _LOG_BARE.sub(r"\1{\2}", _SQRT_BARE.sub(r"\\sqrt{\1}", answer))
    # Inside brackets a comma separates entries: [0,100) and (1,200) hold two numbers each.
    if not _BRACKET.search(answer):
        answer = _THOUSANDS.sub(lambda match: re.sub(r"[{},\s]", "", match[0]), answer)
        answer = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), answer)
    answer = _ORDINAL.sub("", answer)
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    if "10" in answer:
        answer = _SCIENTIFIC_X.sub(r"\\cdot ", answer)
    answer = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", answer)
    # A full stop at the end belongs to the sentence; an ellipsis is part of the answer.
    return answer.strip() if answer.rstrip().endswith("...") else answer.strip().rstrip(" .,;:")


def _fraction(match: re.Match[str]) -> str:
    return rf"\{'frac' if match[2] == 'over' else 'binom'}{{{match[1]}}}{{{match[3]}}}"


def _space(command: re.Match[str]) -> str:
    if command[0] in ("~", "\\ ") or command[0].endswith("."):
        return " "
    if command[0][-1] in "<>" and command[0] != r"\>":
        return "(" if command[0][-1] == "<" else ")"
    if command.start() and _PARTED.match(command.string, command.start() - 1):
        return " "
    # Two blanks: "1\quad 234" is not 1,234.
    return "  " if "quad" in command[0] else ""


def unwrap_text(answer: str) -> str:
    r"""\text{odd} -> odd."""
    return _TEXT.sub(lambda match: match[1], answer)


def canonical(answer: str) -> str:
    """A tidied answer without its blanks and text commands, for comparison as a string."""
    # A blank between digits stays visible, because "1 2" is not 12.
    flat = "".join(re.sub(r"(?<=\d)\s+(?=\d)", "~", unwrap_text(answer)).split())
    return re.sub(r"([_^])\{(\w)\}(?!\d)", r"\1\2", flat)


_TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d*\.\d*\\overline\s*\{\d{1,30}\})|(?P<number>\d+\.\d*|\.\d+|\d+)"
    r"|(?P<name>\\(?:frac|cdot|div))(?![A-Za-z])|(?P<sign>[-+*/^!%(){}]))"
)


def rational(answer: str) -> Fraction | None:
    """The exact value of a tidied answer; None when it is anything but arithmetic on rational numbers.

    Raises TooLarge for powers and factorials beyond `MAX_BITS`. A percent sign means a hundredth here.
    """
    tokens: list[str] = []
    position = 0
    answer = answer.rstrip()
    while position < len(answer):
        match = _TOKEN.match(answer, position)
        if match is None:
            return None
        tokens.append(match[match.lastgroup or 0])
        position = match.end()
    reader = _Reader(tokens)
    try:
        value = reader.sum(0)
    except (_NotRational, ZeroDivisionError):
        return None
    return value if reader.at_end else None


class _NotRational(Exception):  # noqa: N818
    pass


class _Reader:
    """Recursive descent over tokens; every value it makes is bounded by MAX_BITS."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    @property
    def at_end(self) -> bool:
        return self.position == len(self.tokens)

    def sum(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise _NotRational
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            operator = self.take()
            term = self.product(depth)
            value = _bounded(value + term if operator == "+" else value - term)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while (token := self.peek()) is not None:
            if token in ("*", r"\cdot"):
                self.take()
                value = _bounded(value * self.signed(depth))
            elif token in ("/", r"\div"):
                self.take()
                value = _bounded(value / self.signed(depth))
            elif token == "(" or (token == "{" and not self._is_number_in_braces()) or self._is_factorial_beside():
                value = _bounded(value * self.power(depth))
            else:
                return value
        return value

    def signed(self, depth: int) -> Fraction:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power(depth)
        return -value if negative else value

    def power(self, depth: int) -> Fraction:
        value = self.postfix(self.atom(depth))
        if self.peek() != "^":
            return value
        self.take()
        if depth > _MAX_DEPTH:
            raise _NotRational
        negative = False
        if self.peek() == "-":
            negative = self.take() == "-"
        exponent = self.power(depth + 1)  # right-associative: 2^{2^3} is 256
        exponent = -exponent if negative else exponent
        return self.postfix(_power(value, exponent))

    def postfix(self, value: Fraction) -> Fraction:
        while self.peek() in ("!", "%"):
            if self.take() == "%":
                value /= 100
            elif self.peek() == "!":
                self.take()
                value = _factorial(value, step=2)
                if self.peek() == "!":
                    raise _NotRational
            else:
                value = _factorial(value)
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.take()
        if token == r"\frac":
            numerator = self.group(depth)
            return _bounded(numerator / self.group(depth))
        if token in ("(", "{"):
            self.position -= 1
            return self.group(depth)
        if token[0] not in "0123456789.":
            raise _NotRational
        value = decimal(token)
        if "." not in token and self.peek() == r"\frac" and self._is_plain_fraction():
            self.take()  # 2\frac{3}{4} is a mixed number, never a product
            numerator = self.group(depth)
            value += _bounded(numerator / self.group(depth))
        return value

    def _is_number_in_braces(self) -> bool:
        """Whether a number in braces follows: 2{3} and {2}{3} look like 23, and nobody means 6."""
        following = self.tokens[self.position + 1 : self.position + 2]
        return bool(following) and following[0][0] in ".0123456789"

    def _is_factorial_beside(self) -> bool:
        """Whether a factorial or a power follows a factorial: 3! 2! is a product, and so is 3! 2^2."""
        following = self.tokens[self.position : self.position + 2]
        return (
            self.tokens[self.position - 1] == "!"
            and len(following) == 2
            and following[0].isdigit()
            and following[1] in "!^"
        )

    def _is_plain_fraction(self) -> bool:
        r"""Whether \frac{3}{4} follows: 2\frac{-1}{2} is a product."""
        following = self.tokens[self.position + 1 : self.position + 7]
        return [token if token in "{}" else token.isdigit() for token in following] == ["{", True, "}", "{", True, "}"]

    def group(self, depth: int) -> Fraction:
        closing = {"(": ")", "{": "}"}.get(self.take())
        value = self.sum(depth + 1)
        if closing is None or self.take() != closing:
            raise _NotRational
        return value

    def peek(self) -> str | None:
        return None if self.at_end else self.tokens[self.position]

    def take(self) -> str:
        if self.at_end:
            raise _NotRational
        self.position += 1
        return self.tokens[self.position - 1]


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLarge(f"a value of more than {MAX_BITS} bits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NotRational  # a root, which math_values compares
    if base in (0, 1, -1):
        if base == 0 and exponent <= 0:
            raise _NotRational
        return base ** (int(exponent) % 2 if base == -1 else 1 if exponent else 0)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > MAX_BITS:
        raise TooLarge(f"a power of more than {MAX_BITS} bits")
    return base ** int(exponent)


def _factorial(value: Fraction, step: int = 1) -> Fraction:
    """n!, or with a step of 2 n!! = n (n - 2) (n - 4) ..."""
    if value.denominator != 1 or value < 0:
        raise _NotRational
    if value > MAX_FACTORIAL:
        raise TooLarge(f"a factorial above {MAX_FACTORIAL}!")
    return _bounded(Fraction(prod(range(int(value), 0, -step))))


def decimal(token: str) -> Fraction:
    r"""The value of 12, .5, 1.25 or 0.1\overline{6}."""
    digits, _, repeating = token.partition(r"\overline")
    if not repeating:
        return Fraction(digits)
    repeating = repeating.strip("{} \t")
    whole, _, start = digits.partition(".")
    shift = Fraction(1, 10 ** len(start))
    return Fraction(int((whole + start) or "0")) * shift + Fraction(int(repeating), 10 ** len(repeating) - 1) * shift
