"""The dashboard shows what is exported, all of it, and the committed file is the generated one."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from actors.prometheus import FAMILIES
from cluster.dashboards import grafana
from cluster.dashboards.panels import Panel
from cluster.dashboards.queries import BY_NAME
from tests.unit.promql import EXPORTED, faults, names_in


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(grafana.DASHBOARD.read_text(encoding="utf-8"))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_committed_file_is_the_generated_one() -> None:
    text = grafana.DASHBOARD.read_text(encoding="utf-8")
    assert text == grafana.render(), "run: python -m cluster.dashboards.grafana"


def test_every_query_names_what_is_exported(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        assert len(names_in(expression)) == 1, expression
        assert faults(expression) == [], expression


def test_every_family_is_shown(dashboard: dict[str, Any]) -> None:
    shown = {EXPORTED[name].name for expression in expressions(dashboard) for name in names_in(expression)}
    assert {family.name for family in FAMILIES} - shown == set()


def test_every_query_keeps_the_tags_of_its_family_and_its_parentheses(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        (name,) = names_in(expression)
        by = re.search(r"by \(([^)]*)\)", expression)
        assert by is not None, expression
        assert set(by[1].split(", ")) - {"le"} == set(EXPORTED[name].tags)
        assert expression.count("(") == expression.count(")")
        selectors = re.findall(rf"{name}(\S*)", expression)
        assert all(selector.startswith('{run=~"$run"}') for selector in selectors), expression


def test_queries_of_each_kind() -> None:
    def of(name: str) -> list[tuple[str, str]]:
        return grafana.expressions(BY_NAME[name], (0.95,))

    chosen = '{run=~"$run"}'
    assert of("dphrl_engine_busy_fraction") == [
        (f"max by (run, engine) (ray_dphrl_engine_busy_fraction{chosen})", "{{run}} {{engine}}")
    ]
    name = f"ray_dphrl_skipped_steps_total{chosen}"
    assert of("dphrl_skipped_steps_total") == [
        (f"sum by (run) (({name} unless {name} offset $window) or increase({name}[$window]))", "{{run}}")
    ]
    buckets = f"rate(ray_dphrl_step_seconds_bucket{chosen}[$window])"
    assert of("dphrl_step_seconds") == [(f"histogram_quantile(0.95, sum by (run, le) ({buckets}))", "{{run}} p95")]


@pytest.mark.parametrize(
    ("bounds", "colors"),
    [
        ({}, []),
        ({"above": 0.8}, [("transparent", None), ("red", 0.8)]),
        ({"below": 0.1}, [("red", None), ("transparent", 0.1)]),
    ],
)
def test_the_bad_side_of_a_bound_is_red(bounds: dict[str, float], colors: list[tuple[str, float | None]]) -> None:
    defaults = grafana._chart(Panel("Is it?", ["dphrl_step"], "Do.", **bounds))["fieldConfig"]["defaults"]
    steps = defaults.get("thresholds", {}).get("steps", [])
    assert [(step["color"], step["value"]) for step in steps] == colors
    assert defaults["custom"].get("thresholdsStyle") == ({"mode": "dashed"} if colors else None)


def test_variables_are_the_ones_queries_use(dashboard: dict[str, Any]) -> None:
    defined = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used == set(defined) == {"datasource", "run", "window"}
    assert faults(defined["run"]["definition"].replace(", run)", ")")) == []


def test_panels_lie_side_by_side_in_their_rows(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "At a glance",
        "Does it learn?",
        "Does it stay diverse?",
        "Where does the time go?",
        "Is it well?",
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= grafana.COLUMNS
        taken |= cells
