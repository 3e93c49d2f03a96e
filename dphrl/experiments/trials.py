"""The trials of a suite's tuning section: as a suite of their own, and what their results choose.

Each trial is an arm of that suite, so whatever runs a suite, adds up its runs and goes on after an interruption does
the same for trials.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dphrl.config.loading import InputError
from dphrl.experiments.results import DOMAINS, Results, values_by_seed
from dphrl.experiments.suite import QuickPart, Settings, Suite
from dphrl.experiments.tuning import TuningPart

# Beyond the rates that the rule looks at, these are shown where they were measured.
_SHOWN = ("pass@1", "pass@8", "pass@16")


@dataclass(frozen=True)
class Trial:
    """One point of the grid. rates: by domain and name, means over the tuning seeds; none before all have finished."""

    arm: str
    name: str
    settings: Settings
    rates: dict[str, dict[str, float]]
    score: float | None = None
    counts: bool = False
    is_chosen: bool = False


def trial_names(part: TuningPart, arms: Iterable[str]) -> list[str]:
    """The trials of these arms in the order of the grid, as arms of the suite of trials: the arm's name and a number.

    Not the settings: their values need not suit the name of a folder.
    """
    return [f"{arm}-{number}" for arm in arms for number in range(1, len(part.grid[arm]) + 1)]


def tuning_of(suite: Suite) -> TuningPart:
    """Raises InputError when the suite has no tuning section."""
    if suite.tuning is None:
        raise InputError(f"suite {suite.name} has no section `tuning`; add one with seeds, rule, choose and grid")
    return suite.tuning


def tuning_suite(suite: Suite) -> Suite:
    """The suite whose arms are the trials. Its runs go to the folder NAME-tuning. Raises InputError without any."""
    part = tuning_of(suite)
    arms = {
        name: {**suite.arms[arm], **settings}
        for arm, grid in part.grid.items()
        for name, settings in zip(trial_names(part, [arm]), grid, strict=True)
    }
    # Made anew and not copied: whatever else the suite says is about its arms, which are not here.
    return Suite(
        name=f"{suite.name}-tuning",
        about=f"The trials that choose the settings of {suite.name}. {part.rule}",
        base=suite.base,
        seeds=part.seeds,
        settings=suite.settings,
        arms=arms,
        quick=QuickPart(seeds=part.seeds, arms=tuple(arms)),
    )


def suite_text(suite: Suite) -> str:
    """A suite file from which `load_suite` reads the same suite: every JSON text is YAML."""
    return json.dumps(suite.model_dump(mode="json", exclude_none=True), indent=1) + "\n"


def check_trials(suite: Suite, run_dir: str, overrides: Sequence[str]) -> None:
    """Raises InputError when a trial's configuration makes no sense, lacks a rate of the rule, or is not its own."""
    part, trials = tuning_of(suite), tuning_suite(suite)
    given = {line.partition("=")[0].strip() for line in overrides}
    if tuned := sorted(given & {key for grid in part.grid.values() for settings in grid for key in settings}):
        raise InputError(f"{tuned[0]}: the tuning of suite {suite.name} tries values of it; leave the override out")
    for arm in trials.arms:
        measured = trials.config(arm, part.seeds[0], run_dir, overrides).evaluation.k
        for place, key in part.rates:
            if key.startswith("pass@") and int(key.removeprefix("pass@")) not in measured:
                k = ", ".join(map(str, measured))
                raise InputError(f"suite {suite.name}: tuning.{place} looks at {key}, but evaluation.k has {k}; add it")


def judge(suite: Suite, results: Results) -> list[Trial]:
    """Every trial of the grid with its figures. An arm's is chosen once all of its trials have finished.

    results: those of the suite of trials.
    """
    part, found = tuning_of(suite), []
    for arm, grid in part.grid.items():
        trials = [
            Trial(arm, name, settings, _rates(part, results, name))
            for name, settings in zip(trial_names(part, [arm]), grid, strict=True)
        ]
        finished = [trial.rates[DOMAINS[0]] for trial in trials if trial.rates]
        rule = part.rule_of(arm)
        scores = [rule.score(trial.rates[DOMAINS[0]]) if trial.rates else None for trial in trials]
        is_whole = len(finished) == len(trials)
        counts = rule.eligible(finished) if is_whole else [False] * len(trials)
        chosen = rule.choose(finished) if is_whole else None
        found += [
            Trial(trial.arm, trial.name, trial.settings, trial.rates, score, counting, place == chosen)
            for place, (trial, score, counting) in enumerate(zip(trials, scores, counts, strict=True))
        ]
    return found


def _rates(part: TuningPart, results: Results, name: str) -> dict[str, dict[str, float]]:
    rates: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        for key in dict.fromkeys([*_SHOWN, *(key for _, key in part.rates)]):
            if key.startswith("pass@") and int(key.removeprefix("pass@")) not in results["k"]:
                continue
            by_seed = values_by_seed(results["rows"], name, domain, key)
            if all(seed in by_seed for seed in part.seeds):
                rates.setdefault(domain, {})[key] = statistics.fmean(by_seed[seed] for seed in part.seeds)
    # Without every rate of the rules in domain there is nothing to judge by.
    return rates if {key for _, key in part.rates} <= rates.get(DOMAINS[0], {}).keys() else {}


def trials_table(trials: Sequence[Trial]) -> tuple[list[str], list[list[object]]]:
    """A row for each trial: its settings, its rates in and out of domain, the score, and what the rule says."""
    columns = list(dict.fromkeys((domain, key) for t in trials for domain in t.rates for key in t.rates[domain]))
    columns.sort(key=lambda column: DOMAINS.index(column[0]))
    where = {DOMAINS[0]: "in", DOMAINS[1]: "out"}
    header = ["arm", "settings", *(f"{where[domain]} {key}" for domain, key in columns), "score", ""]
    rows: list[list[object]] = []
    for trial in trials:
        figures = [trial.rates.get(domain, {}).get(key) for domain, key in columns]
        rows.append([trial.arm, settings_text(trial.settings), *figures, trial.score, _verdict(trial, trials)])
    return header, rows


def _verdict(trial: Trial, trials: Sequence[Trial]) -> str:
    if trial.is_chosen:
        return "chosen"
    if not trial.rates:
        return "not run"
    if not any(other.is_chosen for other in trials if other.arm == trial.arm):
        return "waits for the arm's other trials"
    return "" if trial.counts else "too far below the best"


def settings_text(settings: Settings) -> str:
    """Settings as they would stand on a command line."""
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items())
    return " ".join(words) or "-"


def chosen_settings(trials: Sequence[Trial]) -> dict[str, Settings]:
    """The chosen settings by arm; an arm whose trials have not all finished is left out."""
    return {trial.arm: trial.settings for trial in trials if trial.is_chosen}


def without_effect(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Keys that an arm's trials differ in, by arm, where all of them have finished with the same figures.

    Such a grid tries nothing: with one update a step, for instance, every clip bound gives the same policy.
    """
    found = {}
    for arm in dict.fromkeys(trial.arm for trial in trials):
        own = [trial for trial in trials if trial.arm == arm]
        if len(own) > 1 and own[0].rates and all(trial.rates == own[0].rates for trial in own):
            found[arm] = list(dict.fromkeys(key for trial in own for key in trial.settings))
    return found


def tuning_record(suite: Suite, trials: Sequence[Trial], overrides: Sequence[str]) -> dict[str, Any]:
    """What is kept of a tuning: the rule, every trial with its figures, and the chosen settings."""
    part = tuning_of(suite)
    return {
        "suite": suite.name,
        "seeds": list(part.seeds),
        "rule": part.rule,
        "choose": part.choose.model_dump(mode="json"),
        "choose_for": {arm: rule.model_dump(mode="json") for arm, rule in part.choose_for.items()},
        "overrides": list(overrides),
        "trials": [
            {
                "arm": trial.arm,
                "name": trial.name,
                "settings": trial.settings,
                "rates": {
                    domain: {key: round(rate, 5) for key, rate in of.items()} for domain, of in trial.rates.items()
                },
                "score": None if trial.score is None else round(trial.score, 5),
                "counts": trial.counts,
                "chosen": trial.is_chosen,
            }
            for trial in trials
        ],
        "chosen": chosen_settings(trials),
    }
