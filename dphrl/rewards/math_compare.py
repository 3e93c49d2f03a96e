r"""Whether an extracted answer equals the gold answer.

Order of decision: the same spelling; rational numbers, exactly; words; sets of real numbers (`math_set_text`) and
congruences; lists, tuples, intervals and other sets, entry by entry; relations; and everything else by value
(`math_values`). The first three are `compare_cheaply`: they take almost no time, whatever the text is. Each step of the
rest is bounded, but its total may be long, so it belongs in a child process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from dphrl.rewards import math_choice, math_currency, math_forms, math_set_text, math_times, math_units, math_values
from dphrl.rewards.exact import TooLarge, canonical, rational, tidy, unwrap_text
from dphrl.rewards.math_parser import MAX_CHARS, Node, parse
from dphrl.rewards.math_tokens import NotAnExpressionError
from dphrl.types import RewardResult, RewardStatus

# Longer texts may be arithmetic too, but not cheap arithmetic: a thousand fractions have a long common denominator.
_MAX_CHEAP_CHARS = 200
# Entries are compared pair by pair. Each comparison is bounded, and this bounds their number.
_MAX_COMPARISONS = 500
# Blanks between digits ("~" in canonical texts) group them.
_BASED = re.compile(r"\(?(\w+|\w{1,4}(?:~\w{4})+|\w{1,3}(?:~\w{3})+)\)?_\{?(\d+)\}?")
# Words and numbers beside one another: "June 20".
_DATE_LIKE = re.compile(r"(?=.*[A-Za-z]{3})[\w\s.,:'/-]+")
# Most answers: they need no reading.
_PLAIN_NUMBER = re.compile(r"-?(?:\d{1,100}|\d{1,3}(?:,\d{3}){1,10})(?:\.\d{1,100})?", re.ASCII)
_BRACKETS = frozenset(["()", "(]", "[)", "[]", "union"])


_Congruence = tuple[str, list[str], str]


class _TooManyError(Exception):
    """More entries than any answer has."""


def compare(answer: str, gold: str) -> RewardResult:
    """The verdict on an extracted answer. It raises nothing but RecursionError and MemoryError."""
    comparison = _Comparison()
    verdict = _verdict(answer, gold, comparison.equal)
    assert verdict is not None, "a full comparison decides"
    if verdict.status is RewardStatus.WRONG and not _is_readable(tidy(answer)):
        return RewardResult(RewardStatus.UNPARSABLE, f"{answer[:80]!a} is no expression")
    return verdict


def compare_cheaply(answer: str, gold: str) -> RewardResult | None:
    """The verdict where spelling, rational numbers, words or sheer length decide; None where they do not."""
    verdict = _verdict(answer, gold, _decide_cheaply)
    if verdict is None and len(answer) > MAX_CHARS:
        return RewardResult(RewardStatus.REFUSED, f"an expression of {len(answer)} characters")
    return verdict


def _verdict(answer: str, gold: str, decide: Callable[[str, str], bool | None]) -> RewardResult | None:
    if _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(gold):
        return _result(answer, gold, Fraction(answer.replace(",", "")) == Fraction(gold.replace(",", "")))
    tidied = math_choice.as_choices(_read(answer), _read(gold))
    if not canonical(tidied[0]):
        return RewardResult(RewardStatus.UNPARSABLE, "the answer is empty")
    try:
        same = decide(*tidied)
    except (TooLarge, _TooManyError) as error:
        return RewardResult(RewardStatus.REFUSED, str(error))
    if same is None:
        return None
    return _result(answer, gold, same)


def _result(answer: str, gold: str, same: bool) -> RewardResult:
    status = RewardStatus.CORRECT if same else RewardStatus.WRONG
    return RewardResult(status, f"{answer[:80]!a} {'equals' if same else 'is not'} {gold[:80]!a}")


def _read(text: str) -> str:
    """The tidied text, with its amount of money and its phrases in their usual wording."""
    return math_choice.in_other_words(math_currency.tidy_amount(text))


def _decide_cheaply(answer: str, gold: str) -> bool | None:
    if canonical(answer) == canonical(gold):
        return True
    for compare_as in (math_times.same_time, math_times.same_amounts, math_times.same_date):
        if (same := compare_as(answer, gold)) is not None:
            return same
    answer, gold = math_forms.strip_assignments(answer, gold)
    (answer, unit), (gold, gold_unit) = math_units.split_unit(answer), math_units.split_unit(gold)
    if not canonical(answer) or not canonical(gold):
        return False
    if canonical(answer) == canonical(gold):
        return not math_units.differ(unit, gold_unit)
    if max(len(answer), len(gold)) <= _MAX_CHEAP_CHARS:
        value, gold_value = rational(answer), rational(gold)
        if value is not None and gold_value is not None:
            return _same_amount(value, unit, gold_value, gold_unit)
    if math_units.differ(unit, gold_unit):
        return False
    return _same_words(answer, gold)


def _same_amount(value: Fraction, unit: str, gold: Fraction, gold_unit: str) -> bool:
    if not math_units.differ(unit, gold_unit):
        if value == gold:
            return True
        # 25% equals 0.25, and it also equals a bare 25: then the sign is a unit on one side only.
        if unit == "percent" and not gold_unit:
            return value == gold * 100
        return gold_unit == "percent" and not unit and value * 100 == gold
    return False


def _same_words(answer: str, gold: str) -> bool | None:
    """The verdict on words and on numerals with a base; None where either is an expression."""
    bases = _BASED.fullmatch(canonical(answer)), _BASED.fullmatch(canonical(gold))
    if any(base and _is_numeral(base[1], base[2]) for base in bases):
        numerals = [
            (base[1].replace("~", "").casefold().lstrip("0") or "0", base[2]) if base else (canonical(text), "10")
            for base, text in zip(bases, (answer, gold), strict=True)
        ]
        return numerals[0] == numerals[1]
    found = math_forms.words(answer), math_forms.words(gold)
    if found[0] is None or found[1] is None:
        return None
    # Capital letters name points or people, and their order counts: ABCD is not ABDC.
    if all(re.fullmatch(r"[A-Z]{3,}", canonical(text)) for text in (answer, gold)):
        return canonical(answer) == canonical(gold)
    # abc and cba may be equal products instead of words, so that is left undecided.
    return found[0] == found[1] or (None if sorted(found[0]) == sorted(found[1]) else False)


def _is_numeral(digits: str, base: str) -> bool:
    """Whether a word with an index is a numeral: 1010_2, and A3_{16} where the base has such a digit."""
    return digits[0].isdigit() or (any(map(str.isdigit, digits)) and 10 < int(base[:3]) <= 36)


def _is_readable(text: str) -> bool:
    """Whether an answer can be compared by more than its spelling."""
    core = math_units.split_unit(math_forms.strip_assignments(text, "")[0])[0]
    if math_forms.compound(core)[0] != "plain" or math_forms.words(text) is not None:
        return True
    if _BASED.fullmatch(canonical(text)) or _DATE_LIKE.fullmatch(unwrap_text(text)):
        return True
    return all(_tree(operand) is not None for operand in math_forms.relations(core)[0])


def _compound(text: str) -> tuple[str, list[str]]:
    """`math_forms.compound`, with (a,b)=(1,2) read as the list a=1, b=2."""
    named = math_forms.assignments(text)
    return ("list", named) if named else math_forms.compound(text)


def _num_sets(entries: list[str]) -> int:
    return sum(entry.startswith(r"\{") for entry in entries)


def _reduced(residues: list[str], modulus: str) -> list[str]:
    """The least residues, where they are whole numbers: -2 modulo 7 is 5."""
    bound = rational(modulus)
    if bound is None or bound.denominator != 1 or bound <= 0:
        return residues
    values = [rational(residue) for residue in residues]
    return [
        str(value % bound) if value is not None and value.denominator == 1 else residue
        for residue, value in zip(residues, values, strict=True)
    ]


def _tree(text: str) -> Node | None:
    try:
        return parse(text)
    except NotAnExpressionError:
        return None


class _Comparison:
    """One comparison of two answers, however many entries they have."""

    def __init__(self) -> None:
        self.num_comparisons = 0

    def equal(self, answer: str, gold: str) -> bool:
        self.num_comparisons += 1
        if self.num_comparisons > _MAX_COMPARISONS:
            raise _TooManyError(f"more than {_MAX_COMPARISONS} comparisons of entries")
        decided = _decide_cheaply(answer, gold)
        if decided is not None:
            return decided
        same = math_set_text.same(answer, gold)
        if same is not None:
            return same
        answer, gold = math_forms.strip_assignments(answer, gold)
        answer, gold = math_units.split_unit(answer)[0], math_units.split_unit(gold)[0]
        congruence, gold_congruence = math_forms.congruence(answer), math_forms.congruence(gold)
        if congruence and gold_congruence:
            return self.equal_congruences(congruence, gold_congruence)
        same = math_set_text.same(answer, gold)
        if same is not None:
            return same
        kind, entries = _compound(answer)
        gold_kind, gold_entries = _compound(gold)
        if kind == gold_kind == "plain":
            return self.equal_relations(answer, gold)
        if {kind, gold_kind} == {"list", "()"}:
            # Entries without names, such as those of the tuple, stay as they are: values_in_order gives None for them.
            values = [
                math_forms.values_in_order(entries) or entries,
                math_forms.values_in_order(gold_entries) or gold_entries,
            ]
            if values != [entries, gold_entries]:
                kind, gold_kind, entries, gold_entries = "()", "()", *values
        pairs = (kind, entries), (gold_kind, gold_entries)
        conjunctions = [side for side_kind, side in pairs if side_kind == "conjunction"]
        if len(conjunctions) == 1:
            both = math_forms.intersection(conjunctions[0])
            return both is not None and self.equal(
                both if kind == "conjunction" else answer, both if gold_kind == "conjunction" else gold
            )
        if {kind, gold_kind} == {"union", "list"} and all(each[0] in "([]" for each in [*entries, *gold_entries]):
            # Intervals one after the other are their union.
            return math_set_text.same(r"\cup".join(entries), r"\cup".join(gold_entries)) or False
        if "set" in (kind, gold_kind) and {"plain", "()"} & {kind, gold_kind}:
            # 5 stands for {5}.
            members = entries if kind == "set" else gold_entries
            pair = (members[:1] or [""])[0], gold if kind == "set" else answer
            is_empty = r"\emptyset" in (canonical(answer), canonical(gold))
            return len(members) == 1 and not is_empty and self.equal(*(pair if kind == "set" else pair[::-1]))
        if (gold_kind in _BRACKETS) != (kind in _BRACKETS):
            return self.equal_intervals(kind, entries, gold_kind, gold_entries)
        if "set" in (kind, gold_kind) and {kind, gold_kind} <= {"set", "list"}:
            return self.equal_sets(kind, entries, gold_kind, gold_entries)
        if kind != gold_kind or len(entries) != len(gold_entries):
            return False
        if kind == "list" and (in_order := math_forms.in_order_of_names(entries, gold_entries)):
            entries, gold_entries = in_order
        elif kind in ("list", "union", "conjunction"):
            return self.equal_in_any_order(entries, gold_entries)
        return all(self.equal(a, b) for a, b in zip(entries, gold_entries, strict=True))

    def equal_in_any_order(self, entries: list[str], gold_entries: list[str]) -> bool:
        left = list(gold_entries)
        for entry in entries:
            match = next((i for i, other in enumerate(left) if self.equal(entry, other)), None)
            if match is None:
                return False
            del left[match]
        return True

    def equal_sets(self, kind: str, entries: list[str], gold_kind: str, gold_entries: list[str]) -> bool:
        """A set beside a set, or beside a list of its members. A member may be named twice in a set, not in a list."""
        if _num_sets(entries) != _num_sets(gold_entries):
            # A set of one set is not that set, though 5 stands for {5}; and {1}, {2} are two sets.
            return False
        if len(entries) == len(gold_entries) and self.equal_in_any_order(entries, gold_entries):
            return True
        if kind == "set":
            entries = self.distinct(entries)
        if gold_kind == "set":
            gold_entries = self.distinct(gold_entries)
        return len(entries) == len(gold_entries) and self.equal_in_any_order(entries, gold_entries)

    def distinct(self, entries: list[str]) -> list[str]:
        found: list[str] = []
        for entry in entries:
            if not any(self.equal(entry, other) for other in found):
                found.append(entry)
        return found

    def equal_congruences(self, one: _Congruence, other: _Congruence) -> bool:
        (left, residues, modulus), (gold_left, gold_residues, gold_modulus) = one, other
        same_left = self.equal(left, gold_left) if left and gold_left else math_forms.is_letter(left or gold_left)
        if not same_left or not self.equal(modulus, gold_modulus):
            return False
        residues, gold_residues = _reduced(residues, modulus), _reduced(gold_residues, modulus)
        return len(residues) == len(gold_residues) and self.equal_in_any_order(residues, gold_residues)

    def equal_intervals(self, kind: str, entries: list[str], gold_kind: str, gold_entries: list[str]) -> bool:
        """An interval beside an inequality: (2, 7] and 2 < x <= 7."""
        sides = []
        for side_kind, side in ((kind, entries), (gold_kind, gold_entries)):
            if side_kind == "union":
                sides.append(side)
            elif side_kind in _BRACKETS:
                sides.append([f"{side_kind[0]}{','.join(side)}{side_kind[1]}"])
            else:
                found = [math_forms.interval(entry) for entry in side]
                if None in found:
                    return False
                sides.append([each for each in found if each is not None])
        return len(sides[0]) == len(sides[1]) and self.equal_in_any_order(*sides)

    def equal_relations(self, answer: str, gold: str) -> bool:
        operands, signs = math_forms.relations(answer)
        gold_operands, gold_signs = math_forms.relations(gold)
        if len(signs) != len(gold_signs):
            return False
        if not signs:
            return self.equal_values(answer, gold)
        if not operands[0] or not gold_operands[0]:
            # "\ge 3" leaves the variable out.
            is_about_letter = math_forms.is_letter(operands[0]) and math_forms.is_letter(gold_operands[0])
            return is_about_letter and signs == gold_signs and self.equal(operands[-1], gold_operands[-1])
        if len(signs) > 1:
            return self.equal_chains(operands, signs, gold_operands, gold_signs)
        if signs[0] in (">", r"\ge"):
            operands, signs = math_forms.mirrored(operands, signs)
        if gold_signs[0] in (">", r"\ge"):
            gold_operands, gold_signs = math_forms.mirrored(gold_operands, gold_signs)
        trees = [_tree(operand) for operand in operands + gold_operands]
        known = [tree for tree in trees if tree is not None]
        if signs != gold_signs or len(known) != 4:
            return False
        factor = math_values.proportional(_difference(*known[:2]), _difference(*known[2:]))
        return factor > 0 if signs[0] in ("<", r"\le") else factor != 0

    def equal_chains(self, operands: list[str], signs: list[str], gold: list[str], gold_signs: list[str]) -> bool:
        for chain, chain_signs in ((operands, signs), math_forms.mirrored(operands, signs)):
            if chain_signs == gold_signs and all(self.equal(a, b) for a, b in zip(chain, gold, strict=True)):
                return True
        return False

    def equal_values(self, answer: str, gold: str) -> bool:
        tree, gold_tree = _tree(answer), _tree(gold)
        if tree is None or gold_tree is None:
            return False
        return tree == gold_tree or math_values.same_value(tree, gold_tree)


def _difference(left: Node, right: Node) -> Node:
    return Node("add", (left, Node("neg", (right,))))
