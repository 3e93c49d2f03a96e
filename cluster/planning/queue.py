"""Runs that wait for what others hold: who holds it, and how many wait before.

A run reserves its places by placement groups, whose names Ray shows to everybody on the cluster. The names here tell
whose they are and since when.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.planning.placement import Bundle, Node
from dphrl.config.schema import Config

# How the line begins that says what a run waits for.
WAITS = "waits for "
NAME_PREFIX = "dphrl"
# Ray sets this variable in the driver of a submitted job, with the job's id in its metadata.
JOB_CONFIG_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
JOB_ID_KEY = "job_submission_id"
RESOURCES = ("GPU", "CPU")
EPSILON = 1e-6


@dataclass(frozen=True)
class Claim:
    """A placement group of a run. who: its job, or its run if it was not submitted. since_ns: when it was asked for.
    resources: in all, by Ray's names."""

    who: str
    since_ns: int
    is_waiting: bool
    resources: Mapping[str, float]


def group_name(config: Config, since_ns: int | None = None) -> str:
    """A name for one more placement group of this run; since_ns: asked for when (nanoseconds since 1970), else now."""
    return f"{NAME_PREFIX}:{since_ns or time.time_ns()}:{own_name(config)}"


def own_name(config: Config) -> str:
    """The job of this process if it was submitted as one, else its run."""
    try:
        job = json.loads(os.environ.get(JOB_CONFIG_ENVIRONMENT, "{}")).get("metadata", {}).get(JOB_ID_KEY)
    except (ValueError, AttributeError):
        job = None
    return str(job or config.run_name)


def claims_in(table: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """The runs' claims among Ray's placement groups (`ray.util.placement_group_table()`), oldest first."""
    claims = []
    for group in table.values():
        prefix, _, rest = str(group["name"]).partition(":")
        since, _, who = rest.partition(":")
        if prefix != NAME_PREFIX or not since.isdigit() or group["state"] == "REMOVED":
            continue
        resources = {name: sum(bundle.get(name, 0.0) for bundle in group["bundles"].values()) for name in RESOURCES}
        claims.append(Claim(who, int(since), group["state"] == "PENDING", resources))
    return sorted(claims, key=lambda claim: claim.since_ns)


def missing(bundles: Sequence[Bundle], free: Iterable[Node]) -> dict[str, float]:
    """Of what the bundles need on their nodes, what is not free there; by Ray's names, without what is all free."""
    left = {node.name: {"GPU": node.num_gpus, "CPU": node.num_cpus} for node in free}
    lacks = dict[str, float]()
    for name in RESOURCES:
        wanted = defaultdict[str, float](float)
        for bundle in bundles:
            wanted[bundle.node] += bundle.resources().get(name, 0.0)
        lacks[name] = sum(max(0.0, amount - left.get(node, {}).get(name, 0.0)) for node, amount in wanted.items())
    return {name: amount for name, amount in lacks.items() if amount > EPSILON}


def describe_wait(bundles: Sequence[Bundle], lacks: Mapping[str, float], claims: Sequence[Claim], mine: Claim) -> str:
    """`waits for 2 of 4 GPUs; job-1 holds them; second in the queue, after job-2`.

    lacks: see `missing`. claims: of all runs, `mine` among them.
    """
    needs = {name: sum(bundle.resources().get(name, 0.0) for bundle in bundles) for name in RESOURCES}
    parts = [f"{amount:g} of {needs[name]:g} {name}s" for name, amount in lacks.items()]
    holding: dict[str, dict[str, float]] = {}
    for claim in claims:
        held = {name: claim.resources.get(name, 0.0) for name in lacks}
        if not claim.is_waiting and claim.who != mine.who and any(held.values()):
            before = holding.get(claim.who, {})
            holding[claim.who] = {name: before.get(name, 0.0) + amount for name, amount in held.items()}
    ahead = [claim.who for claim in claims if claim.is_waiting and claim.since_ns < mine.since_ns]
    place = f"number {len(ahead) + 1} in the queue, after {', '.join(ahead)}" if ahead else "first in the queue"
    return f"{WAITS}{' and '.join(parts) or 'its places'}; {_holders(holding)}; {place}"


def _holders(holding: Mapping[str, Mapping[str, float]]) -> str:
    if not holding:
        return "programs other than dphrl hold them"
    if len(holding) == 1:
        return f"{next(iter(holding))} holds them"

    def amounts(held: Mapping[str, float]) -> str:
        return " and ".join(f"{amount:g} {name}s" for name, amount in held.items() if amount)

    return ", ".join(f"{who} holds {amounts(held)}" for who, held in holding.items())
