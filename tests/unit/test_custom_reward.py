"""A user's own reward: what it may be, and that its faults are not the model's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli.support import Command
from cluster.jobs.submission import plan_submission
from dphrl.config.data import RewardConfig
from dphrl.config.loading import ConfigError, InputError, load_config
from dphrl.prepare import prepare
from dphrl.rewards.base import build_grader
from dphrl.rewards.custom import MAX_TRACE_CHARS
from dphrl.tracking.console import Console
from dphrl.types import RewardResult, RewardStatus


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("user_rewards", None)


def grade(
    name: str, *completions: str, answer: str = "4", timeout_s: float = 10.0, **params: Any
) -> list[RewardResult]:
    config = RewardConfig(name=f"user_rewards:{name}", params=params, timeout_s=timeout_s)
    with closing(build_grader(config)) as grader:
        return grader.grade([(completion, answer) for completion in completions])


def test_a_bool_is_right_or_wrong() -> None:
    assert [r.status for r in grade("exact", " 4", "5")] == ["correct", "wrong"]


def test_a_number_is_the_training_signal_and_right_from_one_on() -> None:
    results = grade("scaled", "a", "abcd", scale=0.25)
    assert [(r.status, r.score, r.training_score) for r in results] == [("wrong", 0.0, 0.25), ("correct", 1.0, 1.0)]


def test_a_typed_result_is_taken_as_it_is() -> None:
    assert grade("typed", "x") == [RewardResult(RewardStatus.REFUSED, "not this")]


def test_a_class_is_made_once() -> None:
    results = grade("Counting", "abc", "ab", target=3)
    assert [(r.status, r.detail) for r in results] == [("correct", "1"), ("wrong", "2")]


@pytest.mark.parametrize(
    ("completion", "words"),
    [("hang", "timeout"), ("die", "resource_limit"), ("raise", "KeyError"), ("nonsense", "'maybe'")],
)
def test_a_fault_of_the_reward_costs_its_item_only_and_is_no_score(completion: str, words: str) -> None:
    before, faulty, after = grade("misbehaving", "fine", completion, "fine", timeout_s=1.0)
    assert before.status == after.status == "correct"
    assert faulty.status == "infrastructure_error"
    assert faulty.score is None
    assert words in faulty.detail


@pytest.mark.parametrize("name", ["misbehaving", "misbehaving_later"])
def test_an_error_comes_with_the_users_own_lines(name: str) -> None:
    fine, faulty = grade(name, "fine", "raise")
    assert fine.trace == ""
    assert "user_rewards.py" in faulty.trace
    assert 'raise KeyError("no such thing")' in faulty.trace
    assert faulty.trace.endswith("KeyError: 'no such thing'\n")
    assert len(grade(name, "raise at length")[0].trace) == MAX_TRACE_CHARS


@pytest.mark.parametrize("name", ["ill_typed", "ill_typed_later"])
def test_a_verdict_of_the_wrong_type_is_no_verdict(name: str) -> None:
    results = grade(name, "text", "status", "nan", "signal", "string")
    assert [r.status for r in results] == ["correct", *["infrastructure_error"] * 4]
    assert all(isinstance(r.status, RewardStatus) for r in results)
    assert "'good', which is no status" in results[1].detail


def test_what_a_reward_says_when_it_exits_is_the_message() -> None:
    (result,) = grade("exits", "4")
    assert (result.status, result.detail) == ("infrastructure_error", "the reward raised SystemExit: set JUDGE_KEY")
    assert 'sys.exit("set JUDGE_KEY")' in result.trace


def test_a_coroutine_that_exits_costs_its_item_only() -> None:
    assert [r.status for r in grade("ill_typed_later", "text", "exit")] == ["correct", "infrastructure_error"]


def test_coroutines_of_a_batch_wait_together_each_with_a_deadline() -> None:
    started = time.perf_counter()
    results = grade("judged", *["4"] * 20, "5", "hang", timeout_s=1.5)
    assert time.perf_counter() - started < 4  # one after another they would take 4.2 s and the deadline
    assert [r.status for r in results] == ["correct"] * 20 + ["wrong", "infrastructure_error"]
    assert results[20].training_score == 0.25


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "No module named"),
        ("user_rewards:absent", "no attribute"),
        ("user_rewards:NOT_CALLABLE", "cannot be called"),
        ("user_rewards:Counting", "target"),
    ],
)
def test_a_config_that_names_no_reward_is_refused_with_the_reason(name: str, words: str) -> None:
    """When a run is prepared, and by `plan`, which prepares none."""
    setting = f"reward.name={name}"
    for refuse in (
        lambda: prepare(load_config("demo-math", [setting]), Console()),
        lambda: Command().load_with_reward("demo-math", [setting]),
    ):
        with pytest.raises(InputError, match=words) as refused:
            refuse()
        assert str(refused.value).startswith(f"reward.name='{name}' ")
        assert len(str(refused.value).splitlines()) == 1


def test_a_plan_refuses_a_reward_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["plan", "demo-math", "reward.name=no_such_module:f"])
    assert result.exit_code == 2
    assert "reward.name='no_such_module:f' cannot be loaded" in result.stderr


def test_what_runs_elsewhere_may_have_its_reward_there_alone() -> None:
    """The uploaded folder and the nodes' own packages are not on this process's path; the job itself refuses."""
    setting = "reward.name=only_over_there:f"
    assert setting in plan_submission("demo-math", [setting]).entrypoint
    for kind in ("kubernetes", "slurm"):
        assert CliRunner().invoke(app, ["render", kind, "demo-math", setting]).exit_code == 0
    # A name of the wrong form is wrong everywhere.
    with pytest.raises(InputError, match="is unknown"):
        plan_submission("demo-math", ["reward.name=maths"])


def test_preparing_a_run_makes_a_reward_of_a_class_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dphrl.rewards.custom.load_reward", lambda name, params: made.append(name))
    made: list[str] = []
    config = Command().load("demo-math", ["reward.name=user_rewards:Counting", "data.train.limit=4"])
    assert made == []
    prepare(config, Console())
    assert made == ["user_rewards:Counting"]


def test_a_config_takes_a_users_reward_for_any_data() -> None:
    config = load_config("demo-math", ["reward={name: user_rewards:scaled, params: {scale: 0.5}}"])
    assert config.reward.params == {"scale": 0.5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("reward.name=math_answer", "cannot grade data of kind tiny"),
        ("reward.name=maths", "reward.name='maths' is unknown; choose one of factorization"),
        ("reward.params={a: 1}", "takes none"),
        ("reward.shaping=column_overlap", "is for sql_execution"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("demo-math", [settings])


def test_the_reward_follows_the_data_unless_named() -> None:
    assert load_config("demo-math", ["reward.name=auto"]).reward.name == "factorization"
