"""The report's page: sections in reading order, style and script inline."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from typing import Any

import dphrl
from dphrl.report.figures import note, pass_at_k_figure, plane_figure, series_figures, style_of
from dphrl.report.pareto import pareto_figure
from dphrl.report.runs import Arm, ReferenceSplit, Run, group_bases
from dphrl.report.samples import choose_samples
from dphrl.report.statistics import datasets_of
from dphrl.report.steps import split_figure, status_figures, time_figures
from dphrl.report.strategies import ABOUT_STRATEGIES, lost_prompts, strategies_table
from dphrl.report.svg import swatch
from dphrl.report.tables import (
    SPLIT_COLUMNS,
    difference_table,
    events_table,
    retention_table,
    runs_table,
    settings_table,
    split_row,
    table,
)
from dphrl.report.tables import summary_table as one_summary_table
from dphrl.report.text import embed_json, escape

# More histograms than this would bury the page; the table has all splits.
MAX_SPLIT_FIGURES = 12


_ABOUT_CHANGES = (
    "Both models answered the same prompts, so each prompt is compared with itself: a change whose interval excludes 0 "
    "is one, even where the intervals of the rates touch. Kept of a half: of the prompts that half of the base's "
    "samples solve, the share that as many of the model's solve. By the base itself: the share that its other half "
    "solves. Where both are equal, nothing was lost."
)


def render_page(arms: Sequence[Arm], now: datetime) -> str:
    """The whole HTML document. now: a time in UTC that knows its time zone."""
    bases = group_bases(arms)
    sections = [
        ("results", "Results", _results(arms, bases)),
        ("pass-at-k", "Pass@k", _per_dataset(pass_at_k_figure, [*bases, *arms])),
        ("pareto", "Pass@1 against Pass@k, seed by seed", _per_dataset(pareto_figure, [*bases, *arms])),
        ("plane", "Pass@1 against Pass@k over training", _per_dataset(plane_figure, [*bases, *arms])),
        ("training", "Training", _training(arms, series_figures)),
        ("events", "Events", _events(arms)),
        ("time", "Where the time goes", _training(arms, time_figures)),
        ("statuses", "How completions were graded", _training(arms, status_figures)),
        ("mass", "Where the mass goes", _mass(arms)),
        ("retention", "Retention", _retention(arms)),
        ("samples", "Completions", _samples(arms)),
        ("reference", "Reference split", _reference(arms)),
        ("settings", "Settings", _settings(arms)),
    ]
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser may load nothing and run no script but ours, so hostile text would do nothing even without escaping.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    title = escape(_title(arms))
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>{content}</section>'
        for name, heading, content in sections
    )
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{_HATCHES}
<a class="skip" href="#results">Skip to the results</a>
<header>{_header(arms, title, now)}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
{_legend([*bases, *arms])}
<main>{body}</main>
<footer><p>{escape(_versions([run for arm in arms for run in arm.runs]))}</p></footer>
<script>{script}</script>
</body>
</html>
"""


# The style sheet refers to these patterns; with them, parts of stacked bars can be told apart without colour.
_HATCHES = """<svg width="0" height="0" aria-hidden="true" focusable="false" class="defs"><defs>
<pattern id="h1" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<path d="M0 0V5" stroke="var(--hatch)" stroke-width="1.6"/></pattern>
<pattern id="h2" width="5" height="5" patternUnits="userSpaceOnUse"><path d="M0 2.5H5" stroke="var(--hatch)"/></pattern>
<pattern id="h3" width="5" height="5" patternUnits="userSpaceOnUse">
<path d="M0 0L5 5M5 0L0 5" stroke="var(--hatch)"/></pattern></defs></svg>"""


def _title(arms: Sequence[Arm]) -> str:
    suites = list(dict.fromkeys(run.suite for arm in arms for run in arm.runs if run.suite))
    names = [arm.name for arm in arms]
    if suites and all(run.suite for arm in arms for run in arm.runs):
        return f"{', '.join(suites)}: {', '.join(names)}"
    return ", ".join(names)


def _header(arms: Sequence[Arm], title: str, now: datetime) -> str:
    runs = [run for arm in arms for run in arm.runs]
    steps = sorted({run.num_steps_done for run in runs})
    span = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    periods = [run.period for run in runs if run.period]
    facts = {
        "Runs": f"{len(runs)} of {len(arms)} arm{'s' if len(arms) > 1 else ''}",
        "Model": _values(runs, "model.path"),
        "Trained on": _values(runs, "data.train.name"),
        "Steps": f"{span} of {_values(runs, 'learner.num_steps')}",
        "Trained": "no run.log says when",
        "This page": f"{now:%Y-%m-%d %H:%M} UTC, by dphrl {dphrl.__version__}",
    }
    if periods:
        begin, end = min(p[0] for p in periods), max(p[1] for p in periods)
        facts["Trained"] = f"{begin.replace('T', ' ')} to {end.replace('T', ' ')} UTC"
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    partial = [run for run in runs if run.state != "finished"]
    warning = ""
    if partial:
        names = "; ".join(f"{run.folder.name}: {run.state}" for run in partial)
        warning = f'<p class="warning"><strong>Not finished.</strong> {escape(names)}.</p>'
    toggle = '<button type="button" id="theme" hidden>Dark or light</button>'
    return f"<div class='top'><h1>{title}</h1>{toggle}</div><dl>{listed}</dl>{warning}{runs_table(arms)}"


def _versions(runs: Sequence[Run]) -> str:
    found = list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.versions.items()) for run in runs if run.versions))
    return f"Trained with {'; '.join(found)}." if found else "These runs do not say which versions they were made with."


def _values(runs: Sequence[Run], dotted: str) -> str:
    return ", ".join(dict.fromkeys(str(run.setting(dotted, "?")) for run in runs))


def _legend(arms: Sequence[Arm]) -> str:
    items = "".join(
        f'<li><button type="button" aria-pressed="true" data-key="{style_of(arm).key}">{swatch(style_of(arm))}'
        f"{escape(arm.name)}</button></li>"
        for arm in arms
    )
    return f'<div class="legend" role="group" aria-label="Arms: press to hide or show"><ul>{items}</ul></div>'


def _results(arms: Sequence[Arm], bases: Sequence[Arm]) -> str:
    rows = [*bases, *arms]
    datasets = datasets_of(rows)
    if not datasets:
        return note("No run was evaluated (evaluation.num_samples is 0, or the runs were stopped before).")
    several = any(arm.num_seeds > 1 for arm in rows)
    intervals = "over seeds (Student's t), of a single seed over prompts (bootstrap)" if several else "over prompts"
    text = (
        f"Bold: the best of a column. Small: the 95 % interval {intervals}. Each arm at its newest evaluation. "
        "Pass@k: the chance that k samples hold a correct one. Retention: of the prompts the base solves, the share "
        "still solved. Distinct correct: different correct solutions a prompt."
    )
    without = [arm.name for arm in arms if all(run.last_evaluated_step is None for run in arm.runs)]
    missing = note(f"Not evaluated after training began: {', '.join(without)}.") if without else ""
    tables = "".join(one_summary_table(rows, dataset) for dataset in datasets)
    changes = "".join(difference_table(arms, dataset) for dataset in datasets)
    return note(text) + missing + tables + (note(_ABOUT_CHANGES) + changes if changes else "")


def _per_dataset(render: Any, arms: Sequence[Arm], *, wraps: bool = True) -> str:
    parts = [render(arms, dataset) for dataset in datasets_of(arms)]
    if not any(parts):
        return note("No evaluation to draw.")
    return f'<div class="grid large">{"".join(parts)}</div>' if wraps else "".join(parts)


def _mass(arms: Sequence[Arm]) -> str:
    tables = "".join(strategies_table(arms, dataset) for dataset in datasets_of(arms))
    if not tables:
        return note("No evaluation counted strategies: the reward has none, or the runs are of an older version.")
    return note(ABOUT_STRATEGIES) + tables


def _retention(arms: Sequence[Arm]) -> str:
    return _per_dataset(retention_table, arms, wraps=False) + "".join(
        lost_prompts(arms, dataset) for dataset in datasets_of(arms)
    )


def _training(arms: Sequence[Arm], render: Any) -> str:
    if not any(run.metrics for arm in arms for run in arm.runs):
        return note("No step was recorded.")
    return str(render(arms))


def _events(arms: Sequence[Arm]) -> str:
    text = "What a run told of itself, most of it once until it had healed. Thin upright lines in the charts above."
    found = events_table(arms)
    return note(text) + found if found else note("No run has told of anything.")


def _samples(arms: Sequence[Arm]) -> str:
    samples = choose_samples(arms)
    if not samples.page["rows"]:
        return note(samples.summary)
    return f"""{note(samples.summary)}
<noscript><p class="note">Browsing completions needs JavaScript; the runs' samples/ hold them as text.</p></noscript>
<form id="browser" hidden aria-label="Choose completions">
<label>Data set <select name="dataset"></select></label>
<label>Step <select name="step"></select></label>
<label>Prompt <select name="prompt"></select></label>
<label>Arm <select name="arm"></select></label>
<label>Status <select name="status"></select></label>
<label>Text <input name="text" type="search" placeholder="in prompt or completion"></label>
</form>
<p id="found" role="status"></p>
<p class="note paper">On paper: the first three prompts chosen, nine completions of each.</p>
<div id="completions"></div>
<button type="button" id="more" hidden>Show more</button>
<script type="application/json" id="samples-data">{embed_json(samples.page)}</script>"""


def _reference(arms: Sequence[Arm]) -> str:
    users: dict[str, list[tuple[str, Run, ReferenceSplit]]] = {}
    without, missing = [], []
    for arm in arms:
        for run in arm.runs:
            name = f"{arm.name}, seed {run.seed}" if arm.num_seeds > 1 else arm.name
            # The settings decide: a run's folder may hold a buffer that the run had no use for.
            if not run.uses_reference_stage:
                without.append(name)
            elif run.reference is None:
                missing.append(name)
            else:
                key = json.dumps([run.reference.fingerprint, run.reference.counts], sort_keys=True)
                users.setdefault(key, []).append((name, run, run.reference))
    parts = []
    rows, figures = [], []
    for group in users.values():
        names, run, split = "; ".join(name for name, _, _ in group), group[0][1], group[0][2]
        rows.append(split_row(names, run, split))
        k, threshold = run.setting("reference.num_samples"), run.setting("reference.threshold")
        if isinstance(k, int) and isinstance(threshold, int) and split.num_correct:
            figures.append(split_figure(names, split, k, threshold))
    if rows:
        text = (
            "Before training, the initial policy's responses to every training prompt were graded. Near-perfect "
            "prompts are rehearsed by the divergence, or replayed; the others are explored. All wrong: no response "
            "correct, counted among exploration or dropped. Ungraded: the grader failed on every response."
        )
        parts += [note(text), table("Reference split", SPLIT_COLUMNS, rows, css="numbers")]
    if without:
        parts.append(note(f"No reference stage (no divergence, or one on rollouts alone): {'; '.join(without)}."))
    if missing:
        parts.append(note(f"Reference stage not finished, or its files are gone: {'; '.join(missing)}."))
    if len(figures) > MAX_SPLIT_FIGURES:
        parts.append(note(f"Drawn: the first {MAX_SPLIT_FIGURES} of {len(figures)}."))
    return f'{"".join(parts)}<div class="grid small">{"".join(figures[:MAX_SPLIT_FIGURES])}</div>'


def _settings(arms: Sequence[Arm]) -> str:
    parts = [note("Aside from run_name, run_dir and seed."), settings_table(arms)]
    for arm in arms:
        run = arm.runs[0]
        which = f" (seed {run.seed})" if arm.num_seeds > 1 else ""
        parts.append(
            f"<details><summary>All settings of {escape(arm.name)}{which}</summary>"
            f"<pre>{escape(run.config_text)}</pre></details>"
        )
    return "".join(parts)


def _asset(name: str) -> str:
    return resources.files("dphrl").joinpath("report", "assets", name).read_text(encoding="utf-8")
