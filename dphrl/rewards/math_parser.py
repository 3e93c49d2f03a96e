r"""Reads a LaTeX expression into a tree of `Node`s.

The grammar covers what answers are written in: arithmetic, roots, powers, functions, absolute values, matrices, and
sums and integrals as symbols. Any other text is no expression: nothing is guessed, dropped or executed, so two texts
never become equal because a part of one was not understood. Parsing takes linear time, and nesting is bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dphrl.rewards.math_tokens import FUNCTIONS, INVERSES, NotAnExpressionError, tokens

MAX_CHARS = 1_000
_MAX_DEPTH = 40

_GREEK = re.compile(
    "(?:var)?(?:epsilon|theta|phi|rho|sigma)|alpha|beta|[gG]amma|[dD]elta|zeta|eta|Theta|iota|kappa|[lL]ambda|mu|nu"
    "|[xX]i|Sigma|tau|[uU]psilon|Phi|chi|[pP]si|[oO]mega|ell|hbar"
)
# Operators that are not evaluated: two of them are equal when their parts are equal.
_BIG_OPERATORS = frozenset(["sum", "prod", "int"])
_ACCENTS = frozenset(["bar", "hat", "tilde", "dot", "ddot", "overline", "widehat", "widetilde"])
# Letters that are functions, not factors, when a parenthesis follows.
_FUNCTION_LETTERS = frozenset("fgFG")

_CLOSERS = {
    "(": ")", "[": "]", "{": "}", "|": "|", r"\vert": r"\vert",
    r"\lvert": r"\rvert", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil",
}  # fmt: skip
_BRACKET_KINDS = {"|": "abs", r"\lvert": "abs", r"\vert": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}
_ENDING_COMMANDS = frozenset(
    [r"\cdot", r"\div", r"\}", r"\rfloor", r"\rceil", r"\rvert", r"\vert", r"\degree", "\\\\", r"\endmatrix"]
)


@dataclass(frozen=True, slots=True)
class Node:
    """kind: "number" and "name" (with `text`), "add", "mul", "inverse", "div", "neg", "pow", "root" (radicand, index),
    "call" (`text` is the function), "abs", "floor", "ceil", "factorial", "double_factorial", "percent", "degree",
    "binom", "matrix" (of "row"s), "opaque" (`text` is the operator)."""

    kind: str
    children: tuple[Node, ...] = ()
    text: str = ""


def parse(text: str) -> Node:
    """The tree of a tidied expression. Raises NotAnExpressionError, also for nesting beyond the bound."""
    if len(text) > MAX_CHARS:
        raise NotAnExpressionError(f"{len(text)} characters")
    reader = _Parser(tokens(text))
    tree = reader.sum(0)
    if reader.peek():
        raise NotAnExpressionError(f"{reader.peek()!r} is out of place")
    return tree


class _Parser:
    """Recursive descent; each method reads one level of precedence, weakest first."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        # A bar closes an absolute value if one is open, and opens one otherwise; absolute values do not nest.
        self.bar_open = False

    def peek(self, ahead: int = 0) -> str:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise NotAnExpressionError(f"{expected or 'more'} is missing")
        self.position += 1
        return token

    def sum(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise NotAnExpressionError("nested too deeply")
        terms = [self.product(depth)]
        while self.peek() in ("+", "-"):
            negative = self.take() == "-"
            term = self.product(depth)
            terms.append(Node("neg", (term,)) if negative else term)
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def product(self, depth: int) -> Node:
        # All factors go into one flat node, because trees are walked recursively.
        factors = [self.signed(depth)]
        while True:
            token = self.peek()
            if token in ("*", r"\cdot"):
                self.take()
                factors.append(self.signed(depth))
            elif token in ("/", r"\div"):
                self.take()
                factors.append(Node("inverse", (self.signed(depth),)))
            elif self.starts_factor():
                factors.append(self.power(depth))
            else:
                return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))

    def starts_factor(self) -> bool:
        """Whether a factor follows without a multiplication sign. A number never does: in "x 2" and "3 4" a sign was
        lost, and nobody knows which."""
        token = self.peek()
        if token == "|":
            return not self.bar_open
        if not token or token in ")]}+-*/^_!'%&=" or token in _ENDING_COMMANDS:
            return False
        if token[0].isdigit():
            # 3! 2! is a product.
            return self.tokens[self.position - 1] == "!" and self.peek(1) in ("!", "^")
        # 2{3} and {2}{3} look like 23, and nobody means 6.
        return not (token[0] == "." or (token == "{" and self.peek(1)[:1].isdigit()))

    def signed(self, depth: int) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power(depth)
        return Node("neg", (value,)) if negative else value

    def power(self, depth: int) -> Node:
        base = self.postfix(self.atom(depth))
        if self.peek() != "^":
            return base
        self.take()
        return self.postfix(Node("pow", (base, self.exponent(depth))))

    def exponent(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise NotAnExpressionError("nested too deeply")
        if self.peek() == "-":
            self.take()
            return Node("neg", (self.exponent(depth + 1),))
        if self.peek()[:1].isdigit():
            # `number` must not read it: x^2\\frac{1}{2} holds no mixed number.
            value = self.postfix(Node("number", text=self.take()))
        else:
            value = self.postfix(self.group(depth) if self.peek() in ("{", "(") else self.atom(depth + 1))
        if self.peek() == "^":
            self.take()
            return Node("pow", (value, self.exponent(depth + 1)))
        return value

    def postfix(self, value: Node) -> Node:
        kinds = {"!": "factorial", "%": "percent", r"\degree": "degree"}
        for _ in range(_MAX_DEPTH):
            if self.peek() not in kinds:
                return value
            mark = self.take()
            if mark == self.peek() == "!":
                self.take()
                if self.peek() == "!":
                    raise NotAnExpressionError("three factorial signs")
                value = Node("double_factorial", (value,))
            else:
                value = Node(kinds[mark], (value,))
        raise NotAnExpressionError("nested too deeply")

    def atom(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise NotAnExpressionError("nested too deeply")
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token, depth)
        if token in _CLOSERS:
            self.position -= 1
            return self.group(depth)
        if token.isalpha():
            return self.name(token, depth)
        if token[0] == "\\":
            return self.command(token[1:], depth)
        raise NotAnExpressionError(f"{token!r} is out of place")

    def number(self, token: str, depth: int) -> Node:
        value = Node("number", text=token)
        if token.isdigit() and self.peek() == r"\frac" and self.peek(2).isdigit():
            # 2\frac{3}{4} is a mixed number; 2\frac{x}{4} is a product.
            start = self.position
            self.take()
            fraction = Node("div", (self.argument(depth), self.argument(depth)))
            if all(child.kind == "number" for child in fraction.children):
                return Node("add", (value, fraction))
            self.position = start
        return value

    def name(self, token: str, depth: int) -> Node:
        name = token + self.subscript()
        while self.peek() == "'":
            name += self.take()
        if token in _FUNCTION_LETTERS and self.peek() == "(":
            return Node("opaque", (self.group(depth),), name)
        return Node("name", text=name)

    def subscript(self) -> str:
        """The subscript as part of a name: x_{n+1} is a name, not arithmetic."""
        if self.peek() != "_":
            return ""
        self.take()
        token = self.take()
        if token != "{":
            return f"_{token}"
        parts, level = [], 1
        while level:
            token = self.take()
            level += (token == "{") - (token == "}")
            parts.append(token)
        return "_" + "".join(parts[:-1])

    def command(self, name: str, depth: int) -> Node:
        if name == "frac":
            return Node("div", (self.argument(depth), self.argument(depth)))
        if name == "binom":
            return Node("binom", (self.argument(depth), self.argument(depth)))
        if name == "sqrt":
            index = self.group(depth) if self.peek() == "[" else Node("number", text="2")
            return Node("root", (self.argument(depth), index))
        if name in FUNCTIONS:
            return self.call(name, depth)
        if _GREEK.fullmatch(name):
            return Node("name", text=f"\\{name}" + self.subscript())
        if name in ("pi", "infty"):
            return Node("name", text=f"\\{name}")
        if name in ("abs", "floor", "ceil"):
            return Node(name, (self.argument(depth),))
        if name in _ACCENTS:
            return self.accented(name, depth)
        if name in _BIG_OPERATORS:
            return self.big_operator(name, depth)
        if name == "beginmatrix":
            return self.matrix(depth)
        raise NotAnExpressionError(f"\\{name} is not read")

    def accented(self, accent: str, depth: int) -> Node:
        r"""A letter with an accent is a name of its own: \bar{x} is not x."""
        letter = self.argument(depth)
        if letter.kind != "name":
            raise NotAnExpressionError(f"\\{accent} over more than a letter")
        return Node("name", text=f"\\{accent} {letter.text}" + self.subscript())

    def argument(self, depth: int) -> Node:
        """What follows a command: a group, or one token."""
        if self.peek() in ("{", "("):
            return self.group(depth)
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            # TeX takes one digit: \sqrt12 is \sqrt{1}2.
            raise NotAnExpressionError("an argument without braces")
        return self.atom(depth + 1)

    def group(self, depth: int) -> Node:
        opening = self.take()
        bar_open, self.bar_open = self.bar_open, opening == "|"
        value = self.sum(depth + 1)
        self.bar_open = bar_open
        self.take(_CLOSERS[opening])
        kind = _BRACKET_KINDS.get(opening)
        return Node(kind, (value,)) if kind else value

    def call(self, name: str, depth: int) -> Node:
        base: Node | None = None
        power: Node | None = None
        while self.peek() in ("_", "^"):
            if self.take() == "^":
                power = self.exponent(depth + 1)
            elif name == "log":
                base = self.argument(depth)
            else:
                raise NotAnExpressionError(f"a base of \\{name}")
        if power == Node("neg", (Node("number", text="1"),)) and name in INVERSES:
            name, power = INVERSES[name], None
        value = Node("call", (self.call_argument(depth), *([base] if base else [])), name)
        return Node("pow", (value, power)) if power else value

    def call_argument(self, depth: int) -> Node:
        """A group, or the factors up to the next sign or function: \\sin 2x \\cos y is (\\sin 2x)(\\cos y)."""
        if depth > _MAX_DEPTH:
            raise NotAnExpressionError("nested too deeply")
        if self.peek() in ("(", "[", "{"):
            return self.postfix(self.group(depth))
        if self.peek() == "-":
            self.take()
            return Node("neg", (self.call_argument(depth + 1),))
        factors = [self.power(depth + 1)]
        while self.starts_factor() and self.peek() not in ("(", "[") and self.peek()[1:] not in FUNCTIONS:
            factors.append(self.power(depth + 1))
        return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))

    def big_operator(self, name: str, depth: int) -> Node:
        """Bounds and body, in a fixed order; a missing bound is 0."""
        bounds = {"_": Node("number", text="0"), "^": Node("number", text="0")}
        variable = ""
        while self.peek() in bounds:
            which = self.take()
            if which == "_" and self.peek() == "{" and self.peek(1).isalpha() and self.peek(2) == "=":
                variable = self.peek(1)
                self.position += 3
                bounds[which] = self.sum(depth + 1)
                self.take("}")
            else:
                bounds[which] = self.argument(depth)
        return Node("opaque", (bounds["_"], bounds["^"], self.product(depth + 1)), f"{name} {variable}")

    def matrix(self, depth: int) -> Node:
        rows: list[Node] = []
        entries: list[Node] = []
        while True:
            entries.append(self.sum(depth + 1))
            token = self.take()
            if token == "&":
                continue
            rows.append(Node("row", tuple(entries)))
            entries = []
            if token == "\\\\" and self.peek() == r"\endmatrix":
                token = self.take()
            if token == r"\endmatrix":
                break
            if token != "\\\\":
                raise NotAnExpressionError(f"{token!r} in a matrix")
        if len({len(row.children) for row in rows}) != 1:
            raise NotAnExpressionError("a matrix with rows of different lengths")
        return Node("matrix", tuple(rows))
