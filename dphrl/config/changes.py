"""Which settings of a run that is continued are not those it was trained with so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from dphrl.config.errors import Loc, show_value
from dphrl.config.loading import METHOD_PLACES
from dphrl.config.places import dotted, find_field
from dphrl.config.schema import Config

# Settings, and whole sections, that decide neither what is trained nor on what: names, speed, memory, deadlines, when
# something is stored or measured. Anything else is told when it changes, and so is every new setting until it is here.
FREE = frozenset(
    [
        *("run_name", "run_dir", "data.evaluation", "evaluation", "tracking", "cluster", "health"),
        *("reward.num_workers", "reward.cpus_per_worker", "reward.gpus_per_worker", "reward.num_retries"),
        *(
            "rollout.num_engines",
            "rollout.max_engines",
            "rollout.tensor_parallel",
            "rollout.cpus_per_engine",
            "rollout.threads_per_engine",
        ),
        *("rollout.kv_cache_gib", "rollout.gpu_memory_utilization", "rollout.max_concurrent_sequences"),
        *("rollout.enforce_eager", "rollout.timeout_s", "rollout.completion_timeout_s"),
        *("rollout.on_failure", "rollout.max_replacements"),
        *("reference.prompts_per_chunk", "reference.max_bytes"),
        *("learner.micro_batch_tokens", "learner.gradient_checkpointing", "learner.cpus_per_rank"),
        *(
            "learner.threads_per_rank",
            "learner.timeout_s",
            "learner.max_restarts",
            "learner.max_skipped_steps",
            "learner.accelerator",
            "rollout.accelerator",
        ),
        *("learner.sequence_parallel", "learner.offload", "learner.share_prefix"),
        *("sync.backend", "sync.num_probes", "sync.timeout_s", "sync.max_mean_logprob_gap"),
        *("learner.num_ranks", "learner.zero_stage", "checkpoint"),
    ]
)
# What was free and is no more.
REMOVED = frozenset(["sync.max_logprob_gap", "sync.on_failure"])
# A run may become longer. Shorter, it would have had another schedule of learning rates all along.
MAY_GROW = frozenset(["learner.num_steps"])

# Defaults of earlier versions that today's defaults are other words for.
EARLIER_DEFAULTS = {"data.train.answer_format": "plain", "data.train.invalid_gold": "error"}

_ABSENT = object()


@dataclass(frozen=True)
class SettingChanges:
    """changed: `key: old -> new` of each. unknown: keys that only the older configuration has."""

    changed: tuple[str, ...]
    unknown: tuple[str, ...]


def compare_settings(stored: Mapping[str, Any], config: Config) -> SettingChanges:
    """What is not free to change and differs between `stored`, an earlier resolved configuration as JSON, and `config`.

    A setting that `stored` lacks, because it is newer, counts as having had its default.
    """
    changed: list[str] = []
    unknown: list[str] = []
    present = config.model_dump(mode="json")
    if "proximal_policy" not in (algorithm := stored.get("algorithm", {})):
        # Runs from before this setting had the trust region around the learner, whatever `auto` makes of it today.
        stored = {**stored, "algorithm": {**algorithm, "proximal_policy": "learner"}}
        present["algorithm"]["proximal_policy"] = config.proximal_policy
    for loc, old, new in _differences(stored, present, ()):
        key = dotted(loc)
        if new is _ABSENT and not _is_free_mapping(loc):
            unknown.append(key)
        elif not (key in MAY_GROW and isinstance(old, int) and old < new):
            changed.append(f"{key}: {_show(old)} -> {_show(new)}")
    return SettingChanges(tuple(changed), tuple(unknown))


def _differences(old: Any, new: Any, loc: Loc) -> Iterator[tuple[Loc, Any, Any]]:
    """(place, old value, new value) of every setting that differs; a method with its parameters is one setting."""
    key = dotted(loc)
    if key in FREE | REMOVED:
        return
    if old is _ABSENT or (key in EARLIER_DEFAULTS and old == EARLIER_DEFAULTS[key] != new):
        default = _default(loc)
        # A section that is newer as a whole is compared setting by setting, but for one that is null by default.
        old = {} if isinstance(new, dict) and loc not in METHOD_PLACES and default is not None else default
    if loc in METHOD_PLACES or not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield loc, old, new
        return
    for name in {**old, **new}:
        yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), (*loc, name))


def _default(loc: Loc) -> Any:
    """The default of the setting at `loc`, as JSON; _ABSENT where there is none."""
    _, place, info = find_field(loc)
    if place != loc or info.is_required():
        return _ABSENT
    return to_jsonable_python(info.get_default(call_default_factory=True))


def _is_free_mapping(loc: Loc) -> bool:
    """Whether `loc` is an entry of a mapping whose keys are the user's, such as reward.params."""
    try:
        _, place, _ = find_field(loc)
    except KeyError:
        return False
    return place != loc


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    if isinstance(value, dict) and value.keys() == {"name", "params"}:
        return show_value({"name": value["name"], **value["params"]}) if value["params"] else show_value(value["name"])
    return show_value(value)
