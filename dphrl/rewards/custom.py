"""A user's own reward: a function, coroutine function, class or Ray remote function, named `package.module:name`.

It is called as (completion, answer, **params), a class as Class(**params)(completion, answer). Plain functions run in a
child process, so that one that hangs is killed. Coroutine and remote functions wait rather than compute: those of
a batch run together, each under its own deadline. What the code raises or returns amiss is an infrastructure error:
the model is not to blame for it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dphrl.own_code import name_taken
from dphrl.sandbox.process import Limits, Sandbox
from dphrl.types import JsonDict, RewardResult, RewardStatus

MAX_TEXT_CHARS = 500


@dataclass(frozen=True, slots=True)
class UserReward:
    """call(completion, answer) gives the verdict, or something to await for it if `asynchronous`."""

    call: Callable[[str, str], Any]
    asynchronous: bool


def load_reward(name: str, params: Mapping[str, Any]) -> UserReward:
    """What `package.module:name` stands for, bound to `params`.

    Raises ValueError when there is nothing of that name, it cannot be called so, or its module fails to import.
    """
    module_name, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        if inspect.isclass(target):
            target, params = target(**params), {}
    except Exception as error:
        raise ValueError(
            f"reward.name={name!r} cannot be loaded ({type(error).__name__}: {error}); "
            + (name_taken(error) or "install the module or put its folder on PYTHONPATH, and check reward.params")
        ) from error
    # Ray marks what runs elsewhere by `.remote`; its result is awaited like a coroutine's.
    remote = hasattr(target, "remote")
    function = target.remote if remote else target
    if not callable(function):
        raise ValueError(f"reward.name={name!r} is a {type(target).__name__}, which cannot be called; name a function")
    asynchronous = remote or any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    return UserReward(functools.partial(function, **params), asynchronous)


class CustomGrader:
    """`Grader` around a user's reward. timeout_s: for one call. Raises ValueError when it cannot be loaded."""

    def __init__(self, name: str, params: Mapping[str, Any], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reward = load_reward(name, params)
        self._child: Sandbox | None = None
        if not self._reward.asynchronous:
            settings = {"name": name, "params": dict(params)}
            self._child = Sandbox("dphrl.rewards.custom:serve", settings, Limits(restricted=False))

    def grade(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        if self._child is None:
            return asyncio.run(self._grade_together(items))
        jobs = [{"completion": text, "answer": answer} for text, answer in items]
        outcomes = self._child.run(jobs, self._timeout_s)
        return [
            # The code that died or hung is the user's, not the model's.
            _checked(outcome.value)
            if outcome.value is not None
            else RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"{outcome.failure}: {outcome.detail}")
            for outcome in outcomes
        ]

    def close(self) -> None:
        if self._child is not None:
            self._child.close()

    async def _grade_together(self, items: Sequence[tuple[str, str]]) -> list[RewardResult]:
        return list(await asyncio.gather(*[self._grade_one(text, answer) for text, answer in items]))

    async def _grade_one(self, text: str, answer: str) -> RewardResult:
        try:
            return as_result(await asyncio.wait_for(_settle(self._reward.call(text, answer)), self._timeout_s))
        except TimeoutError:
            detail = f"the reward gave no verdict within {self._timeout_s:g} s (reward.timeout_s)"
            return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, detail)
        except Exception as error:
            return _raised(error)


async def _settle(verdict: Awaitable[Any]) -> Any:
    try:
        return await verdict
    except SystemExit as error:
        # Out of a task it would end the event loop, and with it the worker.
        raise RuntimeError(f"SystemExit: {error}") from error


def as_result(verdict: object) -> RewardResult:
    """A user's verdict: a bool is right or wrong; a number is the training signal, and right from 1 on."""
    if isinstance(verdict, RewardResult):
        return _checked(asdict(verdict))
    if isinstance(verdict, bool):
        return RewardResult(RewardStatus.CORRECT if verdict else RewardStatus.WRONG)
    signal = _finite(verdict)
    if signal is None:
        return _amiss(verdict, "not a bool, a finite number or a RewardResult")
    status = RewardStatus.CORRECT if signal >= 1 else RewardStatus.WRONG
    return RewardResult(status, f"reward {signal:g}", signal=signal)


def _checked(fields: JsonDict) -> RewardResult:
    """A RewardResult whose every field is what its type says; Python lets a user write anything there."""
    signal = None if fields["signal"] is None else _finite(fields["signal"])
    if fields["status"] not in list(RewardStatus):
        return _amiss(fields["status"], f"which is no status ({', '.join(RewardStatus)})")
    if signal is None and fields["signal"] is not None:
        return _amiss(fields["signal"], "which is no finite signal")
    detail, solution, answer = (str(fields[name])[:MAX_TEXT_CHARS] for name in ("detail", "solution", "answer"))
    return RewardResult(RewardStatus(fields["status"]), detail, solution, signal, answer)


def _finite(value: object) -> float | None:
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]  # numpy's and torch's scalars too
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _amiss(value: object, why: str) -> RewardResult:
    return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"the reward returned {value!r:.80}, {why}")


def serve(settings: JsonDict) -> Callable[[JsonDict], JsonDict]:
    """What the child process runs."""
    reward = load_reward(settings["name"], settings["params"]).call

    def handle(job: JsonDict) -> JsonDict:
        try:
            result = as_result(reward(job["completion"], job["answer"]))
        except Exception as error:
            result = _raised(error)
        return asdict(result)

    return handle


def _raised(error: Exception) -> RewardResult:
    return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"the reward raised {type(error).__name__}: {error}"[:300])
