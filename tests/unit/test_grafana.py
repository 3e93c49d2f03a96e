"""The dashboard shows what is exported, all of it, and the committed file is the generated one."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from actors.prometheus import FAMILIES, RAY_PREFIX, Family
from cluster.dashboards import grafana

# What Prometheus stores for a family of each kind.
SERIES = {"gauge": [""], "counter": [""], "histogram": ["_bucket", "_sum", "_count"]}
EXPORTED = {f"{RAY_PREFIX}{family.name}{suffix}": family.name for family in FAMILIES for suffix in SERIES[family.kind]}
FUNCTIONS = {"sum", "max", "by", "rate", "increase", "histogram_quantile", "le", "run"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(grafana.DASHBOARD.read_text(encoding="utf-8"))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def series_in(expression: str) -> set[str]:
    """The metric names of a PromQL expression: words that are no function, label or variable."""
    bare = re.sub(r"{[^}]*}|\[[^\]]*\]|by \([^)]*\)", " ", expression)
    return set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS


def test_the_committed_file_is_the_generated_one() -> None:
    text = grafana.DASHBOARD.read_text(encoding="utf-8")
    assert text == grafana.render(), "run: python -m cluster.dashboards.grafana"


def test_every_query_names_what_is_exported(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        names = series_in(expression)
        assert len(names) == 1, expression
        assert names <= set(EXPORTED), expression


def test_every_family_is_shown(dashboard: dict[str, Any]) -> None:
    shown = {EXPORTED[name] for expression in expressions(dashboard) for name in series_in(expression)}
    assert {family.name for family in FAMILIES} - shown == set()


def test_every_query_keeps_the_tags_of_its_family_and_its_parentheses(dashboard: dict[str, Any]) -> None:
    families = {family.name: family for family in FAMILIES}
    for expression in expressions(dashboard):
        (name,) = series_in(expression)
        by = re.search(r"by \(([^)]*)\)", expression)
        assert by is not None, expression
        assert set(by[1].split(", ")) - {"le"} == set(families[EXPORTED[name]].tags)
        assert expression.count("(") == expression.count(")")
        assert '{run=~"$run"}' in expression


def test_queries_of_each_kind() -> None:
    def of(kind: Any, key: str = "a/{tag}") -> list[tuple[str, str]]:
        return grafana.expressions(Family(key, "dphrl_a", kind, "", ""), (0.95,))

    chosen = '{run=~"$run"}'
    assert of("gauge") == [(f"max by (run, tag) (ray_dphrl_a{chosen})", "{{run}} {{tag}}")]
    assert of("counter", "a") == [(f"sum by (run) (increase(ray_dphrl_a{chosen}[$window]))", "{{run}}")]
    assert of("histogram", "a") == [
        (f"histogram_quantile(0.95, sum by (run, le) (rate(ray_dphrl_a_bucket{chosen}[$window])))", "{{run}} p95")
    ]


def test_the_parser_of_this_test_sees_a_name_that_is_not_exported() -> None:
    assert series_in('sum by (run) (rate(ray_dphrl_gone_total{run=~"$run"}[$window])) / ray_dphrl_step') == {
        "ray_dphrl_gone_total",
        "ray_dphrl_step",
    }


def test_variables_are_the_ones_queries_use(dashboard: dict[str, Any]) -> None:
    defined = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used == set(defined) == {"datasource", "run", "window"}
    assert series_in(defined["run"]["definition"].replace("label_values", "max").replace(", run", "")) <= set(EXPORTED)


def test_panels_lie_side_by_side_in_their_rows(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Learning",
        "Diversity",
        "Throughput",
        "Health",
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= grafana.COLUMNS
        taken |= cells
