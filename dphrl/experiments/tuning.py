"""How a suite tunes its arms: as many settings for each, tried on seeds of their own, and a rule that chooses.

It is written down before any of them runs, so that no arm gets more attempts than another, and no figure of the results
decides which settings the results are made with. This module is the section `tuning` of a suite, and the rule as
arithmetic; `trials` makes runs of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from dphrl.config.section import NonNegativeInt, PositiveFloat, Section

Settings = dict[str, Any]


def _rate_name(name: str) -> str:
    if not re.fullmatch(r"pass@[1-9]\d*|retention", name):
        raise ValueError(f"no rate that a rule can look at (got {name}); write pass@K or retention")
    return name


# A rate in domain, as results name it.
RateName = Annotated[str, AfterValidator(_rate_name)]
# A suite sets these for each run.
_NOT_TUNED = ("seed", "run_name", "run_dir")


class Choice(Section):
    """The rule, as arithmetic on rates in domain: means over the tuning seeds."""

    highest: tuple[RateName, ...]
    """The trial with the highest sum of these rates is chosen, the first of the grid where several have it."""
    within: dict[RateName, PositiveFloat] = {}  # noqa: RUF012  (pydantic copies it)
    """Only trials count whose rate is at most so far below the best of the arm's trials, by rate; none counts by
    itself."""

    @model_validator(mode="after")
    def _looks_at_something(self) -> Self:
        # Not min_length: of a rate that is none it would complain a second time.
        if not self.highest:
            raise ValueError("highest: no rate to choose by; write pass@K or retention")
        return self

    @property
    def rates(self) -> list[str]:
        """Every rate that the rule looks at, each once."""
        return list(dict.fromkeys([*self.highest, *self.within]))

    def score(self, rates: Mapping[str, float]) -> float:
        """The sum that decides."""
        return sum(rates[key] for key in self.highest)

    def eligible(self, trials: Sequence[Mapping[str, float]]) -> list[bool]:
        """Whether each trial of an arm counts. trials: the rates of every one of them, in the order of the grid."""
        # Rates are fractions of counts: what lies on the bound must not fall out of it by rounding.
        best = {key: max(rates[key] for rates in trials) for key in self.within}
        return [all(rates[key] >= best[key] - far - 1e-9 for key, far in self.within.items()) for rates in trials]

    def choose(self, trials: Sequence[Mapping[str, float]]) -> int:
        """Index of the chosen trial of an arm."""
        counting = [index for index, counts in enumerate(self.eligible(trials)) if counts]
        # Two bounds that no trial meets together leave nothing to choose from: then every trial counts.
        return max(counting or range(len(trials)), key=lambda index: (self.score(trials[index]), -index))


class TuningPart(Section):
    """How the settings of a suite's arms are chosen (`dphrl tune`)."""

    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """The seeds of the trials. None of them may be a seed of the suite's results."""
    rule: Annotated[str, Field(min_length=1)]
    """The rule in a sentence, for readers."""
    choose: Choice
    """The rule as arithmetic."""
    choose_for: dict[str, Choice] = {}  # noqa: RUF012  (pydantic copies it)
    """Arms with a rule of their own, such as plain RL, whose learning rate is chosen for Pass@1."""
    grid: Annotated[dict[str, Annotated[tuple[Settings, ...], Field(min_length=1)]], Field(min_length=1)]
    """For each arm the settings to try, as section.key: value, beyond the arm's own. Every arm has the same number of
    them, so that each has the same budget."""

    def rule_of(self, arm: str) -> Choice:
        """What chooses among the settings of `arm`."""
        return self.choose_for.get(arm, self.choose)

    @property
    def rates(self) -> list[tuple[str, str]]:
        """Every rate that a rule looks at, after the rule's key in this section."""
        rules = {"choose": self.choose, **{f"choose_for.{arm}": rule for arm, rule in self.choose_for.items()}}
        return [(place, key) for place, rule in rules.items() for key in rule.rates]

    def check(self, arms: Iterable[str], seeds: Sequence[int]) -> None:
        """Raises ValueError when the section does not fit a suite with these arms and seeds of results."""
        known = list(arms)
        if unknown := [arm for arm in self.grid if arm not in known]:
            raise ValueError(f"tuning.grid: {', '.join(unknown)} not among arms ({', '.join(known)})")
        if unknown := [arm for arm in self.choose_for if arm not in self.grid]:
            raise ValueError(f"tuning.choose_for: {', '.join(unknown)} not in tuning.grid ({', '.join(self.grid)})")
        budgets = {arm: len(trials) for arm, trials in self.grid.items()}
        if len(set(budgets.values())) > 1:
            counts = ", ".join(f"{arm} {count}" for arm, count in budgets.items())
            raise ValueError(
                f"tuning.grid: the budgets differ ({counts}); give every arm the same number of settings to try"
            )
        if shared := [str(seed) for seed in self.seeds if seed in seeds]:
            raise ValueError(
                f"tuning.seeds: the results have seed {', '.join(shared)} too, and would be those of settings chosen "
                "for it; choose on other seeds"
            )
        for arm, trials in self.grid.items():
            if taken := sorted({key for trial in trials for key in trial} & {*_NOT_TUNED}):
                raise ValueError(f"tuning.grid.{arm}: a suite sets {taken[0]} for each run; remove it")
            if any(trial in trials[:place] for place, trial in enumerate(trials)):
                raise ValueError(f"tuning.grid.{arm}: the same settings stand there twice; change or remove one")
