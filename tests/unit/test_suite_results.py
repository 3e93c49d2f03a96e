"""How the runs of a suite add up, by hand; the claims; the committed results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import dphrl
from cluster.cli import app
from dphrl.evaluation.differences import self_retention
from dphrl.evaluation.estimators import summarize
from dphrl.experiments.results import (
    add_up,
    claims,
    compared,
    interval_over_seeds,
    merge,
    predicted,
    read_results,
    recompute,
    rows_of,
    write_results,
)
from dphrl.experiments.show import (
    claims_table,
    count_claims,
    curve_over_seeds,
    kept_of_itself,
    line_style,
    plot,
    prediction_table,
    results_table,
)
from dphrl.experiments.suite import committed_results, load_suite

KINDS = {"grpo": "plain", "rkl": "penalised", "dph-js": "rehearsing", "maxrl": "other"}


def evaluation(correct: list[int], base: list[int] | None = None) -> list[dict[str, Any]]:
    counts = [(str(i), 4, c) for i, c in enumerate(correct)]
    base_counts = None if base is None else [(str(i), 4, c) for i, c in enumerate(base)]
    return [summarize(name, "test", counts, (1, 4), 0.5, base_counts) for name in ("in", "out", "far")]


def results_of(runs: dict[tuple[str, int], list[int]], base: list[int]) -> dict[str, Any]:
    rows = [row for seed in sorted({seed for _, seed in runs}) for row in rows_of("base", seed, evaluation(base))]
    rows += [row for (arm, seed), correct in runs.items() for row in rows_of(arm, seed, evaluation(correct, base))]
    return add_up("mine", rows, (1, 4), {arm: KINDS[arm] for arm, _ in runs})


def test_rates_add_up_over_seeds_by_hand() -> None:
    results = results_of({("grpo", 0): [4, 0], ("grpo", 1): [4, 2]}, base=[2, 2])
    assert results["seeds"] == [0, 1]
    assert list(results["arms"]) == ["base", "grpo"]
    grpo = results["arms"]["grpo"]["in_domain"]
    # Pass@1 .5 and .75: mean .625, s = .25/sqrt(2), t(1) = 12.706, half = t * s / sqrt(2) = 12.706 * .125.
    assert grpo["pass@1"]["mean"] == pytest.approx(0.625)
    assert grpo["pass@1"]["high"] - 0.625 == pytest.approx(12.706 * 0.125)
    assert grpo["pass@1"]["predict_high"] - 0.625 == pytest.approx(12.706 * 0.25 / 2**0.5 * 1.5**0.5)
    assert grpo["retention"]["mean"] == pytest.approx(0.75)
    assert grpo["greedy"]["mean"] == 0.5
    assert "retention" not in results["arms"]["base"]["in_domain"]
    assert results["arms"]["base"]["out_of_domain"]["pass@4"]["mean"] == 1.0
    header, rows = results_table(results)
    assert [len(row) for row in rows] == [len(header)] * 2


def test_the_seeds_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(0.5, 0.1, size=(4000, 4))
    cells = [interval_over_seeds(list(draw[:3])) for draw in draws]
    covered = np.mean([cell["low"] <= 0.5 <= cell["high"] for cell in cells])
    predicts = np.mean(
        [cell["predict_low"] <= draw[3] <= cell["predict_high"] for cell, draw in zip(cells, draws, strict=True)]
    )
    # Two standard errors of 4,000 draws are 0.7 points.
    assert covered == pytest.approx(0.95, abs=0.012)
    assert predicts == pytest.approx(0.95, abs=0.012)


def test_a_prediction_is_never_nearer_than_the_error_over_prompts() -> None:
    """Seeds that came out alike by luck: one more has other prompts."""
    runs = {("grpo", seed): [4, 0, 4, 0] for seed in (1, 2, 3)}
    cells = results_of(runs, base=[2, 2, 2, 0])["arms"]["grpo"]
    cell = cells["in_domain"]["pass@1"]
    assert (cell["low"], cell["high"]) == (0.5, 0.5)
    # Of four prompts s^2 is 1/3, the error sqrt(1/3 / 4); the mean of three seeds adds a third of its square.
    assert cell["predict_high"] - 0.5 == pytest.approx(1.96 * (1 / 12) ** 0.5 * (4 / 3) ** 0.5, rel=1e-3)
    # Two data sets out of domain, whose mean has half the variance; three prompts that the base solves.
    assert cells["out_of_domain"]["pass@1"]["predict_high"] - 0.5 == pytest.approx(
        1.96 / 24**0.5 * (4 / 3) ** 0.5, rel=1e-3
    )
    kept = cells["in_domain"]["retention"]
    assert kept["predict_high"] - 2 / 3 == pytest.approx(1.96 * (1 / 9) ** 0.5 * (4 / 3) ** 0.5, rel=1e-3)


def test_one_seed_has_the_interval_over_prompts() -> None:
    cells = results_of({("grpo", 3): [4, 0]}, base=[2, 2])["arms"]["grpo"]["in_domain"]
    assert cells["pass@1"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert cells["retention"] == {"mean": 0.5, "low": 0.0, "high": 1.0}


def test_a_rate_that_a_seed_lacks_is_left_out() -> None:
    results = results_of({("grpo", 0): [4, 0], ("grpo", 1): [4, 2]}, base=[0, 0])
    assert "retention" not in results["arms"]["grpo"]["in_domain"], "the base solves nothing"
    assert results["arms"]["grpo"]["in_domain"]["pass@4"]["mean"] == pytest.approx(0.75)


def test_results_come_back_from_their_rows(tmp_path: Path) -> None:
    results = results_of({("grpo", 0): [4, 0], ("grpo", 1): [3, 1]}, base=[2, 2])
    write_results(tmp_path / "results.json", results)
    read = read_results(tmp_path / "results.json")
    assert recompute(read) == results
    stored, exact = (some["arms"]["grpo"]["in_domain"]["pass@1"] for some in (read, results))
    assert stored == pytest.approx(exact, abs=1e-5)


def test_results_of_pieces_made_elsewhere_merge() -> None:
    here = results_of({("grpo", 0): [4, 0], ("dph-js", 0): [2, 2]}, base=[1, 1])
    there = results_of({("grpo", 0): [0, 0], ("grpo", 1): [4, 2], ("rkl", 1): [3, 3]}, base=[1, 1])
    both = merge(here, there)
    assert both["seeds"] == [0, 1]
    assert sorted(both["kinds"]) == ["dph-js", "grpo", "rkl"]
    # Of the run that both have, the first one's: (.5 + .75) / 2, not (0 + .75) / 2.
    assert both["arms"]["grpo"]["in_domain"]["pass@1"]["mean"] == pytest.approx(0.625)
    assert len([row for row in both["rows"] if row["arm"] == "base"]) == 6
    assert recompute(both) == both


@pytest.mark.parametrize("text", ["[{", "[]", '{"suite": "mine"}'])
def test_what_is_no_results_file_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    done = CliRunner().invoke(app, ["experiment", "--show", str(tmp_path / "bad.json")])
    assert done.exit_code == 2
    assert "bad.json" in done.output
    assert done.output.count("\n") == 1


# -------------------------------------------------------------------------------------------- claims


def test_differences_are_taken_seed_by_seed() -> None:
    # Both move by much from seed to seed, and together: their difference does not.
    results = results_of(
        {("grpo", 0): [1, 0], ("dph-js", 0): [2, 0], ("grpo", 1): [3, 2], ("dph-js", 1): [4, 2]}, base=[4, 4]
    )
    cell = compared(results, "dph-js", "in_domain", lambda a, b: a - b, ("", "pass@1"), ("grpo", "pass@1"))
    assert (cell["mean"], cell["low"], cell["high"]) == (0.125, 0.125, 0.125)
    assert results["arms"]["dph-js"]["in_domain"]["pass@1"]["low"] < 0


def test_claims_by_hand() -> None:
    # Pass@1 and Pass@4: base .25, 1; GRPO .5, .5; DPH .5, 1; reverse KL .5, .5.
    results = results_of({("grpo", 0): [4, 0], ("rkl", 0): [0, 4], ("dph-js", 0): [2, 2]}, base=[1, 1])
    found = {(c["arm"], c["domain"], c["claim"]): (c["value"]["mean"], c["holds"]) for c in claims(results)}
    assert found["grpo", "in_domain", "below the base at Pass@4 by"] == (0.5, True)
    assert found["grpo", "in_domain", "above the base at Pass@1 by"] == (0.25, True)
    assert found["dph-js", "in_domain", "above rkl at Pass@4 by"] == (0.5, True)
    assert found["dph-js", "out_of_domain", "keeps more than grpo by"] == (0.5, True)
    assert found["dph-js", "in_domain", "share of the way from GRPO to the base at Pass@4"] == (1.0, True)
    assert found["dph-js", "in_domain", "share of GRPO's gain at Pass@1"] == (1.0, True)
    assert found["dph-js", "in_domain", "not below the base at Pass@4: difference"] == (0.0, True)

    assert "0.500 (yes)" in claims_table(results)[1][0], "of one seed nothing is sure"

    worse = results_of({("grpo", 0): [4, 0], ("dph-js", 0): [3, 0]}, base=[1, 1])
    found = {(c["arm"], c["domain"], c["claim"]): (c["value"]["mean"], c["holds"]) for c in claims(worse)}
    assert found["dph-js", "in_domain", "above grpo at Pass@4 by"] == (0.0, False), "level is not above"
    assert found["dph-js", "in_domain", "share of the way from GRPO to the base at Pass@4"] == (0.0, False)
    assert found["dph-js", "in_domain", "share of GRPO's gain at Pass@1"] == (0.5, False)
    header, rows = claims_table(worse)
    verdicts = {(row[0], row[1]): row[header.index("dph-js")] for row in rows}
    assert verdicts["in", "share of GRPO's gain at Pass@1 (at least 0.85)"] == "0.500 no"
    assert verdicts["in", "above grpo at Pass@4 by"] == "0.000 no"
    assert verdicts["in", "above the base at Pass@1 by"] == "-", "GRPO's row"
    assert not any(claim["is_sure"] for claim in claims(worse)), "of one seed nothing is sure"
    twice = {(arm, seed): c for arm, c in {"grpo": [4, 0], "dph-js": [3, 3]}.items() for seed in (0, 1)}
    sure = {claim["claim"]: claim["is_sure"] for claim in claims(results_of(twice, base=[1, 1]))}
    assert sure["above grpo at Pass@4 by"]


def test_other_methods_are_held_to_the_same_and_are_nobody_s_rival() -> None:
    runs = {("grpo", 0): [4, 0], ("rkl", 0): [0, 4], ("dph-js", 0): [2, 2], ("maxrl", 0): [3, 1]}
    found = {(c["arm"], c["claim"]): c["holds"] for c in claims(results_of(runs, base=[1, 1])) if "in_d" in c["domain"]}
    assert {claim for arm, claim in found if arm == "dph-js" and claim.startswith("above")} == {
        "above grpo at Pass@4 by",
        "above rkl at Pass@4 by",
    }
    assert {claim: holds for (arm, claim), holds in found.items() if arm == "maxrl"} == {
        "above grpo at Pass@4 by": True,
        "keeps more than grpo by": True,
        "share of the way from GRPO to the base at Pass@4": True,
        "share of GRPO's gain at Pass@1": True,
        "not below the base at Pass@4: difference": True,
        "not below GRPO at Pass@1: difference": True,
    }


def test_claims_are_counted_with_what_chance_would_give() -> None:
    twice = {(arm, seed): c for arm, c in {"grpo": [4, 0], "dph-js": [3, 3]}.items() for seed in (0, 1)}
    found = claims(results_of(twice, base=[1, 1]))
    verdicts = [cell.split()[-1] for row in claims_table(results_of(twice, base=[1, 1]))[1] for cell in row[2:]]
    counted = [verdicts.count(verdict) for verdict in ("yes", "(yes)", "no")]
    said = count_claims(found)
    assert [int(number) for number in re.findall(r"(\d+) (?:hold|in the mean|do not)", said)] == counted
    assert said.startswith(f"{sum(counted)} claims were tested: ")
    assert f"about {0.025 * len(found):.1f} would" in said


def test_the_base_s_own_retention_is_said_for_each_domain() -> None:
    results = results_of({("grpo", 0): [4, 0]}, base=[2, 1])
    shares = [self_retention([{"num_samples": 4, "num_correct": c} for c in (2, 1)])] * 2
    assert shares[0] is not None
    lines = kept_of_itself(results)
    assert [line.split(":")[0] for line in lines] == ["in domain", "out of domain"]
    assert all(f"its other half solves {share:.3f};" in line for line, share in zip(lines, shares, strict=True))


def test_no_share_of_a_way_that_is_none_or_leads_down() -> None:
    level = results_of({("grpo", 0): [1, 1], ("dph-js", 0): [2, 2]}, base=[1, 1])
    assert not any("share" in claim["claim"] for claim in claims(level))
    # GRPO solves what the base does not: it gained at Pass@1, and lost nothing at Pass@4.
    gained = results_of({("grpo", 0): [2, 2], ("dph-js", 0): [3, 1]}, base=[1, 0])
    shares = {claim["claim"] for claim in claims(gained) if "share" in claim["claim"]}
    assert shares == {"share of GRPO's gain at Pass@1"}
    assert claims(results_of({("dph-js", 0): [2, 2]}, base=[1, 1])) == [], "nothing to compare with"


def test_predictions_name_what_falls_outside() -> None:
    half, every, base = [4, 0] * 40, [4, 4] * 40, [2, 2] * 40
    committed = results_of({("grpo", 1): half, ("grpo", 2): half, ("grpo", 3): half}, base)
    same, other = results_of({("grpo", 0): half}, base), results_of({("grpo", 0): every}, base)
    assert all(check["inside"] for check in predicted(same, committed))
    outside = {(c["arm"], c["rate"]) for c in predicted(other, committed) if not c["inside"]}
    assert outside == {("grpo", "pass@1"), ("grpo", "pass@4"), ("grpo", "retention")}
    assert prediction_table(predicted(other, committed))[1][0][-1] == "NO"


# -------------------------------------------------------------------------------------------- pictures


def test_the_curve_is_the_estimator_over_seeds_and_data_sets() -> None:
    results = results_of({("grpo", 0): [4, 0], ("grpo", 1): [4, 2]}, base=[2, 2])
    mine = [row for row in results["rows"] if row["arm"] == "grpo" and row["domain"] == "out_of_domain"]
    curve = curve_over_seeds(mine)
    # Of two prompts: (1 + 0) / 2 and (1 + (1 - C(2, k) / C(4, k))) / 2.
    assert [cell["mean"] for cell in curve] == pytest.approx([0.625, (0.5 + (1 + 5 / 6) / 2) / 2, 0.75, 0.75])


def test_the_picture_is_the_same_every_time(tmp_path: Path) -> None:
    results = results_of({("grpo", 0): [4, 0], ("dph-js", 0): [2, 2]}, base=[2, 2])
    for name in ("one.svg", "two.svg"):
        plot(results, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert "<svg" in (tmp_path / "one.svg").read_text()
    write_results(tmp_path / "results.json", results)
    show = ["experiment", "--show", str(tmp_path / "results.json"), "--picture"]
    assert CliRunner().invoke(app, [*show, str(tmp_path / "a.png")]).exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, [*show, str(tmp_path / "a.docx")])
    assert (refused.exit_code, "cannot be written" in refused.output) == (2, True)


def test_each_of_many_arms_has_a_line_of_its_own() -> None:
    styles = [line_style(index) for index in range(33)]
    assert len({*styles}) == 33
    # What the first eight have, they have in every picture.
    assert [dash for _, dash in styles[:10]] == ["-", *("-", "--", ":", "-."), *("-", "--", ":", "-."), "--"]
    assert styles[1][0] == styles[9][0]


@pytest.mark.parametrize(("suite", "num_bands"), [("passk-even", 9), ("diversity-math", 0)])
def test_bands_are_drawn_as_long_as_they_can_be_told_apart(tmp_path: Path, suite: str, num_bands: int) -> None:
    plot(committed_results(suite), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count('<g id="FillBetweenPolyCollection') == 2 * num_bands


# -------------------------------------------------------------------------------------------- what is committed


COMMITTED = sorted(path.stem for path in (Path(dphrl.__file__).parent / "suites" / "results").glob("*.json"))


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_figures_follow_from_the_committed_counts(name: str) -> None:
    results, suite = committed_results(name), load_suite(name)
    assert {row["arm"] for row in results["rows"]} <= {"base", *suite.arms}
    assert {row["seed"] for row in results["rows"]} <= set(suite.seeds)
    for arm, domains in recompute(results)["arms"].items():
        for domain, cells in domains.items():
            for key, cell in cells.items():
                for bound, value in cell.items():
                    stored = results["arms"][arm][domain][key][bound]
                    # Both are of numbers rounded to five digits, and the bounds of two seeds magnify that sixteenfold.
                    assert math.isclose(stored, value, abs_tol=2e-4), (arm, domain, key, bound)


def test_committed_results_are_shown_as_json() -> None:
    done = CliRunner().invoke(app, ["experiment", "--show", "passk-math", "--json"])
    assert done.exit_code == 0
    results = json.loads(done.output)
    assert {"suite", "seeds", "arms"} <= results.keys()
    assert {"mean", "low", "high"} <= results["arms"]["dph-js"]["in_domain"]["pass@16"].keys()
