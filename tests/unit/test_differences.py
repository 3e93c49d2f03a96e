"""Two evaluations of the same prompts compared: by hand, by enumeration, and against what chance would give."""

from __future__ import annotations

import io
import itertools
import re
from typing import Any

import numpy as np
import pytest

from dphrl.evaluation.differences import compare, half_size, self_retention
from dphrl.evaluation.estimators import pass_at_k, summarize
from dphrl.evaluation.table import report_evaluations
from dphrl.tracking.console import Console


def rows(*counts: tuple[int, int], greedy: list[int | None] | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"prompt_id": f"p{i}", "num_samples": n, "num_correct": c} for i, (n, c) in enumerate(counts)
    ]
    for row, solved in zip(found, greedy or [], strict=False):
        row["greedy"] = solved
    return found


def test_a_difference_is_taken_prompt_by_prompt() -> None:
    base, model = rows((4, 1), (4, 3), (4, 0)), rows((4, 2), (4, 4), (4, 1))
    found = compare(base, list(reversed(model)), (1, 2))
    one, two = found["pass@1"], found["pass@2"]
    assert one is not None
    assert two is not None
    # Every prompt gained the same, so the interval is a point, though the rates themselves are anything from 0 to 1.
    assert one == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert two["value"] == pytest.approx(
        np.mean([pass_at_k(4, b, 2) - pass_at_k(4, a, 2) for a, b in [(1, 2), (3, 4), (0, 1)]])
    )
    assert compare(model, base, (1,))["pass@1"] == {"value": -0.25, "low": -0.25, "high": -0.25}


def test_the_paired_interval_is_narrower_than_the_rates_and_covers() -> None:
    rng = np.random.default_rng(0)
    inside = widths = 0.0
    for _ in range(120):
        easy = rng.beta(0.5, 0.5, size=120)
        base = rows(*((16, int(rng.binomial(16, p))) for p in easy))
        model = rows(*((16, int(rng.binomial(16, 0.9 * p + 0.05))) for p in easy))
        one = compare(base, model, (1,))["pass@1"]
        assert one is not None
        inside += one["low"] <= 0.0 <= one["high"]
        low, high = summarize("d", "test", [(r["prompt_id"], 16, r["num_correct"]) for r in base], (1,), None)[
            "intervals"
        ]["pass@1"]
        widths += (one["high"] - one["low"]) / (high - low)
    assert 0.9 < inside / 120 <= 1.0
    assert widths / 120 < 0.5


def test_greedy_completions_are_compared_where_both_have_a_verdict() -> None:
    base = rows((2, 1), (2, 1), (2, 1), greedy=[0, 1, None])
    model = rows((2, 1), (2, 1), (2, 1), greedy=[1, 1, 1])
    greedy = compare(base, model, (1,))["greedy"]
    assert greedy is not None
    assert (greedy["value"], greedy["low"], greedy["high"]) == (0.5, 0.0, 1.0)
    assert compare(rows((2, 1)), rows((2, 1)), (1,))["greedy"] is None, "older results hold no greedy verdicts"


def test_a_prompt_short_of_samples_is_left_out_of_that_k() -> None:
    found = compare(rows((4, 0), (1, 0)), rows((4, 4), (4, 0)), (1, 4, 8))
    assert found["pass@1"] is not None
    assert found["pass@1"]["value"] == 0.5
    assert found["pass@4"] is not None
    assert found["pass@4"]["value"] == 1.0
    assert found["pass@8"] is None


def test_what_a_model_keeps_of_itself_is_the_mean_over_all_halves() -> None:
    counts = [(5, 1), (5, 2), (4, 3), (4, 0)]
    solved = both = 0.0
    for n, c in counts:
        right = [i < c for i in range(n)]
        draws = [
            (any(right[i] for i in first), any(right[i] for i in second))
            for first in itertools.combinations(range(n), 2)
            for second in itertools.combinations(sorted(set(range(n)) - set(first)), 2)
        ]
        solved += np.mean([a for a, _ in draws])
        both += np.mean([a and b for a, b in draws])
    assert self_retention(rows(*counts)) == pytest.approx(both / solved)
    assert self_retention(rows((4, 1))) == 0.0, "one right sample is in one of two parts"
    assert self_retention(rows((4, 0))) is None
    assert self_retention(rows((1, 1), (4, 2))) is None, "half of one sample is none"
    assert (half_size(rows((5, 1), (7, 1))), half_size(rows((8, 1)), rows((2, 1))), half_size([])) == (2, 1, 0)


def test_a_prompt_that_the_grader_failed_on_does_not_decide_for_all() -> None:
    base = rows(*[(8, 4)] * 19, (0, 0))
    assert half_size(base) == 4
    assert self_retention(base) == self_retention(rows(*[(8, 4)] * 19))
    kept = compare(base, base, (1,))["retention"]
    assert kept is not None
    assert kept["num_samples"] == 4


def test_nothing_is_lost_when_the_model_is_as_good_as_the_base() -> None:
    """By retention at all samples a weak model seems to lose; by halves its difference is about 0."""
    rng = np.random.default_rng(1)
    chance = rng.beta(0.3, 2.0, size=3000)
    base = rows(*((8, int(rng.binomial(8, p))) for p in chance))
    model = rows(*((8, int(rng.binomial(8, p))) for p in chance))
    counts = [[(row["prompt_id"], 8, row["num_correct"]) for row in side] for side in (model, base)]
    assert summarize("d", "test", counts[0], (1,), None, counts[1])["retention"] < 0.8
    kept = compare(base, model, (1,))["retention"]
    assert kept is not None
    assert kept["num_samples"] == 4
    assert kept["low"] < 0.0 < kept["high"]
    assert kept["base"] == self_retention(base)
    assert kept["value"] == pytest.approx(kept["model"] - kept["base"])
    lost = compare(base, rows(*((8, int(rng.binomial(8, p)) if i % 3 else 0) for i, p in enumerate(chance))), (1,))[
        "retention"
    ]
    assert lost is not None
    assert lost["high"] < -0.1
    assert lost["model"] == pytest.approx(lost["base"] * 2 / 3, abs=0.05)


def test_what_the_base_never_solves_has_no_retention() -> None:
    assert compare(rows((4, 0)), rows((4, 4)), (1,))["retention"] is None
    assert compare(rows((1, 1)), rows((1, 1)), (1,))["retention"] is None


def test_the_table_of_differences() -> None:
    base, model = rows((4, 2), (4, 3), greedy=[0, 1]), rows((4, 3), (4, 4), greedy=[1, 1])
    found = {
        name: summarize(name, "test", [(r["prompt_id"], 4, r["num_correct"]) for r in model], (1,), 0.5)
        for name in ("d", "e")
    }
    found["d"]["difference"] = compare(base, model, (1,))
    found["e"]["difference"] = compare(rows((1, 1)), rows((1, 0)), (1,))
    said = io.StringIO()
    report_evaluations(Console(said, interactive=False), {"trained": list(found.values())})
    title, *explained, header, _, first, second = said.getvalue().splitlines()[5:]
    assert title == "trained minus base, prompt by prompt, ± half of the 95 % interval"
    assert "half of the base's samples" in " ".join(explained)
    assert re.split(" {2,}", header) == ["data set", "split", "pass@1", "greedy", "half", "kept", "by the base"]
    kept = compare(base, model, (1,))["retention"]
    assert kept is not None
    cells = ["d", "test", "+0.250 ±0.000", "+0.500 ±0.500", "2", f"{kept['model']:.3f}", f"{kept['base']:.3f}"]
    assert re.split(" {2,}", first) == cells
    assert re.split(" {2,}", second) == ["e", "test", "-1.000 ±0.000", "-", "-", "-", "-"]
