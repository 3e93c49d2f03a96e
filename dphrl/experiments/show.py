"""Shows a suite's results to people: the table, the claims, the picture as in the paper."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dphrl.config.loading import InputError
from dphrl.evaluation.differences import self_retention
from dphrl.evaluation.estimators import pass_curve
from dphrl.experiments.expected import compare_expected, expected_table
from dphrl.experiments.pareto import choose_k, hypervolumes
from dphrl.experiments.results import BASE_ARM, DOMAINS, Cell, Results, Row, claims, interval_over_seeds
from dphrl.experiments.strategies import alone_table, mass_as_json, prompts_table, say_missing, split_table
from dphrl.experiments.suite import committed_results
from dphrl.outputs import save_output
from dphrl.tracking.console import Console

Table = tuple[list[str], list[list[object]]]
# Colour-blind readers can tell these colours apart. In a black and white print the line styles tell the arms apart.
_COLOURS = ("#4477aa", "#66ccee", "#aa3377", "#ccbb44", "#228833", "#ee6677", "#bbbbbb", "#332288")
_DASHES = ("-", "--", ":", "-.")
# Arms in a picture, up to which their intervals are shaded.
_MAX_SHADED = 10


def show_results(source: str, *, as_json: bool, picture: Path | None) -> None:
    """Show the committed results of a suite, or those of a results file, as tables, as JSON, or as a picture.

    Raises InputError when there are no results, or when the picture cannot be written.
    """
    results = committed_results(source)
    if picture is not None:
        plot(results, picture)
    if as_json:
        print(json.dumps(results | derived(results)))
    else:
        show(results, Console())
        if picture is not None:
            print(f"written to {picture}")


def show(results: Results, console: Console) -> None:
    """Print the rates, and the claims if there are arms to compare."""
    console.table(title(results), *results_table(results))
    for line in kept_of_itself(results):
        console.info(line)
    header, rows = claims_table(results)
    if rows:
        console.table("The paper's claims; figures are means over seeds ± half of the 95 % interval", header, rows)
        console.info(count_claims(claims(results)))
    _show_mass(results, console)
    k = choose_k(results)
    words = f"Hypervolume of Pass@1 and Pass@{k} above the origin, a method's etas together"
    console.table(f"{words}: mean ± half of the 95 % interval", *hypervolume_table(results, k))
    header, rows = expected_table(results)
    if rows:
        console.table(f"Published figures beside these: {results['expected']['source']}", header, rows)


def _show_mass(results: Results, console: Console) -> None:
    header, rows = prompts_table(results)
    if rows:
        words = "Lost: solved by the base in its samples, by the arm in none; gained: the other way round"
        console.table(f"{words}. Means over seeds; where they were lost, prompts of all seeds", header, rows)
    header, rows = alone_table(results)
    if rows:
        words = (
            "Pass@1 where one strategy alone fits (its share x precision there), and where every one does (precision)"
        )
        console.table(f"{words}: mean ± half of the 95 % interval", header, rows)
    header, rows = split_table(results)
    if rows:
        words = (
            "Pass@1 taken apart: right is share x selection (the strategy fits) x precision (it is carried out well)"
        )
        console.table(f"{words}; blind: selection without a look at the prompt", header, rows)
    if (missing := say_missing(results)) is not None:
        console.info(missing)


def derived(results: Results) -> dict[str, Any]:
    """What --json adds to the results, all of it computed from their rows: see the modules that compute it."""
    k = choose_k(results)
    domains = [domain for domain in DOMAINS if domain in results["arms"][BASE_ARM]]
    return {
        "mass": mass_as_json(results),
        "hypervolume": {"k": k, **{domain: hypervolumes(results, domain, k) for domain in domains}},
        **({"published": published} if (published := compare_expected(results)) else {}),
    }


def hypervolume_table(results: Results, k: int) -> Table:
    """A row for each method, the base first: its hypervolume, and what it has more than the base, for each domain."""
    domains = [domain for domain in DOMAINS if domain in results["arms"][BASE_ARM]]
    found = {domain: hypervolumes(results, domain, k) for domain in domains}
    header = ["method", "etas", *(f"{_where(d)} {name}" for d in domains for name in ("hypervolume", "above the base"))]
    rows: list[list[object]] = []
    for method in dict.fromkeys(method for volumes in found.values() for method in volumes):
        cells: list[object] = []
        for domain in domains:
            volume = found[domain].get(method, {})
            cells += [_plus_minus(volume[key]) if key in volume else "-" for key in ("cell", "above_base")]
        num_etas = next(volumes[method]["num_etas"] for volumes in found.values() if method in volumes)
        rows.append([method, num_etas, *cells])
    return header, rows


def kept_of_itself(results: Results) -> list[str]:
    """For each domain, what the base keeps of itself by split halves: what a retention must be compared with."""
    lines = []
    for domain in DOMAINS:
        mine = [row for row in results["rows"] if row["arm"] == BASE_ARM and row["domain"] == domain]
        counts = [zip(row["num_graded"], row["num_correct"], strict=True) for row in mine]
        prompts = [[{"num_samples": n, "num_correct": c} for n, c in of_row] for of_row in counts]
        shares = [share for of_row in prompts if (share := self_retention(of_row)) is not None]
        if shares:
            lines.append(
                f"{domain.replace('_', ' ')}: of the prompts that half of the base's samples solve, its other half "
                f"solves {statistics.fmean(shares):.3f}; an arm with that retention lost nothing"
            )
    return lines


def count_claims(found: Sequence[Mapping[str, Any]]) -> str:
    """How many claims were tested and how they came out, and how many would look sure by chance.

    A claim is sure when its whole 95 % interval is as claimed. Of claims that are just not true, 2.5 % come out so.
    """
    sure = sum(bool(claim["is_sure"]) for claim in found)
    in_the_mean = sum(bool(claim["holds"] and not claim["is_sure"]) for claim in found)
    return (
        f"{len(found)} claims were tested: {sure} hold with their whole interval (yes), {in_the_mean} in the mean "
        f"only ((yes)), {len(found) - sure - in_the_mean} do not (no); were none of them true, about "
        f"{0.025 * len(found):.1f} would come out as a yes by chance"
    )


def title(results: Results) -> str:
    """The table's heading."""
    seeds = ", ".join(map(str, results["seeds"]))
    plural = "s" if len(results["seeds"]) > 1 else ""
    return f"{results['suite']}, seed{plural} {seeds}: mean ± half of the 95 % interval"


def results_table(results: Results) -> Table:
    """A row per arm with its rates in and out of domain, as mean and half-width; for few k, to fit a screen."""
    # The base has no retention: a column exists if any arm has it.
    columns = list(
        dict.fromkeys((name, key) for some in results["arms"].values() for name in some for key in _shown(some[name]))
    )
    columns.sort(key=lambda column: column[0])
    header = ["arm", *(f"{_where(domain)} {key}" for domain, key in columns)]
    rows: list[list[object]] = []
    for arm, domains in results["arms"].items():
        cells = [domains.get(domain, {}).get(key) for domain, key in columns]
        rows.append([arm, *("-" if cell is None else _plus_minus(cell) for cell in cells)])
    return header, rows


def _shown(domain: Mapping[str, Any]) -> list[str]:
    passes = [key for key in domain if key.startswith("pass@")]
    ends = [key for key in passes if key in ("pass@1", "pass@8", "pass@16")] or passes
    return [*ends, *(key for key in ("retention",) if key in domain)]


def _where(domain: str) -> str:
    return "in" if domain == DOMAINS[0] else "out"


def _plus_minus(value: Cell) -> str:
    half = (value["high"] - value["low"]) / 2
    return f"{value['mean']:.3f} ±{half:.3f}" if half else f"{value['mean']:.3f}"


def claims_table(results: Results) -> Table:
    """The paper's claims: a row for each claim and domain, a column for each arm with the figure and a verdict.

    The verdict is "yes" if the whole interval is as claimed, "(yes)" if only the mean is, "no" otherwise.
    """
    arms = list(results["kinds"])
    rows: dict[tuple[str, str], list[object]] = {}
    for claim in claims(results):
        verdict = "yes" if claim["is_sure"] else "(yes)" if claim["holds"] else "no"
        bound = f" (at least {claim['bound']:g})" if claim["bound"] else ""
        row = rows.setdefault((_where(claim["domain"]), claim["claim"] + bound), ["-"] * len(arms))
        row[arms.index(claim["arm"])] = f"{_plus_minus(claim['value'])} {verdict}"
    return ["domain", "claim", *arms], [[*name, *cells] for name, cells in sorted(rows.items(), key=lambda r: r[0][0])]


def prediction_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """New figures beside the committed prediction intervals; those outside their interval come first."""
    rows: list[list[object]] = []
    for check in sorted(checks, key=lambda check: bool(check["inside"])):
        where = _where(check["domain"])
        bounds = f"{check['low']:.3f} to {check['high']:.3f}"
        rows.append([check["arm"], where, check["rate"], check["value"], bounds, "yes" if check["inside"] else "NO"])
    return ["arm", "domain", "rate", "this seed", "predicted", "inside"], rows


def curve_over_seeds(rows: Sequence[Row]) -> list[Cell]:
    """Pass@k for k = 1, 2, ... of one arm and domain: mean and interval over seeds. All data sets count the same."""
    by_seed: dict[int, list[list[float]]] = {}
    for row in rows:
        counts = [("", n, c) for n, c in zip(row["num_graded"], row["num_correct"], strict=True)]
        by_seed.setdefault(row["seed"], []).append(pass_curve(counts))
    length = min(len(curve) for curves in by_seed.values() for curve in curves)
    return [
        interval_over_seeds([statistics.fmean(curve[k] for curve in curves) for curves in by_seed.values()])
        for k in range(length)
    ]


def plot(results: Results, path: Path) -> None:
    """Draw Pass@k over k of every arm, in and out of domain (.svg, .png or .pdf).

    The intervals over seeds are shaded, unless there are so many arms that nobody could tell them apart. The same
    results give the same bytes. Raises InputError when the file cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    domains = [domain for domain in DOMAINS if domain in results["arms"][BASE_ARM]]
    matplotlib.rcParams.update({"svg.hashsalt": "dphrl", "font.size": 9})
    figure, axes = plt.subplots(1, len(domains), figsize=(4.6 * len(domains), 3.6), squeeze=False, layout="constrained")
    for axis, domain in zip(axes[0], domains, strict=True):
        for index, arm in enumerate(results["arms"]):
            mine = [row for row in results["rows"] if row["arm"] == arm and row["domain"] == domain]
            if mine:
                _draw(axis, arm, line_style(index), curve_over_seeds(mine), shaded=len(results["arms"]) <= _MAX_SHADED)
        datasets = dict.fromkeys(row["dataset"] for row in results["rows"] if row["domain"] == domain)
        axis.set_title(f"{domain.replace('_', ' ')}: {', '.join(datasets)}")
        axis.set_xlabel("k: samples a prompt")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("Pass@k")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    drawn = io.BytesIO()
    try:
        # With a date in it, the file would differ at every drawing.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        kind = path.suffix.removeprefix(".") or None
        figure.savefig(drawn, dpi=150, format=kind, metadata=metadata, facecolor="white")
    except ValueError as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
    finally:
        plt.close(figure)
    save_output(path, drawn.getvalue())


def line_style(index: int) -> tuple[str, str]:
    """Colour and dash of an arm: its own as far as there are pairs of them. 0 is the base, black and whole."""
    if not index:
        return "black", "-"
    turn, colour = divmod(index - 1, len(_COLOURS))
    # Beyond the number of colours, each comes with another dash than before.
    return _COLOURS[colour], _DASHES[(colour + turn) % len(_DASHES)]


def _draw(axis: Any, arm: str, style: tuple[str, str], curve: Sequence[Cell], *, shaded: bool) -> None:
    ks = list(range(1, len(curve) + 1))
    colour, dash = style
    width = 2 if arm == BASE_ARM else 1.5
    axis.plot(ks, [cell["mean"] for cell in curve], dash, color=colour, label=arm, linewidth=width)
    if not shaded:
        return
    low, high = [cell["low"] for cell in curve], [cell["high"] for cell in curve]
    axis.fill_between(ks, np.clip(low, 0, 1), np.clip(high, 0, 1), color=colour, alpha=0.15, linewidth=0)
