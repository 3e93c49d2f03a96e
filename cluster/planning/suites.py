"""What a suite would run: its arms and seeds, what each arm changes, and the plan they have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.planning.describe import describe_plan
from cluster.planning.placement import plan_bundles
from dphrl.config.loading import ConfigError, list_presets, parse_yaml
from dphrl.config.schema import Config
from dphrl.experiments.expected import Expected
from dphrl.experiments.results import BASE_ARM
from dphrl.experiments.suite import Suite, list_suites, load_suite
from dphrl.experiments.trials import check_trials
from dphrl.experiments.tuning import TuningPart
from dphrl.tracking.console import format_table


def is_suite(source: str) -> bool:
    """Whether `source` is the name of an embedded suite, or a YAML file with arms. A file that cannot be read counts as
    no suite: the code that reads it next says what is wrong with it."""
    path = Path(source).expanduser()
    if source in list_suites():
        return source not in list_presets()
    if not path.is_file():
        return False
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError, ConfigError):
        return False
    return isinstance(tree, dict) and "arms" in tree


def describe_suite(source: str, overrides: Sequence[str] = (), run_dir: str = "runs") -> str:
    """Runs, arms and the plan of the arms' common base, as tables; starts nothing.

    Raises InputError for the first arm whose configuration makes no sense.
    """
    suite = load_suite(source)
    arms = {arm: suite.config(arm, suite.seeds[0], run_dir, overrides) for arm in suite.arms}
    # What all arms have in common is the configuration of an arm that changes nothing.
    common = suite.model_copy(update={"arms": {BASE_ARM: {}}}).config(BASE_ARM, suite.seeds[0], run_dir, overrides)
    # This configuration is not run itself, so it has no run folder.
    plan = [line for line in describe_plan(common).splitlines() if not line.startswith("run folder")]
    if suite.tuning is not None:
        check_trials(suite, run_dir, overrides)
    rows = [(arm, _needs(config), _settings(suite.arms[arm])) for arm, config in arms.items()]
    return "\n\n".join(
        [
            format_table(["what", "how much"], _summary(suite, common)),
            format_table(["arm", "needs", "beyond what all share"], [(BASE_ARM, "-", "the untrained model"), *rows]),
            f"What all share, from {suite.base}:",
            "\n".join(plan),
        ]
    )


def _summary(suite: Suite, common: Config) -> list[tuple[str, str]]:
    quick, evaluation = suite.quick, common.evaluation
    sets = ", ".join(dataset.name for dataset in common.data.evaluation)
    settings = {key: value for key, value in suite.settings.items() if key != "data.evaluation"}
    return [
        ("suite", f"{suite.name}: {suite.about}"),
        ("runs", f"{len(suite.arms)} arms x {_seeds(suite.seeds)} = {len(suite.arms) * len(suite.seeds)}"),
        ("with --quick", f"{', '.join(quick.arms)} x {_seeds(quick.seeds)} = {len(quick.arms) * len(quick.seeds)}"),
        *([("tuning (dphrl tune)", _tuning(suite.tuning))] if suite.tuning else []),
        ("evaluated on", f"{sets}: {evaluation.num_samples} samples a prompt, k {', '.join(map(str, evaluation.k))}"),
        ("settings of all", _settings(settings)),
        *([] if suite.expected is None else [("published figures", _published(suite.expected))]),
        ("runs go to", f"{common.run_dir}/ARM-sSEED"),
        ("GPUs, where there are any", _gpus(common)),
    ]


def _published(expected: Expected) -> str:
    return f"of {', '.join(expected.figures)}: {expected.source}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def _gpus(config: Config) -> str:
    count: dict[str, float] = {}
    for bundle in plan_bundles(config, with_gpus=True):
        count[bundle.role] = count.get(bundle.role, 0.0) + bundle.num_gpus
    used = {role: number for role, number in count.items() if number}
    return f"{sum(used.values()):g} a run: " + " + ".join(f"{number:g} {role}" for role, number in used.items())


def _needs(config: Config) -> str:
    needs = [
        *(["reference samples"] if config.uses_reference_stage else []),
        *(["resident reference model"] if config.uses_reference_model else []),
    ]
    return ", ".join(needs) or "-"


def _settings(settings: Mapping[str, Any]) -> str:
    """The settings as they would stand on a command line."""
    shown = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
    return ", ".join(f"{key}={value}" for key, value in zip(settings, shown, strict=True)) or "-"


def _tuning(part: TuningPart) -> str:
    budgets = {len(grid) for grid in part.grid.values()}
    (budget,) = budgets  # every arm has the same number: a suite with others is refused
    runs = len(part.grid) * budget * len(part.seeds)
    return f"{len(part.grid)} arms x {budget} settings x {_seeds(part.seeds)} = {runs}"
