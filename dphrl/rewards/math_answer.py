r"""Grades a mathematical answer by value, without ever executing a part of it.

Cheap and exact decisions are made in this process; all others are computed in a child process that can be killed
(`dphrl.sandbox`). A closed grammar reads the answers: no `eval`, `sympify` or `parse_expr` gets the model's output.

Covered: value equality without tolerance; units, currency, degrees, percent signs and thousands separators on one side;
fractions, mixed numbers, scientific notation, roots, powers, elementary functions, complex numbers; expressions in free
variables; lists and sets in any order, tuples and intervals in their own order, matrices, ratios; equations and
inequalities up to a factor; words; hedged answers (wrong); thoughts (cut); several boxes (the last counts); numbers
and nesting that would take too long (refused).
Not covered: the value of a sum, a product or an integral sign (two of them are compared part by part); limits;
equations that are equal only as sets of solutions; sets given by a condition that has to be solved (x^2 < 4); the
meaning of text beyond its words.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dphrl.config.marks import THINKING_MARKS
from dphrl.rewards.exact import canonical, tidy
from dphrl.rewards.extraction import FINDERS, undress
from dphrl.rewards.math_compare import compare_cheaply
from dphrl.rewards.thinking import UNFINISHED, Marks, spoken
from dphrl.sandbox.process import Limits, Sandbox
from dphrl.types import RewardResult, RewardStatus

MAX_ANSWER_CHARS = 2_000
# A comparison holds only texts and numbers of bounded size, so this memory is enough.
_LIMITS = Limits(memory_bytes=512 * 2**20)
_HANDLER = "dphrl.rewards.math_child:make"
_CACHE_SIZE = 16_384
_MAX_VOTE_CHARS = 200
_TRANSIENT = frozenset([RewardStatus.TIMEOUT, RewardStatus.RESOURCE_LIMIT, RewardStatus.INFRASTRUCTURE_ERROR])
_TOO_MUCH = frozenset([RewardStatus.TIMEOUT, RewardStatus.RESOURCE_LIMIT, RewardStatus.REFUSED])
# An answer that costs nothing to compare.
_PLAIN = "1"
# How the detail begins where the gold is to blame, so that the completion has no verdict.
UNUSABLE_GOLD = "the gold cannot be graded against"

Pair = tuple[str, str]


class _Answer(NamedTuple):
    """What is compared, and which part of the completion it is."""

    pair: Pair
    part: str


class MathAnswerGrader:
    """`Grader` for answers of mathematics problems.

    extraction: "boxed" or "auto". thinking_marks: pairs of marks around thoughts, which are cut before the answer is
    looked for. A gold that is too long or takes too much by itself is not the completion's fault: INFRASTRUCTURE_ERROR.
    A verdict's detail ends with the part of the completion that was read, such as "(box)". timeout_s bounds
    one comparison in the child process, which is started when the first answer needs it. Verdicts are cached by answer
    and gold answer, without the part. Safe to call from several threads.
    """

    def __init__(
        self, extraction: str = "boxed", timeout_s: float = 10.0, thinking_marks: Marks = THINKING_MARKS
    ) -> None:
        if extraction not in FINDERS:
            raise ValueError(f"extraction={extraction!r} is unknown; choose one of {', '.join(FINDERS)}")
        self._find = FINDERS[extraction]
        self._marks = thinking_marks
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        self._verdicts: OrderedDict[Pair, RewardResult] = OrderedDict()

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """The verdict on each completion's final answer against its gold answer; never raises."""
        answers = [self._answer(text, gold) for text, gold in items]
        verdicts: dict[Pair, RewardResult] = {}
        pairs = dict.fromkeys(answer.pair for answer in answers if isinstance(answer, _Answer))
        for pair in pairs:
            verdict = self._remembered(pair) or _decided_here(pair)
            if verdict is not None:
                verdicts[pair] = verdict
        undecided = [pair for pair in pairs if pair not in verdicts]
        verdicts.update(zip(undecided, self._decided_by_child(undecided), strict=True))
        verdicts |= self._blamed_on_golds(verdicts)
        self._remember(verdicts)
        return [_told(verdicts[each.pair], each) if isinstance(each, _Answer) else each for each in answers]

    def close(self) -> None:
        """End the child process; the next answer that needs one starts another."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None

    def _answer(self, text: str, gold: str) -> _Answer | RewardResult:
        """What to compare, or the verdict on a completion without a gradable answer."""
        try:
            said = spoken(text, self._marks)
            if said is None:
                return RewardResult(RewardStatus.UNPARSABLE, UNFINISHED)
            found = self._find(said)
            if found is None:
                return RewardResult(RewardStatus.UNPARSABLE, "no answer found")
            answer, part = found
            if len(answer) > MAX_ANSWER_CHARS:
                return RewardResult(RewardStatus.REFUSED, f"the answer has {len(answer)} characters ({part})")
            if len(gold) > MAX_ANSWER_CHARS:
                return _unusable_gold(f"it has {len(gold)} characters, more than {MAX_ANSWER_CHARS}")
            return _Answer((undress(answer), undress(gold)), part)
        except Exception as error:
            return _failure(error)

    def _blamed_on_golds(self, verdicts: Mapping[Pair, RewardResult]) -> dict[Pair, RewardResult]:
        """New verdicts on pairs that took too much because of the gold: it does so beside a plain number too."""
        hard = {pair: verdict for pair, verdict in verdicts.items() if verdict.status in _TOO_MUCH}
        alone = [(_PLAIN, gold) for gold in dict.fromkeys(gold for _, gold in hard)]
        here = {pair: verdict for pair in alone if (verdict := _decided_here(pair)) is not None}
        undecided = [pair for pair in alone if pair not in here]
        known = here | dict(zip(undecided, self._decided_by_child(undecided), strict=True))
        return {
            pair: _unusable_gold(verdict.detail)
            for pair, verdict in hard.items()
            if known[_PLAIN, pair[1]].status in _TOO_MUCH
        }

    def _decided_by_child(self, pairs: Sequence[Pair]) -> list[RewardResult]:
        if not pairs:
            return []
        try:
            with self._lock:
                if self._sandbox is None:
                    self._sandbox = Sandbox(_HANDLER, {}, _LIMITS)
                sandbox = self._sandbox
            outcomes = sandbox.run([{"answer": answer, "gold": gold} for answer, gold in pairs], self._timeout_s)
        except (RuntimeError, ValueError, OSError) as error:
            return [_failure(error)] * len(pairs)
        return [
            RewardResult(RewardStatus(outcome.value["status"]), outcome.value["detail"])
            if outcome.value is not None
            else RewardResult(outcome.failure or RewardStatus.INFRASTRUCTURE_ERROR, outcome.detail)
            for outcome in outcomes
        ]

    def _remembered(self, pair: Pair) -> RewardResult | None:
        with self._lock:
            verdict = self._verdicts.get(pair)
            if verdict is not None:
                self._verdicts.move_to_end(pair)
            return verdict

    def _remember(self, verdicts: dict[Pair, RewardResult]) -> None:
        with self._lock:
            # Another try may succeed after a time-out or the like, so such verdicts are not remembered.
            self._verdicts.update((p, v) for p, v in verdicts.items() if v.status not in _TRANSIENT)
            while len(self._verdicts) > _CACHE_SIZE:
                self._verdicts.popitem(last=False)


def _told(verdict: RewardResult, answer: _Answer) -> RewardResult:
    """The verdict with the part that was read, and with one spelling of the answer, so that equal answers count as
    votes for the same answer."""
    spelling = canonical(tidy(answer.pair[0]))[:_MAX_VOTE_CHARS]
    return replace(verdict, detail=f"{verdict.detail} ({answer.part})", answer=spelling)


def _unusable_gold(why: str) -> RewardResult:
    return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"{UNUSABLE_GOLD}: {why}")


def _decided_here(pair: Pair) -> RewardResult | None:
    try:
        return compare_cheaply(*pair)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> RewardResult:
    return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"{type(error).__name__}: {error}"[:200])
