"""Rewards as a user would write them, named in configs of test_custom_reward.py."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from dphrl.types import RewardResult, RewardStatus


def exact(completion: str, answer: str) -> bool:
    return completion.strip() == answer


def scaled(completion: str, answer: str, *, scale: float) -> float:
    return scale * len(completion)


def typed(completion: str, answer: str) -> RewardResult:
    return RewardResult(RewardStatus.REFUSED, "not this")


def misbehaving(completion: str, answer: str) -> object:
    """Does what the completion says."""
    if completion == "hang":
        time.sleep(3600)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "raise at length":
        raise KeyError("no" * 5000)
    return "maybe" if completion == "nonsense" else True


async def misbehaving_later(completion: str, answer: str) -> object:
    return misbehaving(completion, answer)


def ill_typed(completion: str, answer: str) -> RewardResult:
    """A RewardResult, but not of what its types say."""
    made = {
        "status": RewardResult("good"),
        "text": RewardResult("correct"),
        "nan": RewardResult(RewardStatus.CORRECT, signal=float("nan")),
        "signal": RewardResult(RewardStatus.CORRECT, signal="0.3"),
        "string": "1",
    }
    return made[completion]


async def ill_typed_later(completion: str, answer: str) -> RewardResult:
    if completion == "exit":
        raise SystemExit(3)
    return ill_typed(completion, answer)


async def judged(completion: str, answer: str) -> float:
    await asyncio.sleep(3600 if completion == "hang" else 0.2)
    return 1.0 if completion == answer else 0.25


def exits(completion: str, answer: str) -> None:
    sys.exit("set JUDGE_KEY")


def raises(completion: str, answer: str) -> float:
    return float({"answer": answer}["final_answer"])


def returns_nan(completion: str, answer: str) -> float:
    return float("nan")


def returns_none(completion: str, answer: str) -> None:
    completion.strip()


class Counting:
    """A class keeps what is expensive to make."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.num_calls = 0

    def __call__(self, completion: str, answer: str) -> RewardResult:
        self.num_calls += 1
        return RewardResult(
            RewardStatus.CORRECT if len(completion) == self.target else RewardStatus.WRONG, str(self.num_calls)
        )


NOT_CALLABLE = 3
