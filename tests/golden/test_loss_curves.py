"""The curves of `loss_curves` as they were committed.

How close: on one processor and one thread the same numbers come to the last digit. Another processor's vector units,
or another layout of the rows, add up in another order; a float32 sum then differs in the seventh digit, and 40
optimizer steps carry that on. Measured between AVX-512, AVX2 and plain SSE builds of the same kernels, and between
padded and packed rows, nine arms each: of a curve's largest value at most 2e-5 in the first ten steps and 6e-5 in the
last ten. The bounds here are several times that. No ratio came closer than 1e-4 to where it is clipped, so rounding
clips no other token. A wrong sign or a step too many is off by per cents at the second step.
"""

from __future__ import annotations

import pytest

from tests.golden.loss_curves import ARMS, METRICS, NUM_STEPS, curves_of, stored

EARLY_STEPS, EARLY, LATE = 10, 1e-4, 5e-4


@pytest.mark.parametrize("arm", ARMS)
def test_the_curve_is_the_committed_one(arm: str) -> None:
    wanted, got = stored(arm), curves_of(arm)
    assert got.keys() == wanted.keys() <= set(METRICS)
    for name, values in wanted.items():
        assert len(got[name]) == len(values) == NUM_STEPS
        scale = max(map(abs, values))
        for step, (mine, theirs) in enumerate(zip(got[name], values, strict=True)):
            bound = (EARLY if step < EARLY_STEPS else LATE) * scale
            assert abs(mine - theirs) <= bound, f"{name} at step {step + 1}: {mine} instead of {theirs}"


def test_the_same_machine_repeats_a_curve_to_the_last_digit() -> None:
    assert curves_of("grpo") == curves_of("grpo")


def test_every_arm_has_a_curve_of_its_own_that_moves() -> None:
    curves = {arm: stored(arm) for arm in ARMS}
    assert len({tuple(curve["policy/loss"]) for curve in curves.values()}) == len(ARMS)
    for arm, curve in curves.items():
        assert max(curve["policy/clip_fraction"]) > 0, arm
        assert len(set(curve["policy/entropy"])) == NUM_STEPS, arm
        assert len(set(curve["reward/mean"])) > 3, arm
    assert {arm for arm, curve in curves.items() if "divergence/loss" in curve} == {
        "forward_kl",
        "js",
        "alpha",
        "reverse_kl_k3",
        "js_definition",
    }
