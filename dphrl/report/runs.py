"""Reads run folders for the report: everything that a run has left, however far it came, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import ConfigError, InputError, parse_yaml
from dphrl.durable import file_damage
from dphrl.report.summaries import find_summary_fault
from dphrl.tracking.events import read_events
from dphrl.tracking.tracker import LOG_FILE, METRICS_FILE, VERSIONS_FILE, read_metrics

CONFIG_FILE = "config.yaml"
ARM_FILE = "arm.json"
# Events that every run has many of; events.jsonl has them.
ROUTINE_EVENTS = frozenset(["checkpoint"])
Summary = Mapping[str, Any]
# (data set, split)
DatasetKey = tuple[str, str]


@dataclass(frozen=True)
class ReferenceSplit:
    """What the reference stage found: of each training prompt's K responses, how many have a verdict, are correct, and
    are complete too.
    """

    fingerprint: Mapping[str, str]
    counts: Mapping[str, float]
    num_correct: Sequence[int]
    num_graded: Sequence[int]
    num_complete: Sequence[int]


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    config: the tree of config.yaml, unvalidated, so that a run of another version can still be read.
    evaluations: step -> data set -> summary; step 0 is the base. problems: a line for each file that cannot be used.
    """

    folder: Path
    arm: str
    suite: str | None
    seed: int
    config: Mapping[str, Any]
    config_text: str
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Mapping[int, Mapping[DatasetKey, Summary]]
    reference: ReferenceSplit | None
    problems: tuple[str, ...] = ()

    def setting(self, dotted: str, default: Any = None) -> Any:
        """config's value at `section.key`; default where the file has none."""
        node: Any = self.config
        for key in dotted.split("."):
            if not isinstance(node, Mapping) or key not in node:
                return default
            node = node[key]
        return node

    @property
    def num_steps_done(self) -> int:
        """The last recorded step; 0 without any."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def num_steps_planned(self) -> int | None:
        """learner.num_steps; None when the configuration has none."""
        return _whole_number(self.setting("learner.num_steps"))

    @property
    def last_evaluated_step(self) -> int | None:
        """Step of the newest evaluation after training began; None when there is none."""
        return max((step for step in self.evaluations if step > 0), default=None)

    @property
    def uses_divergence(self) -> bool:
        """Whether the loss has a divergence term."""
        return self.setting("algorithm.divergence.name") != "none" and bool(self.setting("algorithm.eta"))

    @property
    def uses_reference_samples(self) -> bool:
        """Whether the divergence is estimated on reference samples."""
        return self.uses_divergence and self.setting("algorithm.estimator") != "rollout"

    @property
    def uses_reference_stage(self) -> bool:
        """Whether the training prompts were split: for the divergence, or to replay near-perfect ones."""
        return self.uses_reference_samples or bool(self.setting("reference.replay_share"))

    @cached_property
    def state(self) -> str:
        """How far the run came, in words; "finished" when it reached its last step and was evaluated there."""
        planned = self.num_steps_planned
        if planned is None or not self.num_steps_done:
            return "no step taken yet" if not self.num_steps_done else f"{self.num_steps_done} steps"
        if self.num_steps_done < planned:
            return f"stopped after step {self.num_steps_done} of {planned}"
        # With evaluation.num_samples 0 a run evaluates nothing, and is still finished.
        wants_evaluation = self.setting("evaluation.num_samples", 0)
        if wants_evaluation and planned not in self.evaluations:
            return f"all {planned} steps taken, final evaluation missing"
        return "finished"

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the run used; empty when the run does not say."""
        try:
            found = json.loads((self.folder / VERSIONS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What a person should know of the run, in order, without what is routine: see dphrl.tracking.events."""
        return [event for event in read_events(self.folder) if event["event"] not in ROUTINE_EVENTS]

    @cached_property
    def period(self) -> tuple[str, str] | None:
        """First and last time stamp of run.log (UTC, to the second); None without one."""
        path = self.folder / LOG_FILE
        if not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # A message may span several lines; only the first line of a record begins with the time.
        stamps = [line[:19] for line in lines if len(line) > 24 and line[10:11] == "T" and line[23:24] == "Z"]
        return (stamps[0], stamps[-1]) if stamps else None


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ only in their seed, or one run. index: fixes the arm's colour, dash and marker everywhere."""

    name: str
    index: int
    runs: tuple[Run, ...]
    is_base: bool = field(default=False)

    @property
    def num_seeds(self) -> int:
        """How many runs the arm has."""
        return len(self.runs)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of `paths`, in order and none twice; each path is a run folder or a folder directly above run folders.

    Raises InputError, a line for each path that is neither.
    """
    folders: list[Path] = []
    problems = []
    for path in paths:
        if (path / CONFIG_FILE).is_file():
            found = [path]
        else:
            found = sorted(child.parent for child in path.glob(f"*/{CONFIG_FILE}"))
        if not found:
            what = f"no {CONFIG_FILE} in it or directly below" if path.is_dir() else "no such folder"
            problems.append(f"{path}: {what}; name a run's folder (RUN_DIR/NAME) or a suite's")
        folders += found
    if problems:
        raise InputError(*problems)
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if not unique:
        raise InputError("no run given; name a run's folder (RUN_DIR/NAME) or a suite's")
    return [load_run(folder) for folder in unique]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """One Arm for the runs of each arm of a suite, and one for every other run. If all runs belong to suites, plain RL
    comes before methods that preserve diversity."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        # The parent folder counts too: one suite that is run into two places is two experiments.
        key = (str(run.folder.resolve().parent), run.suite, run.arm) if run.suite else (str(run.folder.resolve()),)
        groups.setdefault(key, []).append(run)
    members = list(groups.values())
    if all(group[0].suite for group in members):
        members.sort(key=lambda group: _kind_of_algorithm(group[0]))
    suites = {group[0].suite for group in members}
    names = [
        f"{group[0].suite}/{group[0].arm}" if len(suites) > 1 and group[0].suite else group[0].arm for group in members
    ]
    unique = [
        name if names.count(name) == 1 else f"{group[0].folder.resolve().parent.name}/{name}"
        for name, group in zip(names, members, strict=True)
    ]
    labels = [
        name if unique.count(name) == 1 else f"{name} ({unique[: i + 1].count(name)})" for i, name in enumerate(unique)
    ]
    return [
        Arm(label, index, tuple(sorted(group, key=lambda run: run.seed)))
        for index, (label, group) in enumerate(zip(labels, members, strict=True))
    ]


def group_bases(arms: Sequence[Arm]) -> list[Arm]:
    """The untrained models, one Arm for each; its runs are, for every seed, one run that evaluated the model."""
    groups: dict[str, dict[int, Run]] = {}
    owners: dict[str, list[str]] = {}
    for arm in arms:
        for run in arm.runs:
            if base := run.evaluations.get(0):
                asked = [[*key, *_prompt_ids(summary)] for key, summary in sorted(base.items())]
                key = json.dumps([run.setting("model"), run.setting("evaluation.num_samples"), asked])
                groups.setdefault(key, {}).setdefault(run.seed, run)
                owners.setdefault(key, []).append(arm.name)
    bases = []
    for index, (key, by_seed) in enumerate(groups.items()):
        runs = tuple(by_seed.values())
        model = Path(str(runs[0].setting("model.path", "?"))).name
        name = "base" if len(groups) == 1 else f"base {model} (of {', '.join(dict.fromkeys(owners[key]))})"
        bases.append(Arm(name, index, runs, is_base=True))
    return bases


def load_run(folder: Path) -> Run:
    """The run in `folder`. Raises InputError when config.yaml makes no sense; other broken files are in `problems`."""
    problems: list[str] = []
    config_text = (folder / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    try:
        config = parse_yaml(config_text, str(folder / CONFIG_FILE))
    except ConfigError as error:
        raise InputError(*error.lines) from None
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG_FILE}: holds no settings; name the folder of a run")
    arm_file = _read_json(folder / ARM_FILE, problems) if (folder / ARM_FILE).is_file() else None
    named = arm_file if isinstance(arm_file, dict) and {"suite", "arm"} <= arm_file.keys() else {}
    seed = _whole_number(named.get("seed", config.get("seed")))
    return Run(
        folder=folder,
        arm=str(named.get("arm") or config.get("run_name") or folder.name),
        suite=str(named["suite"]) if named else None,
        seed=seed if seed is not None else 0,
        config=config,
        config_text=config_text,
        metrics=_load_metrics(folder, problems),
        evaluations=_load_evaluations(folder, problems),
        reference=_load_reference(folder, problems),
        problems=tuple(problems),
    )


def _load_metrics(folder: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    records = read_metrics(folder)
    path = folder / METRICS_FILE
    num_lines = len(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.is_file() else 0
    if num_lines > len(records):
        problems.append(f"{METRICS_FILE}: {num_lines - len(records)} of {num_lines} lines are cut off or broken")
    # If a step was taken twice, its last record counts.
    by_step = {int(record["step"]): record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def _load_evaluations(folder: Path, problems: list[str]) -> dict[int, dict[DatasetKey, Summary]]:
    found: dict[int, dict[DatasetKey, Summary]] = {}
    for path in (folder / "eval").glob("*.json"):
        step = 0 if path.stem == "base" else _whole_number(path.stem.removeprefix("step_"))
        if step is None:
            continue
        if step < 0:
            problems.append(f"eval/{path.name}: not a step's number; left out")
            continue
        if damage := file_damage(path):
            problems.append(f"eval/: {damage}; left out")
            continue
        summaries = _read_json(path, problems)
        if not isinstance(summaries, list):
            problems.append(f"eval/{path.name}: not a list of evaluations; left out")
            continue
        usable = []
        for i, summary in enumerate(summaries):
            if fault := find_summary_fault(summary):
                problems.append(f"eval/{path.name}: entry {i + 1}: {fault}; left out")
            else:
                usable.append(summary)
        if usable:
            found[step] = {(entry["dataset"], entry.get("split", "")): entry for entry in usable}
    return dict(sorted(found.items()))


def _load_reference(folder: Path, problems: list[str]) -> ReferenceSplit | None:
    path = folder / "reference"
    if not (path / "manifest.json").is_file():
        return None
    manifest = _read_json(path / "manifest.json", problems)
    try:
        columns = pq.read_table(path / "counts.parquet").to_pydict()
        correct, graded = columns["num_correct"], columns["num_graded"]
        # An older version's buffer does not tell complete answers apart: its split counted all correct ones.
        complete = columns.get("num_complete", correct)
        return ReferenceSplit(manifest["fingerprint"], manifest["split"], correct, graded, complete)
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        problems.append(f"reference/: not whole ({type(error).__name__}); left out")
        return None


def _read_json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problems.append(f"{path.parent.name}/{path.name}: not valid JSON; left out")
        return None


def _kind_of_algorithm(run: Run) -> tuple[int, str]:
    if not run.uses_divergence:
        return 0, run.arm
    return (2 if run.uses_reference_samples else 1), run.arm


def _prompt_ids(summary: Summary) -> list[str]:
    return sorted(row["prompt_id"] for row in summary["per_prompt"])


def _whole_number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
