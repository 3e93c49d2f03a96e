"""Pass@1 against Pass@k: the points of a suite's arms, their front, and the hypervolume as one number.

A method that trades one for the other moves along a front as eta changes. Its *hypervolume* is the area of what its
points dominate: the union of the rectangles between the reference point and each of them (Zitzler and Thiele, PPSN
1998). It grows when a point moves up or right, and when an eta adds a point that no other dominates.

The reference point is the origin, the worst that both rates can be. The base would be the other choice, but plain RL,
and in some suites every arm, ends below it in Pass@k; such points would count nothing, and could not be told apart. The
base has a hypervolume of its own, beside which the others are shown. More etas never make a hypervolume smaller, so
compare methods with about as many of them; with a single eta it is Pass@1 x Pass@k.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dphrl.experiments.results import BASE_ARM, Results, interval_over_seeds, values_by_seed, values_of_prompts

ORIGIN = (0.0, 0.0)
DEFAULT_K = 16
_NUM_RESAMPLES = 2000
_ETA = "algorithm.eta"


@dataclass(frozen=True)
class Point:
    """One run. x: Pass@1, y: Pass@k, each in [0, 1]. method: the arms that differ in eta alone share it."""

    method: str
    arm: str
    eta: float | None
    seed: int
    x: float
    y: float


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float] = ORIGIN) -> float:
    """The area that the points dominate above `reference`, both rates the larger the better; 0 without such a point.

    A point that is not above the reference point in both rates counts nothing, and neither does a dominated one.
    """
    area, reached = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):
        # From right to left, each point adds the part of its rectangle that lies above those before it.
        if x > reference[0] and y > reached:
            area += (x - reference[0]) * (y - reached)
            reached = y
    return area


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other dominates, by rising x and so by falling y; equal points once."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept[::-1]


def choose_k(results: Results, k: int | None = None) -> int:
    """The k of the picture: the wanted one, else 16, else the largest. Raises ValueError for one that is missing."""
    if k is None:
        return DEFAULT_K if DEFAULT_K in results["k"] else max(results["k"])
    if k not in results["k"] or k == 1:
        had = ", ".join(str(one) for one in results["k"] if one > 1)
        raise ValueError(f"k={k} is not among the results' ({had}); choose one of these")
    return k


def methods_of(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{arm: {"method": name, "eta": eta or None}}; arms whose settings differ in eta alone are one method.

    settings: what each arm changes, by section.key. A method of several arms is named by what their names share.
    """
    groups: dict[str, list[str]] = {}
    for arm, changes in settings.items():
        others = {key: value for key, value in changes.items() if key != _ETA}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(arm)
    methods: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    for arms in groups.values():
        name = arms[0] if len(arms) == 1 else _shared_name(arms)
        if not name or name in taken or (name in settings and name not in arms):
            name = ", ".join(arms)
        taken.add(name)
        for arm in arms:
            eta = settings[arm].get(_ETA)
            methods[arm] = {"method": name, "eta": float(eta) if isinstance(eta, int | float) else None}
    return methods


def _shared_name(arms: Sequence[str]) -> str:
    """What the names begin with in common, without number or separator at its end: dph-f of dph-f-0.1 and dph-f-1."""
    shortest = min(arms, key=len)
    num_shared = next((i for i, c in enumerate(shortest) if any(arm[i] != c for arm in arms)), len(shortest))
    return re.sub(r"[-_.\d]+$", "", shortest[:num_shared])


def points_of(results: Results, domain: str, k: int) -> list[Point]:
    """A point for each arm and seed, the base included. Arms that the results know no method of are methods alone."""
    methods = results.get("methods", {})
    found = []
    for arm in results["arms"]:
        xs, ys = (values_by_seed(results["rows"], arm, domain, f"pass@{one}") for one in (1, k))
        method = methods.get(arm, {"method": arm, "eta": None})
        for seed in sorted(xs.keys() & ys.keys()):
            found.append(Point(method["method"], arm, method["eta"], seed, xs[seed], ys[seed]))
    return found


def hypervolumes(
    results: Results, domain: str, k: int, reference: tuple[float, float] = ORIGIN
) -> dict[str, dict[str, Any]]:
    """For each method, the base first: `cell` (mean and interval), `num_etas`, and `above_base` (a cell, or absent).

    A hypervolume is computed seed by seed, from all etas that the seed has; a seed that lacks one of the method's etas
    is left out. The interval is Student's over seeds; for one seed on one data set it is the bootstrap over prompts,
    the same prompts for both rates and all etas. `above_base` is the difference from the base on the same seeds.
    """
    points = points_of(results, domain, k)
    volumes: dict[str, dict[int, float]] = {}
    arms: dict[str, list[str]] = {}
    for point in points:
        arms.setdefault(point.method, [])
        if point.arm not in arms[point.method]:
            arms[point.method].append(point.arm)
    for method, of_method in arms.items():
        for seed in sorted({point.seed for point in points if point.method == method}):
            mine = [point for point in points if (point.method, point.seed) == (method, seed)]
            if len(mine) == len(of_method):
                volumes.setdefault(method, {})[seed] = hypervolume([(p.x, p.y) for p in mine], reference)
    found: dict[str, dict[str, Any]] = {}
    for method, by_seed in volumes.items():
        one = _over_prompts(results, arms[method], domain, k, reference) if len(by_seed) == 1 else None
        found[method] = {"cell": interval_over_seeds(list(by_seed.values()), one), "num_etas": len(arms[method])}
        base = volumes.get(BASE_ARM, {})
        shared = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
        if method != BASE_ARM and shared:
            found[method]["above_base"] = interval_over_seeds(shared)
    return found


def _over_prompts(
    results: Results, arms: Sequence[str], domain: str, k: int, reference: tuple[float, float]
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap over the prompts of one seed; None for several data sets or ungraded samples."""
    columns: list[NDArray[np.float64]] = []
    for arm in arms:
        mine = [row for row in results["rows"] if row["arm"] == arm and row["domain"] == domain]
        if len(mine) != 1:
            return None
        for one in (1, k):
            values = values_of_prompts(results["rows"], mine[0], f"pass@{one}")
            if values is None or len(values) != len(mine[0]["num_graded"]):
                return None
            columns.append(values)
    num_prompts = len(columns[0])
    if not num_prompts or any(len(column) != num_prompts for column in columns):
        return None
    drawn = np.random.default_rng(0).integers(num_prompts, size=(_NUM_RESAMPLES, num_prompts))
    means = np.stack([column[drawn].mean(axis=1) for column in columns], axis=1).reshape(len(drawn), len(arms), 2)
    volumes = [hypervolume([(float(x), float(y)) for x, y in of_draw], reference) for of_draw in means]
    low, high = np.quantile(volumes, [0.025, 0.975])
    return float(low), float(high)
