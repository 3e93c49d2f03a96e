"""Runs the tuning section of a suite: its trials as a suite of their own, and what the rule makes of their results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cluster.experiments import run_experiment
from cluster.launch import check_writable
from dphrl.config.loading import InputError
from dphrl.durable import write_whole
from dphrl.experiments.results import read_results
from dphrl.experiments.suite import load_suite
from dphrl.experiments.trials import (
    check_trials,
    chosen_settings,
    judge,
    settings_text,
    suite_text,
    trial_names,
    trials_table,
    tuning_of,
    tuning_record,
    tuning_suite,
    without_effect,
)
from dphrl.outputs import check_output, save_output
from dphrl.tracking.console import Console


def run_tuning(
    source: str,
    run_dir: str,
    overrides: Sequence[str] = (),
    *,
    arms: str | None = None,
    inline: bool = False,
    num_parallel: int = 1,
    num_retries: int = 0,
    output: Path | None = None,
) -> None:
    """Train the trials of a suite's tuning section that are not finished, then show and write what they choose.

    arms: comma-separated arms of the suite, None for all that have a grid. A second call goes on where the first one
    stopped. Raises InputError for a suite without such a section, or with trials that make no sense; and what
    `run_experiment` raises, which trains them as a suite of their own.
    """
    suite = load_suite(source)
    part, trials = tuning_of(suite), tuning_suite(suite)
    names = list(dict.fromkeys(arm.strip() for arm in arms.split(","))) if arms is not None else list(part.grid)
    if unknown := [arm for arm in names if arm not in part.grid]:
        raise InputError(f"--arms: {', '.join(unknown)} not in the tuning grid, which has {', '.join(part.grid)}")
    folder = Path(run_dir).expanduser() / trials.name
    output = folder / "tuning.json" if output is None else output
    check_output(output)
    check_trials(suite, run_dir, overrides)
    check_writable(folder, "--run-dir")
    # Others read the grid here too: the processes of parallel runs, `dphrl plan` and `dphrl experiment`.
    file = folder / "suite.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, suite_text(trials))
    runs = [(trial, seed) for seed in part.seeds for trial in trial_names(part, names)]
    run_experiment(
        *(str(file), runs, run_dir, overrides), inline=inline, num_parallel=num_parallel, num_retries=num_retries
    )

    console = Console()
    found = judge(suite, read_results(folder / "results.json"))
    console.table(f"tuning of {suite.name}, seeds {', '.join(map(str, part.seeds))}: {part.rule}", *trials_table(found))
    for arm, settings in chosen_settings(found).items():
        console.info(f"{arm}: {settings_text(settings)}")
    for arm, keys in without_effect(found).items():
        console.info(f"{arm}: all its settings gave the same figures, so this grid of {', '.join(keys)} tries nothing")
    save_output(output, json.dumps(tuning_record(suite, found, overrides), indent=1) + "\n")
    console.info(f"written to {output}")
