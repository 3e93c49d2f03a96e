"""Suites: the same task under several algorithms and seeds, and what their runs show together.

A suite is one YAML file: a base configuration, settings that all arms share, and the settings of each arm. The base
model is an arm of its own, which is measured before training. This module reads suites, `cluster.experiments` runs
them, and `results` adds up what the runs found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from dphrl.config.loading import ConfigError, InputError, load_config, parse_yaml
from dphrl.config.schema import Config
from dphrl.config.section import NonNegativeInt, Section
from dphrl.evaluation.results import read_summaries
from dphrl.experiments.expected import Expected
from dphrl.experiments.pareto import methods_of
from dphrl.experiments.results import BASE_ARM, OTHER, PENALISED, PLAIN, REHEARSING, Results, read_results
from dphrl.experiments.tuning import TuningPart

Settings = dict[str, Any]


class QuickPart(Section):
    """The seeds and arms of a suite that --quick runs."""

    seeds: tuple[NonNegativeInt, ...]
    """The seeds of this part."""
    arms: tuple[str, ...]
    """The arms of this part, by name."""


class Suite(Section):
    """A suite, as its YAML file has it."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """The folder of the suite's runs, and of its committed results."""
    about: str
    """One line: what the suite shows."""
    base: str
    """The preset or YAML file that every arm starts from."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """The seeds: each arm runs once with each of them. More seeds make the intervals narrower, and each adds runs."""
    settings: Settings = {}  # noqa: RUF012  (pydantic copies it)
    """The settings that all arms change in the base, as section.key: value."""
    arms: Annotated[dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], Settings], Field(min_length=1)]
    """The settings that each arm changes in addition, by the arm's name, as section.key: value."""
    tuning: TuningPart | None = None
    """How the arms' settings are chosen, on seeds that the results do not use (`dphrl tune`); null for no such part."""
    quick: QuickPart
    """The part of the suite that shows the same result in minutes (--quick)."""
    expected: Expected | None = None
    """Figures that were published for these arms, shown beside the results; nothing else depends on them."""

    @model_validator(mode="after")
    def _quick_is_a_part(self) -> Suite:
        if BASE_ARM in self.arms:
            raise ValueError(f"arms: {BASE_ARM} is the untrained model and always there; remove it")
        if unknown := [arm for arm in self.quick.arms if arm not in self.arms]:
            raise ValueError(f"quick.arms: {', '.join(unknown)} not among arms ({', '.join(self.arms)})")
        if self.tuning is not None:
            self.tuning.check(self.arms, self.seeds)
        return self

    @model_validator(mode="after")
    def _expects_what_it_measures(self) -> Suite:
        if self.expected is None:
            return self
        if unknown := [arm for arm in self.expected.figures if arm not in (BASE_ARM, *self.arms)]:
            known = ", ".join([BASE_ARM, *self.arms])
            raise ValueError(f"expected.figures: {', '.join(unknown)} not among arms ({known}); name one of these")
        ks = self.settings.get("evaluation.k")
        for arm, metrics in self.expected.figures.items():
            for metric in metrics:
                _, _, k = metric.partition("pass@")
                if k and isinstance(ks, list) and int(k) not in ks:
                    raise ValueError(
                        f"expected.figures.{arm}.{metric}: the suite measures no pass@{k}; add {k} to evaluation.k"
                    )
        return self

    def config(self, arm: str, seed: int, run_dir: str, overrides: Sequence[str] = ()) -> Config:
        """The configuration of the run of `arm` and `seed`, whose folder is below `run_dir`/`name`.

        Raises ConfigError, which names the arm, or an override that only the suite itself may set.
        """
        if taken := {"seed", "run_name", "run_dir"} & {line.partition("=")[0].strip() for line in overrides}:
            raise ConfigError(f"{min(taken)}: a suite sets it for each run; use --seeds, --arms and --run-dir")
        own = {"run_name": f"{arm}-s{seed}", "run_dir": str(Path(run_dir) / self.name), "seed": seed}
        # Overrides are parsed as YAML, and JSON is valid YAML.
        lines = [f"{key}={json.dumps(value)}" for key, value in {**self.settings, **self.arms[arm], **own}.items()]
        try:
            config = load_config(self.base, [*lines[:-3], *overrides, *lines[-3:]])
        except ConfigError as error:
            raise ConfigError(*(f"suite {self.name}, arm {arm}: {line}" for line in error.lines)) from None
        if not (config.evaluation.num_samples and config.data.evaluation):
            raise ConfigError(
                f"suite {self.name}, arm {arm}: nothing would be evaluated; set evaluation.num_samples and "
                "data.evaluation"
            )
        return config


def list_suites() -> dict[str, str]:
    """Every embedded suite's name and YAML text."""
    folder = _suite_folder()
    texts = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: entry.read_text(encoding="utf-8") for name, entry in sorted(texts.items())}


def load_suite(source: str) -> Suite:
    """Read a suite. source: an embedded suite's name or a YAML file. Raises InputError, one line per mistake."""
    embedded = list_suites()
    path = Path(source).expanduser()
    if source in embedded:
        text = embedded[source]
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source}: cannot be read as UTF-8 text: {error}; name a YAML file") from None
    else:
        raise InputError(f"{source}: no such suite or file; suites: {', '.join(embedded)}")
    tree = parse_yaml(text, source)
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for e in error.errors()
        ]
        raise InputError(*(f"{source}: {problem}" for problem in problems)) from None


def choose_runs(suite: Suite, *, quick: bool, arms: str | None, seeds: str | None) -> list[tuple[str, int]]:
    """(arm, seed) of the runs that are asked for, in order of seeds. arms, seeds: comma-separated lists, None for all.

    Raises InputError for an arm that the suite lacks, or a seed that is no whole number.
    """
    chosen_arms = list(suite.quick.arms if quick else suite.arms)
    chosen_seeds = list(suite.quick.seeds if quick else suite.seeds)
    if arms is not None:
        chosen_arms = [arm.strip() for arm in arms.split(",")]
        if unknown := [arm for arm in chosen_arms if arm not in suite.arms]:
            raise InputError(f"--arms: {', '.join(unknown)} not in suite {suite.name}; it has {', '.join(suite.arms)}")
    if seeds is not None:
        if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
            raise InputError(f"--seeds {seeds}: must be whole numbers from 0 on, separated by commas")
        chosen_seeds = [int(seed) for seed in seeds.split(",")]
    return [(arm, seed) for seed in dict.fromkeys(chosen_seeds) for arm in dict.fromkeys(chosen_arms)]


def about(suite: Suite) -> dict[str, Any]:
    """What results repeat of their suite: `methods` (which arms differ in eta alone) and, if any, `expected`."""
    expected = {} if suite.expected is None else {"expected": suite.expected.model_dump()}
    return {"methods": methods_of({arm: suite.settings | changes for arm, changes in suite.arms.items()}), **expected}


def committed_results(source: str) -> Results:
    """The results that the package has for a suite, or those in a results file. source: suite or path of the file.

    Results that do not repeat what their suite says (see `about`) get it from the embedded suite of their name.

    Raises InputError when there are none.
    """
    path = Path(source).expanduser()
    if path.suffix == ".json":
        try:
            return _with_about(read_results(path))
        except ValueError as error:
            raise InputError(str(error)) from None
    name = load_suite(source).name
    with resources.as_file(_suite_folder() / "results" / f"{name}.json") as file:
        if not file.is_file():
            raise InputError(f"{name}: no committed results; run `dphrl experiment {name}`")
        return _with_about(read_results(file))


def _with_about(results: Results) -> Results:
    name = results["suite"]
    return {**(about(load_suite(name)) if name in list_suites() else {}), **results}


def kind_of(config: Config) -> str:
    """What the algorithm of `config` does for diversity.

    PLAIN: nothing. PENALISED: a penalty on the policy's rollouts. REHEARSING: a divergence on stored reference samples.
    OTHER: something that DPH-RL's paper does not have: another advantage, policy loss or term, or replay.
    """
    algorithm = config.algorithm
    if config.reference.replay_share or algorithm.divergence.name == "sft":
        return OTHER
    if algorithm.advantage.name not in _ADVANTAGES or algorithm.policy_loss.name not in _POLICY_LOSSES:
        return OTHER
    if config.uses_reference_samples:
        return REHEARSING
    return PENALISED if config.uses_divergence else PLAIN


# What plain RL with verifiable rewards does with scores and ratios, whatever else is added.
_ADVANTAGES = ("group_normalized", "mean_only", "leave_one_out")
_POLICY_LOSSES = ("clipped", "gspo")


def _suite_folder() -> Traversable:
    return resources.files("dphrl").joinpath("suites")


def read_run(folder: Path, config: Config) -> dict[str, list[dict[str, Any]]] | None:
    """The evaluations of a finished run, {"base": [...], "trained": [...]}; None if it is not finished."""
    files = {
        "base": folder / "eval" / "base.json",
        "trained": folder / "eval" / f"step_{config.learner.num_steps}.json",
    }
    # A file that is missing, or not as it was written, means that the run is not finished.
    found = {name: read_summaries(file) for name, file in files.items()}
    evaluations = {name: summaries for name, summaries in found.items() if summaries is not None}
    return evaluations if len(evaluations) == len(files) else None
