"""A user's own reward: a function, coroutine function, class or Ray remote function, named `package.module:name`.

It is called as function(completion, answer, **params), a class as Class(**params)(completion, answer). Plain functions
run in a child process, so that one that hangs can be killed. Coroutine functions and remote functions wait rather than
compute, so all calls of a batch run together, each with its own deadline. If the code raises an error or returns a
value of a wrong kind, the status is infrastructure_error, because the model is not to blame.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dphrl.own_code import name_taken
from dphrl.sandbox.process import Limits, Sandbox
from dphrl.types import JsonDict, RewardResult, RewardStatus

MAX_TEXT_CHARS = 500
# The end of a traceback is kept: it holds the error and the innermost calls.
MAX_TRACE_CHARS = 4000


@dataclass(frozen=True, slots=True)
class UserReward:
    """call(completion, answer) returns the verdict; if `asynchronous`, it returns an awaitable of the verdict."""

    call: Callable[[str, str], Any]
    asynchronous: bool


def load_reward(name: str, params: Mapping[str, Any]) -> UserReward:
    """The reward that `package.module:name` names, bound to `params`.

    Raises ValueError when nothing has that name, when it cannot be called, or when its module fails to import.
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
    # A remote function of Ray has an attribute `.remote`; its result is awaited like that of a coroutine.
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
        """One verdict per (completion text, answer), in order; never raises because of the user's code."""
        if self._child is None:
            return asyncio.run(self._grade_together(items))
        jobs = [{"completion": text, "answer": answer} for text, answer in items]
        outcomes = self._child.run(jobs, self._timeout_s)
        return [
            # The user's code died or hung here, so the model is not to blame.
            _checked(outcome.value)
            if outcome.value is not None
            else RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, f"{outcome.failure}: {outcome.detail}")
            for outcome in outcomes
        ]

    def close(self) -> None:
        """End the child process, if there is one."""
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
        # If SystemExit left the task, it would end the event loop, and the worker with it.
        raise RuntimeError(f"SystemExit: {error}") from error


def as_result(verdict: object) -> RewardResult:
    """A user's verdict as a result: a bool is right or wrong; a number is the training signal, and right from 1 on."""
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
    """A RewardResult with fields of the right types; Python lets a user put anything there."""
    signal = None if fields["signal"] is None else _finite(fields["signal"])
    if fields["status"] not in list(RewardStatus):
        return _amiss(fields["status"], f"which is no status ({', '.join(RewardStatus)})")
    if signal is None and fields["signal"] is not None:
        return _amiss(fields["signal"], "which is no finite signal")
    detail, solution, answer = (str(fields[name])[:MAX_TEXT_CHARS] for name in ("detail", "solution", "answer"))
    trace = str(fields["trace"])[-MAX_TRACE_CHARS:]
    return RewardResult(RewardStatus(fields["status"]), detail, solution, signal, answer, trace)


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
    """Make the handler that the child process runs on every job. settings: `name` and `params` of the reward."""
    reward = load_reward(settings["name"], settings["params"]).call

    def handle(job: JsonDict) -> JsonDict:
        try:
            result = as_result(reward(job["completion"], job["answer"]))
        # What sys.exit says is a message too, and the child need not end for it.
        except (Exception, SystemExit) as error:
            result = _raised(error)
        return asdict(result)

    return handle


def _raised(error: BaseException) -> RewardResult:
    detail = f"the reward raised {type(error).__name__}: {error}"[:300]
    trace = "".join(traceback.format_exception(error))[-MAX_TRACE_CHARS:]
    return RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, detail, trace=trace)
