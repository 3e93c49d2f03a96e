"""Suites: what they are made of, and what of them is run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.experiments import share
from dphrl.config.loading import InputError, list_presets
from dphrl.experiments.suite import choose_runs, kind_of, list_suites, load_suite

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
    assert suite.name == name
    # `dphrl plan NAME` takes either, and would not know which is meant.
    assert name not in list_presets()
    configs = [suite.config(arm, 0, "runs") for arm in suite.arms]
    # Engines are told whether they take weights in flight.
    staleness = {config.rollout.max_staleness for config in configs}
    assert len({repr(_engine_settings(config)) for config in configs}) == len(staleness)
    assert len({(c.learner.num_steps, c.rollout.num_prompts) for c in configs}) == 1
    if not name.startswith("tune-"):
        assert len(suite.seeds) >= 3
        # The same rate for every arm, or the comparison is none; but for those that have nothing else to choose, and
        # those that fall apart at GRPO's.
        choosing = {arm for arm, settings in suite.arms.items() if "learner.lr" in settings}
        assert choosing <= {"grpo-half-lr", "dapo", "maxrl", "uniqueness", "kl-cov", "w-reinforce"}
        assert len({c.learner.lr for arm, c in zip(suite.arms, configs, strict=True) if arm not in choosing}) == 1


@pytest.mark.parametrize("name", [name for name in list_suites() if "grpo-half-lr" in load_suite(name).arms])
def test_the_half_rate_is_half_the_rate(name: str) -> None:
    half, whole = (load_suite(name).config(arm, 1, "runs").learner.lr for arm in ("grpo-half-lr", "grpo"))
    assert half == whole / 2


@pytest.mark.parametrize("name", [name for name in list_suites() if name.startswith(("passk-", "diversity-"))])
def test_results_are_not_measured_on_seeds_that_were_tuned_on(name: str) -> None:
    tuned_on = {seed for tuning in list_suites() if tuning.startswith("tune-") for seed in load_suite(tuning).seeds}
    assert not tuned_on & set(load_suite(name).seeds)


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
        (["passk-math", "--json"], "--json: goes with --show"),
        (["passk-math", "--picture", "x.svg"], "--picture: goes with --show"),
        (["passk-math", "--with", "absent.json"], "absent.json: cannot be read"),
        (["passk-math", "--with", "pyproject.toml"], "holds no results of suite passk-math"),
        (["--show", "absent.json"], "absent.json: cannot be read"),
    ],
)
def test_bad_input_is_exit_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["experiment", *arguments, "--run-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert words in done.output


def test_arms_are_told_apart_by_what_they_do_for_diversity() -> None:
    suite = load_suite("passk-math")
    kinds = {arm: kind_of(suite.config(arm, 0, "runs")) for arm in suite.arms}
    rehearsing = dict.fromkeys(["alpha-0.5", "dph-f", "dph-js"], "rehearsing")
    assert kinds == {"grpo": "plain", "dapo": "plain", "rkl": "penalised", **rehearsing}
    suite = load_suite("diversity-math")
    more = {arm: kind_of(suite.config(arm, 0, "runs")) for arm in suite.arms if arm not in kinds}
    others = ["sft", "replay", "maxrl", "pkpo", "w-reinforce", "unlikeliness", "uniqueness", "kl-cov", "clip-cov"]
    assert more == {"grpo-half-lr": "plain", "dph-f-entropy": "rehearsing", **dict.fromkeys(others, "other")}


def test_runs_of_a_seed_share_what_is_whole(tmp_path: Path) -> None:
    done, unfinished, fresh = tmp_path / "done", tmp_path / "unfinished", tmp_path / "fresh"
    of_done = "eval/.base-identity", "eval/base.json", "eval/step_9.json", "eval/x.partial/c", "reference/manifest.json"
    for path in (*(done / name for name in of_done), unfinished / "reference.graded" / "identity.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def shared(siblings: list[Path], *, with_reference: bool) -> list[str]:
        shutil.rmtree(fresh, ignore_errors=True)
        share(fresh, siblings, with_reference=with_reference)
        return sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file())

    of_base = ["eval/.base-identity", "eval/base.json"]
    assert shared([unfinished, tmp_path / "absent"], with_reference=True) == []
    assert shared([unfinished, done], with_reference=False) == of_base
    assert shared([unfinished, done], with_reference=True) == [*of_base, "reference/manifest.json"]
    for name in ("reference.graded", "reference.confirmed"):
        (done / name).mkdir()
        (done / name / "identity.json").write_text("")
    of_stage = ["reference.confirmed/identity.json", "reference.graded/identity.json"]
    everything = [*of_base, *of_stage, "reference/manifest.json"]
    assert shared([unfinished, done], with_reference=True) == everything
    # Killed between the two, and what it has is kept.
    (fresh / "eval" / "base.json").write_text("mine")
    shutil.rmtree(fresh / "reference")
    share(fresh, [done], with_reference=True)
    assert (fresh / "eval" / "base.json").read_text() == "mine"
    assert sorted(path.name for path in fresh.iterdir()) == [
        "eval",
        "reference",
        "reference.confirmed",
        "reference.graded",
    ]


def test_the_quick_part_uses_no_seed_of_the_results() -> None:
    # Otherwise the check against the prediction interval would check what the interval was made of.
    for name in (name for name in list_suites() if name.startswith("passk-")):
        suite = load_suite(name)
        assert not set(suite.quick.seeds) & set(suite.seeds)
