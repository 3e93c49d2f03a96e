"""Pass@1 against Pass@k: hypervolumes and fronts by hand, methods over eta, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.config.loading import InputError
from dphrl.evaluation.estimators import summarize
from dphrl.experiments.pareto import Point, choose_k, front, hypervolume, hypervolumes, methods_of, points_of
from dphrl.experiments.results import add_up, rows_of, write_results
from dphrl.experiments.suite import about, committed_results, load_suite
from dphrl.report.pareto import write_pareto

SHARES = st.floats(0, 1)


def results_of(runs: dict[tuple[str, int], list[int]], methods: Any = None) -> dict[str, Any]:
    def evaluation(correct: list[int]) -> list[dict[str, Any]]:
        return [summarize("d", "test", [(str(i), 4, c) for i, c in enumerate(correct)], (1, 4), None)]

    rows = [row for (arm, seed), correct in runs.items() for row in rows_of(arm, seed, evaluation(correct))]
    kinds = {arm: "plain" for arm, _ in runs if arm != "base"}
    return add_up("mine", rows, (1, 4), kinds) | ({} if methods is None else {"methods": methods})


# -------------------------------------------------------------------------------------------- one number


@pytest.mark.parametrize(
    ("points", "reference", "area"),
    [
        ([], (0, 0), 0.0),
        # One point: its rectangle.
        ([(0.5, 0.6)], (0, 0), 0.30),
        ([(0.5, 0.6)], (0.4, 0.5), 0.01),
        # Two: .5 * .6, and .4 wide from .6 up to .9 is .12 more.
        ([(0.5, 0.6), (0.4, 0.9)], (0, 0), 0.42),
        ([(0.4, 0.9), (0.5, 0.6)], (0, 0), 0.42),
        # A dominated third changes nothing; neither does one that is there twice.
        ([(0.5, 0.6), (0.4, 0.9), (0.4, 0.6)], (0, 0), 0.42),
        ([(0.5, 0.6), (0.5, 0.6), (0.5, 0.2)], (0, 0), 0.30),
        # Three: .6 * .3, .5 wide from .3 to .6 is .15, .4 wide from .6 to .9 is .12.
        ([(0.5, 0.6), (0.6, 0.3), (0.4, 0.9)], (0, 0), 0.45),
        # Below the reference point in one rate, at it, or in both: nothing.
        ([(0.5, 0.4)], (0.4, 0.5), 0.0),
        ([(0.3, 0.9)], (0.4, 0.5), 0.0),
        ([(0.4, 0.9), (0.9, 0.5)], (0.4, 0.5), 0.0),
        ([(0.1, 0.1)], (0.4, 0.5), 0.0),
        # A point below it does not stand in the way of one above: .1 * .1.
        ([(0.9, 0.4), (0.5, 0.6)], (0.4, 0.5), 0.01),
    ],
)
def test_hypervolumes_by_hand(points: list[tuple[float, float]], reference: tuple[float, float], area: float) -> None:
    assert hypervolume(points, reference) == pytest.approx(area)


def test_the_front_by_hand() -> None:
    points = [(0.5, 0.6), (0.4, 0.9), (0.4, 0.6), (0.6, 0.3), (0.5, 0.6), (0.6, 0.2), (0.1, 0.9)]
    assert front(points) == [(0.4, 0.9), (0.5, 0.6), (0.6, 0.3)]
    assert front([]) == []


@given(st.lists(st.tuples(SHARES, SHARES), max_size=8), st.tuples(SHARES, SHARES))
def test_the_area_is_what_the_points_dominate(
    points: list[tuple[float, float]], reference: tuple[float, float]
) -> None:
    # On a fine grid, the share of the cells whose centre a point dominates.
    grid = (np.arange(200) + 0.5) / 200
    covered = np.zeros((200, 200), dtype=bool)
    for x, y in points:
        covered |= (grid[:, None] < x) & (grid[None, :] < y)
    covered &= (grid[:, None] > reference[0]) & (grid[None, :] > reference[1])
    assert hypervolume(points, reference) == pytest.approx(covered.mean(), abs=0.03)
    assert hypervolume(front(points), reference) == pytest.approx(hypervolume(points, reference))


# -------------------------------------------------------------------------------------------- methods


def test_arms_that_differ_in_eta_alone_are_one_method() -> None:
    js, alpha = {"algorithm.divergence": "js"}, {"algorithm.divergence": {"name": "alpha", "alpha": 0.5}}
    methods = methods_of(
        {
            "grpo": {"algorithm.divergence": "none"},
            "dph-js-0.1": js | {"algorithm.eta": 0.1},
            "dph-js-1.0": js | {"algorithm.eta": 1},
            "dph-js-1.0-fast": js | {"algorithm.eta": 1.0, "learner.lr": 1.0},
            "weak": alpha | {"algorithm.eta": 0.1},
            "strong": alpha | {"algorithm.eta": 0.9},
        }
    )
    assert methods["grpo"] == {"method": "grpo", "eta": None}
    assert methods["dph-js-0.1"] == {"method": "dph-js", "eta": 0.1}
    assert methods["dph-js-1.0"] == {"method": "dph-js", "eta": 1.0}
    assert methods["dph-js-1.0-fast"] == {"method": "dph-js-1.0-fast", "eta": 1.0}
    assert methods["weak"]["method"] == methods["strong"]["method"] == "weak, strong", "names that share nothing"
    # The shared part of the names is another arm's.
    both = {"js": {"a": 1}, "js-1": {"algorithm.eta": 1.0}, "js-2": {"algorithm.eta": 2.0}}
    assert methods_of(both)["js-1"]["method"] == "js-1, js-2"
    assert about(load_suite("tune-long"))["methods"]["dph-f-0.35"] == {"method": "dph-f", "eta": 0.35}


def test_points_and_hypervolumes_of_a_suite_by_hand() -> None:
    methods = {arm: {"method": "dph", "eta": eta} for arm, eta in (("strong", 1.0), ("weak", 0.1))}
    runs = {("base", 1): [1, 1], ("base", 2): [1, 1], ("strong", 1): [2, 2], ("strong", 2): [2, 2]}
    runs |= {("weak", 1): [4, 0], ("weak", 2): [4, 2], ("weak", 3): [4, 4], ("grpo", 1): [3, 0], ("grpo", 2): [0, 3]}
    results = results_of(runs, methods)
    points = points_of(results, "in_domain", 4)
    assert points[0] == Point("base", "base", None, 1, 0.25, 1.0)
    assert Point("dph", "weak", 0.1, 1, 0.5, 0.5) in points
    volumes = hypervolumes(results, "in_domain", 4)
    # dph on seed 1: (.5, 1) and (.5, .5) make .5; on seed 2 (.5, 1) and (.75, 1) make .75. Seed 3 lacks `strong`.
    assert volumes["dph"]["num_etas"] == 2
    assert volumes["dph"]["cell"]["mean"] == pytest.approx(0.625)
    assert volumes["dph"]["cell"]["high"] - 0.625 == pytest.approx(12.706 * 0.125), "Student's t over two seeds"
    # The base has .25 * 1 on both seeds: .25 and .5 more.
    assert volumes["dph"]["above_base"]["mean"] == pytest.approx(0.375)
    assert volumes["grpo"]["cell"]["mean"] == pytest.approx(0.375 * 0.5)
    assert list(volumes) == ["base", "dph", "grpo"]
    assert "above_base" not in volumes["base"]
    above = hypervolumes(results, "in_domain", 4, reference=(0.25, 0.5))
    # Over the base's Pass@1 and .5: dph has .25 * .5 and .5 * .5; GRPO never gets above .5.
    assert above["dph"]["cell"]["mean"] == pytest.approx((0.125 + 0.25) / 2)
    assert above["grpo"]["cell"]["mean"] == 0.0


def test_of_one_seed_the_interval_is_over_prompts_that_both_etas_share() -> None:
    methods = {arm: {"method": "dph", "eta": eta} for arm, eta in (("strong", 1.0), ("weak", 0.1))}
    results = results_of({("base", 1): [2, 2] * 20, ("strong", 1): [4, 0] * 20, ("weak", 1): [4, 0] * 20}, methods)
    cell = hypervolumes(results, "in_domain", 4)["dph"]["cell"]
    # Both etas solve the same prompts: the hypervolume of a resample is the square of its share p of solved ones, so
    # its bounds are squares of p's, .5 ± 1.96 * .5 / sqrt(40).
    assert cell["mean"] == 0.25
    assert (cell["low"] ** 0.5, cell["high"] ** 0.5) == (pytest.approx(0.345, abs=0.03), pytest.approx(0.655, abs=0.03))
    assert hypervolumes(results, "in_domain", 4)["base"]["cell"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_k_is_16_or_the_largest_or_the_wanted_one() -> None:
    assert choose_k({"k": [1, 8, 16, 32]}) == 16
    assert choose_k({"k": [1, 4, 8]}) == 8
    assert choose_k({"k": [1, 8, 16, 32]}, 32) == 32
    for k in (1, 64):
        with pytest.raises(ValueError, match=r"among the results' \(8, 16\)"):
            choose_k({"k": [1, 8, 16]}, k)


# -------------------------------------------------------------------------------------------- the picture


def seeds_of(svg: ElementTree.Element, arm: str) -> list[list[list[float]]]:
    groups = [group for group in svg.iter() if group.get("data-name") == arm]
    return [[[float(v) for v in p.split(",")] for p in group.get("data-seeds", "").split()] for group in groups]


def test_the_picture_has_a_point_for_each_seed_and_joins_etas(tmp_path: Path) -> None:
    methods = {arm: {"method": "dph", "eta": eta} for arm, eta in (("strong", 1.0), ("weak", 0.1))}
    runs = {("base", 1): [1, 1], ("strong", 1): [2, 2], ("weak", 1): [4, 0], ("weak", 2): [4, 2], ("grpo", 1): [3, 0]}
    write_pareto(results_of(runs, methods), tmp_path / "a.svg")
    write_pareto(results_of(runs, methods), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    svg = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert seeds_of(svg, "weak") == [[[50.0, 50.0], [75.0, 100.0]]]
    assert seeds_of(svg, "base") == [[[25.0, 100.0]]]
    joined = [group.get("data-arms") for group in svg.iter() if group.get("data-arms")]
    assert joined == ["weak strong"], "by rising eta, and no arm alone"
    texts = [text.text for text in svg.iter() if text.tag.endswith("}text")]
    assert {"weak", "strong", "grpo", "base", "Pass@1, % of prompts", "Pass@4, % of prompts"} <= set(texts)


def test_committed_points_are_drawn_for_both_domains(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["experiment", "--show", "tune-long", "--pareto", str(tmp_path / "p.svg"), "--k", "32", "--json"]
    )
    assert done.exit_code == 0, done.output
    results = json.loads(done.output)
    assert results["hypervolume"]["in_domain"]["dph-f"]["num_etas"] == 3
    svg = ElementTree.parse(tmp_path / "p.svg").getroot()
    arm = committed_results("tune-long")["arms"]["dph-f-0.1"]
    expected = [
        [[pytest.approx(100 * arm[domain][key]["mean"], abs=0.01) for key in ("pass@1", "pass@32")]]
        for domain in ("in_domain", "out_of_domain")
    ]
    assert seeds_of(svg, "dph-f-0.1") == expected


def test_bad_pictures_are_one_line(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", results_of({("base", 1): [1, 1], ("grpo", 1): [2, 2]}))
    show = ["experiment", "--show", str(tmp_path / "results.json")]
    for arguments, words in (
        ([*show, "--pareto", str(tmp_path / "a.png")], "ends in .svg"),
        ([*show, "--pareto", str(tmp_path / "a.svg"), "--k", "16"], "k=16 is not among the results' (4)"),
        ([*show, "--k", "4"], "--k: goes with --pareto"),
        (["experiment", "passk-math", "--pareto", str(tmp_path / "a.svg")], "--pareto: goes with --show"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, words in done.output) == (2, True), done.output
        assert done.output.count("\n") == 1
    with pytest.raises(InputError):
        write_pareto(results_of({("base", 1): [1, 1]}), tmp_path / "absent" / "deep" / "x.txt")
    assert not (tmp_path / "a.svg").exists()
