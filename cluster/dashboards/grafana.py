"""The Grafana dashboard of a run, made from the families that actors.prometheus exports.

`python -m cluster.dashboards.grafana` writes `dphrl.json` beside this file; a test keeps the two equal. Import that
file into Grafana, or provision it, beside a Prometheus that scrapes the Ray cluster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.prometheus import FAMILIES, RAY_PREFIX, Family

DASHBOARD = Path(__file__).with_name("dphrl.json")
# Grafana 12.2 and later; older ones read it too, as they ignore what they do not know.
SCHEMA_VERSION = 42
BY_NAME = {family.name: family for family in FAMILIES}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Grafana's grid is this wide.
COLUMNS = 24
PANEL_HEIGHT = 7
# How Grafana writes a family's unit; a plain number where it is not listed.
UNITS = {"s": "s", "share": "percentunit", "tokens/s": "none", "GB/s": "GBs"}


@dataclass(frozen=True)
class Panel:
    """families: shown in one chart, which has the unit of the first family. quantiles: shown of a histogram."""

    title: str
    families: Sequence[str]
    width: int = 8
    log_scale: bool = False
    quantiles: Sequence[float] = (0.5, 0.95)


def _row(title: str, *panels: Panel) -> tuple[str, tuple[Panel, ...]]:
    return title, panels


ROWS = (
    _row(
        "Learning",
        Panel("Step", ["dphrl_step", "dphrl_policy_version"]),
        Panel("Reward", ["dphrl_reward_mean", "dphrl_reward_signal_mean"]),
        Panel("Policy loss", ["dphrl_policy_loss"]),
        Panel("Gradient norm", ["dphrl_grad_norm"], log_scale=True),
        Panel("Learning rate", ["dphrl_learner_lr"]),
        Panel("Groups that teach nothing, tokens at the clip", ["dphrl_zero_variance_fraction", "dphrl_clip_fraction"]),
    ),
    _row(
        "Diversity",
        Panel("Pass@k, base and current", ["dphrl_pass_at_k"], width=12),
        Panel("Retention of what the base solves", ["dphrl_retention"], width=12),
        Panel("Different correct solutions of a prompt", ["dphrl_distinct_correct"]),
        Panel("Greedy accuracy", ["dphrl_greedy"]),
        Panel("Entropy", ["dphrl_entropy"]),
        Panel("Divergence loss", ["dphrl_divergence_loss"]),
        Panel("log u on rehearsal tokens", ["dphrl_divergence_log_u_mean"]),
        Panel("Rehearsal tokens on the tangent", ["dphrl_divergence_continued_fraction"], width=4),
        Panel("Rehearsal rows a step", ["dphrl_divergence_rows"], width=4),
    ),
    _row(
        "Throughput",
        Panel("Completion tokens a second of the step", ["dphrl_tokens_per_s"]),
        Panel("Completion tokens a second at work, by engine", ["dphrl_engine_tokens_per_s"]),
        Panel("Completion tokens sampled in $window", ["dphrl_rollout_tokens_total"]),
        Panel("Step, median and 95th percentile over $window", ["dphrl_step_seconds"]),
        Panel(
            "Where a step's time goes",
            ["dphrl_rollout_seconds", "dphrl_reward_seconds", "dphrl_learn_seconds", "dphrl_sync_seconds"],
        ),
        Panel("Trained tokens a second of the update", ["dphrl_learner_tokens_per_s"]),
        Panel(
            "Share of time: learner waiting, engines at work, GPUs' peak arithmetic",
            ["dphrl_waiting_share", "dphrl_rollout_busy_fraction", "dphrl_learner_mfu"],
        ),
        Panel("Engines at work, by engine", ["dphrl_engine_busy_fraction"]),
        Panel("Weights sent a second of the sync", ["dphrl_sync_gb_per_s"]),
        Panel("Length of a completion", ["dphrl_completion_tokens_mean"], width=4),
        Panel("Rounds of dynamic sampling", ["dphrl_rollout_rounds"], width=4),
        Panel("Completions pending, by engine", ["dphrl_engine_completions_pending"]),
        Panel(
            "Waiting: prompts for an engine, completions for a grader",
            ["dphrl_prompts_waiting", "dphrl_completions_waiting"],
        ),
        Panel("Reward workers at work", ["dphrl_reward_workers_busy"]),
    ),
    _row(
        "Health",
        Panel("Events in $window, by name", ["dphrl_events_total"], width=12),
        Panel("Optimizer steps skipped in $window", ["dphrl_skipped_steps_total"], width=6),
        Panel("Tokens whose ratio is held at its bound", ["dphrl_ratio_bounded_fraction"], width=6),
        Panel("Verdicts in $window, by status", ["dphrl_reward_status_total"], width=12),
        Panel(
            "Log-prob gap: largest, mean, largest in rollouts",
            ["dphrl_logprob_gap", "dphrl_mean_logprob_gap", "dphrl_rollout_logprob_gap"],
            width=12,
            log_scale=True,
        ),
        Panel("Staleness", ["dphrl_staleness"]),
        Panel("Completions cut at the limit", ["dphrl_truncated_fraction"]),
        Panel("Importance weight, engine to learner", ["dphrl_importance_mean"]),
        Panel(
            "Time to a verdict",
            ["dphrl_reward_latency_mean_seconds", "dphrl_reward_latency_max_seconds"],
            width=12,
            log_scale=True,
        ),
        Panel("Engines", ["dphrl_rollout_engines"], width=12),
        Panel(
            "Engines replaced, completions asked for again, in $window",
            ["dphrl_rollout_engines_replaced_total", "dphrl_rollout_resubmitted_total"],
            width=12,
        ),
        Panel(
            "Gradings retried, workers restarted, in $window",
            ["dphrl_reward_retried_total", "dphrl_reward_restarts_total"],
            width=12,
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The whole dashboard as Grafana's classic JSON model."""
    return {
        "annotations": {"list": []},
        "description": "Runs of dphrl: what they learn, what stays diverse, what it takes, whether all is well.",
        "editable": True,
        "graphTooltip": 1,  # one crosshair over all charts
        "links": [],
        "panels": _place(ROWS),
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["dphrl", "ray"],
        "templating": {"list": _variables()},
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "title": "dphrl",
        "uid": "dphrl",
        "version": 1,
    }


def expressions(family: Family, quantiles: Sequence[float] = ()) -> list[tuple[str, str]]:
    """The queries that show a family, as (PromQL, legend).

    Ray's own labels (node, session, worker) are aggregated away: a resumed run has other values of them, but should
    continue the same line.
    """
    name, chosen = RAY_PREFIX + family.name, '{run=~"$run"}'
    by = ", ".join(family.tags)
    legend = " ".join(f"{{{{{tag}}}}}" for tag in family.tags)
    if family.kind == "counter":
        return [(f"sum by ({by}) (increase({name}{chosen}[$window]))", legend)]
    if family.kind == "histogram":
        buckets = f"sum by ({by}, le) (rate({name}_bucket{chosen}[$window]))"
        return [(f"histogram_quantile({q:g}, {buckets})", f"{legend} p{100 * q:g}") for q in quantiles]
    return [(f"max by ({by}) ({name}{chosen})", legend)]


def _place(rows: Sequence[tuple[str, Sequence[Panel]]]) -> list[dict[str, Any]]:
    """Panels from left to right and from top to bottom, each row under its heading."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows:
        heading = {"collapsed": False, "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}, "panels": []}
        placed.append({"id": len(placed) + 1, "type": "row", "title": title, **heading})
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + PANEL_HEIGHT
            place = {"h": PANEL_HEIGHT, "w": panel.width, "x": x, "y": y}
            placed.append({"id": len(placed) + 1, "gridPos": place, **_chart(panel)})
            x += panel.width
        y += PANEL_HEIGHT
    return placed


def _chart(panel: Panel) -> dict[str, Any]:
    families = [BY_NAME[name] for name in panel.families]
    targets: list[dict[str, Any]] = []
    for family in families:
        for expression, legend in expressions(family, panel.quantiles):
            if len(families) > 1:
                legend = f"{legend} {family.name.removeprefix('dphrl_').removesuffix('_total')}"
            ref = chr(ord("A") + len(targets))
            targets.append({"datasource": DATASOURCE, "expr": expression, "legendFormat": legend, "refId": ref})
    custom = {"lineWidth": 1, "showPoints": "never", "spanNulls": False}
    if panel.log_scale:
        custom |= {"scaleDistribution": {"type": "log", "log": 10}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": "\n\n".join(family.description for family in families),
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"custom": custom, "unit": UNITS.get(families[0].unit, "short")}, "overrides": []},
        "options": {
            "legend": {"calcs": ["lastNotNull"], "displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    runs = f"label_values({RAY_PREFIX}dphrl_step, run)"
    windows = ["5m", "15m", "1h", "6h"]
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": DATASOURCE,
            "definition": runs,
            "query": {"query": runs, "refId": "runs"},
            "refresh": 2,  # when the time range changes, because it decides what runs there are
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        },
        {
            "name": "window",
            "label": "Window of what is counted",
            "type": "interval",
            "query": ",".join(windows),
            "auto": False,
            "options": [{"selected": window == "15m", "text": window, "value": window} for window in windows],
            "current": {"selected": True, "text": "15m", "value": "15m"},
        },
    ]


def render() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=2) + "\n"


def main() -> None:
    """Write the dashboard's file and print its path."""
    DASHBOARD.parent.mkdir(exist_ok=True)
    DASHBOARD.write_text(render(), encoding="utf-8")
    print(DASHBOARD)


if __name__ == "__main__":
    main()
