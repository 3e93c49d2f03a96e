"""One learner step again: what a step was given is kept, and may be given to a learner a second time.

`RUN/replay/step_N` holds the batch of step N (arrays without pickle), and in its seal the step's metrics, a digest of
weights and optimizer after it, and the settings that it was taken with. Repeating the step from a checkpoint must give
the same, to the bit, on the same machine. What differs then tells of a learner that is not repeatable, or of memory or
files that are not what they were.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.durable import damage, put_in_place, read_seal, seal
from dphrl.learner.checkpoint import list_checkpoints, read_manifest, step_of
from dphrl.protocols import Learner
from dphrl.tracking.tracker import REPLAY_FOLDER
from dphrl.types import RowKind, TrainBatch, TrainRow

BATCH_FILE = "batch.npz"
# What depends on the time that a step took.
TIMED = frozenset(["learner/mfu"])
# Settings of the learner that may change between two steps: a batch brings its learning rate, and the others are about
# deadlines, places and when a run ends.
_FREE = {
    *("num_steps", "lr", "lr_schedule", "lr_final_fraction", "warmup_steps", "max_skipped_steps"),
    *("max_restarts", "timeout_s", "cpus_per_rank"),
}
_KINDS = tuple(RowKind)


# ---------------------------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class StoredStep:
    """batch: what the step was given. metrics: its record. digest: of weights and optimizer after it. layout: of the
    learner that took it. config: of the run then. anew: whether it was the first step of an optimizer that began anew
    (checkpoint.restore: weights)."""

    batch: TrainBatch
    metrics: Mapping[str, float]
    digest: str
    layout: str
    config: Config
    anew: bool = False


class ReplayKeeper:
    """Stores each step that `learner` takes below the folder `run`, the newest tracking.replay_steps of them.

    anew: whether the learner's optimizer holds nothing of the steps before.
    """

    def __init__(self, config: Config, run: Path, learner: Learner, *, anew: bool = False) -> None:
        self._config, self._run, self._learner, self._anew = config, run, learner, anew

    async def keep(self, batch: TrainBatch, metrics: Mapping[str, float]) -> None:
        """Store the step that the learner has just taken; then delete all but the newest."""
        num_kept, anew, self._anew = self._config.tracking.replay_steps, self._anew, False
        if not num_kept:
            return
        digest, layout = await self._learner.digest(), self._learner.layout
        await asyncio.to_thread(
            _write, self._run / REPLAY_FOLDER, StoredStep(batch, metrics, digest, layout, self._config, anew)
        )
        for step in stored_steps(self._run)[:-num_kept]:
            await asyncio.to_thread(shutil.rmtree, _place(self._run, step))


def stored_steps(run: Path) -> list[int]:
    """The steps that are kept, from 1, in order."""
    names = (path.name.removeprefix("step_") for path in (run / REPLAY_FOLDER).glob("step_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_step(run: Path, step: int) -> StoredStep:
    """Raises InputError when what was kept of the step is not as it was written."""
    folder = _place(run, step)
    if wrong := damage(folder):
        raise InputError(f"{folder}: {wrong}; delete the folder and replay another step")
    facts = _facts(run, step)
    with np.load(folder / BATCH_FILE, allow_pickle=False) as arrays:
        batch = _batch_of(facts["batch"], {name: arrays[name] for name in arrays})
    metrics, config = _from_json(facts["metrics"]), _config_of(facts, folder)
    return StoredStep(batch, metrics, facts["digest"], facts["layout"], config, facts["anew"])


def _facts(run: Path, step: int) -> dict[str, Any]:
    """What the seal of a kept step says. Raises InputError when it is damaged."""
    folder = _place(run, step)
    try:
        return read_seal(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {error}; delete the folder and replay another step") from error


def _config_of(facts: Mapping[str, Any], folder: Path) -> Config:
    try:
        return Config.model_validate(facts.get("settings"))
    except ValidationError as error:
        raise InputError(f"{folder}: its settings are of another version of dphrl; replay it with that one") from error


def _place(run: Path, step: int) -> Path:
    return run / REPLAY_FOLDER / f"step_{step}"


def _write(folder: Path, stored: StoredStep) -> None:
    batch = stored.batch
    staging, target = folder / f".step_{batch.step + 1}.partial", folder / f"step_{batch.step + 1}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    np.savez(staging / BATCH_FILE, allow_pickle=False, **_arrays_of(batch))
    told = {"step": batch.step, "policy_version": batch.policy_version, "learning_rate": batch.learning_rate}
    seal(
        staging,
        {
            "batch": {**told, "metrics": _for_json(batch.metrics)},
            "metrics": _for_json(stored.metrics),
            "digest": stored.digest,
            "layout": stored.layout,
            "settings": stored.config.model_dump(mode="json"),
            "anew": stored.anew,
        },
    )
    put_in_place(staging, target)


def _arrays_of(batch: TrainBatch) -> dict[str, Any]:
    """Rows end to end. Floats are 64 bits wide, as they are in the batch: the learner must be given the same."""
    rows = [row for minibatch in batch.minibatches for row in minibatch]
    return {
        "minibatch_sizes": np.array([len(minibatch) for minibatch in batch.minibatches], np.int64),
        "policy_shares": np.array(batch.policy_shares, np.float64),
        "kinds": np.array([_KINDS.index(row.kind) for row in rows], np.int8),
        "num_tokens": np.array([row.num_tokens for row in rows], np.int64),
        "num_prompt_tokens": np.array([row.num_prompt_tokens for row in rows], np.int64),
        "token_ids": np.array([token for row in rows for token in row.token_ids], np.int64),
        "logprobs": np.array([logprob for row in rows for logprob in row.logprobs], np.float64),
        "weights": np.array([row.weight for row in rows], np.float64),
        "advantages": np.array([row.advantage for row in rows], np.float64),
        "policy_versions": np.array([row.policy_version for row in rows], np.int64),
        # -1 where nothing chooses.
        "num_chosen": np.array([-1 if row.chosen is None else len(row.chosen) for row in rows], np.int64),
        "chosen": np.array([place for row in rows for place in row.chosen or ()], np.int64),
    }


def _batch_of(told: Mapping[str, Any], arrays: Mapping[str, Any]) -> TrainBatch:
    token_ids, logprobs = iter(arrays["token_ids"].tolist()), iter(arrays["logprobs"].tolist())
    names = ("kinds", "num_tokens", "num_prompt_tokens", "weights", "advantages", "policy_versions", "num_chosen")
    # Earlier versions chose nothing.
    arrays = {"num_chosen": np.full(len(arrays["kinds"]), -1), "chosen": np.array([], np.int64), **arrays}
    chosen = iter(arrays["chosen"].tolist())
    rows = iter(
        [
            TrainRow(
                _KINDS[kind],
                tuple(next(token_ids) for _ in range(num_tokens)),
                num_prompt,
                tuple(next(logprobs) for _ in range(num_tokens - num_prompt)),
                weight,
                advantage,
                version,
                None if num_chosen < 0 else tuple(next(chosen) for _ in range(num_chosen)),
            )
            for kind, num_tokens, num_prompt, weight, advantage, version, num_chosen in zip(
                *(arrays[name].tolist() for name in names), strict=True
            )
        ]
    )
    minibatches = tuple(tuple(next(rows) for _ in range(size)) for size in arrays["minibatch_sizes"].tolist())
    shares = tuple(arrays["policy_shares"].tolist())
    rate, metrics = told["learning_rate"], _from_json(told["metrics"])
    return TrainBatch(told["step"], told["policy_version"], minibatches, rate, metrics, shares)


def _for_json(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN, and a step that went bad is what one wants to see again."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def _from_json(metrics: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) if isinstance(value, str) else value for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------- taking it again


@dataclass(frozen=True)
class Route:
    """How to come to a step: from a checkpoint (None: from the initial policy) by the steps that are taken again.
    weights_only: without the optimizer of the checkpoint, as the run did."""

    checkpoint: Path | None
    steps: Sequence[int]
    weights_only: bool = False


@dataclass(frozen=True)
class Replayed:
    """One step taken again. stored, replayed: its metrics, of the same names. same_weights: whether weights and
    optimizer are equal after it."""

    step: int
    stored: Mapping[str, float]
    replayed: Mapping[str, float]
    same_weights: bool

    @property
    def difference(self) -> str | None:
        """What differs first, in words; None when nothing does."""
        for name, value in self.replayed.items():
            if name not in self.stored or not _same(self.stored[name], value):
                return f"{name} was {self.stored.get(name)!r} and is {value!r}"
        return None if self.same_weights else "the metrics are equal, but weights or optimizer are not"


@dataclass(frozen=True)
class _Conditions:
    """What the result of a step depends on, beside its batch, the machine and the step before it."""

    layout: str
    settings: Mapping[str, Any]
    anew: bool

    def change_since(self, before: _Conditions) -> str | None:
        """Why no learner that took the step `before` can take this one, in words."""
        if self.anew:
            return "the optimizer began anew"
        if self.layout != before.layout:
            return f"the learner was {before.layout} and became {self.layout}"
        names = ", ".join(_differing(before.settings, self.settings))
        return f"the run went on with another {names}" if names else None


def _conditions(run: Path, step: int) -> _Conditions:
    facts = _facts(run, step)
    config = _config_of(facts, _place(run, step))
    names = {"seed", "deterministic", "model", "algorithm", "learner"}
    settings = config.model_dump(mode="json", include=names, exclude={"learner": _FREE})
    settings["rollout"] = {"temperature": config.rollout.temperature}
    # What `auto` comes to depends on other settings.
    settings["learner"]["share_prefix"] = config.share_prefix
    settings["algorithm"]["proximal_policy"] = config.proximal_policy
    return _Conditions(facts["layout"], settings, facts["anew"])


def _differing(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """The dotted names of settings that differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differing(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name


def find_route(run: Path, step: int) -> Route:
    """The shortest way to a step, on which nothing changes but the batches.

    Raises InputError, which names the steps that can be replayed, when there is none.
    """
    kept = {n: _conditions(run, n) for n in stored_steps(run)}
    if not kept:
        raise InputError(
            f"{run}: keeps no steps to replay; train with tracking.replay_steps=N, at least the steps between two "
            "checkpoints"
        )
    # Steps that do not follow from the one before.
    changes = {n: why for n in kept if n - 1 in kept and (why := kept[n].change_since(kept[n - 1]))}
    starts = _starts(run)

    def reaches(start: int, end: int) -> bool:
        return (
            start < end
            and kept.keys() >= {*range(start + 1, end + 1)}
            and changes.keys().isdisjoint(range(start + 2, end + 1))
        )

    for start in sorted(starts, reverse=True):
        if reaches(start, step):
            return Route(starts[start], range(start + 1, step + 1), weights_only=kept[start + 1].anew)
    possible = [n for n in sorted(kept) if any(reaches(start, n) for start in starts)]
    which = f"steps {', '.join(map(str, possible))} can be" if possible else "no step can be"
    why = _obstacle(step, kept, changes)
    raise InputError(f"{run}: step {step} cannot be replayed, as {why}; {which} (tracking.replay_steps)")


def _obstacle(step: int, kept: Container[int], changes: Mapping[int, str]) -> str:
    if step not in kept:
        return "it is not kept"
    first = next(n for n in range(step, -1, -1) if n - 1 not in kept)
    if changed := [n for n in changes if first < n <= step]:
        at = max(changed)
        return f"{changes[at]} after step {at - 1}, and no checkpoint is left between there and step {step}"
    return "it has a gap between it and every checkpoint before it"


def _starts(run: Path) -> dict[int, Path | None]:
    """Where a replay may start, by the steps that are done there."""
    return {0: None} | {step_of(path): path for path in list_checkpoints(run / "checkpoints")}


async def replay(learner: Learner, run: Path, route: Route) -> list[Replayed]:
    """Bring a fresh learner to the start of the route and take its steps again, up to the first that differs.

    Raises InputError when a file on the way is not as it was written.
    """
    if route.checkpoint is not None:
        if wrong := damage(route.checkpoint):
            raise InputError(f"{route.checkpoint}: {wrong}; move it away to start from the one before it")
        version = read_manifest(route.checkpoint).policy_version
        await learner.load(route.checkpoint, version, weights_only=route.weights_only)
    done: list[Replayed] = []
    for step in route.steps:
        stored = read_step(run, step)
        metrics = {name: value for name, value in (await learner.update(stored.batch)).items() if name not in TIMED}
        told = {name: stored.metrics[name] for name in metrics if name in stored.metrics}
        done.append(Replayed(step, told, metrics, await learner.digest() == stored.digest))
        if done[-1].difference:
            break
    return done


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
