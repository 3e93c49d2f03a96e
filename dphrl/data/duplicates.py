"""Rows that ask what another row asks: repetitions, golds that contradict one another, and questions of a test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dphrl.data.golds import BadGold, shorten, shown_gold
from dphrl.data.problems import Fault, Problem
from dphrl.types import Prompt

# Whether the two golds of each pair are equal.
SameGolds = Callable[[Sequence[tuple[Problem, Problem]]], Sequence[bool]]
_REMEDY = "leave the row with the right gold"


@dataclass(frozen=True)
class Repeats:
    """problems: all but the contradictory ones, in order. repeated: the ids of those among them whose question and gold
    an earlier one has. contradictory: every row of a question on whose gold its rows do not agree."""

    problems: list[Problem]
    repeated: frozenset[str]
    contradictory: list[BadGold]


def find_repeats(problems: Sequence[Problem], same_golds: SameGolds | None) -> Repeats:
    """Sort the problems by question. `same_golds` is asked about golds of one question that are spelled differently.

    None for it means that nobody can tell; then such golds make different problems.
    """
    groups: dict[tuple[str, ...], dict[str, list[Problem]]] = defaultdict(lambda: defaultdict(list))
    for problem in problems:
        question = identity(problem) if same_golds else (*identity(problem), problem.answer)
        groups[question][problem.answer].append(problem)
    openings = [[rows[0] for rows in group.values()] for group in groups.values()]
    pairs = [(other, first) for first, *others in openings for other in others]
    verdicts = same_golds(pairs) if same_golds and pairs else ()
    unequal = {other.problem_id for (other, _), same in zip(pairs, verdicts, strict=True) if not same}
    repeated, contradictory = set[str](), dict[str, BadGold]()
    for group in groups.values():
        first = next(iter(group.values()))[0]
        dissenter = next((rows[0] for rows in group.values() if rows[0].problem_id in unequal), None)
        for rows in group.values():
            if dissenter is None:
                repeated.update(row.problem_id for row in rows if row is not first)
            else:
                other = first if rows[0].problem_id in unequal else dissenter
                contradictory |= {row.problem_id: _contradiction(row, other) for row in rows}
    return Repeats(
        [problem for problem in problems if problem.problem_id not in contradictory],
        frozenset(repeated),
        [contradictory[problem.problem_id] for problem in problems if problem.problem_id in contradictory],
    )


def identity(problem: Problem) -> tuple[str, ...]:
    """What makes two rows one question: the text, whatever its blanks, and what else the prompt shows."""
    shown = [problem.text, *(part for turn in problem.earlier for part in turn)]
    if problem.sql is not None:
        shown += [str(problem.sql.schema.path), problem.sql.evidence]
    return tuple(" ".join(part.split()) for part in shown)


def num_shared(trained: Iterable[Prompt], evaluated: Iterable[Prompt]) -> int:
    """How many prompts of an evaluation are trained on, whatever their blanks."""
    texts = {" ".join(prompt.text.split()) for prompt in trained}
    return sum(" ".join(prompt.text.split()) in texts for prompt in evaluated)


def _contradiction(problem: Problem, other: Problem) -> BadGold:
    reason = f"the same question has the gold {shorten(shown_gold(other))} at {other.location}"
    return BadGold(problem.location, shown_gold(problem), Fault(reason, _REMEDY))
