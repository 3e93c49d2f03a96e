r"""Grades a mathematical answer by value: exact forms here, everything else by math-verify.

Order of decision: the same spelling; rational numbers, exactly; tuples, intervals, lists, sets and matrices, entry by
entry; and only what is left by symbolic comparison, after `_guard` has refused what would not end. No model output is
given to `eval`, `sympify` or `parse_expr`: the symbolic parser reads LaTeX through a grammar.

Covered: value equality without tolerance, units and thousands separators on one side, hedged answers (wrong), several
boxes (the last). Not covered: a symbolic comparison that blocks inside one long C call, and any time limit outside the
main thread; `_guard` keeps both rare, only a killable process would make them impossible.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any

from dphrl.rewards.exact import TooLarge, canonical, rational, tidy, unwrap_text
from dphrl.rewards.extraction import EXTRACTORS
from dphrl.types import RewardResult, RewardStatus

MAX_ANSWER_CHARS = 2_000
# Beyond this the algebra system, not the model, would be at work.
_MAX_SYMBOLIC_CHARS = 400
_MAX_EXPONENT = 3_000
_MAX_EXPANSION = 200
_MAX_ENTRIES = 100

# What may stand before "=" in an assignment: x, x_1, f(2), V_1:V_2, \angle ABC; an equation's side may not.
_NAME = r"(?:(?!\\(?:frac|sqrt|cdot|pm))\\?[A-Za-z]|_(?:\{[A-Za-z0-9]{1,9}\}|[A-Za-z0-9])|\([\w,]{0,20}\)|[':\s])+"
_ASSIGNMENT = re.compile(rf"({_NAME})(?:=|(?<=[\s\w}}])\\in(?![A-Za-z]))")
_CONJUNCTION = re.compile(r"\\text\s*\{\s*(?:and|or),?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\u00b0|\\degree(?![A-Za-z])")
_UNIT = re.compile(
    r"(?P<core>.*[\d)}\]])(?P<unit>\s*\\(?:text|mbox|mathrm|textnormal)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?"
    r"|\s+[A-Za-z]{2,}(?:\s+[A-Za-z]{2,}){0,2})",
    re.DOTALL,
)
_NOT_UNITS = frozenset({"pi", "sqrt", "ln", "log", "sin", "cos", "tan", "sec", "csc", "cot", "exp", "mod", "e", "i"})
_DEGREE_WORDS = frozenset({"degree", "degrees", "deg"})
_PERCENT_WORDS = frozenset({"percent", "percents"})
_WORDS_ONLY = re.compile(r"[A-Za-z][A-Za-z .'-]*")
_BASED = re.compile(r"(\d+)_\{?(\d+)\}?")
_MATRIX = re.compile(
    r"\\begin\{(?:(?:p|b|small)?matrix|array)\}(?:\{[lcr|\s]*\})?(?P<rows>.*?)\\end\{(?:(?:p|b|small)?matrix|array)\}",
    re.DOTALL,
)
_OPEN, _CLOSE = "([{", ")]}"
# What LaTeX mathematics is written in. Quotes, backticks, underscored names and the like are programs.
_LATEX_ONLY = re.compile(r"[\w\s+\-*/^=<>()\[\]{}\\.,:;!|&'%]*", re.ASCII)
# Sums and the like are compared by spelling only: evaluating one can take for ever.
_FORBIDDEN = re.compile(
    r"__|[A-Za-z]\.[A-Za-z]|\\(?:write|immediate|input|def|csname)(?![A-Za-z])"
    r"|\\(?:det|prod|sum|int|iint|oint|lim|mod|pmod|bmod|binom|gcd|lcm)(?![A-Za-z])"
)
_LONG_NUMBER = re.compile(r"\d{60}|\d{4,}\s*!|!\s*!|\)\s*!")
_EXPONENT = re.compile(
    r"\^\s*(?:\{(?P<group>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|(?P<token>\\?\w))|\\sqrt\s*\[(?P<index>[^\]]*)\]"
)


class _Verdict(Exception):  # noqa: N818  (carries a status up; not cached, so a time limit is not remembered)
    def __init__(self, status: RewardStatus, detail: str) -> None:
        super().__init__(detail)
        self.result = RewardResult(status, detail)


class MathAnswerGrader:
    """`Grader` for answers of mathematics problems.

    extraction: "boxed" or "auto". timeout_s bounds one symbolic comparison, in the main thread only.
    """

    def __init__(self, extraction: str = "boxed", timeout_s: float = 10.0) -> None:
        if extraction not in EXTRACTORS:
            raise ValueError(f"extraction={extraction!r} is unknown; choose one of {', '.join(EXTRACTORS)}")
        self._extract = EXTRACTORS[extraction]
        self._timeout_s = max(1, ceil(timeout_s))

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        return [self.grade_one(text, answer) for text, answer in items]

    def close(self) -> None:
        pass

    def grade_one(self, completion_text: str, answer: str) -> RewardResult:
        """The verdict on the completion's final answer against the gold `answer`; never raises."""
        try:
            extracted = self._extract(completion_text)
            if extracted is None:
                return RewardResult(RewardStatus.UNPARSABLE, "no answer found")
            if len(extracted) > MAX_ANSWER_CHARS:
                return RewardResult(RewardStatus.REFUSED, f"the answer has {len(extracted)} characters")
            return compare(extracted, answer, self._timeout_s)
        except _Verdict as verdict:
            return verdict.result
        except TooLarge as error:
            return RewardResult(RewardStatus.REFUSED, str(error))
        except (RecursionError, MemoryError) as error:
            return RewardResult(RewardStatus.RESOURCE_LIMIT, type(error).__name__)
        except Exception as error:
            return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"{type(error).__name__}: {error}"[:200])


@lru_cache(maxsize=16_384)
def compare(answer: str, gold: str, timeout_s: int = 10) -> RewardResult:
    """The verdict on an extracted answer. Raises `TooLarge` and `_Verdict` for what must not be cached."""
    answer, gold = tidy(answer), tidy(gold)
    if not canonical(answer):
        return RewardResult(RewardStatus.UNPARSABLE, "the answer is empty")
    same = _equal(answer, gold, timeout_s)
    status = RewardStatus.CORRECT if same else RewardStatus.WRONG
    relation = "equals" if same else "is not"
    return RewardResult(status, f"{answer[:80]!a} {relation} {gold[:80]!a}")


def _equal(answer: str, gold: str, timeout_s: int) -> bool:
    if canonical(answer) == canonical(gold):
        return True
    answer, gold = _strip_assignments(answer, gold)
    (answer, unit), (gold, gold_unit) = _split_unit(answer), _split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    if canonical(answer) == canonical(gold):
        return True
    values = rational(answer), rational(gold)
    if values[0] is not None and values[1] is not None:
        # 25% stands for 0.25, and beside a bare 25 its sign is a unit on one side.
        percent = "%" in (unit, gold_unit) and unit != gold_unit
        scale = 100 if unit == "%" else Fraction(1, 100)
        return values[0] == values[1] or (percent and values[0] == values[1] * scale)
    decided = _equal_by_parts(answer, gold, timeout_s)
    return _equal_symbolically(answer, gold, timeout_s) if decided is None else decided


def _equal_by_parts(answer: str, gold: str, timeout_s: int) -> bool | None:
    """The verdict on words, numerals and compound answers; None for a pair of plain expressions."""
    words = unwrap_text(answer).strip(), unwrap_text(gold).strip()
    if any("\\" not in word and _WORDS_ONLY.fullmatch(word) and len(word) > 1 for word in words):
        return words[0].casefold().split() == words[1].casefold().split()
    bases = _BASED.fullmatch(canonical(answer)), _BASED.fullmatch(canonical(gold))
    if any(bases):
        return bool(bases[0] and bases[1] and bases[0].groups() == bases[1].groups())
    kind, entries = _compound(answer)
    gold_kind, gold_entries = _compound(gold)
    if kind == gold_kind == "plain":
        return None
    if {kind, gold_kind} <= {"set", "list"}:
        kind = gold_kind
    if kind != gold_kind or len(entries) != len(gold_entries):
        return False
    if len(entries) > _MAX_ENTRIES:
        raise _Verdict(RewardStatus.REFUSED, f"the answer has {len(entries)} entries")
    if kind not in ("set", "list"):
        return all(_equal(a, b, timeout_s) for a, b in zip(entries, gold_entries, strict=True))
    left = list(gold_entries)
    for entry in entries:
        match = next((i for i, other in enumerate(left) if _equal(entry, other, timeout_s)), None)
        if match is None:
            return False
        del left[match]
    return True


def _compound(text: str) -> tuple[str, list[str]]:
    r"""(kind, entries): a bracket pair "()", "[)", ..., "set", "list" (commas, and/or, \pm), "union", "ratio",
    a matrix with its shape, or "plain"."""
    text = text.strip()
    if matrix := _MATRIX.fullmatch(text.removeprefix("[").removesuffix("]").strip()):
        rows = [row.split("&") for row in matrix["rows"].split(r"\\") if row.strip()]
        return f"matrix{[len(row) for row in rows]}", [entry.strip() for row in rows for entry in row]
    parts = _entries(text)
    if len(parts) > 1:
        return "list", [signed for part in parts for signed in _plus_minus(part)]
    parts = _split(text, r"\cup")
    if len(parts) > 1:
        return "union", sorted(parts, key=canonical)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", _split(text[2:-2], ",")
    if text and text[0] in "([" and text[-1] in ")]" and _encloses(text):
        parts = _split(text[1:-1], ",")
        if len(parts) > 1:
            return text[0] + text[-1], parts
    parts = _split(text, ":")
    if len(parts) > 1:
        return "ratio", parts
    signed = _plus_minus(text)
    return ("list", signed) if len(signed) > 1 else ("plain", [text])


def _entries(text: str) -> list[str]:
    return _split(_CONJUNCTION.sub(",", text), ",")


def _plus_minus(text: str) -> list[str]:
    if text.count(r"\pm") != 1:
        return [text]
    return [text.replace(r"\pm", sign) for sign in ("+", "-")]


def _split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside every bracket; a half-open interval may close with the other bracket."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position].strip())
            position += len(separator)
            start = position
            continue
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        position += 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character and not before."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return position == len(text) - 1
    return False


def _strip_assignments(answer: str, gold: str) -> tuple[str, str]:
    """Drop "x =" where one side has it, or both have the same. x = 5 and y = 5 stay different, and so does an
    equation such as x^2 - 4 = 0 from its right side."""
    texts = (answer, gold)
    names = [_ASSIGNMENT.match(text) for text in texts]
    if any(_is_equation(text) and not name for text, name in zip(texts, names, strict=True)):
        # A chain of numbers, "2 + 2 = 4", says what its last part says.
        if _is_equation(answer) and not _is_equation(gold) and not re.search(r"[A-Za-z,]", _plain(answer)):
            return _split(answer, "=")[-1], gold
        return answer, gold
    if names[0] and names[1] and canonical(names[0][1]) != canonical(names[1][1]):
        return answer, gold
    return _value_of(answer, names[0]), _value_of(gold, names[1])


def _is_equation(text: str) -> bool:
    """Whether "=" stands outside all brackets; the one in a sum's bounds does not."""
    return "=" in text and len(_split(text, "=")) > 1


def _value_of(text: str, assignment: re.Match[str] | None) -> str:
    # "x = 1, y = 2" is a list, whose entries are stripped one by one.
    if assignment is None or (text.count("=") > 1 and len(_entries(text)) > 1):
        return text
    # The last part: "x = 2 + 3 = 5" ends in its value.
    return (_split(text[assignment.end() :], "=") or [text])[-1]


def _plain(text: str) -> str:
    r"""Without the commands that numbers are written with."""
    return re.sub(r"\\(?:frac|cdot|div|sqrt|pi)(?![A-Za-z])", " ", text)


def _split_unit(text: str) -> tuple[str, str]:
    """(core, unit): the unit in lower case without plural s, "" for none."""
    bare = _DEGREES.sub("", text)
    if bare != text and bare.strip():
        return bare.strip(), "degree"
    if text.endswith("%"):
        return text[:-1].strip(), "%"
    match = _UNIT.fullmatch(text)
    if match is None:
        return text, ""
    words = unwrap_text(match["unit"]).casefold().split()
    if not words or _NOT_UNITS.intersection(words):
        return text, ""
    if words[0] in _PERCENT_WORDS:
        return match["core"], "%"
    if words[0] in _DEGREE_WORDS:
        return match["core"], "degree"
    return match["core"], " ".join(words).rstrip("s")


def _guard(text: str) -> None:
    """Refuse by inspection what the algebra system might never finish. Raises `_Verdict`."""
    if not _LATEX_ONLY.fullmatch(text):
        raise _Verdict(RewardStatus.UNPARSABLE, "not a mathematical expression")
    if len(text) > _MAX_SYMBOLIC_CHARS:
        raise _Verdict(RewardStatus.REFUSED, f"an expression of {len(text)} characters")
    if _FORBIDDEN.search(text) or _LONG_NUMBER.search(text):
        raise _Verdict(RewardStatus.REFUSED, "an operator or number outside what is evaluated")
    expansion = 1.0
    for match in _EXPONENT.finditer(text):
        exponent = match["group"] or match["token"] or match["index"] or ""
        value = rational(exponent)
        if value is None:
            if re.search(r"\^|\d{4}|!", exponent):
                raise _Verdict(RewardStatus.REFUSED, "an exponent too large or too deep")
            continue
        if abs(value) > _MAX_EXPONENT:
            raise _Verdict(RewardStatus.REFUSED, f"an exponent above {_MAX_EXPONENT}")
        # Powers of brackets are multiplied out, and brackets nest.
        if text[: match.start()].rstrip().endswith((")", "}", "]")):
            expansion *= max(1.0, float(abs(value)))
    if expansion > _MAX_EXPANSION:
        raise _Verdict(RewardStatus.REFUSED, "powers of brackets too large")


def _equal_symbolically(answer: str, gold: str, timeout_s: int) -> bool:
    if _is_equation(answer) != _is_equation(gold):
        return False  # math-verify would compare the right side alone
    _guard(answer)
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    # SIGALRM exists in the main thread only; elsewhere `_guard` is all there is.
    limit = timeout_s if threading.current_thread() is threading.main_thread() else None
    config = [_latex_config()]
    try:
        # math-verify decides by the order of its arguments how an assignment unwraps: gold first.
        expressions = [
            parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=limit) for text in (gold, answer)
        ]
        if not expressions[1]:
            raise _Verdict(RewardStatus.UNPARSABLE, f"{answer[:80]!a} is no expression")
        # The parser makes i a real symbol in one place and a complex one in another, never the imaginary unit.
        pair = [[_with_imaginary_unit(expression) for expression in found] for found in expressions]
        # Sixty digits: with the default fifteen 2^-99 counts as zero.
        options = {"float_rounding": 12, "numeric_precision": 60, "timeout_seconds": limit}
        return bool(verify(*pair, raise_on_error=True, **options))
    except TimeoutException:
        raise _Verdict(RewardStatus.TIMEOUT, f"no verdict after {timeout_s} s") from None
    except (_Verdict, RecursionError, MemoryError):
        raise
    except Exception as error:
        # sympy gives up on odd pairs with any exception at all; the pair is at fault, and equal it was not shown.
        raise _Verdict(RewardStatus.WRONG, f"not comparable: {type(error).__name__}") from error


@lru_cache(maxsize=1)
def _latex_config() -> Any:
    from math_verify import LatexExtractionConfig

    config = LatexExtractionConfig()
    # math-verify would drop single letters as units: to it 5 - 2t is 5 - 2.
    return replace(config, normalization_config=replace(config.normalization_config, units=False))


def _with_imaginary_unit(expression: Any) -> Any:
    from sympy import I

    units = [symbol for symbol in getattr(expression, "free_symbols", ()) if str(symbol) == "i"]
    return expression.xreplace(dict.fromkeys(units, I)) if units else expression
