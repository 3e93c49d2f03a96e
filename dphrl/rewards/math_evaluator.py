r"""The value of an expression tree at a point, to as many digits as `mp` is set to.

The cost of every step is bounded before the step is taken: powers, factorials and arguments that would be too
expensive raise TooLarge.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import prod
from typing import Any

from mpmath import mp

from dphrl.rewards.exact import MAX_BITS, TooLarge, decimal
from dphrl.rewards.math_parser import Node

# An mpmath number, or a matrix of them as a tuple of rows.
Value = Any
Point = dict[str, Value]

_MAX_FACTORIAL = 10_000
# Reducing an argument longer than this would need as many bits of pi.
_MAX_ARGUMENT_BITS = 2_000


class Undefined(Exception):  # noqa: N818  (a property of the point, not a fault)
    """The expression has no value here: a division by zero, or a root that leaves the real numbers."""


def evaluate(tree: Node, point: Point, real: bool) -> Value:
    """The value at `mp`'s precision. Raises TooLarge, or Undefined where there is no value; with `real`, a step outside
    the real numbers is Undefined too."""
    return _Evaluator(point, real).value(tree)


def coordinate(name: str, index: int, signed: bool, scale: int = 1, whole: bool = False) -> Value:
    """A pseudo-random value of at most 3 `scale`, the same for the same arguments; `whole` makes it an integer above 0,
    `signed` lets it be negative."""
    digest = hashlib.sha256(f"{name} {index}".encode()).digest()
    drawn = int.from_bytes(digest[:4], "big")
    if whole:
        value = mp.mpf(drawn % (3 * scale) + 1)
    else:
        value = scale * mp.mpf(drawn % 9_973 + 1) / (3_989 if index % 2 else 12_007)
    return -value if signed and digest[4] & 1 else value


class _Evaluator:
    def __init__(self, point: Point, real: bool) -> None:
        self.point = point
        self.real = real

    def value(self, tree: Node) -> Value:
        values = [self.value(child) for child in tree.children] if tree.kind not in ("matrix", "row", "pow") else []
        result = getattr(self, f"_{tree.kind}")(tree, *values)
        if not isinstance(result, tuple):
            _check_size(result)
            if self.real and isinstance(result, mp.mpc):
                raise Undefined
        return result

    def _number(self, tree: Node) -> Value:
        value = decimal(tree.text)
        return mp.mpf(value.numerator) / value.denominator

    def _name(self, tree: Node) -> Value:
        constants = {"e": mp.e, r"\pi": mp.pi, r"\infty": mp.inf, "i": mp.mpc(0, 1)}
        return +constants[tree.text] if tree.text in constants else self.point[tree.text]

    def _add(self, tree: Node, *terms: Value) -> Value:
        total = terms[0]
        for term in terms[1:]:
            total = _sum(total, term)
        return total

    def _neg(self, tree: Node, value: Value) -> Value:
        return _product(mp.mpf(-1), value)

    def _mul(self, tree: Node, *factors: Value) -> Value:
        product = factors[0]
        for factor in factors[1:]:
            product = _product(product, factor)
            # Checked after every factor: a hundred factors of acceptable size may have too large a product.
            if not isinstance(product, tuple):
                _check_size(product)
        return product

    def _inverse(self, tree: Node, value: Value) -> Value:
        _scalar(value)
        if value == 0 or mp.isinf(value):
            raise Undefined
        return 1 / value

    def _div(self, tree: Node, a: Value, b: Value) -> Value:
        return _product(a, self._inverse(tree, b))

    def _pow(self, tree: Node) -> Value:
        base = self.value(tree.children[0])
        exponent = _exact(tree.children[1])
        if isinstance(base, tuple):
            if exponent is None or exponent.denominator != 1 or not 0 < exponent <= 16:
                raise Undefined
            result = base
            for _ in range(int(exponent) - 1):
                result = _product(result, base)
            return result
        if exponent is not None and exponent.denominator != 1:
            return self._rational_power(base, exponent)
        power = self.value(tree.children[1])
        _scalar(power)
        if mp.isinf(base) or mp.isinf(power):
            raise Undefined
        if base == 0:
            # 0^0 and 0^-1 have no value, 0^x only for x > 0.
            if mp.re(power) <= 0:
                raise Undefined
            return mp.mpf(0)
        _check_power(base, power)
        if exponent is not None:
            return base ** int(exponent)
        if self.real and base < 0:
            raise Undefined
        return mp.power(base, power)

    def _rational_power(self, base: Value, exponent: Fraction) -> Value:
        if base == 0:
            if exponent < 0:
                raise Undefined
            return mp.mpf(0)
        if mp.isinf(base):
            raise Undefined
        power = mp.mpf(exponent.numerator) / exponent.denominator
        _check_power(base, power)
        if isinstance(base, mp.mpc) or base > 0:
            return mp.power(base, power)
        # The school convention: the cube root of -8 is -2, although the principal branch gives a complex number.
        if exponent.denominator % 2:
            return (-1) ** exponent.numerator * mp.power(-base, power)
        if self.real:
            raise Undefined
        return mp.power(base, power)

    def _root(self, tree: Node, radicand: Value, index: Value) -> Value:
        exact = _exact(tree.children[1])
        if exact is None or exact.denominator != 1 or exact < 2 or exact > MAX_BITS:
            raise Undefined
        _scalar(radicand)
        return self._rational_power(radicand, 1 / exact)

    def _call(self, tree: Node, argument: Value, base: Value = None) -> Value:
        _scalar(argument)
        if mp.isinf(argument) or mp.isnan(argument):
            raise Undefined
        if mp.mag(argument) > _MAX_ARGUMENT_BITS and tree.text not in ("ln", "log", "lg"):
            raise TooLarge(f"an argument of more than {_MAX_ARGUMENT_BITS} bits")
        if tree.text in ("ln", "log", "lg"):
            return self._logarithm(tree.text, argument, base)
        if tree.text == "exp":
            _check_power(mp.e, argument)
        name = tree.text.replace("arc", "a", 1)
        try:
            return getattr(mp, name)(argument)
        except (ZeroDivisionError, ValueError):
            raise Undefined from None

    def _logarithm(self, name: str, argument: Value, base: Value) -> Value:
        if argument == 0 or (self.real and argument < 0):
            raise Undefined
        result = mp.ln(argument)
        if name == "ln":
            return result
        base = mp.mpf(10) if base is None else base
        _scalar(base)
        if base in (0, 1) or (self.real and base < 0) or mp.isinf(base):
            raise Undefined
        return result / mp.ln(base)

    def _abs(self, tree: Node, value: Value) -> Value:
        _scalar(value)
        return abs(value)

    def _floor(self, tree: Node, value: Value) -> Value:
        _scalar(value)
        return mp.floor(value)

    def _ceil(self, tree: Node, value: Value) -> Value:
        _scalar(value)
        return mp.ceil(value)

    def _factorial(self, tree: Node, value: Value) -> Value:
        _scalar(value)
        if abs(value) > _MAX_FACTORIAL:
            raise TooLarge(f"a factorial above {_MAX_FACTORIAL}!")
        try:
            return mp.factorial(value)
        except ValueError:
            raise Undefined from None

    def _double_factorial(self, tree: Node, value: Value) -> Value:
        _scalar(value)
        if abs(value) > _MAX_FACTORIAL:
            raise TooLarge(f"a factorial above {_MAX_FACTORIAL}!!")
        if not mp.isint(value) or value < 0:
            raise Undefined
        return mp.fac2(value)

    def _percent(self, tree: Node, value: Value) -> Value:
        return _product(value, mp.mpf(1) / 100)

    def _degree(self, tree: Node, value: Value) -> Value:
        return _product(value, mp.pi / 180)

    def _binom(self, tree: Node, n: Value, k: Value) -> Value:
        if max(abs(n), abs(k)) > _MAX_FACTORIAL:
            raise TooLarge(f"a binomial above {_MAX_FACTORIAL}")
        return mp.binomial(n, k)

    def _matrix(self, tree: Node) -> Value:
        rows = tuple(tuple(self.value(entry) for entry in row.children) for row in tree.children)
        for row in rows:
            for entry in row:
                _scalar(entry)
        return rows

    def _opaque(self, tree: Node, *parts: Value) -> Value:
        """A number that depends on the operator and its parts alone: what f is, or what a sum adds up to, is not
        computed."""
        # Parts that agree in 30 digits count as the same, so that rounding does not separate equal parts.
        key = " ".join([tree.text, *(mp.nstr(part, 30) for part in parts)])
        return coordinate(key, 0, signed=False)


def _sum(a: Value, b: Value) -> Value:
    if not isinstance(a, tuple) and not isinstance(b, tuple):
        return a + b
    if not (isinstance(a, tuple) and isinstance(b, tuple)) or shape(a) != shape(b):
        raise Undefined
    return tuple(tuple(x + y for x, y in zip(*rows, strict=True)) for rows in zip(a, b, strict=True))


def _product(a: Value, b: Value) -> Value:
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a[0]) != len(b):
            raise Undefined
        return tuple(
            tuple(mp.fsum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True))
            for row in a
        )
    if isinstance(a, tuple):
        a, b = b, a
    if isinstance(b, tuple):
        return tuple(tuple(a * entry for entry in row) for row in b)
    return a * b


def shape(matrix: tuple[tuple[Value, ...], ...]) -> tuple[int, int]:
    """(rows, columns) of a matrix."""
    return len(matrix), len(matrix[0])


def _scalar(value: Value) -> None:
    if isinstance(value, tuple):
        raise Undefined


def _check_size(value: Value) -> None:
    if not (mp.isinf(value) or mp.isnan(value)) and value != 0 and abs(mp.mag(value)) > MAX_BITS:
        raise TooLarge(f"a value of more than {MAX_BITS} bits")


def _check_power(base: Value, power: Value) -> None:
    """Raises TooLarge before a power is computed: an exponent of a million bits would need a million squarings."""
    if abs(power) * max(1, abs(mp.mag(base))) > MAX_BITS:
        raise TooLarge(f"a power of more than {MAX_BITS} bits")


def _exact(tree: Node) -> Fraction | None:
    """The exact value of a tree of plain numbers, else None. Exponents need it: 1/3 asks for a root."""
    if tree.kind == "number":
        return decimal(tree.text)
    parts = [_exact(child) for child in tree.children]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    if tree.kind == "neg":
        return -known[0]
    if tree.kind == "add":
        return sum(known, Fraction(0))
    if tree.kind == "mul":
        return prod(known, start=Fraction(1))
    if tree.kind == "inverse" and known[0]:
        return 1 / known[0]
    if tree.kind == "div" and known[1]:
        return known[0] / known[1]
    return None
