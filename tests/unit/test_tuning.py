"""The tuning section of suites, the rule that chooses by hand, and `dphrl tune` on runs that are only pretended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster import experiments
from cluster.cli import app
from dphrl.config.loading import InputError, dump_config
from dphrl.config.schema import Config
from dphrl.evaluation.estimators import summarize
from dphrl.evaluation.results import write_summaries
from dphrl.experiments.suite import list_suites, load_suite
from dphrl.experiments.trials import suite_text, trial_names, tuning_suite
from dphrl.experiments.tuning import Choice

SUITE = """
name: mine
about: A test.
base: demo-math
seeds: [1, 2]
settings: {learner.num_steps: 3, evaluation.num_samples: 4, evaluation.k: [1, 4]}
arms:
  grpo: {algorithm.divergence: none}
  js: {algorithm.divergence: js, algorithm.eta: 0.3}
  rkl: {algorithm.divergence: reverse_kl, algorithm.estimator: rollout}
quick: {seeds: [0], arms: [grpo]}
tuning:
  seeds: [0, 7]
  rule: The highest Pass@4 where Pass@1 is at most 0.1 below the best.
  choose: {highest: [pass@4], within: {pass@1: 0.1}}
  grid:
    grpo: [{learner.lr: 1.0e-5}, {learner.lr: 2.0e-5}]
    js: [{algorithm.eta: 0.1}, {algorithm.eta: 1.0}]
"""
# Correct of 4 samples for the two prompts, by trial; both seeds and both data sets have the same.
CORRECT = {
    "grpo-1": [4, 0],  # Pass@1 (1 + 0) / 2 = .5, Pass@4 (1 + 0) / 2 = .5
    "grpo-2": [1, 1],  # Pass@1 (.25 + .25) / 2 = .25, Pass@4 1
    "js-1": [3, 0],  # Pass@1 .375, Pass@4 .5
    "js-2": [2, 1],  # Pass@1 (.5 + .25) / 2 = .375, Pass@4 1
}


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs leave what finished ones leave, and train nothing. The list says which were asked for, in order."""
    asked: list[str] = []

    def evaluation(correct: list[int]) -> list[dict[str, Any]]:
        counts = [(str(prompt), 4, number) for prompt, number in enumerate(correct)]
        return [summarize(name, "test", counts, (1, 4), 0.5, None) for name in ("in", "out")]

    def pretend(suite: object, run: tuple[str, int], config: Config, *rest: object) -> None:
        asked.append(f"{run[0]}-s{run[1]}")
        (config.folder / "eval").mkdir(parents=True)
        dump_config(config, config.folder / "config.yaml")
        write_summaries(config.folder / "eval" / "base.json", evaluation([2, 2]))
        write_summaries(config.folder / "eval" / "step_3.json", evaluation(CORRECT[run[0]]))

    monkeypatch.setattr(experiments, "_run_one", pretend)
    return asked


def tune(suite: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", str(suite), "--inline", "--run-dir", str(suite.parent), *arguments])


# ------------------------------------------------------------ the rule


def test_the_rule_by_hand() -> None:
    trials = [{"pass@1": 0.50, "pass@16": 0.60}, {"pass@1": 0.45, "pass@16": 0.80}, {"pass@1": 0.30, "pass@16": 0.95}]
    # Within .1 of the best Pass@1, .50, are the first two, and the second has the higher Pass@16.
    within = Choice(highest=("pass@16",), within={"pass@1": 0.1})
    assert within.eligible(trials) == [True, True, False]
    assert within.choose(trials) == 1
    # Sums: 1.10, 1.25 and 1.25. The first of the highest.
    assert Choice(highest=("pass@1", "pass@16")).choose(trials) == 1
    assert Choice(highest=("pass@1",)).choose(trials) == 0
    assert Choice(highest=("pass@16",)).choose(trials) == 2


def test_what_lies_on_the_bound_counts() -> None:
    # .8 - .1 is .7000000000000001 as floats.
    trials = [{"pass@1": 0.8, "pass@16": 0.8}, {"pass@1": 0.7, "pass@16": 0.9}]
    assert Choice(highest=("pass@16",), within={"pass@1": 0.1}).choose(trials) == 1


def test_bounds_that_no_trial_meets_leave_all_to_choose_from() -> None:
    trials = [{"pass@1": 0.8, "retention": 0.5}, {"pass@1": 0.5, "retention": 0.9}]
    choice = Choice(highest=("retention",), within={"pass@1": 0.1, "retention": 0.1})
    assert choice.eligible(trials) == [False, False]
    assert choice.choose(trials) == 1


# ------------------------------------------------------------ the section


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("js: [{algorithm.eta: 0.1}, {", "js: [{", "the budgets differ (grpo 2, js 1); give every arm the same number"),
        ("seeds: [0, 7]", "seeds: [0, 2]", "tuning.seeds: the results have seed 2 too"),
        ("    js: [", "    ppo: [", "tuning.grid: ppo not among arms (grpo, js, rkl)"),
        ("eta: 0.1}, {algorithm.eta: 1.0", "eta: 0.1}, {algorithm.eta: 0.1", "tuning.grid.js: the same settings stand"),
        ("{learner.lr: 1.0e-5}", "{seed: 3}", "tuning.grid.grpo: a suite sets seed for each run; remove it"),
        (
            "highest: [pass@4]",
            "highest: [reward]",
            "tuning.choose.highest.0: no rate that a rule can look at (got reward)",
        ),
        ("highest: [pass@4]", "highest: []", "tuning.choose: highest: no rate to choose by; write pass@K or retention"),
        ("highest: [pass@4]", "highest: [pass@8]", "tuning.choose looks at pass@8, but evaluation.k has 1, 4; add it"),
        (
            "  grid:",
            "  choose_for: {rkl: {highest: [pass@4]}}\n  grid:",
            "choose_for: rkl not in tuning.grid (grpo, js)",
        ),
        (
            "  grid:",
            "  choose_for: {js: {highest: [pass@2]}}\n  grid:",
            "tuning.choose_for.js looks at pass@2, but evaluation.k has 1, 4; add it",
        ),
        ("learner.lr: 1.0e-5", "learner.lr: fast", "arm grpo-1: "),
        (SUITE[SUITE.index("tuning:") :], "", "suite mine has no section `tuning`"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused_in_a_line(
    suite_file: Path, trained: list[str], old: str, new: str, words: str
) -> None:
    assert SUITE.count(old) == 1
    suite_file.write_text(SUITE.replace(old, new))
    done = tune(suite_file)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert words in line
    assert trained == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("algorithm.eta=0.5", "algorithm.eta: the tuning of suite mine tries values of it; leave the override out"),
        ("--arms=grpo,rkl", "--arms: rkl not in the tuning grid, which has grpo, js"),
        ("seed=3", "use --seeds"),
    ],
)
def test_arguments_that_do_not_fit_the_grid_are_refused(
    suite_file: Path, trained: list[str], argument: str, words: str
) -> None:
    done = tune(suite_file, argument)
    assert done.exit_code == 2
    assert words in done.stderr
    assert trained == []


def test_trials_are_the_arms_with_the_settings_of_the_grid(suite_file: Path, tmp_path: Path) -> None:
    suite = load_suite(str(suite_file))
    trials = tuning_suite(suite)
    assert list(trials.arms) == ["grpo-1", "grpo-2", "js-1", "js-2"]
    assert trials.seeds == (0, 7)
    config = trials.config("js-2", 7, "there")
    assert (config.algorithm.divergence.name, config.algorithm.eta) == ("js", 1.0)
    assert (config.learner.num_steps, config.seed, config.folder) == (3, 7, Path("there/mine-tuning/js-2-s7"))
    assert trials.config("grpo-1", 0, "there").learner.lr == 1e-5
    # What parallel runs read is the same suite.
    (tmp_path / "suite.yaml").write_text(suite_text(trials))
    assert load_suite(str(tmp_path / "suite.yaml")) == trials


# ------------------------------------------------------------ the command


def test_tuning_runs_the_grid_and_chooses_by_the_rule(suite_file: Path, trained: list[str]) -> None:
    done = tune(suite_file)
    assert done.exit_code == 0, done.output
    assert trained == [f"{trial}-s{seed}" for seed in (0, 7) for trial in ("grpo-1", "grpo-2", "js-1", "js-2")]
    record = json.loads((suite_file.parent / "mine-tuning" / "tuning.json").read_text())
    # grpo-2 has the higher Pass@4, but its Pass@1 of .25 is more than .1 below .5. Both of js count.
    assert record["chosen"] == {"grpo": {"learner.lr": 1e-5}, "js": {"algorithm.eta": 1.0}}
    assert [trial["counts"] for trial in record["trials"]] == [True, False, True, True]
    assert [trial["score"] for trial in record["trials"]] == [0.5, 1.0, 0.5, 1.0]
    assert record["trials"][3]["rates"]["in_domain"] == {"pass@1": 0.375, "pass@4": 1.0}
    rule = "The highest Pass@4 where Pass@1 is at most 0.1 below the best."
    assert (record["suite"], record["seeds"], record["rule"]) == ("mine", [0, 7], rule)
    assert f"tuning of mine, seeds 0, 7: {rule}" in done.output
    table = {tuple(line.split()[:2]): line.split("  ")[-1].strip() for line in done.output.splitlines()}
    assert table["grpo", "learner.lr=1e-05"] == "chosen"
    assert table["grpo", "learner.lr=2e-05"] == "too far below the best"
    assert table["js", "algorithm.eta=1.0"] == "chosen"
    assert "js: algorithm.eta=1.0" in done.output


def test_an_arm_may_have_a_rule_of_its_own(suite_file: Path, trained: list[str]) -> None:
    general = "choose: {highest: [pass@4], within: {pass@1: 0.1}}"
    suite_file.write_text(
        SUITE.replace(general, "choose: {highest: [pass@4]}\n  choose_for: {grpo: {highest: [pass@1]}}")
    )
    done = tune(suite_file)
    assert done.exit_code == 0, done.output
    record = json.loads((suite_file.parent / "mine-tuning" / "tuning.json").read_text())
    # By Pass@4 alone it would be grpo-2.
    assert record["chosen"] == {"grpo": {"learner.lr": 1e-5}, "js": {"algorithm.eta": 1.0}}
    assert [trial["score"] for trial in record["trials"]] == [0.5, 0.25, 0.5, 1.0]
    assert record["choose_for"] == {"grpo": {"highest": ["pass@1"], "within": {}}}


def test_a_tuning_goes_on_where_it_stopped(
    suite_file: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = experiments._run_one

    def breaks(suite: Any, run: tuple[str, int], *rest: Any) -> None:
        if run == ("js-1", 0):
            raise RuntimeError("the machine is gone")
        whole(suite, run, *rest)

    monkeypatch.setattr(experiments, "_run_one", breaks)
    assert tune(suite_file).exit_code == 1
    assert trained == ["grpo-1-s0", "grpo-2-s0"]
    monkeypatch.setattr(experiments, "_run_one", whole)
    done = tune(suite_file)
    assert done.exit_code == 0, done.output
    assert "8 runs, 2 finished already" in done.output
    assert trained[2:] == ["js-1-s0", "js-2-s0", "grpo-1-s7", "grpo-2-s7", "js-1-s7", "js-2-s7"]
    assert "8 runs, 8 finished already" in tune(suite_file).output
    assert len(trained) == 8


def test_a_grid_that_changes_nothing_is_named(
    suite_file: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DAPO's clip bounds are with one update a step: a budget of four runs is one run four times."""
    assert "tries nothing" not in tune(suite_file).output
    monkeypatch.setitem(CORRECT, "js-2", CORRECT["js-1"])
    suite_file.write_text(SUITE.replace("name: mine", "name: other"))
    part = tune(suite_file, "--arms", "grpo")
    assert "tries nothing" not in part.output, "those that were not run are not alike"
    said = "js: all its settings gave the same figures, so this grid of algorithm.eta tries nothing"
    assert said in tune(suite_file).output


def test_an_arm_is_chosen_for_when_all_of_its_trials_have_finished(suite_file: Path, trained: list[str]) -> None:
    done = tune(suite_file, "--arms", "js", "-o", str(suite_file.parent / "of-js.json"))
    assert done.exit_code == 0, done.output
    record = json.loads((suite_file.parent / "of-js.json").read_text())
    assert record["chosen"] == {"js": {"algorithm.eta": 1.0}}
    assert [trial["score"] for trial in record["trials"]] == [None, None, 0.5, 1.0]
    assert done.output.count("not run") == 2
    # One of grpo's two is finished.
    folder = suite_file.parent / "mine-tuning"
    assert tune(suite_file).exit_code == 0
    (folder / "grpo-2-s7" / "eval" / "step_3.json").unlink()
    done = tune(suite_file, "--arms", "js")
    assert "waits for the arm's other trials" in done.output
    assert json.loads((folder / "tuning.json").read_text())["chosen"] == {"js": {"algorithm.eta": 1.0}}


def test_a_grid_that_was_changed_meets_the_runs_of_the_one_before(suite_file: Path, trained: list[str]) -> None:
    assert tune(suite_file).exit_code == 0
    suite_file.write_text(SUITE.replace("learner.lr: 2.0e-5", "learner.lr: 3.0e-5"))
    done = tune(suite_file)
    assert done.exit_code == 2
    assert "holds a run of another configuration" in done.stderr


# ------------------------------------------------------------ the suites that come with dphrl

TUNED = [name for name in list_suites() if load_suite(name).tuning is not None]


def test_the_comparisons_of_the_embedded_tasks_have_a_grid() -> None:
    assert {name for name in list_suites() if name.startswith(("passk-", "diversity-"))} == set(TUNED)


@pytest.mark.parametrize("name", TUNED)
def test_a_grid_tries_what_the_suite_has_in_every_arm(name: str) -> None:
    suite = load_suite(name)
    assert suite.tuning is not None
    assert list(suite.tuning.grid) == [arm for arm in suite.arms if arm != "grpo-half-lr"]
    assert not {*suite.tuning.seeds} & {*suite.seeds}
    trials = tuning_suite(suite)
    for arm in suite.tuning.grid:
        names = trial_names(suite.tuning, [arm])
        configs = [trials.config(trial, suite.tuning.seeds[0], "runs") for trial in names]
        own = suite.config(arm, suite.tuning.seeds[0], "runs")
        tried = [(config.learner, config.algorithm, config.reference) for config in configs]
        assert (own.learner, own.algorithm, own.reference) in tried, arm


def test_plan_counts_the_trials(suite_file: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(suite_file)])
    (line,) = [line for line in done.output.splitlines() if line.startswith("tuning (dphrl tune)")]
    assert line.endswith("2 arms x 2 settings x 2 seeds (0, 7) = 8")
    suite_file.write_text(SUITE.replace("highest: [pass@4]", "highest: [pass@8]"))
    done = CliRunner().invoke(app, ["plan", str(suite_file)])
    assert (done.exit_code, "looks at pass@8" in done.stderr) == (2, True)


def test_a_suite_without_the_section_says_how_to_get_one() -> None:
    with pytest.raises(InputError, match="add one with seeds, rule, choose and grid"):
        tuning_suite(load_suite("tune-lr"))
