"""Group-relative advantages: a completion is compared with the other completions of its prompt.

Most methods are functions of the scores. One that reads more of a group, or that has a smallest group of its own, is a
`GroupAdvantage`:

    @register_advantage("shared")
    def shared() -> GroupAdvantage:
        '''The score, divided among the completions that solve the prompt in the same way.'''

        def advantages(group: Group) -> list[float]:
            sizes = Counter(group.clusters)
            return [score / sizes[cluster] for score, cluster in zip(group.scores, group.clusters, strict=True)]

        return GroupAdvantage(advantages, reads=("clusters",))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dphrl.algo.registry import METHODS, Registry, one_line

# What a method may read of a group besides its scores.
GroupField = Literal["logprobs", "clusters"]
# How each of them is had, called only when a method reads it: one value a completion, the ungraded ones included.
GroupFields = Mapping[GroupField, Callable[[], Sequence[Any]]]


@dataclass(frozen=True, slots=True)
class Group:
    """The graded completions of one prompt: entry i of every field belongs to the same completion.

    scores: [n], what the completions are paid, a length penalty included. logprobs: [n], the log-probability of each
    completion (nats, the sum over its tokens) by the policy that sampled it. clusters: [n], equal for completions that
    solve the prompt in the same way. A field that the method does not read is empty.
    """

    scores: tuple[float, ...]
    logprobs: tuple[float, ...] = ()
    clusters: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupAdvantage:
    """An advantage that says what it needs of a group.

    compute: takes a `Group` and returns the advantages of its completions in the same order. reads: the fields of the
    group that it reads besides the scores. min_size: the fewest graded completions that it can compare; all those of a
    smaller group get 0. Raises ValueError for a field that a group does not have, and for a size below 1.
    """

    compute: Callable[[Group], Sequence[float]]
    reads: tuple[GroupField, ...] = ()
    min_size: int = 2

    def __post_init__(self) -> None:
        for field in self.reads:
            if field not in get_args(GroupField):
                raise ValueError(f"reads {field!r}; a group has scores, {', '.join(get_args(GroupField))}")
        if self.min_size < 1:
            raise ValueError(f"min_size={self.min_size}; make it at least 1")

    def __call__(self, group: Group) -> Sequence[float]:
        return self.compute(group)


# Takes the graded scores of one group, at least two, as a tuple, and returns their advantages in the same order.
# It is made anew for each group, so it cannot keep anything from one to the next. So is a GroupAdvantage.
AdvantageFn = Callable[[Sequence[float]], Sequence[float]]

# GRPO implementations add this to the standard deviation. It matters only when the spread is numerical noise.
STD_EPSILON = 1e-6

_ADVANTAGES: Registry[AdvantageFn | GroupAdvantage] = METHODS["advantage"]

# Decorator: register_advantage("mine") makes `factory(**params)`, which returns an AdvantageFn or a GroupAdvantage,
# available to configurations.
register_advantage = _ADVANTAGES.register


def get_advantage(name: str, **params: Any) -> AdvantageFn | GroupAdvantage:
    """The registered advantage `name` with its parameters.

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return _ADVANTAGES.build(name, params)


def get_group_advantage(name: str, /, **params: Any) -> GroupAdvantage:
    """As `get_advantage`, with a function of the scores as a method that reads nothing else."""
    made = get_advantage(name, **params)
    return made if isinstance(made, GroupAdvantage) else GroupAdvantage(lambda group: made(group.scores))


def group_advantages(
    scores: Sequence[float | None], name: str, fields: GroupFields | None = None, /, **params: Any
) -> list[float | None]:
    """Advantage of each completion of one group by the registered method `name`.

    A score of None (an infrastructure error) stays None, and its completion is not passed to the method. A group with
    fewer graded completions than the method can compare, two if it does not say otherwise, gets zeros. fields: how to
    have what the method may read besides the scores. Raises ValueError as `get_advantage` does, and when the method
    reads what `fields` lacks, fails, or does not return one finite number for each score.
    """
    method = get_group_advantage(name, **params)
    graded = [i for i, score in enumerate(scores) if score is not None]
    if len(graded) < method.min_size:
        return [None if score is None else 0.0 for score in scores]

    def read(field: GroupField) -> tuple[Any, ...]:
        if field not in method.reads:
            return ()
        if fields is None or field not in fields:
            raise ValueError(f"advantage {name!r} reads the {field} of a group; give them beside its scores")
        values = fields[field]()
        return tuple(values[i] for i in graded)

    # Tuples of their own: a method that sorts what it is given must not change whose score is whose.
    group = Group(tuple(s for s in scores if s is not None), read("logprobs"), read("clusters"))
    given = iter(_finite_numbers(name, method, group))
    return [None if score is None else next(given) for score in scores]


def _finite_numbers(name: str, advantages: GroupAdvantage, group: Group) -> list[float]:
    scores = group.scores
    try:
        made: Any = advantages(group)
    except Exception as error:
        raise ValueError(f"advantage {name!r} failed at the scores {list(scores)} ({one_line(error)})") from error
    try:
        values = [math.nan if isinstance(value, str) else float(value) for value in made]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != len(scores) or not all(map(math.isfinite, values)):
        raise ValueError(
            f"advantage {name!r} made {made!r} of the scores {list(scores)}; return one finite number for each"
        )
    return values


def normalized(scores: Sequence[float]) -> list[float]:
    """(score - mean) / sample standard deviation of at least two scores; zeros where all are equal."""
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    return [(score - mean) / (std + STD_EPSILON) for score in scores]


@register_advantage("group_normalized")
def _group_normalized() -> AdvantageFn:
    """(score - mean) / standard deviation of the group (GRPO, arXiv 2402.03300)."""
    return normalized


@register_advantage("mean_only")
def _mean_only() -> AdvantageFn:
    """score - mean of the group: hard and easy prompts keep their scale (Dr.GRPO, arXiv 2503.20783)."""

    def advantages(scores: Sequence[float]) -> list[float]:
        mean = sum(scores) / len(scores)
        return [score - mean for score in scores]

    return advantages


@register_advantage("leave_one_out")
def _leave_one_out() -> AdvantageFn:
    """score - mean of the other completions: an unbiased baseline (RLOO, arXiv 2402.14740)."""

    def advantages(scores: Sequence[float]) -> list[float]:
        total, others = sum(scores), len(scores) - 1
        return [score - (total - score) / others for score in scores]

    return advantages


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to max_tokens - buffer_tokens, then falling linearly to -1 at max_tokens (DAPO, arXiv 2503.14476, eq. 13).

    Without a buffer (0 tokens) there is no penalty.
    """
    if not buffer_tokens:
        return 0.0
    return -min(1.0, max(0, num_tokens - (max_tokens - buffer_tokens)) / buffer_tokens)
