r"""Grades a mathematical answer by value, without ever executing a part of it.

Cheap and exact decisions are made in this process; all others are computed in a child process that can be killed
(`dphrl.sandbox`). A closed grammar reads the answers: no `eval`, `sympify` or `parse_expr` gets the model's output.

Covered: value equality without tolerance; units, currency, degrees, percent signs and thousands separators on one side;
fractions, mixed numbers, scientific notation, roots, powers, elementary functions, complex numbers; expressions in free
variables; lists and sets in any order, tuples and intervals in their own order, matrices, ratios; equations and
inequalities up to a factor; words; hedged answers (wrong); several boxes (the last counts); numbers and nesting that
would take too long (refused).
Not covered: the value of a sum, a product or an integral sign (two of them are compared part by part); limits;
equations that are equal only as sets of solutions; sets given by a description; the meaning of text beyond its words.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from dphrl.rewards.exact import canonical, tidy
from dphrl.rewards.extraction import EXTRACTORS
from dphrl.rewards.math_compare import compare_cheaply
from dphrl.sandbox.process import Limits, Sandbox
from dphrl.types import RewardResult, RewardStatus

MAX_ANSWER_CHARS = 2_000
# A comparison holds only texts and numbers of bounded size, so this memory is enough.
_LIMITS = Limits(memory_bytes=512 * 2**20)
_HANDLER = "dphrl.rewards.math_child:make"
_CACHE_SIZE = 16_384
_MAX_VOTE_CHARS = 200
_TRANSIENT = frozenset([RewardStatus.TIMEOUT, RewardStatus.RESOURCE_LIMIT, RewardStatus.INFRASTRUCTURE_ERROR])

Pair = tuple[str, str]


class MathAnswerGrader:
    """`Grader` for answers of mathematics problems.

    extraction: "boxed" or "auto". timeout_s bounds one comparison in the child process, which is started when the first
    answer needs it. Verdicts are cached by answer and gold answer. Safe to call from several threads.
    """

    def __init__(self, extraction: str = "boxed", timeout_s: float = 10.0) -> None:
        if extraction not in EXTRACTORS:
            raise ValueError(f"extraction={extraction!r} is unknown; choose one of {', '.join(EXTRACTORS)}")
        self._extract = EXTRACTORS[extraction]
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        self._verdicts: OrderedDict[Pair, RewardResult] = OrderedDict()

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        """The verdict on each completion's final answer against its gold answer; never raises."""
        pairs = [self._pair(text, gold) for text, gold in items]
        verdicts: dict[Pair, RewardResult] = {}
        for pair in pairs:
            if isinstance(pair, tuple) and pair not in verdicts:
                verdict = self._remembered(pair) or _decided_here(pair)
                if verdict is not None:
                    verdicts[pair] = verdict
        undecided = list(dict.fromkeys(p for p in pairs if isinstance(p, tuple) and p not in verdicts))
        verdicts.update(zip(undecided, self._decided_by_child(undecided), strict=True))
        self._remember(verdicts)
        return [_voting(verdicts[pair], pair[0]) if isinstance(pair, tuple) else pair for pair in pairs]

    def close(self) -> None:
        """End the child process; the next answer that needs one starts another."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None

    def _pair(self, text: str, gold: str) -> Pair | RewardResult:
        """(answer, gold), or the verdict on a completion without a gradable answer."""
        try:
            answer = self._extract(text)
        except Exception as error:
            return _failure(error)
        if answer is None:
            return RewardResult(RewardStatus.UNPARSABLE, "no answer found")
        if len(answer) > MAX_ANSWER_CHARS:
            return RewardResult(RewardStatus.REFUSED, f"the answer has {len(answer)} characters")
        return answer, gold

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


def _voting(verdict: RewardResult, answer: str) -> RewardResult:
    """The verdict with one spelling of the answer, so that equal answers count as votes for the same answer."""
    return replace(verdict, answer=canonical(tidy(answer))[:_MAX_VOTE_CHARS])


def _decided_here(pair: Pair) -> RewardResult | None:
    try:
        return compare_cheaply(*pair)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> RewardResult:
    return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"{type(error).__name__}: {error}"[:200])
