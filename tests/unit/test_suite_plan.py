"""Suites in `dphrl plan`, and the suites of the paper against the presets of its arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.planning.placement import plan_bundles
from cluster.planning.suites import describe_suite, is_suite
from dphrl.config.loading import list_presets, load_config
from dphrl.config.schema import Config
from dphrl.experiments.suite import list_suites, load_suite

SUITE = """
name: mine
about: A test.
base: demo-math
seeds: [0, 4]
settings: {learner.num_steps: 3}
arms:
  grpo: {algorithm.divergence: none}
  rkl: {algorithm.divergence: reverse_kl, algorithm.estimator: rollout}
  alpha: {algorithm.divergence: {name: alpha, alpha: 0.5}, learner.lr: 0.5}
quick: {seeds: [4], arms: [grpo]}
"""
PAPER_ARMS = ["grpo", "dapo", "rkl", "alpha-0.2", "alpha-0.5", "alpha-0.8", "dph-f", "dph-js", "dph-f-8of8"]


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE)
    return path


# ------------------------------------------------------------ the command


@pytest.mark.parametrize("name", list(list_suites()))
def test_every_embedded_suite_can_be_planned(name: str) -> None:
    done = plan(name)
    assert done.exit_code == 0, done.output
    suite = load_suite(name)
    seeds = f"{len(suite.seeds)} seeds" if len(suite.seeds) > 1 else f"seed {suite.seeds[0]}"
    assert f"{len(suite.arms)} arms x {seeds}" in done.output
    for words in ("optimizer steps", "placement", *(f"\n{arm} " for arm in suite.arms)):
        assert words in done.output


def test_a_suite_is_shown_with_its_arms_and_common_base(suite_file: Path) -> None:
    said = {line.split("  ")[0]: line for line in plan(str(suite_file), "rollout.num_prompts=16").output.splitlines()}
    assert said["runs"].endswith("3 arms x 2 seeds (0, 4) = 6")
    assert said["with --quick"].endswith("grpo x seed 4 = 1")
    assert said["settings of all"].endswith("learner.num_steps=3")
    assert said["GPUs, where there are any"].endswith("2 a run: 1 learner + 1 rollout")
    assert said["grpo"].split() == ["grpo", "-", "algorithm.divergence=none"]
    assert "  resident reference model  " in said["rkl"]
    assert said["alpha"].endswith('algorithm.divergence={"name": "alpha", "alpha": 0.5}, learner.lr=0.5')
    assert said["steps"].endswith("3 (seed 0)")
    assert "16 prompts x 8 samples" in said["rollouts a step"]
    assert "run folder" not in said


def test_what_is_no_suite_is_planned_as_a_configuration(suite_file: Path, tmp_path: Path) -> None:
    assert is_suite(str(suite_file))
    assert is_suite("passk-math")
    config = tmp_path / "config.yaml"
    config.write_text("base: demo-math\n")
    (tmp_path / "broken.yaml").write_text("arms: [\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    for other in (config, tmp_path / "broken.yaml", tmp_path / "binary.yaml", tmp_path, tmp_path / "absent.yaml"):
        assert not is_suite(str(other))
    assert not any(map(is_suite, list_presets()))
    assert "run folder" in plan(str(config)).output


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ("", ["--yaml"], "--yaml: "),
        ("", ["seed=3"], "use --seeds"),
        ("", ["learner.num_stepz=3"], "learner.num_stepz"),
        ("learner.lr: 0.5", [], "arm alpha: "),
        ("name: mine", [], "name: "),
    ],
)
def test_bad_input_is_exit_2_and_names_the_arm(suite_file: Path, change: str, arguments: list[str], words: str) -> None:
    if change:
        suite_file.write_text(SUITE.replace(change, f"{change.partition(':')[0]}: '?'"))
    done = plan(str(suite_file), *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert all(line.startswith("dphrl: error: ") for line in done.stderr.splitlines())


def test_a_run_dir_can_be_given(suite_file: Path) -> None:
    assert "/elsewhere/mine/ARM-sSEED" in describe_suite(str(suite_file), run_dir="/elsewhere")


# ------------------------------------------------------------ the paper's suites


def settings(config: Config) -> dict[str, Any]:
    """All but the run's own name and place, and how it is evaluated."""
    tree = config.model_dump(exclude={"run_name", "run_dir", "seed", "evaluation"})
    del tree["data"]["evaluation"]
    return tree


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize("task", ["sql", "math"])
def test_a_llama_arm_is_its_preset(task: str, arm: str) -> None:
    config = load_suite(f"paper-llama8b-{task}").config(arm, 0, "runs")
    assert settings(config) == settings(load_config(f"paper/{task}-{arm}"))


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_a_qwen_arm_is_its_preset_with_the_math_arms_algorithm(arm: str) -> None:
    config = load_suite("paper-qwen-math").config(arm, 0, "runs")
    expected = settings(load_config("paper/qwen-math-dph-f"))
    of_llama = load_config(f"paper/math-{arm}")
    expected["algorithm"] = of_llama.algorithm.model_dump()
    expected["reference"]["threshold"] = 8 if arm.endswith("8of8") else 7
    assert settings(config) == expected
    # The positions that Qwen2.5-Math-7B has.
    assert config.max_sequence_tokens <= 4096


@pytest.mark.parametrize("name", [name for name in list_suites() if name.startswith("paper-")])
def test_the_papers_suites_are_whole(name: str) -> None:
    suite = load_suite(name)
    assert list(suite.arms) == PAPER_ARMS
    for arm in suite.arms:
        config = suite.config(arm, 0, "runs")
        assert sum(bundle.num_gpus for bundle in plan_bundles(config, with_gpus=True)) == 8
        assert {1, 8, 16} <= set(config.evaluation.k)
        # More samples than the largest k of the paper's tables, or its estimate is a single draw.
        assert config.evaluation.num_samples > 16


@pytest.mark.parametrize(
    ("suite", "threshold"), [("paper-llama8b-sql", 6), ("paper-llama8b-math", 6), ("paper-qwen-math", 7)]
)
def test_near_perfect_is_6_of_8_for_llama_and_7_for_qwen(suite: str, threshold: int) -> None:
    loaded = load_suite(suite)
    for arm in loaded.arms:
        reference = loaded.config(arm, 0, "runs").reference
        assert (reference.num_samples, reference.threshold) == (8, 8 if arm == "dph-f-8of8" else threshold)
        assert not reference.confirm


REHEARSING = ["dph-f", "dph-js", "dph-js-definition", "alpha-0.2", "alpha-0.5", "alpha-0.8"]


@pytest.mark.parametrize("arm", REHEARSING)
@pytest.mark.parametrize("task", ["sql", "math"])
def test_a_repo_preset_is_its_arm_with_the_released_codes_arithmetic(task: str, arm: str) -> None:
    paper, repo = (settings(load_config(f"paper/{task}-{arm}{end}")) for end in ("", "-repo"))
    # Three optimizer steps of 129 / 3 = 43 prompts and 255 / 3 = 85 rows: the code's 128 and 256 do not divide by 3.
    assert (paper["algorithm"]["num_minibatches"], repo["algorithm"]["num_minibatches"]) == (2, 3)
    assert (repo["rollout"]["num_prompts"], repo["reference"]["rows_per_step"]) == (129, 255)
    # 4 of the first 4 of 8, and one right answer more.
    assert [repo["reference"][key] for key in ("num_samples", "threshold", "confirm")] == [4, 4, True]
    assert repo["reward"]["shaping"] == ("column_overlap" if task == "sql" else "none")
    changed = {"algorithm": ["eta", "num_minibatches"], "rollout": ["num_prompts"], "reward": ["shaping"]}
    changed["reference"] = ["num_samples", "threshold", "confirm", "rows_per_step"]
    for section, keys in changed.items():
        for key in keys:
            del paper[section][key], repo[section][key]
    assert paper == repo, "nothing else differs"


@pytest.mark.parametrize("task", ["sql", "math"])
def test_the_baselines_of_the_released_code_make_two_steps_with_their_own_eta(task: str) -> None:
    rkl, dapo = (load_config(f"paper/{task}-{arm}-repo") for arm in ("rkl", "dapo"))
    for config in (rkl, dapo):
        algorithm = config.algorithm
        assert (algorithm.divergence.name, algorithm.estimator) == ("reverse_kl", "rollout")
        assert (algorithm.kl_estimator, algorithm.eta, algorithm.num_minibatches) == ("k3_as_loss", 0.01, 2)
        assert (algorithm.clip_high, algorithm.dynamic_sampling_rounds) == (0.28, 1)
        assert config.rollout.num_prompts == 128
    assert load_config("paper/sql-grpo-repo").reward.shaping == "column_overlap"
