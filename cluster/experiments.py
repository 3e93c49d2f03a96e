"""Runs a suite: its arms one after another on the same engines, or several at a time on a larger cluster."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM
from typing import Any

from cluster.apart import Run, run_apart
from cluster.launch import check_writable, open_system, quiet_libraries, train_on
from dphrl.config.loading import InputError, load_config
from dphrl.config.schema import Config
from dphrl.durable import put_in_place, write_whole
from dphrl.experiments.results import BASE_ARM, Results, add_up, merge, predicted, rows_of, write_results
from dphrl.experiments.show import prediction_table, show
from dphrl.experiments.suite import Suite, about, committed_results, kind_of, load_suite, read_run
from dphrl.outputs import check_output
from dphrl.owner import owned
from dphrl.prepare import Prepared, prepare
from dphrl.protocols import System
from dphrl.resume import ResumeCheck
from dphrl.sandbox.zygote import die_with_parent
from dphrl.stopping import StopRequest
from dphrl.tracking.console import Console


def run_experiment(
    source: str,
    runs: Sequence[Run],
    run_dir: str,
    overrides: Sequence[str] = (),
    *,
    inline: bool = False,
    num_parallel: int = 1,
    num_retries: int = 0,
    is_part: bool = False,
    output: Path | None = None,
    others: Path | None = None,
) -> None:
    """Train those of `runs` that are not finished, then write and show the results of the whole suite.

    num_parallel: runs at a time. num_retries: with several at a time, how often one that failed is started again.
    is_part: other runs of the suite train at the same time, and the process that started them writes the results.
    others: a results file of further runs, made elsewhere, that count too.
    A second call after an interrupt goes on where the first one stopped: finished runs stay, an unfinished one resumes.
    Raises InputError when a run's folder holds another configuration or is being written, Stopped when a signal ended
    it, and for runs in processes of their own what `run_apart` raises.
    """
    if is_part:
        die_with_parent(os.getppid(), SIGTERM)
    suite = load_suite(source)
    if output is None:
        output = Path(run_dir).expanduser() / suite.name / "results.json"
    check_output(output)
    elsewhere = _results_of(suite, others) if others else None
    configs = {(arm, seed): suite.config(arm, seed, run_dir, overrides) for arm, seed in runs}
    console = Console()
    for config in configs.values():
        _check_same_config(config)
    check_writable(Path(run_dir).expanduser() / suite.name, "--run-dir")
    missing = [run for run, config in configs.items() if read_run(config.folder, config) is None]
    console.info(f"suite {suite.name}: {len(runs)} runs, {len(runs) - len(missing)} finished already")
    if num_parallel > 1 and missing:
        # A signal reaches this process alone, which passes it on.
        # The first run of a seed goes ahead of the others, so it should be one that leaves a reference buffer.
        ahead = sorted(missing, key=lambda run: not configs[run].uses_reference_stage)

        def options_of(run: Run) -> list[str]:
            options = ["experiment", source, "--arms", run[0], "--seeds", str(run[1]), "--run-dir", run_dir, "--part"]
            return [*options, *(["--inline"] if inline else []), *overrides]

        with StopRequest().listening():
            run_apart({run: configs[run] for run in ahead}, options_of, num_parallel, num_retries, console)
    else:
        quiet_libraries()
        with StopRequest(saves=True).listening() as stop, _Systems(inline=inline) as systems:
            for number, run in enumerate(missing, start=1):
                console.info(f"--- run {number} of {len(missing)}: {run[0]}, seed {run[1]}")
                _run_one(suite, run, configs[run], systems, console, stop)
    if is_part:
        return
    results = _add_up(suite, _finished_runs(suite, configs, run_dir, overrides), run_dir, overrides)
    if elsewhere is not None:
        results = merge(results, elsewhere)
    write_results(output, results)
    show(results, console)
    if not overrides:
        _check_prediction(source, results, console)
    console.info(f"written to {output}")


def _results_of(suite: Suite, path: Path) -> Results:
    """The results in `path`. Read before anything is trained, because a file of another suite is an InputError."""
    results = committed_results(str(path)) if path.suffix == ".json" else {}
    if results.get("suite") != suite.name:
        raise InputError(f"--with {path}: holds no results of suite {suite.name}; name a results.json of it")
    return results


def _check_prediction(source: str, results: Results, console: Console) -> None:
    """Show whether the figures of another seed lie where the committed results say they should."""
    try:
        committed = committed_results(source)
    except InputError:
        return
    checks = predicted(results, committed)
    if set(results["seeds"]) & set(committed["seeds"]) or len(results["seeds"]) > 1 or not checks:
        return
    num_inside = sum(check["inside"] for check in checks)
    console.table(
        f"{num_inside} of {len(checks)} figures lie within the committed 95 % prediction intervals for one more seed",
        *prediction_table(checks),
    )


class _Systems:
    """At most one running system, kept from run to run while the next one can use its engines."""

    def __init__(self, *, inline: bool) -> None:
        self._inline = inline
        self._stack = ExitStack()
        self._system: System | None = None

    def __enter__(self) -> _Systems:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def get(self, config: Config, prepared: Prepared) -> System:
        if self._system is not None and self._system.renew_learner(config):
            return self._system
        self._stack.close()
        self._system = self._stack.enter_context(open_system(config, prepared, inline=self._inline))
        return self._system


def _finished_runs(
    suite: Suite, configs: dict[Run, Config], run_dir: str, overrides: Sequence[str]
) -> dict[Run, dict[str, Any]]:
    """All finished runs of the suite, not only those of this call: results of pieces add up."""
    seeds = dict.fromkeys([*suite.seeds, *(seed for _, seed in configs)])
    every = {(arm, seed): suite.config(arm, seed, run_dir, overrides) for seed in seeds for arm in suite.arms}
    found = {run: read_run(config.folder, config) for run, config in every.items() if _is_same_config(config)}
    return {run: evaluations for run, evaluations in found.items() if evaluations is not None}


def _add_up(suite: Suite, runs: dict[Run, dict[str, Any]], run_dir: str, overrides: Sequence[str]) -> Results:
    of_arms = [run for arm in suite.arms for run in sorted(runs) if run[0] == arm]
    # All runs of a seed share the measurement of the base, so one of them gives it.
    of_base = {seed: runs[arm, seed]["base"] for arm, seed in reversed(of_arms)}
    rows = [row for seed, evaluation in sorted(of_base.items()) for row in rows_of(BASE_ARM, seed, evaluation)]
    rows += [row for arm, seed in of_arms for row in rows_of(arm, seed, runs[arm, seed]["trained"])]
    configs = {arm: suite.config(arm, seed, run_dir, overrides) for arm, seed in of_arms}
    ks = next(iter(configs.values())).evaluation.k
    return add_up(suite.name, rows, ks, {arm: kind_of(config) for arm, config in configs.items()}) | about(suite)


def _run_one(suite: Suite, run: Run, config: Config, systems: _Systems, console: Console, stop: StopRequest) -> None:
    folder = config.folder
    with owned(folder, stop.abandon) as owner:
        owner.tell(console.info)
        owner.remove_leftovers()
        siblings = [folder.parent / f"{arm}-s{run[1]}" for arm in suite.arms if arm != run[0]]
        share(folder, siblings, with_reference=config.uses_reference_stage)
        write_whole(folder / "arm.json", json.dumps({"suite": suite.name, "arm": run[0], "seed": run[1]}) + "\n")
        check = ResumeCheck(config, remedy="remove that run's folder to train it anew")
        check.check_settings()
        prepared = prepare(config, console)
        check.check_inputs(prepared)
        train_on(systems.get(config, prepared), config, prepared, console, resume=check, stop=stop)


def _is_same_config(config: Config) -> bool:
    stored = config.folder / "config.yaml"
    # Compared as settings, not as text: a comment in the file makes no difference, nor does another path to its folder.
    elsewhere = [f"run_dir={json.dumps(config.run_dir)}"]
    return not stored.is_file() or load_config(str(stored), elsewhere, stored=True) == config


def _check_same_config(config: Config) -> None:
    if not _is_same_config(config):
        raise InputError(
            f"{config.folder} holds a run of another configuration; remove it, or give another --run-dir for this one"
        )


def share(folder: Path, siblings: Sequence[Path], *, with_reference: bool) -> None:
    """Give a fresh run the base evaluation and the reference buffer of another run with the same seed.

    The run itself checks by fingerprint whether they are what it would have made. The siblings may be running, or
    copying, at the same time.
    """
    # If there is a buffer, the graded samples that it was selected from are complete. They are copied before it.
    shared = {"eval": "eval/.base-identity"}
    if with_reference:
        shared |= dict.fromkeys(("reference.graded", "reference.confirmed", "reference"), "reference/manifest.json")
    for sibling in siblings:
        for name, complete in shared.items():
            ours, theirs = folder / name, sibling / name
            if not ours.exists() and theirs.is_dir() and (sibling / complete).is_file():
                staging = folder / f".{name}.{os.getpid()}.partial"
                shutil.rmtree(staging, ignore_errors=True)
                shutil.copytree(theirs, staging, ignore=shutil.ignore_patterns("*step_*.json*", "*.partial"))
                put_in_place(staging, ours)
