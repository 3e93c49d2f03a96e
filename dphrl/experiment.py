"""Suites: the same task under several algorithms and seeds, and what their runs say together.

A suite is one YAML file: a base configuration, settings that all arms share, and for each arm what is different. The
base model is an arm of its own, measured before training. This module reads suites and adds up finished runs;
`cluster.experiments` runs them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from dphrl.config import Config
from dphrl.config_algorithm import NonNegativeInt, Section
from dphrl.config_loading import ConfigError, InputError, load_config, parse_yaml

BASE_ARM = "base"
# Two-sided 95 % quantiles: the normal one, and Student's t by degrees of freedom.
_NORMAL = 1.95996
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
Settings = dict[str, Any]


class QuickPart(Section):
    # A part of the suite that shows the same in minutes.
    seeds: tuple[NonNegativeInt, ...]
    arms: tuple[str, ...]


class Suite(Section):
    # The folder of its runs, and of its committed results.
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    # One line: what it shows.
    about: str
    # A preset or YAML file that every arm starts from.
    base: str
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    # For all arms, as section.key: value.
    settings: Settings = {}  # noqa: RUF012  (pydantic copies it)
    # Arm -> what it sets beyond that.
    arms: Annotated[dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], Settings], Field(min_length=1)]
    quick: QuickPart

    @model_validator(mode="after")
    def _quick_is_a_part(self) -> Suite:
        if BASE_ARM in self.arms:
            raise ValueError(f"arms: {BASE_ARM} is the untrained model and always there; remove it")
        if unknown := [arm for arm in self.quick.arms if arm not in self.arms]:
            raise ValueError(f"quick.arms: {', '.join(unknown)} not among arms ({', '.join(self.arms)})")
        return self

    def config(self, arm: str, seed: int, run_dir: str, overrides: Sequence[str] = ()) -> Config:
        """The run of `arm` and `seed`, below `run_dir`/`name`. Raises ConfigError that names the arm, or a setting
        that a suite cannot do with."""
        if taken := {"seed", "run_name", "run_dir"} & {line.partition("=")[0].strip() for line in overrides}:
            raise ConfigError(f"{min(taken)}: a suite sets it for each run; use --seeds, --arms and --run-dir")
        own = {"run_name": f"{arm}-s{seed}", "run_dir": str(Path(run_dir) / self.name), "seed": seed}
        # JSON is YAML.
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
    """An embedded suite's name or a YAML file. Raises InputError, one line, for what is wrong with it."""
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
    """(arm, seed) of the runs asked for, a seed at a time; arms and seeds as comma-separated lists, None for all.

    Raises InputError for an arm that the suite lacks, or a seed that is no number.
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


def committed_results(name: str) -> dict[str, Any]:
    """The results that come with the package. Raises InputError when this suite has none."""
    file = _suite_folder() / "results" / f"{name}.json"
    if not file.is_file():
        raise InputError(f"{name}: no committed results; run `dphrl experiment {name}`")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _suite_folder() -> Traversable:
    return resources.files("dphrl").joinpath("suites")


# -------------------------------------------------------------------------------------------- adding up


def read_run(folder: Path, config: Config) -> dict[str, list[dict[str, Any]]] | None:
    """The evaluations of a finished run, {"base": [...], "trained": [...]}; None while it is not finished."""
    files = {
        "base": folder / "eval" / "base.json",
        "trained": folder / "eval" / f"step_{config.learner.num_steps}.json",
    }
    try:
        return {name: json.loads(file.read_text()) for name, file in files.items()}
    except (OSError, ValueError):
        # Cut off while it was written: as good as not there.
        return None


def add_up(suite: str, runs: Mapping[tuple[str, int], Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """The results file: per arm and domain each rate's mean and interval over seeds, and the counts behind them.

    runs: (arm, seed) -> what `read_run` gives. The first data set is the domain trained on, the others are out of it
    (their mean, where there are several). The interval is Student's 95 % over seeds; for one seed it is the
    bootstrap over prompts. `predict_low` and `predict_high` bound where one more seed would fall.
    """
    seeds = sorted({seed for _, seed in runs})
    by_arm: dict[str, list[Sequence[Mapping[str, Any]]]] = {BASE_ARM: []}
    for seed in seeds:
        by_arm[BASE_ARM].append(next(run["base"] for (_, of_seed), run in runs.items() if of_seed == seed))
    for (arm, _), run in sorted(runs.items(), key=lambda item: item[0][1]):
        by_arm.setdefault(arm, []).append(run["trained"])
    arms = {arm: _summarize_arm(evaluations) for arm, evaluations in by_arm.items()}
    counts = [
        {"arm": arm, "seed": seed, **_counts(summary)}
        for (arm, seed), run in sorted(runs.items())
        for summary in run["trained"]
    ] + [
        {"arm": BASE_ARM, "seed": seed, **_counts(summary)}
        for seed, evaluation in zip(seeds, by_arm[BASE_ARM], strict=True)
        for summary in evaluation
    ]
    return {"suite": suite, "seeds": seeds, "arms": arms, "counts": counts}


def _counts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Enough to recompute every rate: correct samples of each prompt, in the order of the data set."""
    return {
        "dataset": summary["dataset"],
        "num_samples": summary["num_samples"],
        "num_graded": [row["num_samples"] for row in summary["per_prompt"]],
        "num_correct": [row["num_correct"] for row in summary["per_prompt"]],
    }


def _summarize_arm(evaluations: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    domains = {"in_domain": [[evaluation[0]] for evaluation in evaluations]}
    if all(len(evaluation) > 1 for evaluation in evaluations):
        domains["out_of_domain"] = [list(evaluation[1:]) for evaluation in evaluations]
    return {domain: _summarize_domain(summaries) for domain, summaries in domains.items()}


def _summarize_domain(summaries: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """summaries: per seed, the domain's data sets."""
    keys = [key for key in summaries[0][0] if key.startswith(("pass@", "majority@"))]
    result = {}
    for key in [*keys, "greedy", "retention", "distinct_correct", "entropy_mean", "completion_tokens_mean"]:
        values = [[summary[key] for summary in of_seed if summary.get(key) is not None] for of_seed in summaries]
        if not all(values):
            continue
        means = [statistics.fmean(of_seed) for of_seed in values]
        intervals = [summary.get("intervals", {}).get(key) for summary in summaries[0]]
        result[key] = interval_over_seeds(means, intervals[0] if len(intervals) == 1 else None)
    return result


def interval_over_seeds(values: Sequence[float], of_one: Sequence[float] | None = None) -> dict[str, float]:
    """Mean, and Student's 95 % interval and prediction interval; of one value the interval is `of_one`, or none."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        low, high = of_one or (mean, mean)
        return {"mean": mean, "low": low, "high": high}
    n, spread = len(values), statistics.stdev(values)
    # Beyond the table the first term of the expansion about the normal quantile is right to 0.001.
    t = _STUDENT_T[n - 2] if n - 2 < len(_STUDENT_T) else _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * (n - 1))
    half, predicted = t * spread / math.sqrt(n), t * spread * math.sqrt(1 + 1 / n)
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "predict_low": mean - predicted,
        "predict_high": mean + predicted,
    }


def title(results: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, results["seeds"]))
    return (
        f"{results['suite']}, seed{'s' if len(results['seeds']) > 1 else ''} {seeds}: mean ± half of the 95 % interval"
    )


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of the table: per arm the rates in and out of domain, as mean and half-width."""
    # The base has no retention: a column exists if any arm has it.
    columns = list(
        dict.fromkeys((name, key) for some in results["arms"].values() for name in some for key in _shown(some[name]))
    )
    columns.sort(key=lambda column: column[0])
    header = ["arm", *(f"{'in' if domain == 'in_domain' else 'out'} {key}" for domain, key in columns)]
    rows: list[list[object]] = []
    for arm, domains in results["arms"].items():
        cells = [domains.get(domain, {}).get(key) for domain, key in columns]
        rows.append([arm, *("-" if cell is None else _cell(cell) for cell in cells)])
    return header, rows


def _shown(domain: Mapping[str, Any]) -> list[str]:
    passes = [key for key in domain if key.startswith("pass@")]
    # The two ends and the paper's own k: a row for each arm must fit a screen.
    ends = [key for key in passes if key in ("pass@1", "pass@8", "pass@16")] or passes
    return [*ends, *(key for key in ("retention",) if key in domain)]


def _cell(value: Mapping[str, float]) -> str:
    half = (value["high"] - value["low"]) / 2
    return f"{value['mean']:.3f} ±{half:.3f}" if half else f"{value['mean']:.3f}"
