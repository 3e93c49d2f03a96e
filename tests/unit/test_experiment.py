"""Suites: what they are made of, and how their runs add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.config_loading import InputError
from dphrl.evaluation import summarize
from dphrl.experiment import add_up, choose_runs, list_suites, load_suite, table_rows

SUITE = """
name: mine
about: A test.
base: demo-math
seeds: [0, 1]
settings: {learner.num_steps: 3}
arms:
  grpo: {algorithm.divergence: none}
  alpha: {algorithm.divergence: {name: alpha, alpha: 0.5}, learner.num_steps: 4}
quick: {seeds: [0], arms: [grpo]}
"""


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE)
    return path


def test_an_arm_is_the_base_with_the_suites_settings_then_its_own(suite_file: Path) -> None:
    suite = load_suite(str(suite_file))
    grpo, alpha = suite.config("grpo", 1, "there"), suite.config("alpha", 0, "there", ["learner.lr=0.5"])
    assert (grpo.learner.num_steps, grpo.algorithm.divergence.name, grpo.seed) == (3, "none", 1)
    assert (grpo.run_dir, grpo.run_name) == ("there/mine", "grpo-s1")
    assert (alpha.learner.num_steps, alpha.algorithm.divergence.params, alpha.learner.lr) == (4, {"alpha": 0.5}, 0.5)


@pytest.mark.parametrize("name", list(list_suites()))
def test_every_embedded_suite_makes_valid_configs_that_can_share_engines(name: str) -> None:
    from cluster.ray_system import _engine_settings

    suite = load_suite(name)
    assert len(suite.seeds) >= 3
    configs = [suite.config(arm, 0, "runs") for arm in suite.arms]
    assert all(_engine_settings(config) == _engine_settings(configs[0]) for config in configs)
    # The same budget for every arm, or the comparison is none.
    assert len({(c.learner.num_steps, c.learner.lr, c.rollout.num_prompts) for c in configs}) == 1


def test_runs_are_chosen_a_seed_at_a_time(suite_file: Path) -> None:
    suite = load_suite(str(suite_file))
    everything = [("grpo", 0), ("alpha", 0), ("grpo", 1), ("alpha", 1)]
    assert choose_runs(suite, quick=False, arms=None, seeds=None) == everything
    assert choose_runs(suite, quick=True, arms=None, seeds=None) == [("grpo", 0)]
    assert choose_runs(suite, quick=False, arms="alpha", seeds="7, 8") == [("alpha", 7), ("alpha", 8)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("arms: {base: {}}", "base is the untrained model"),
        ("quick: {seeds: [0], arms: [absent]}", "absent not among arms"),
        ("seeds: [x]", "seeds.0"),
        ("seeds: []", "seeds: "),
        ("name: ../evil", "name: "),
        ("surprise: 1", "surprise"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused_in_a_line(suite_file: Path, change: str, words: str) -> None:
    kept = [line for line in SUITE.splitlines() if not line.startswith(change.split(":")[0])]
    if change.startswith("arms"):
        kept = [line for line in kept if not line.startswith("  ")]
    suite_file.write_text("\n".join([*kept, change]))
    with pytest.raises(InputError, match=words):
        load_suite(str(suite_file))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "no such suite"),
        (["passk-math", "--arms", "ppo"], "ppo not in suite"),
        (["passk-math", "--seeds", "-1"], "--seeds -1"),
        (["passk-math", "--quick", "learner.num_stepz=3"], "learner.num_stepz"),
        (["passk-math", "--quick", "evaluation.num_samples=0"], "nothing would be evaluated"),
        (["passk-math", "--quick", "seed=3"], "use --seeds"),
    ],
)
def test_bad_input_is_exit_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["experiment", *arguments, "--run-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert words in done.output


def evaluation(correct: list[int], base: list[int] | None = None) -> list[dict[str, Any]]:
    counts = [(str(i), 4, c) for i, c in enumerate(correct)]
    base_counts = None if base is None else [(str(i), 4, c) for i, c in enumerate(base)]
    return [summarize(name, "test", counts, (1, 4), 0.5, base_counts) for name in ("in", "out", "far")]


def test_rates_add_up_over_seeds_by_hand() -> None:
    base = [2, 2]
    runs = {
        ("grpo", 0): {"base": evaluation(base), "trained": evaluation([4, 0], base)},
        ("grpo", 1): {"base": evaluation(base), "trained": evaluation([4, 2], base)},
    }
    results = add_up("mine", runs)
    assert results["seeds"] == [0, 1]
    assert list(results["arms"]) == ["base", "grpo"]
    grpo = results["arms"]["grpo"]["in_domain"]
    # Pass@1 .5 and .75: mean .625, s = .25/sqrt(2), t(1) = 12.706, half = t * s / sqrt(2) = 12.706 * .125.
    assert grpo["pass@1"]["mean"] == pytest.approx(0.625)
    assert grpo["pass@1"]["high"] - 0.625 == pytest.approx(12.706 * 0.125)
    assert grpo["pass@1"]["predict_high"] - 0.625 == pytest.approx(12.706 * 0.25 / 2**0.5 * 1.5**0.5)
    assert grpo["retention"]["mean"] == pytest.approx(0.75)
    assert "retention" not in results["arms"]["base"]["in_domain"]
    assert results["arms"]["base"]["out_of_domain"]["pass@4"]["mean"] == 1.0
    assert {
        "arm": "grpo",
        "seed": 1,
        "dataset": "far",
        "num_samples": 4,
        "num_graded": [4, 4],
        "num_correct": [4, 2],
    } in (results["counts"])
    header, rows = table_rows(results)
    assert [len(row) for row in rows] == [len(header)] * 2


def test_one_seed_has_the_interval_over_prompts() -> None:
    runs = {("grpo", 3): {"base": evaluation([2, 2]), "trained": evaluation([4, 0], [2, 2])}}
    cell = add_up("mine", runs)["arms"]["grpo"]["in_domain"]["pass@1"]
    assert cell == {"mean": 0.5, "low": 0.0, "high": 1.0}


def test_results_are_written_as_json(tmp_path: Path) -> None:
    from cluster.experiments import write_results

    runs = {("grpo", 0): {"base": evaluation([2, 2]), "trained": evaluation([4, 0], [2, 2])}}
    results = add_up("mine", runs)
    write_results(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["counts"] == results["counts"]
    assert written["arms"]["grpo"]["in_domain"]["pass@4"] == results["arms"]["grpo"]["in_domain"]["pass@4"]
