"""The report's figures of evaluations and of training: Pass@k, Pass@1 against Pass@k, metrics over the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dphrl.report.axes import k_axis, linear_axis, log_axis, show_number, step_axis
from dphrl.report.charts import Line, line_chart
from dphrl.report.runs import Arm, DatasetKey, Run
from dphrl.report.statistics import (
    Band,
    largest,
    over_seeds,
    pass_at_k_curve,
    pass_keys,
    plane_points,
    series,
    tokens_per_second,
    trained_summaries,
)
from dphrl.report.svg import Style
from dphrl.report.text import escape
from dphrl.tracking.metrics import BY_NAME

# A run of fewer steps is drawn as it is; a longer run is smoothed over this share of its steps.
MIN_STEPS_TO_SMOOTH = 50
SMOOTHED_SHARE = 1 / 25
# With more arms than this, faint raw curves would hide one another and the smoothed curves, so none are drawn.
MAX_RAW_CURVES = 3
LARGE = (480.0, 320.0)
# Inline, on a CPU, or in a run of before it was measured there is none of these, and no chart that says so.
WHERE_MEASURED = (
    ("Learner waiting", "time/waiting_share"),
    ("Learner's speed", "learner/tokens_per_s"),
    ("Engines at work", "rollout/busy_fraction"),
    ("Learner's use of its GPUs", "learner/mfu"),
    ("Speed of a sync", "sync/gb_per_s"),
)


def style_of(arm: Arm) -> Style:
    """The look of an arm in all charts."""
    return Style(f"{'b' if arm.is_base else 'a'}{arm.index}", arm.index, arm.is_base)


def figure(title: str, caption: str, svg: str, css: str = "") -> str:
    """A chart under its heading; caption is text, svg markup."""
    return (
        f'<figure class="{css}"><figcaption><h4>{escape(title)}</h4><p>{escape(caption)}</p></figcaption>{svg}</figure>'
    )


def note(text: str) -> str:
    """A remark as a paragraph; text is not markup."""
    return f'<p class="note">{escape(text)}</p>'


# -------------------------------------------------------------------------------------------- evaluations


def pass_at_k_figure(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """Pass@k over k, for the base and for the newest evaluation of every arm."""
    lines = []
    for arm in arms:
        if curve := pass_at_k_curve(trained_summaries(arm, dataset)):
            last = curve.xs[-1]
            marked = frozenset(float(2**i) for i in range(20) if 2**i < last)
            lines.append(Line(arm.name, style_of(arm), _in_percent(curve), marked=marked))
    if not lines:
        return ""
    x = k_axis("k: samples a prompt (log scale)", int(max(line.band.xs[-1] for line in lines)))
    values = [v for line in lines for ys in (line.band.ys, line.band.low or ()) for v in ys if v is not None]
    values += [v for line in lines for v in line.band.high or () if v is not None]
    y = linear_axis("Pass@k, % of prompts", values, floor=0.0, cap=100.0)
    ends = "; ".join(
        f"{line.name} {_percent(line.band.ys[0])} to {_percent(line.band.ys[-1])}" for line in lines if line.band.ys
    )
    title = f"Pass@k on {name_of(dataset)}"
    svg = line_chart(title, f"From k = 1 to the largest: {ends}.", x, y, lines, size=LARGE)
    return figure(name_of(dataset), _band_note(arms), svg, "large")


def plane_figure(arms: Sequence[Arm], dataset: DatasetKey) -> str:
    """Pass@1 against Pass@k over training; only a note if the evaluations have one k."""
    summaries = [
        s for arm in arms for run in arm.runs for found in run.evaluations.values() if (s := found.get(dataset))
    ]
    shared = [key for key in pass_keys(summaries) if all(key in summary for summary in summaries)]
    if len(shared) < 2:
        return note(f"{name_of(dataset)}: evaluation.k gives no second k to set against Pass@1.")
    first, last = shared[0], shared[-1]
    lines = []
    for arm in arms:
        points = plane_points(arm, dataset, (first, last))
        if arm.is_base:
            points = [point for point in points if point[0] == 0]
        if points:
            xs, ys = [100 * x for _, x, _ in points], [100 * y for _, _, y in points]
            notes = [f"step {step}" if step else "base" for step, _, _ in points]
            lines.append(Line(arm.name, style_of(arm), Band(xs, ys), marked=frozenset(xs), notes=notes))
    if not lines:
        return note(f"{name_of(dataset)}: no step at which all of an arm's runs were evaluated.")
    x = linear_axis(f"{_pass_name(first)}, % of prompts", [v for line in lines for v in line.band.xs], floor=0, cap=100)
    ys = [v for line in lines for v in line.band.ys if v is not None]
    y = linear_axis(f"{_pass_name(last)}, % of prompts", ys, floor=0, cap=100)
    title = f"{_pass_name(first)} against {_pass_name(last)} on {name_of(dataset)}"
    description = "; ".join(
        f"{line.name} ends at {_percent(line.band.xs[-1])}, {_percent(line.band.ys[-1])}" for line in lines
    )
    caption = (
        f"A point per evaluation, joined in the order of training from the base on. Up and to the right is better; "
        f"down is diversity lost. On the thin diagonal {_pass_name(last)} is no more than {_pass_name(first)}."
    )
    return figure(name_of(dataset), caption, line_chart(title, description, x, y, lines, size=LARGE, is_plane=True))


def name_of(dataset: DatasetKey) -> str:
    """A data set's name with its split, as shown to readers."""
    name, split = dataset
    return f"{name}, {split.replace('_', ' ')}" if split else name


# -------------------------------------------------------------------------------------------- steps


def series_figures(arms: Sequence[Arm]) -> str:
    """Reward, entropy, divergence, log-prob gap, staleness, speeds over the steps."""
    rehearsing = [arm for arm in arms if any(run.uses_divergence for run in arm.runs)]
    silent = [arm.name for arm in arms if arm not in rehearsing]
    without = f" Not drawn, without a divergence: {', '.join(silent)}." if silent else ""
    zero = " A gap of exactly 0 lies on the lower edge."
    last = last_step(arms)
    found = [
        _series_figure(arms, last, "Reward", "reward/mean"),
        _series_figure(arms, last, "Entropy", "policy/entropy"),
        _series_figure(rehearsing, last, "Divergence loss", "divergence/loss", extra=without),
        _series_figure(arms, last, "Largest log-prob gap", "sync/logprob_gap_max", log=True, extra=zero),
        _series_figure(
            arms, last, "Mean log-prob gap", "sync/logprob_gap_mean", log=True, bound=_gap_bound(arms), extra=zero
        ),
        _series_figure(arms, last, "Staleness", "rollout/staleness_max"),
        _series_figure(arms, last, "Throughput", "", get=tokens_per_second),
        *(
            _series_figure(measured, last, title, name)
            for title, name in WHERE_MEASURED
            if (measured := [arm for arm in arms if any(series(run, name) for run in arm.runs)])
        ),
    ]
    charts = "".join(markup for markup, is_chart in found if is_chart)
    constant = "".join(markup for markup, is_chart in found if not is_chart)
    return f'<div class="grid small">{charts}</div>{constant}'


def _series_figure(
    arms: Sequence[Arm],
    last: int,
    title: str,
    metric: str,
    *,
    get: Callable[[Run], dict[int, float]] | None = None,
    log: bool = False,
    bound: tuple[float, str] | None = None,
    extra: str = "",
) -> tuple[str, bool]:
    """(markup, whether it is a chart): a series that never changes becomes a sentence.

    last: the last step on the axis. get: computes a series that is no metric itself (completion tokens a second).
    extra: text after the chart's caption.
    """
    if metric:
        unit, meaning = BY_NAME[metric].unit, BY_NAME[metric].meaning
        label = f"{metric}, {unit}" if unit else metric
    else:
        label, meaning = "tokens/s", "Completion tokens sampled for the step, over the duration of the whole step."
    found = {arm.name: [(get(run) if get else series(run, metric)) for run in arm.runs] for arm in arms}
    values = [value for runs in found.values() for run in runs for value in run.values()]
    if not values:
        return _sentence(title, meaning, "No step has it."), False
    if min(values) == max(values):
        return _sentence(title, meaning, f"{show_number(values[0])} at every step of every run."), False
    # The window is an odd number of steps: as many before a step as after it.
    window = 2 * round(last * SMOOTHED_SHARE / 2) + 1 if last >= MIN_STEPS_TO_SMOOTH else 1
    is_maximum = metric.endswith("_max")
    lines, shown = [], []
    for arm in arms:
        band = largest(found[arm.name], window) if is_maximum else over_seeds(found[arm.name], window)
        if band is None or not band.xs:
            continue
        has_raw = window > 1 and arm.num_seeds == 1 and not is_maximum and len(arms) <= MAX_RAW_CURVES
        raw = over_seeds(found[arm.name]) if has_raw else None
        lines.append(Line(arm.name, style_of(arm), band, raw=raw))
        # The faint raw curve may leave the chart at its extremes; the smoothed one and its band may not.
        shown += [v for ys in (band.ys, band.low or (), band.high or ()) for v in ys if v is not None]
    smoothing = f" {'Largest of' if is_maximum else 'Mean over'} {window} steps." if window > 1 else ""
    smoothing += " Faint: every step." if any(line.raw for line in lines) else ""
    if any(arm.num_seeds > 1 for arm in arms):
        smoothing += " Several seeds: the largest." if is_maximum else " Several seeds: mean and 95 % interval."
    is_positive = min(values) >= 0
    y = log_axis(label, values) if log else linear_axis(label, shown, floor=0.0 if is_positive else None)
    ends = "; ".join(f"{line.name} {show_number(line.band.ys[-1] or 0.0)}" for line in lines)
    svg = line_chart(
        *(title, f"{meaning} At the last step: {ends}.", step_axis("training step", last), y, lines),
        bound=bound,
        marks=_event_steps(arms),
    )
    return figure(title, f"{meaning}{smoothing}{extra}", svg), True


def _sentence(title: str, meaning: str, finding: str) -> str:
    return f"<p><strong>{escape(title)}: {escape(finding)}</strong> {escape(meaning)}</p>"


def _event_steps(arms: Sequence[Arm]) -> list[float]:
    steps = {event.get("step") for arm in arms for run in arm.runs for event in run.events}
    return sorted(float(step) for step in steps if isinstance(step, int))


def _gap_bound(arms: Sequence[Arm]) -> tuple[float, str] | None:
    bounds = {run.setting("sync.max_mean_logprob_gap") for arm in arms for run in arm.runs}
    bound = bounds.pop() if len(bounds) == 1 else None
    return (float(bound), "above this a run stops") if isinstance(bound, int | float) else None


def last_step(arms: Iterable[Arm]) -> int:
    """The last step that any run has taken; 0 when there is none."""
    return max((run.num_steps_done for arm in arms for run in arm.runs), default=0)


def _in_percent(band: Band) -> Band:
    def scale(values: Sequence[float | None] | None) -> list[float | None] | None:
        return None if values is None else [None if value is None else 100 * value for value in values]

    return Band(band.xs, scale(band.ys) or [], scale(band.low), scale(band.high))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _pass_name(key: str) -> str:
    return key.replace("pass@", "Pass@")


def _band_note(arms: Sequence[Arm]) -> str:
    several = [arm for arm in arms if arm.num_seeds > 1]
    if not several:
        return "Band: 95 % bootstrap over prompts."
    if len(several) == len(arms):
        return "Line: mean over seeds. Band: its 95 % interval (Student's t over seeds)."
    return "Several seeds: mean and its 95 % interval (Student's t); one seed: 95 % bootstrap over prompts."
