"""What the driver makes of the engines' records and log-probs after a sync: with stand-ins for Ray's actors."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import pytest

from actors.weight_proof import Gap, WeightProof, _worst, record_problems
from actors.weight_transfer.ledger import EngineRecord, WeightSummary
from actors.weight_transfer.session import EngineSteps
from dphrl.config.loading import InputError, load_config
from dphrl.config.runtime import SyncConfig
from dphrl.protocols import LastUpdate
from tests.unit.test_pools import PROBES, Engine, Learner, refit

SENT = WeightSummary(4, 160, 0xABC)
NAMES = tuple(f"layer.{i}.weight" for i in range(8))
# One token of six is off.
NUM_TOKENS = 6


def check(proof: WeightProof, learner: Any, sent: WeightSummary = SENT, **record: Any) -> dict[str, float]:
    records = {i: EngineRecord(learner.policy_version, (sent,) * 2, **record) for i in proof._steps.engines}
    return asyncio.run(proof.check(records, sent, learner))


def steps_of(*engines: Engine) -> EngineSteps:
    return EngineSteps(dict(enumerate(engines)), 60.0)


def problems(*records: EngineRecord) -> list[str]:
    return [*record_problems(dict(enumerate(records)), SENT)]


# ------------------------------------------------------------------------------------- records


def test_workers_that_hold_what_was_sent_have_no_problem() -> None:
    assert problems(EngineRecord(1, (SENT, SENT)), EngineRecord(1, (SENT, SENT))) == []


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SENT, checksum=0xABD),
        dataclasses.replace(SENT, num_tensors=3),
        dataclasses.replace(SENT, num_bytes=161),
        WeightSummary(),
    ],
)
def test_a_worker_that_received_something_else_is_named_with_both_counts(other: WeightSummary) -> None:
    (problem,) = problems(EngineRecord(1, (SENT, SENT)), EngineRecord(1, (SENT, other)))
    assert problem.startswith("worker 1 of rollout engine 1 received ")
    for summary in (other, SENT):
        text = f"{summary.num_tensors} tensors of {summary.num_bytes} bytes with checksum {summary.checksum:016x}"
        assert text in problem


def test_parameters_that_were_not_loaded_are_named_up_to_a_number() -> None:
    (few,) = problems(EngineRecord(1, (SENT,), NAMES[:2]))
    assert few.startswith("rollout engine 0 misses new values of layer.0.weight, layer.1.weight, in whole")
    (many,) = problems(EngineRecord(1, (SENT,), NAMES))
    assert "layer.5.weight and 2 more, in whole" in many


def test_an_old_copy_and_a_missing_record_are_problems() -> None:
    (old,) = problems(EngineRecord(1, (SENT,), stale=("lm_head.weight",)))
    assert old == "rollout engine 0 holds the new lm_head.weight but multiplies by an older copy"
    (silent,) = problems(EngineRecord(1))
    assert silent == "rollout engine 0 has no record of what it received"


def test_a_sync_with_problems_is_told_before_anything_is_sampled() -> None:
    engine = Engine()
    proof = WeightProof(steps_of(engine), PROBES, 1e-5)
    with pytest.raises(RuntimeError, match=r"^after the sync to policy version 7, rollout engine 0 misses .* head"):
        check(proof, Learner(), unloaded=("head",))
    assert engine.calls == []


def test_a_pool_hands_its_engines_records_and_its_learners_count_to_the_proof(make_config: Any) -> None:
    learner = Learner()
    learner.content = WeightSummary(3, 24, 100)  # engines received 99
    with pytest.raises(RuntimeError, match=r"worker 0 of rollout engine 0 received 3 tensors of 24 bytes with"):
        refit(make_config, Engine(), learner=learner)


# ------------------------------------------------------------------------------------- an update that changed nothing


def after(version: int, update: LastUpdate | None) -> Any:
    learner = Learner()
    learner.policy_version, learner.last_update = version, update
    return learner


STEP = LastUpdate(0.25, 1e-6)


def test_an_update_that_changed_nothing_stops_the_run_with_the_likely_reasons() -> None:
    proof = WeightProof(steps_of(Engine()), PROBES, 1e-5)
    check(proof, after(0, None))
    check(proof, after(1, STEP), WeightSummary(4, 160, 1))
    with pytest.raises(RuntimeError, match=r"update to policy version 2 changed no weight.* 0.25 .* 1e-06.*version 1"):
        check(proof, after(2, STEP), WeightSummary(4, 160, 1))
    check(proof, after(3, STEP), WeightSummary(4, 160, 2))


@pytest.mark.parametrize(
    "update",
    [
        LastUpdate(math.inf, 1e-6),  # DeepSpeed skipped it
        LastUpdate(math.nan, 1e-6),
        LastUpdate(-1.0, 1e-6),
        LastUpdate(0.0, 1e-6),  # nothing to learn from
        LastUpdate(0.25, 0.0),  # a schedule's last step
        None,  # the weights of a checkpoint
    ],
)
def test_equal_weights_are_right_where_no_update_had_to_change_them(update: LastUpdate | None) -> None:
    proof = WeightProof(steps_of(Engine()), PROBES, 1e-5)
    check(proof, after(4, STEP))
    check(proof, after(5, update))


def test_the_same_version_may_be_sent_again() -> None:
    # An evaluation, or an engine that was replaced, takes the weights once more.
    proof = WeightProof(steps_of(Engine()), PROBES, 1e-5)
    for _ in range(2):
        check(proof, after(4, STEP))


# ------------------------------------------------------------------------------------- log-probs


class Changing(Engine):
    """Is off by another amount each time it samples."""

    def __init__(self, *gaps: float) -> None:
        super().__init__()
        self.gaps = list(gaps)

    async def _probe(self, *args: Any) -> Any:
        self.gap = self.gaps.pop(0)
        return await super()._probe(*args)


def test_the_mean_is_bounded_and_the_largest_is_not() -> None:
    gaps = check(WeightProof(steps_of(Engine(gap=5e-5), Engine(gap=-2e-5)), PROBES, 1e-5), Learner())
    assert gaps == {
        "sync/logprob_gap_mean": pytest.approx(5e-5 / NUM_TOKENS),
        "sync/logprob_gap_max": pytest.approx(5e-5),
        "sync/num_bytes": 160,
    }
    with pytest.raises(RuntimeError, match=r"rollout engine 1 are off"):
        check(WeightProof(steps_of(Engine(gap=5e-5), Engine(gap=-7e-5)), PROBES, 1e-5), Learner())


@pytest.mark.parametrize("gap", [2e-3, -2e-3, math.nan, math.inf, -math.inf])
def test_an_engine_that_is_off_is_named_whatever_the_sign(gap: float) -> None:
    proof = WeightProof(steps_of(Engine(gap=5e-4), Engine(gap=gap), Engine()), PROBES, 1e-4)
    with pytest.raises(
        RuntimeError, match=r"policy version 7, log-probs of rollout engine 1 .*_mean_logprob_gap=0.0001"
    ):
        check(proof, Learner())


def test_beyond_the_bound_other_probes_decide(caplog: Any) -> None:
    engine = Changing(1e-3, 6e-6)
    gaps = check(WeightProof(steps_of(engine), PROBES, 1e-5), Learner())
    assert gaps["sync/logprob_gap_mean"] == pytest.approx(1e-6)
    (warning,) = caplog.messages
    assert "off the learner's by 0.000167 on average" in warning
    assert warning.endswith("sampling other probes")
    first, second = engine.calls
    assert first[2] != second[2], "with another seed"

    engine = Changing(1e-3, 2e-3, 0.0)
    with pytest.raises(
        RuntimeError, match=r"by 0.000333 on average .* and by 0.002 at most, and so they were for other"
    ):
        check(WeightProof(steps_of(engine), PROBES, 1e-5), Learner())
    assert len(engine.calls) == 2, "twice is enough"


def test_engines_are_named_by_their_numbers_where_one_is_missing() -> None:
    proof = WeightProof(EngineSteps({0: Engine(), 3: Engine(gap=2e-3)}, 60.0), PROBES, 1e-4)
    with pytest.raises(RuntimeError, match=r"log-probs of rollout engine 3 are off"):
        check(proof, Learner())
    (problem,) = record_problems({3: EngineRecord(1)}, SENT)
    assert problem.startswith("rollout engine 3 ")


def test_probes_are_a_function_of_seed_version_and_attempt() -> None:
    def seeds(seed: int) -> list[int]:
        """Of two proofs of versions 0 and 1, each with a second attempt after a gap."""
        engine, other = Engine(), Engine()
        for version in (0, 1):  # a proof of its own, as after a resume
            learner = Learner()
            learner.policy_version = version
            with pytest.raises(RuntimeError, match="and so they were for other probes"):
                check(WeightProof(steps_of(engine, other), PROBES, -1.0, seed=seed), learner)
        assert [call[2] for call in engine.calls] == [call[2] for call in other.calls]
        return [call[2] for call in engine.calls]

    assert len(set(seeds(3) + seeds(4))) == 8
    assert seeds(3) == seeds(3)


def test_a_gap_is_of_all_tokens() -> None:
    assert Gap.of([-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0]) == Gap(0.5, 1.0)
    assert Gap.of([-1.0, math.nan], [-1.0, -1.0]) == Gap(math.inf, math.inf)
    assert _worst([Gap(1e-6, 3e-3), Gap(2e-6, 4e-6)]) == Gap(2e-6, 4e-6), "the engine that is off on average"


# ------------------------------------------------------------------------------------- settings


def test_the_bound_is_the_settings_or_the_dtypes(make_config: Any) -> None:
    for dtype, bound in (("float32", 5e-5), ("bfloat16", 0.1)):
        assert make_config().sync.mean_gap_bound(dtype) == bound
    assert make_config(sync={"max_mean_logprob_gap": 0.25}).sync.mean_gap_bound("float32") == 0.25


def test_the_bound_of_earlier_versions_is_refused_but_for_the_default_they_wrote_themselves() -> None:
    with pytest.raises(InputError, match=r"sync.max_logprob_gap is no more: .* set sync.max_mean_logprob_gap"):
        load_config("demo-math", ["sync.max_logprob_gap=0.5"])
    assert SyncConfig.model_validate({"max_logprob_gap": None, "num_probes": 5}).num_probes == 5
