"""The checks on a run's numbers: quiet on healthy curves, told once on bad ones, and when they stop a run."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dphrl.health import CHECKS, HEALED_AFTER, HealthChecks
from dphrl.tracking.tracker import Tracker, read_metrics

GAP_BOUND = 5e-5
Record = dict[str, Any]


def healthy(step: int, rng: random.Random) -> Record:
    """As a demo run's: the divergence rises from 0, the entropy falls by half, the gradient's norm is ragged."""
    return {
        "step": step,
        "reward/mean": 0.3 + 0.3 * min(1, step / 60) + rng.uniform(-0.05, 0.05),
        "reward/zero_variance_fraction": rng.uniform(0, 0.4),
        "policy/loss": rng.uniform(-0.02, 0.02),
        "policy/entropy": 0.6 - 0.3 * min(1, step / 100),
        "policy/clip_fraction": rng.uniform(0, 0.05),
        "divergence/loss": 0.0 if step == 1 else 0.15 * min(1, step / 80) * rng.uniform(0.5, 1.5),
        "sync/logprob_gap_mean": rng.uniform(1e-7, 6e-7),
        "learner/grad_norm": rng.lognormvariate(-1, 0.7),
        "learner/skipped_steps": 0.0,
    }


def curve(num_steps: int, change: Callable[[int], Record] = lambda step: {}) -> list[Record]:
    rng = random.Random(num_steps)
    return [healthy(step, rng) | change(step) for step in range(1, num_steps + 1)]


def told(make_config: Any, records: Iterable[Record], caplog: pytest.LogCaptureFixture, **changes: Any) -> list[Any]:
    """(step, event) of all that is told."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        checks = HealthChecks(make_config(**changes), GAP_BOUND)
        for record in records:
            checks.check(record)
    return [(one.step, one.event) for one in caplog.records]  # type: ignore[attr-defined]


def from_step(begin: int, **values: float) -> Callable[[int], Record]:
    return lambda step: {name.replace("__", "/"): value for name, value in values.items()} if step >= begin else {}


BAD = {
    "exploding_divergence": ({"divergence__loss": 2.0}, 41),
    "entropy_collapse": ({"policy__entropy": 0.02}, 42),
    "one_reward": ({"reward__mean": 0.0, "reward__zero_variance_fraction": 1.0}, 49),
    "no_signal": ({"reward__mean": 0.4, "reward__zero_variance_fraction": 1.0}, 49),
    "rising_gap": ({"sync__logprob_gap_mean": 3e-5}, 42),
    "clipping": ({"policy__clip_fraction": 0.7}, 42),
    "exploding_gradient": ({"learner__grad_norm": 60.0}, 41),
}


def test_a_healthy_curve_is_quiet(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert told(make_config, curve(400), caplog) == []
    assert set(BAD) == set(CHECKS), "each check has its bad curve"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_curve_is_told_once(make_config: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    values, step = BAD[name]
    records = curve(80, from_step(40, **values))
    assert told(make_config, records, caplog) == [(step, name)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"step {step}: ")
    assert "; " in said, "and what to do"
    assert "\n" not in said
    assert told(make_config, records, caplog, health={name: "off"}) == []


@pytest.mark.parametrize("name", BAD)
def test_a_check_that_stops_says_why_and_how_to_go_on(make_config: Any, name: str) -> None:
    values, step = BAD[name]
    checks = HealthChecks(make_config(health={name: "stop"}), GAP_BOUND)
    whys = {record["step"]: checks.check(record) for record in curve(60, from_step(40, **values))}
    assert [at for at, why in whys.items() if why] == [step]
    assert str(whys[step]).startswith(f"step {step}: ")
    ways = f"; go on with --resume --insist KEY=VALUE, or health.{name}=warn"
    assert str(whys[step]).endswith(ways)


def test_it_is_told_again_only_after_it_has_healed(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    def on_and_off(step: int) -> Record:
        bad = (20 <= step < 60 and step % 4 != 0) or step >= 90
        return {"reward/zero_variance_fraction": 1.0} if bad else {}

    # Within the first stretch a good step now and then does not heal; the second comes after more than ten good ones.
    records = curve(120, on_and_off)
    assert told(make_config, records, caplog, health={"flat_steps": 1}) == [(21, "no_signal"), (90, "no_signal")]
    assert HEALED_AFTER == 10


def test_one_step_far_off_is_no_explosion(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    far = {"learner/grad_norm": 500.0, "divergence/loss": 9.0}
    assert told(make_config, curve(80, lambda step: far if step % 20 == 0 else {}), caplog) == []


def test_a_resumed_run_does_not_tell_again_what_it_told(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    records = curve(60, from_step(40, policy__clip_fraction=0.9))
    checks = HealthChecks(make_config(), GAP_BOUND, past=records[:50])
    assert [checks.check(record) for record in records[50:]] == [None] * 10
    assert caplog.records == []


def test_thresholds_are_settings(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    flat = curve(20, from_step(1, reward__mean=1.0, reward__zero_variance_fraction=1.0))
    assert told(make_config, flat, caplog, health={"flat_steps": 3}) == [(3, "one_reward")]
    risen = curve(40, from_step(30, divergence__loss=0.15))
    assert told(make_config, risen, caplog) == []
    assert told(make_config, risen, caplog, health={"divergence_factor": 1.5}) == [(31, "exploding_divergence")]


def test_a_gap_that_was_always_large_does_not_rise(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert told(make_config, curve(60, from_step(1, sync__logprob_gap_mean=3e-5)), caplog) == []


def test_values_that_are_missing_or_not_finite_are_passed_over(
    make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    records = curve(60, lambda step: {"learner/grad_norm": None if step % 2 else math.nan, "policy/entropy": math.nan})
    for record in records:
        del record["divergence/loss"], record["policy/clip_fraction"], record["sync/logprob_gap_mean"]
    assert told(make_config, records, caplog) == []


# ------------------------------------------------------------------------------------ skipped steps


def skipped(step: int, **values: float) -> Record:
    return healthy(step, random.Random(0)) | {"learner/skipped_steps": 1.0, "learner/grad_norm": math.nan} | values


def test_a_skipped_step_is_told_with_what_was_not_finite(make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    checks = HealthChecks(make_config(), GAP_BOUND)
    assert checks.check(skipped(4)) is None
    assert checks.check(skipped(5, **{"policy/loss": math.inf})) is None
    first, second = caplog.records
    assert (first.event, first.step) == ("skipped_step", 4)  # type: ignore[attr-defined]
    assert first.facts == {"skipped": 1, "not_finite": "gradient norm", "in_a_row": 1}  # type: ignore[attr-defined]
    assert second.facts["not_finite"] == "loss"  # type: ignore[attr-defined]
    assert second.getMessage().startswith("step 5: the loss was not finite, so 1 optimizer step(s) were skipped")


def test_too_many_in_a_row_stop_the_run(make_config: Any) -> None:
    checks = HealthChecks(make_config(learner={"max_skipped_steps": 2}), GAP_BOUND)
    rng = random.Random(0)
    assert [checks.check(r) for r in (skipped(1), healthy(2, rng), skipped(3))] == [None] * 3
    why = checks.check(skipped(4))
    assert why is not None
    assert why.startswith(
        "step 4: the gradient norm was not finite, as in 2 steps in a row (learner.max_skipped_steps)"
    )
    for words in ("lower learner.lr", "samples/ of step 4", "--resume --insist learner.lr=..."):
        assert words in why
    assert "\n" not in why


def test_a_resumed_run_counts_anew(make_config: Any) -> None:
    checks = HealthChecks(make_config(learner={"max_skipped_steps": 2}), GAP_BOUND, past=[skipped(1)])
    assert checks.check(skipped(2)) is None
    assert checks.check(skipped(3)) is not None


def test_what_metrics_jsonl_holds_is_what_the_checks_read(make_config: Any, tmp_path: Path) -> None:
    """A resumed run reads the records of before from there; a number that is not finite is null in it."""
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in range(1, 4):
            tracker.log_step(skipped(step))
    records = read_metrics(tmp_path)
    assert json.loads(json.dumps(records))[0]["learner/grad_norm"] is None
    assert HealthChecks(make_config(), GAP_BOUND, records).check(skipped(4)) is None
