r"""Golds are looked at once, before a run starts: one that no completion can match would score 0 and say nothing.

What surrounds a gold (`$70$`, `\boxed{70}`, `['70']`) is taken off where nothing else can be meant. A gold of
mathematics is then graded against itself with the run's own reward and its limits; a gold query is run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dphrl.config.data import DataConfig, DatasetConfig, RewardConfig
from dphrl.data.decoration import clean_gold
from dphrl.data.problems import Fault, Problem
from dphrl.data.source import opened
from dphrl.rewards.base import Grader, build_grader
from dphrl.rewards.math_answer import UNUSABLE_GOLD
from dphrl.types import RewardStatus

# Golds that people wrote. Those of the embedded tasks are made together with their questions.
CHECKED_KINDS = ("math", "text_to_sql")
MAX_LISTED = 5
_MAX_SHOWN_CHARS = 60
# A worked solution is shorter. What is longer is not looked at, because some looks take longer than others.
_MAX_LOOKED_AT_CHARS = 20_000
_CHUNK = 1_000
# No answer to a problem. What is compared with it is either wrong or could not be read; numbers are compared at once.
_UNEQUAL = "-9716305.2480169"

# A gold without its decorations, and their names.
Cleaned = tuple[str, list[str]]

EMPTY = Fault("the gold is empty")
MISSING = Fault("a missing value", r"fill in or remove the rows (where None is meant as a word, write \text{None})")
_MARKS_OF_MISSING = frozenset(
    ["nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT", "N/A", "n/a", "#N/A", "proof", "notfound"]
)
_UNREAD = Fault("not an expression that can be read")
_SENTENCE = Fault(
    "a sentence, which no completion would repeat",
    "name the field of the short answer in answer_field, or set answer_format: boxed or gsm8k for worked solutions",
)
# "(B) a text": the letter alone is right too, whatever the text is.
_CHOICE = re.compile(r"(?:\\text\s*\{)?\s*\(?[A-J]\s*[).:]\s*\S")
_MAX_WORDS = 7
# Names, as opposed to commands that give a formula its form.
_NAME = re.compile(
    r"\\(?!(?:[dtc]?frac|sqrt|binom|over|choose|left|right|begin|end)(?![A-Za-z]))[A-Za-z]+|\\\{\s*\\\}|[^\x00-\x7f]+"
)
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}(?:\s*\{[^{}]*\})?|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FORMULA_END = re.compile(r"(?<!\\)\$")
_NEXT_SENTENCE = re.compile(r"(?:[^\W\d_]{2}|[)$\d])[.!?]\s+[A-Z$]")


@dataclass(frozen=True, slots=True)
class BadGold:
    """A row that cannot be used. gold: as the row has it."""

    location: str
    gold: str
    fault: Fault

    def __str__(self) -> str:
        shown = f"{shorten(self.gold)}: " if self.gold else ""
        return f"{self.location}: {shown}{' '.join(self.fault.reason.split())}"


@dataclass(frozen=True)
class CheckedGolds:
    """problems: those that can be used, in order. cleaned: from a decoration to the number of golds that had it."""

    problems: list[Problem]
    bad: list[BadGold] = field(default_factory=list)
    num_cleaned: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)


# ------------------------------------------------------------ what is wrong with a gold of mathematics


def visible_fault(gold: str) -> Fault | None:
    """What is wrong with a cleaned gold by its looks; None when it has to be graded to know."""
    if (absence := _absence(gold)) is not None:
        return absence
    if len(gold) > _MAX_LOOKED_AT_CHARS:
        return Fault(f"{len(gold):,} characters, more than any answer may have")
    if isinstance(struct := opened(gold), Mapping):
        parts = ", ".join([*map(str, struct)][:MAX_LISTED]) or "nothing"
        return Fault(f"a struct of {parts}, stored as text", "set answer_field to a part of it, as field.part")
    if "####" in gold:
        return Fault("a worked solution with the answer after ####", "set answer_format: gsm8k, or mend the rows")
    if re.search(r"\\(?:boxed|fbox)\s*\{", gold):
        return Fault(r"a worked solution with the answer in \boxed{}", "set answer_format: boxed, or mend the rows")
    if re.match(r"\[\s*['\"]", gold) and re.search(r"['\"]\s*\]\Z", gold):
        return Fault("a list of several texts", "write one text in each row, such as 8, 9")
    return _SENTENCE if not _CHOICE.match(gold) and _is_sentence(_COMMAND.sub(" ", gold)) else None


def _is_sentence(plain: str) -> bool:
    """Whether a gold without its commands is prose: many words with no comma between them, because a long list of names
    is an answer; or a few words that lead to a formula, or a few words before another sentence."""
    num_words = len(_WORD.findall(plain))
    longest = max(len(_WORD.findall(part)) for part in re.split("[,;]", plain))
    # Text and formulas take turns. The last text leads to none.
    *leads, _ = _FORMULA_END.split(plain)
    return (
        longest > _MAX_WORDS
        or (num_words > 2 and len(leads) > 1 and any(_WORD.search(lead) for lead in leads[::2]))
        or (num_words > 3 and _NEXT_SENTENCE.search(plain) is not None)
    )


def grading_faults(golds: Sequence[str], grader: Grader) -> dict[str, Fault]:
    r"""The golds that the grader cannot use: those not right against themselves, and those that are no expression, of
    which no other spelling could be right.

    A gold with names that the grader does not know, such as \triangle ABC, is right in its own spelling; it is kept
    when it would be an expression with letters in their place. Raises ValueError when the grader itself fails.
    """
    faults: dict[str, Fault] = {}

    def grade(texts: Mapping[str, str], against: Mapping[str, str], right: Container[RewardStatus]) -> None:
        verdicts = grader.grade([(_boxed(texts[gold]), against.get(gold, _UNEQUAL)) for gold in texts])
        for gold, verdict in zip(texts, verdicts, strict=True):
            faults.pop(gold, None)
            if verdict.status not in right:
                faults[gold] = _fault_of(verdict.status, verdict.detail)

    themselves = {gold: gold for gold in golds}
    grade(themselves, themselves, [RewardStatus.CORRECT])
    # Equal spelling is right before anything is read. An unequal answer is read, or said to be no expression.
    read = [RewardStatus.CORRECT, RewardStatus.WRONG]
    equal = [gold for gold in golds if gold not in faults and not _CHOICE.match(gold)]
    grade({gold: gold for gold in equal}, {}, read)
    grade({gold: _NAME.sub(" x ", gold) for gold in equal if faults.get(gold) is _UNREAD}, {}, read)
    return faults


def _fault_of(status: RewardStatus, detail: str) -> Fault:
    if status is RewardStatus.INFRASTRUCTURE_ERROR and not detail.startswith(UNUSABLE_GOLD):
        raise ValueError(f"golds cannot be checked, because the grader fails: {detail}")
    if status is RewardStatus.WRONG:
        return Fault("graded against itself it is wrong")
    if status is RewardStatus.UNPARSABLE:
        return _UNREAD
    return Fault(f"cannot be graded ({status}: {detail})")


# ------------------------------------------------------------ a data set


def check_golds(
    problems: Sequence[Problem],
    kind: str,
    reward: RewardConfig,
    advance: Callable[[int], object] = lambda count: None,
) -> CheckedGolds:
    """Clean and try every gold once. advance: called with the number of problems newly checked.

    Only the user knows what the golds of their own reward look like. With such a reward nothing is cleaned or graded,
    and only a gold that is not there is bad.
    """
    if kind == "text_to_sql":
        # Imported here, not at the top: few runs use SQL.
        from dphrl.data.text_to_sql import query_faults

        return _sort_out(problems, query_faults(problems, reward.timeout_s, advance))
    if kind not in CHECKED_KINDS:
        return CheckedGolds(list(problems))
    if reward.is_custom:
        return _sort_out(problems, [_absence(problem.answer) for problem in problems])
    return _check_mathematics(problems, reward, advance)


def same_golds(pairs: Sequence[tuple[Problem, Problem]], reward: RewardConfig) -> list[bool]:
    """Whether the two golds of each pair are equal to the run's reward, one taken for the answer to the other."""
    grader = build_grader(reward)
    try:
        there = grader.grade([(_as_completion(a), b.answer) for a, b in pairs])
        back = grader.grade([(_as_completion(b), a.answer) for a, b in pairs])
    finally:
        grader.close()
    different = (RewardStatus.WRONG, RewardStatus.UNPARSABLE)
    return [not (a.status in different and b.status in different) for a, b in zip(there, back, strict=True)]


def refuse_or_drop(bad: Sequence[BadGold], num_rows: int, dataset: DatasetConfig, data: DataConfig) -> None:
    """Raises ValueError, one line that names the first bad rows, unless they may be dropped and others are left."""
    drop = (dataset.invalid_gold or data.invalid_gold) == "drop"
    if not bad or (drop and len(bad) < num_rows):
        return
    listed = "; ".join(map(str, bad[:MAX_LISTED]))
    more = f"; and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
    remedies = "; ".join(remedy for remedy, _ in Counter(gold.fault.remedy for gold in bad).most_common())
    setting = "data.invalid_gold" if dataset.invalid_gold is None else "its invalid_gold"
    raise ValueError(
        f"data set {dataset.name}: {len(bad)} of {num_rows} rows have no gold to grade against: {listed}{more}; "
        f"{remedies}{'' if drop else f', or set {setting}: drop'}"
    )


def shorten(gold: str) -> str:
    """A gold in quotes, as messages show it: on one line, and not too long."""
    # A lone surrogate cannot be printed.
    line = " ".join(gold.encode("utf-8", "backslashreplace").decode().split())
    return f"'{line}'" if len(line) <= _MAX_SHOWN_CHARS else f"'{line[:_MAX_SHOWN_CHARS]}...'"


def shown_gold(problem: Problem) -> str:
    """The gold as its row has it."""
    return str(json.loads(problem.answer)["gold_sql"]) if problem.kind == "text_to_sql" else problem.answer


def _as_completion(problem: Problem) -> str:
    gold = shown_gold(problem)
    return f"```sql\n{gold}\n```" if problem.kind == "text_to_sql" else _boxed(gold)


def _boxed(gold: str) -> str:
    return rf"\boxed{{{gold}}}"


def _absence(gold: str) -> Fault | None:
    return EMPTY if not gold else MISSING if gold in _MARKS_OF_MISSING else None


def _check_mathematics(
    problems: Sequence[Problem], reward: RewardConfig, advance: Callable[[int], object]
) -> CheckedGolds:
    # A gold that many rows share is looked at once.
    cleaned: dict[str, Cleaned] = {}
    faults: dict[str, Fault | None] = {}
    grader = build_grader(reward)
    try:
        for start in range(0, len(problems), _CHUNK):
            answers = [problem.answer for problem in problems[start : start + _CHUNK]]
            cleaned |= {answer: _cleaned(answer) for answer in answers if answer not in cleaned}
            golds = [cleaned[answer][0] for answer in answers]
            new = {gold: visible_fault(gold) for gold in golds if gold not in faults}
            faults |= new | grading_faults([gold for gold, fault in new.items() if fault is None], grader)
            advance(len(answers))
    finally:
        grader.close()
    return _sort_out(problems, [faults[cleaned[problem.answer][0]] for problem in problems], cleaned)


def _cleaned(answer: str) -> Cleaned:
    return clean_gold(answer) if len(answer) <= _MAX_LOOKED_AT_CHARS else (answer, [])


def _sort_out(
    problems: Sequence[Problem], faults: Sequence[Fault | None], cleaned: Mapping[str, Cleaned] = MappingProxyType({})
) -> CheckedGolds:
    """cleaned: by the answer of a problem; one that is not there stays as it is."""
    kept, bad = list[Problem](), list[BadGold]()
    num_cleaned, decorations = 0, Counter[str]()
    for problem, found in zip(problems, faults, strict=True):
        if (fault := problem.fault or found) is not None:
            bad.append(BadGold(problem.location, shown_gold(problem), fault))
            continue
        gold, names = cleaned.get(problem.answer, (problem.answer, []))
        num_cleaned += bool(names)
        decorations.update(set(names))
        kept.append(replace(problem, answer=gold) if gold != problem.answer else problem)
    return CheckedGolds(kept, bad, num_cleaned, decorations)
