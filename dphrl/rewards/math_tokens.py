r"""The tokens of a LaTeX expression: numbers, letters, commands and symbols."""

from __future__ import annotations

import re

# \sin^{-1} is the inverse function, \sin^{2} a power.
INVERSES = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")}
# Applied to one argument, with or without parentheses.
FUNCTIONS = frozenset({*INVERSES, *INVERSES.values(), "coth", "sech", "csch", "ln", "log", "lg", "exp"})

_TOKEN = re.compile(
    r"\s*(?:(?P<repeating>\d*\.\d*\\overline\s*\{\d{1,30}\})|(?P<number>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<command>\\(?:[A-Za-z]+|[{}|\\]))|(?P<letter>[A-Za-z])|(?P<symbol>[-+*/^_!'()\[\]{}|&%=]))"
)
# Names written without a backslash.
_PLAIN_NAME = re.compile(
    rf"(?<![\\A-Za-z])(sqrt|pi|infty|{'|'.join(sorted(FUNCTIONS, key=len, reverse=True))})(?![a-z])"
)
# Words of prose and function calls of a program: they are not products of letters.
_PROSE = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{5,}|[A-Za-z]{3,}(?=\())|__")
_NAMED = re.compile(r"\\(?:operatorname|mathrm|text|mathit|mathbf|vec|rm)\s*\{\s*([A-Za-z]+)\s*\}")
_MATRIX = re.compile(r"\\begin\{(?:[pb]?matrix\*?|smallmatrix|array)\}(?:\[[a-z]\])?(?:\{[lcr|\s]*\})?")
_MATRIX_END = re.compile(r"\\end\{(?:[pb]?matrix\*?|smallmatrix|array)\}")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|\u00b0")


class NotAnExpressionError(Exception):
    """The text is outside the grammar."""


def _prepare(text: str) -> str:
    text = _NAMED.sub(lambda m: rf"\{m[1]} " if m[1] in FUNCTIONS else m[1] if len(m[1]) == 1 else r"\unknown ", text)
    text = _PLAIN_NAME.sub(r"\\\1 ", text.replace("**", "^"))
    text = _MATRIX_END.sub(r"\\endmatrix ", _MATRIX.sub(r"\\beginmatrix ", text))
    if prose := _PROSE.search(text):
        raise NotAnExpressionError(f"{prose[0]!a} is no mathematics")
    return _DEGREE.sub(r"\\degree ", text)


def tokens(text: str) -> list[str]:
    """The tokens of a tidied expression, in order. Raises NotAnExpressionError at the first character outside them."""
    found, position = [], 0
    text = _prepare(text).rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotAnExpressionError(f"{text[position]!a} is no mathematics")
        found.append("".join(match[0].split()))
        position = match.end()
    return found
