"""The Grafana dashboard of a run: the questions of `panels`, as Grafana's JSON.

`python -m cluster.dashboards.grafana` writes `dphrl.json` beside this file; a test keeps the two equal. Import that
file into Grafana, or provision it, beside a Prometheus that scrapes the Ray cluster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.prometheus import Family
from cluster.dashboards.panels import ROWS, Panel
from cluster.dashboards.queries import BY_NAME, counted, newest, quantile, series

DASHBOARD = Path(__file__).with_name("dphrl.json")
# Grafana 12.2 and later; older ones read it too, as they ignore what they do not know.
SCHEMA_VERSION = 42
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Grafana's grid is this wide.
COLUMNS = 24
PANEL_HEIGHT = 7
# How Grafana writes a family's unit; a plain number where it is not listed.
UNITS = {"s": "s", "share": "percentunit", "tokens/s": "none", "GB/s": "GBs"}


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
    """The queries that show a family, as (PromQL, legend)."""
    chosen = 'run=~"$run"'
    legend = " ".join(f"{{{{{tag}}}}}" for tag in family.tags)
    if family.kind == "counter":
        return [(counted(family.name, "$window", chosen), legend)]
    if family.kind == "histogram":
        return [(quantile(family, q, "$window", chosen), f"{legend} p{100 * q:g}") for q in quantiles]
    return [(newest(family.name, chosen), legend)]


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
    custom: dict[str, Any] = {"lineWidth": 1, "showPoints": "never", "spanNulls": False}
    if panel.log_scale:
        custom |= {"scaleDistribution": {"type": "log", "log": 10}}
    defaults: dict[str, Any] = {"custom": custom, "unit": UNITS.get(families[0].unit, "short")}
    if steps := _bound(panel):
        custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    return {
        "type": "timeseries",
        "title": panel.title,
        # Shown where one points at the title: first what to do, then what the numbers are.
        "description": "\n\n".join([panel.when_bad, *(family.description for family in families)]),
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"calcs": ["lastNotNull"], "displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _bound(panel: Panel) -> list[dict[str, Any]]:
    """The colours on both sides of the line between good and bad answers; none of a panel without a bound."""
    if panel.above is None and panel.below is None:
        return []
    first, then = ("transparent", "red") if panel.below is None else ("red", "transparent")
    return [{"color": first, "value": None}, {"color": then, "value": panel.above or panel.below}]


def _variables() -> list[dict[str, Any]]:
    runs = f"label_values({series('dphrl_step')}, run)"
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
