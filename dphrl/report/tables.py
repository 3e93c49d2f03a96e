"""The report's tables: rates of the base and the arms, retained prompts, the runs, settings that differ."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dphrl.report.figures import name_of, note, style_of
from dphrl.report.runs import Arm, DatasetKey, ReferenceSplit, Run
from dphrl.report.statistics import Rate, kept_and_gained, paired_changes, pass_keys, rate, trained_summaries
from dphrl.report.svg import swatch
from dphrl.report.text import escape

# Settings that are a run's own; a difference between them says nothing.
OWN_SETTINGS = ("run_name", "run_dir", "seed")
Cell = str  # markup
# More rows than this would bury the page; each run's events.jsonl has them all.
MAX_EVENTS = 200


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, css: str = "") -> str:
    """caption and columns are text, cells are markup; the first of each row is its header."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{css}"><caption>'
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def arm_cell(arm: Arm) -> Cell:
    """An arm's swatch and name, with the number of its seeds if there are several."""
    seeds = f' <span class="quiet">{arm.num_seeds} seeds</span>' if arm.num_seeds > 1 else ""
    return f"{swatch(style_of(arm))}{escape(arm.name)}{seeds}"


def summary_table(rows_of: Sequence[Arm], dataset: DatasetKey) -> str:
    """Base first, then every arm; the best of a column in bold, its interval below it."""
    found = [(arm, summaries) for arm in rows_of if (summaries := trained_summaries(arm, dataset))]
    everything = [summary for _, summaries in found for summary in summaries]
    keys = [*pass_keys(everything), "greedy", "retention", "distinct_correct"]
    rates = {key: [rate(summaries, key) for _, summaries in found] for key in keys}
    columns = ["arm", "step", *(_heading(key) for key in keys)]
    rows = []
    for i, (arm, _) in enumerate(found):
        cells = [_rate_cell(rates[key][i], rates[key], key) for key in keys]
        rows.append([arm_cell(arm), _steps(arm), *cells])
    num_prompts, num_samples = (everything[0].get(key, "?") for key in ("num_prompts", "num_samples"))
    caption = f"{name_of(dataset)}: {num_prompts} prompts, {num_samples} samples each; rates in %"
    return table(caption, columns, rows, css="numbers")


def _heading(key: str) -> str:
    return key.replace("pass@", "Pass@").replace("_", " ")


def _steps(arm: Arm) -> Cell:
    if arm.is_base:
        return "0"
    steps = sorted({run.last_evaluated_step for run in arm.runs if run.last_evaluated_step is not None})
    return " to ".join(map(str, dict.fromkeys([steps[0], steps[-1]]))) if steps else "-"


def _rate_cell(value: Rate | None, column: Sequence[Rate | None], key: str) -> Cell:
    if value is None:
        return "-"
    # The printed text decides, so that equal figures are all bold.
    shown = _shown(value.mean, key)
    best = _shown(max(other.mean for other in column if other is not None), key)
    mean = f"<strong>{shown}</strong>" if shown == best and len(column) > 1 else shown
    if value.low is None or value.high is None:
        return mean
    return f"{mean} <small>{_shown(value.low, key)} to {_shown(value.high, key)}</small>"


def _shown(value: float, key: str) -> str:
    return f"{value:.2f}" if key == "distinct_correct" else f"{100 * value:.1f}"


def events_table(arms: Sequence[Arm]) -> str:
    """What a person should know of each run, in order of time within a run; "" when there is nothing."""
    rows = [
        [
            arm_cell(arm),
            escape(str(run.seed)),
            escape("-" if event.get("step") is None else str(event["step"])),
            escape(event["event"]),
            escape(str(event.get("message", ""))),
            escape(str(event.get("time", "-"))),
        ]
        for arm in arms
        for run in arm.runs
        for event in run.events
    ]
    if not rows:
        return ""
    shown = f", the last {MAX_EVENTS} of {len(rows)}" if len(rows) > MAX_EVENTS else ""
    columns = ["arm", "seed", "step", "event", "message", "time (UTC)"]
    return table(f"Events{shown}", columns, rows[-MAX_EVENTS:])


def retention_table(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """Of the prompts that the base solves, those still solved; and those that only the trained model solves."""
    rows = []
    for arm in arms:
        found = [kept for run in arm.runs if (kept := kept_and_gained(run, dataset))]
        if not found:
            continue
        solved = _mean([kept.solved_by_base for kept in found])
        still = _mean([kept.still_solved for kept in found])
        lost = _mean([kept.solved_by_base - kept.still_solved for kept in found])
        gained = _mean([kept.newly_solved for kept in found])
        share = rate(trained_summaries(arm, dataset), "retention")
        rows.append([arm_cell(arm), _rate_cell(share, [share], "retention"), solved, still, lost, gained])
    if not rows:
        return note(f"{name_of(dataset)}: no run has both a base and a later evaluation of the same prompts.")
    columns = ["arm", "retention, %", "solved by the base", "still solved", "lost", "newly solved"]
    return table(f"{name_of(dataset)}: prompts with at least one correct sample", columns, rows, css="numbers")


def difference_table(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """Each arm minus its base, prompt by prompt; empty without an arm that has both evaluations."""
    found = [(arm, changes) for arm in arms if (changes := paired_changes(arm.runs, dataset))]
    if not found:
        return ""
    keys = list(dict.fromkeys(key for _, changes in found for key in changes if key not in ("kept", "itself")))
    rows = []
    for arm, changes in found:
        shares = [_rate_cell(changes.get(key), [changes.get(key)], key) for key in ("kept", "itself")]
        rows.append([arm_cell(arm), *(_change_cell(changes.get(key)) for key in keys), *shares])
    columns = ["arm", *map(_heading, keys), "kept of a half", "by the base itself"]
    return table(f"{name_of(dataset)}: change from the base, in points of %", columns, rows, css="numbers")


def _change_cell(change: Rate | None) -> Cell:
    if change is None:
        return "-"
    shown = f"{100 * change.mean:+.1f}"
    if change.low is None or change.high is None:
        return shown
    return f"{shown} <small>{100 * change.low:+.1f} to {100 * change.high:+.1f}</small>"


def _mean(values: Sequence[int]) -> Cell:
    return f"{statistics.fmean(values):.1f}".removesuffix(".0")


def runs_table(arms: Sequence[Arm]) -> str:
    """How far every arm's runs came, when, and what of their folders could not be read."""
    rows = []
    for arm in arms:
        states = Counter(run.state for run in arm.runs)
        shown = [
            f"{f'{count} ' if arm.num_seeds > 1 else ''}{escape(state)}"
            if state == "finished"
            else f"<strong>{f'{count} ' if arm.num_seeds > 1 else ''}{escape(state)}</strong>"
            for state, count in states.items()
        ]
        problems = [f"{run.folder.name}: {problem}" for run in arm.runs for problem in run.problems]
        shown += [f"<small>{escape(problem)}</small>" for problem in problems]
        steps = sorted({run.num_steps_done for run in arm.runs})
        periods = [run.period for run in arm.runs if run.period]
        begin = min((p[0] for p in periods), default="-").replace("T", " ")
        end = max((p[1] for p in periods), default="-").replace("T", " ")
        seeds = ", ".join(str(run.seed) for run in arm.runs)
        done = " to ".join(str(step) for step in dict.fromkeys([steps[0], steps[-1]]))
        rows.append([arm_cell(arm), seeds, "<br>".join(shown), done, escape(begin), escape(end)])
    return table("Runs", ["arm", "seed", "state", "steps", "first log line (UTC)", "last log line (UTC)"], rows)


# -------------------------------------------------------------------------------------------- reference


def split_row(owners: str, run: Run, split: ReferenceSplit) -> list[Cell]:
    """A row of `SPLIT_COLUMNS`."""
    num_samples = run.setting("reference.num_samples", "?")
    all_wrong = sum(c == 0 and n > 0 for c, n in zip(split.num_correct, split.num_graded, strict=True))
    ungraded = sum(n == 0 for n in split.num_graded)
    numbers = [
        len(split.num_correct),
        split.counts.get("num_near_perfect", 0),
        split.counts.get("num_exploration", 0),
        all_wrong,
        split.counts.get("num_dropped", 0),
        ungraded,
        split.counts.get("num_stored_samples", 0),
    ]
    rule = f"&ge; {escape(run.setting('reference.threshold', '?'))} of {escape(num_samples)}"
    return [escape(owners), rule, *(f"{number:,.0f}" for number in numbers)]


SPLIT_COLUMNS = (
    "used by",
    "near-perfect if correct",
    "prompts",
    "near-perfect",
    "exploration",
    "all wrong",
    "dropped",
    "ungraded",
    "samples stored",
)


# -------------------------------------------------------------------------------------------- settings


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """section.key -> value of a configuration's tree; a list stays one value."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def differing_settings(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """(section.key, its value in every arm) of the settings that are not the same everywhere.

    Where the runs of an arm differ among themselves, their values are joined by commas.
    """
    flat = [[dict(flatten(run.config)) for run in arm.runs] for arm in arms]
    keys = list(dict.fromkeys(key for runs in flat for run in runs for key in run if key not in OWN_SETTINGS))
    found = []
    for key in keys:
        values = [", ".join(dict.fromkeys(_show_setting(run, key) for run in runs)) for runs in flat]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def settings_table(arms: Sequence[Arm]) -> str:
    """The settings that differ between arms."""
    if len(arms) < 2:
        return note("One arm: nothing to compare with.")
    differing = differing_settings(arms)
    if not differing:
        return note("The arms have the same settings.")
    rows = [[f"<code>{escape(key)}</code>", *(escape(value) for value in values)] for key, values in differing]
    return table("Settings that differ between arms", ["setting", *(arm.name for arm in arms)], rows, css="settings")


def _show_setting(run: Mapping[str, Any], key: str) -> str:
    if key not in run:
        return "-"
    value = run[key]
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
