"""What a suite's arms lose and where their mass goes, from the counts in the rows; the committed results again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dphrl
from cluster.cli import app
from dphrl.data.loading import load_problems
from dphrl.evaluation.estimators import summarize
from dphrl.evaluation.strategies import ALL
from dphrl.experiments.packing import pack_strategies, unpack_strategies
from dphrl.experiments.pareto import hypervolumes
from dphrl.experiments.results import add_up, merge, read_results, recompute, rows_of, write_results
from dphrl.experiments.strategies import (
    alone,
    alone_table,
    blind_selection,
    changed_prompts,
    mass_as_json,
    prompts_table,
    say_missing,
    split_over_seeds,
    split_table,
)
from dphrl.experiments.suite import committed_results, load_suite
from dphrl.report.pareto import write_pareto
from dphrl.rewards.strategies import strategies_that_fit
from dphrl.tiny import sql_task

# Of three prompts: what fits, and by strategy (samples, fitting, right) of four samples each.
FITTING = [["3"], ["7"], ["3", "7"]]
BASE = [{"3": [2, 2, 1], "7": [2, 0, 0]}, {"3": [2, 0, 0], "7": [2, 2, 2]}, {"3": [2, 2, 2], "7": [2, 2, 0]}]
# All of it on 3, and perfectly done; and as before, but better done.
COLLAPSED = [{"3": [4, 4, 4]}, {"3": [4, 0, 0]}, {"3": [4, 4, 4]}]
PRECISE = [{"3": [2, 2, 2], "7": [2, 0, 0]}, {"3": [2, 0, 0], "7": [2, 2, 2]}, {"3": [2, 2, 2], "7": [2, 2, 1]}]
NOTHING = [{"3": [4, 4, 0]}, {"7": [4, 4, 0]}, {"other": [4, 0, 0]}]


def evaluation(prompts: list[dict[str, list[int]]], base: Any = None, *, counted: bool = True) -> list[dict[str, Any]]:
    def counts(of: list[dict[str, list[int]]]) -> list[tuple[str, int, int]]:
        sums = [[sum(count[place] for count in prompt.values()) for place in (0, 2)] for prompt in of]
        return [(f"factor-{i}", n, c) for i, (n, c) in enumerate(sums)]

    summary = summarize("factor", "held_out", counts(prompts), (1, 4), 0.5, None if base is None else counts(base))
    if counted:
        for row, of_prompt, fitting in zip(summary["per_prompt"], prompts, FITTING, strict=True):
            row |= {"strategies": of_prompt, "fitting": fitting}
    return [summary]


def results_of(runs: dict[tuple[str, int], list[dict[str, list[int]]]], **how: Any) -> dict[str, Any]:
    rows = [
        row for seed in sorted({seed for _, seed in runs}) for row in rows_of("base", seed, evaluation(BASE, **how))
    ]
    rows += [row for (arm, seed), of in runs.items() for row in rows_of(arm, seed, evaluation(of, BASE, **how))]
    return add_up("mine", rows, (1, 4), {arm: "plain" for arm, _ in runs})


def means(cells: dict[str, Any]) -> list[float | None]:
    return [cells[key]["mean"] if key in cells else None for key in ("share", "selection", "precision", "right")]


def test_rows_hold_counts_by_strategy_and_give_them_back() -> None:
    (row,) = rows_of("grpo", 1, evaluation(PRECISE, BASE))
    assert row["strategies"] == {"3": [[2, 2, 2], [2, 0, 2], [2, 0, 2]], "7": [[2, 2, 2], [0, 2, 2], [0, 2, 1]]}
    assert {"prompt_ids", "fitting"}.isdisjoint(row), "the base's row has what is the same for all"
    back = unpack_strategies(row)
    assert back is not None
    assert [{name: list(count) for name, count in prompt.items()} for prompt in back] == PRECISE
    (base,) = rows_of("base", 1, evaluation(BASE))
    assert base["prompt_ids"] == ["factor-0", "factor-1", "factor-2"]
    assert base["fitting"] == ["3", "7", "3 7"]
    (old,) = rows_of("grpo", 1, evaluation(PRECISE, BASE, counted=False))
    assert unpack_strategies(old) is None
    # What fits is unknown on the second prompt, so the column is of no use.
    prompts = [{"strategies": {"join": [1, 1, 1]}}, {"strategies": {"join": [2, None, 1], "one_table": [1, None, 0]}}]
    packed = pack_strategies(prompts, is_base=False)
    assert packed == {"strategies": {"join": [[1, 2], None, [1, 1]], "one_table": [[0, 1], None, [0, 0]]}}
    back = unpack_strategies({"num_graded": [1, 3], **packed})
    assert back == [{"join": (1, None, 1)}, {"join": (2, None, 1), "one_table": (1, None, 0)}]


def test_the_split_over_seeds_by_hand() -> None:
    results = results_of({("grpo", 1): COLLAPSED, ("grpo", 2): PRECISE, ("rkl", 1): NOTHING})
    # The base: half of the samples take each; of 3's six, four fit and three are right. Pass@1 is 5/12.
    base = split_over_seeds(results, "base", "factor")
    assert means(base["3"]) == pytest.approx([1 / 2, 4 / 6, 3 / 4, 3 / 12])
    assert means(base["7"]) == pytest.approx([1 / 2, 4 / 6, 2 / 4, 2 / 12])
    assert means(base[ALL]) == pytest.approx([1, 8 / 12, 5 / 8, 5 / 12])
    # GRPO: strategy 7 has no share on seed 1 and half on seed 2; its precision is that of seed 2, 3 of 4.
    grpo = split_over_seeds(results, "grpo", "factor")
    assert means(grpo["3"]) == pytest.approx([3 / 4, (8 / 12 + 4 / 6) / 2, 1, (8 / 12 + 4 / 12) / 2])
    assert means(grpo["7"]) == pytest.approx([1 / 4, 4 / 6, 3 / 4, (0 + 3 / 12) / 2])
    assert grpo["7"]["share"]["high"] - 1 / 4 == pytest.approx(12.706 * 1 / 4), "Student's t over two seeds"
    passed = results["arms"]["grpo"]["in_domain"]["pass@1"]["mean"]
    assert grpo[ALL]["right"]["mean"] == pytest.approx(passed)
    assert sum(cells["right"]["mean"] for name, cells in grpo.items() if name != ALL) == pytest.approx(passed)
    rkl = split_over_seeds(results, "rkl", "factor")
    assert means(rkl["other"]) == [pytest.approx(1 / 3), 0.0, None, 0.0]
    header, rows = split_table(results)
    shown = {(row[0], row[2]): row[3:] for row in rows}
    assert header[3:] == ["share", "selection", "blind", "precision", "right"]
    # 3 fits two prompts of three, and so does 7: half of each without a look is 2/3, and the base does no better.
    assert shown["base", "all"] == ["1.000", "0.667", "0.667", "0.625", "0.417"]
    assert shown["rkl", "other"] == ["0.333", "0.000", "0.000", "-", "0.000"]
    # A third on each of 3, 7 and neither: 2/9 + 2/9 without a look; both are taken where they fit, 2/3.
    assert shown["rkl", "all"][1:3] == ["0.667", "0.444"]
    assert blind_selection(results, "rkl", "factor") == pytest.approx({"3": 2 / 3, "7": 2 / 3, "other": 0, ALL: 4 / 9})
    # Eleven of twelve samples take 3.
    skewed = [{"3": [4, 4, 0]}, {"3": [4, 0, 0]}, {"3": [3, 3, 0], "other": [1, 0, 0]}]
    assert blind_selection(results_of({("grpo", 1): skewed}), "grpo", "factor")[ALL] == pytest.approx(11 / 12 * 2 / 3)


def test_lost_and_gained_prompts_by_hand() -> None:
    results = results_of({("grpo", 1): COLLAPSED, ("grpo", 2): NOTHING, ("rkl", 1): PRECISE})
    # The base solves all three; the collapsed arm loses the one that 7 alone fits.
    first, second = changed_prompts(results, "grpo", "factor")
    assert first == {
        "seed": 1, "solved_by_base": 3, "lost": ["factor-1"], "gained": [], "lost_where": {"7": 1},
    }  # fmt: skip
    assert (second["lost"], second["lost_where"]) == (["factor-0", "factor-1", "factor-2"], {"3": 1, "7": 1, "3 7": 1})
    assert changed_prompts(results, "base", "factor") == []
    rows = prompts_table(results)[1]
    # The mean of 1 and 3 prompts is 2, and Student's t of two makes ± 12.706 * 1.
    assert rows[0] == ["grpo", "factor", "3.0", "2.0 ±12.7", "0.0", "-", "7: 2, 3: 1, 3+7: 1"]
    assert rows[1][2:5] == ["3.0", "0.0", "0.0"]
    old = results_of({("grpo", 1): COLLAPSED, ("grpo", 2): NOTHING}, counted=False)
    for row in old["rows"]:
        row.pop("prompt_ids", None)
    assert changed_prompts(old, "grpo", "factor")[0]["lost"] == ["#1"], "without ids, by its place"
    assert prompts_table(old)[1][0][-1] == "#1 (seed 1), #0 (seed 2), #1 (seed 2), #2 (seed 2)"
    gains = [{"prompt_id": str(i), "num_samples": 4, "num_correct": c} for i, c in enumerate([0, 3])]
    row = {"dataset": "d", "num_samples": 4, "per_prompt": gains}
    nothing = {**row, "per_prompt": [{**prompt, "num_correct": 0} for prompt in gains]}
    some = add_up("mine", [*rows_of("base", 0, [nothing]), *rows_of("a", 0, [row])], (1,), {"a": "plain"})
    assert changed_prompts(some, "a", "d") == [{"seed": 0, "solved_by_base": 0, "lost": [], "gained": ["1"]}]


def test_many_lost_prompts_are_not_all_listed() -> None:
    correct = [{"prompt_id": f"p{i}", "num_samples": 1, "num_correct": 1} for i in range(8)]
    wrong = [{**prompt, "num_correct": 0} for prompt in correct]
    base, arm = ({"dataset": "d", "num_samples": 1, "per_prompt": prompts} for prompts in (correct, wrong))
    results = add_up("mine", [*rows_of("base", 0, [base]), *rows_of("a", 0, [arm])], (1,), {"a": "plain"})
    assert prompts_table(results)[1][0][-1].endswith("p4 (seed 0) and 3 more")
    assert len(changed_prompts(results, "a", "d")[0]["lost"]) == 8


def test_where_one_strategy_alone_fits_by_hand() -> None:
    results = results_of({("grpo", 1): COLLAPSED, ("grpo", 2): PRECISE})
    # The first prompt is 3's alone, the second 7's; both fit the third, where the base has 2 of 4 right.
    assert {name: cell["mean"] for name, cell in alone(results, "base", "factor").items()} == {
        "3": 0.25, "7": 0.5, "every": 0.5,
    }  # fmt: skip
    assert {name: cell["mean"] for name, cell in alone(results, "grpo", "factor").items()} == {
        "3": pytest.approx((4 / 4 + 2 / 4) / 2),
        "7": pytest.approx((0 + 2 / 4) / 2),
        "every": pytest.approx((4 / 4 + 3 / 4) / 2),
    }
    assert alone_table(results)[0] == ["arm", "data set", "3", "7", "every"]
    # It needs no counts by strategy, only what fits.
    old = results_of({("grpo", 1): COLLAPSED}, counted=False)
    assert alone(old, "grpo", "factor") == {}
    old["rows"][0]["fitting"] = ["3", "7", "3 7"]
    assert alone(old, "grpo", "factor")["3"]["mean"] == 1.0
    old["rows"][0]["fitting"] = ["3", "3", "3"]
    assert list(alone(old, "grpo", "factor")) == ["3"], "of a single strategy there is nothing to choose anywhere"


def test_what_cannot_be_had_is_said() -> None:
    runs = {("grpo", 1): COLLAPSED, ("rkl", 1): PRECISE}
    assert say_missing(results_of(runs)) is None
    old = results_of(runs, counted=False)
    assert "nor does anything say that their task has any" in (say_missing(old) or "")
    old["rows"][0]["fitting"] = ["3", "7", "3 7"]
    assert "only new runs can tell" in (say_missing(old) or "")
    assert split_table(old)[1] == []
    mixed = results_of(runs)
    del mixed["rows"][-1]["strategies"]
    assert say_missing(mixed) == "strategies were not counted in runs of rkl (seed 1); the split is of the others"
    assert {row[0] for row in split_table(mixed)[1]} == {"base", "grpo"}


def test_counts_go_to_the_file_and_come_back(tmp_path: Path) -> None:
    results = results_of({("grpo", 1): COLLAPSED, ("grpo", 2): PRECISE})
    results |= {"methods": {"grpo": {"method": "grpo", "eta": None}}}
    write_results(tmp_path / "results.json", results)
    read = read_results(tmp_path / "results.json")
    assert read["rows"] == json.loads(json.dumps(results["rows"]))
    assert recompute(read)["methods"] == results["methods"]
    assert mass_as_json(read) == mass_as_json(results)
    assert merge(read, results_of({("grpo", 3): PRECISE}))["methods"] == results["methods"]
    shown = CliRunner().invoke(app, ["experiment", "--show", str(tmp_path / "results.json")])
    assert shown.exit_code == 0, shown.output
    for words in (
        "Lost: solved by the base",
        "Pass@1 where one strategy alone fits",
        "Pass@1 taken apart",
        "Hypervolume",
    ):
        assert words in shown.output
    done = CliRunner().invoke(app, ["experiment", "--show", str(tmp_path / "results.json"), "--json"])
    mass = json.loads(done.output)["mass"]["factor"]
    assert mass["grpo"]["strategies"]["all"]["right"]["mean"] == pytest.approx((8 / 12 + 7 / 12) / 2)
    assert mass["grpo"]["prompts"][0]["lost"] == ["factor-1"]
    assert mass["base"]["alone"]["7"]["mean"] == 0.5


# -------------------------------------------------------------------------------------------- what is committed


COMMITTED = sorted(path.stem for path in (Path(dphrl.__file__).parent / "suites" / "results").glob("*.json"))


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_know_what_fits_their_prompts(name: str) -> None:
    """The prompts are drawn anew from suite and seed: these are those of the counts, in their order."""
    results, suite = committed_results(name), load_suite(name)
    for row in (row for row in results["rows"] if row["arm"] == "base"):
        config = suite.config(next(iter(suite.arms)), row["seed"], "runs")
        dataset = next(one for one in config.data.evaluation if one.name == row["dataset"])
        problems = load_problems(dataset, row["seed"])
        fits = [strategies_that_fit(config.reward.name, problem.answer) for problem in problems]
        if "fitting" not in row:
            assert fits == [None] * len(row["num_graded"]), "left out only where the task has no strategies"
            continue
        assert row["fitting"] == [" ".join(name for name, does in (of or {}).items() if does) for of in fits]


def test_a_collapsed_policy_shows_that_the_counts_are_of_these_prompts() -> None:
    """GRPO on passk-math uses one divisor: right where that one fits, and nowhere else. Prompts in another order would
    mix the two."""
    results = committed_results("passk-math")
    bases = {row["seed"]: row for row in results["rows"] if (row["arm"], row["dataset"]) == ("base", "factor")}
    for row in (row for row in results["rows"] if (row["arm"], row["dataset"]) == ("grpo", "factor")):
        pairs = list(zip(bases[row["seed"]]["fitting"], row["num_correct"], strict=True))
        rates = {fits: [c / 32 for fitting, c in pairs if ("7" in fitting.split()) == fits] for fits in (True, False)}
        assert sum(rates[True]) / len(rates[True]) > 0.9
        assert sum(rates[False]) / len(rates[False]) < 0.02


@pytest.mark.parametrize("name", COMMITTED)
def test_lost_prompts_agree_with_committed_retention(name: str) -> None:
    results = committed_results(name)
    for arm, domain in itertools.product(results["kinds"], ("in_domain", "out_of_domain")):
        datasets = {row["dataset"] for row in results["rows"] if (row["arm"], row["domain"]) == (arm, domain)}
        if len(datasets) != 1:
            continue
        seeds = changed_prompts(results, arm, datasets.pop())
        kept = [1 - len(seed["lost"]) / seed["solved_by_base"] for seed in seeds]
        assert sum(kept) / len(kept) == pytest.approx(results["arms"][arm][domain]["retention"]["mean"], abs=2e-5)


# -------------------------------------------------------------------------------------------- what the docs say

DOCS = (Path(dphrl.__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")


def table_of(first_cells: str) -> dict[str, list[str]]:
    """The rows of the table in docs/results.md whose header begins so, by their first cell."""
    lines = DOCS[DOCS.index(f"\n| {first_cells} |") + 1 :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def plus_minus(cell: dict[str, float]) -> str:
    half = (cell["high"] - cell["low"]) / 2
    return f"{cell['mean']:.3f} ±{half:.3f}" if half else f"{cell['mean']:.3f}"


@pytest.mark.parametrize(
    ("suite", "dataset", "names"),
    [("passk-math", "factor", ("3", "7", "11")), ("passk-sql", "league", ("join", "set_operation", "subquery"))],
)
def test_the_tables_of_lost_prompts_are_the_committed_ones(suite: str, dataset: str, names: tuple[str, ...]) -> None:
    results, shown = committed_results(suite), table_of(f"{suite} | lost")
    assert list(shown) == list(results["arms"])
    for arm, cells in shown.items():
        seeds, found = changed_prompts(results, arm, dataset), alone(results, arm, dataset)
        lost = f"{sum(len(seed['lost']) for seed in seeds) / len(seeds):.1f}" if seeds else "-"
        assert cells == [lost, *(plus_minus(found[name]) for name in (*names, "every"))], arm


@pytest.mark.parametrize("suite", ["passk-math", "passk-sql", "tune-long"])
def test_the_tables_of_hypervolumes_are_the_committed_ones(suite: str) -> None:
    results, shown = committed_results(suite), table_of(f"{suite} | etas")
    inside, outside = (hypervolumes(results, domain, 16) for domain in ("in_domain", "out_of_domain"))
    assert list(shown) == list(inside)
    for method, cells in shown.items():
        above = plus_minus(inside[method]["above_base"]) if method != "base" else "-"
        volumes = [plus_minus(found[method]["cell"]) for found in (inside, outside)]
        assert cells == [str(inside[method]["num_etas"]), volumes[0], above, volumes[1]], method


@pytest.mark.parametrize("suite", ["passk-math", "passk-sql", "tune-long"])
def test_the_committed_pictures_are_of_the_committed_results(suite: str, tmp_path: Path) -> None:
    write_pareto(committed_results(suite), tmp_path / "again.svg")
    stored = Path(dphrl.__file__).parent / "suites" / "results" / f"{suite}-pareto.svg"
    assert stored.read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_no_arm_selects_on_mathematics_as_the_docs_say() -> None:
    results = committed_results("passk-math")
    for arm in results["arms"]:
        cells = {name: cell["mean"] for name, cell in alone(results, arm, "factor").items()}
        blind = sum(cells[name] for name in ("3", "7", "11")) / cells["every"]
        # Of a policy that sees which divisor fits, the three would add up to three times the last.
        assert 1.0 <= blind <= 1.061 + 1e-3, arm
    lost = [seed["lost_where"] for seed in changed_prompts(results, "grpo", "factor")]
    total = {fits: sum(of_seed.get(fits, 0) for of_seed in lost) for fits in ("11", "3", "3 11")}
    assert total == {"11": 117, "3": 52, "3 11": 43}
    assert sum(total.values()) == sum(sum(of_seed.values()) for of_seed in lost), "no other was lost"
    for arm in ("alpha-0.5", "dph-f", "dph-js"):
        assert {fits for seed in changed_prompts(results, arm, "factor") for fits in seed["lost_where"]} == {"11"}


def test_grpo_keeps_one_shape_a_kind_of_question_as_the_docs_say() -> None:
    results = committed_results("passk-sql")
    base = {row["seed"]: row for row in results["rows"] if (row["arm"], row["dataset"]) == ("base", "league")}
    kept = {(1, 1): "join", (1, 2): "set_operation", (2, 1): "join", (2, 2): "join", (3, 1): "join"}
    kept[3, 2] = "set_operation"
    for row in (row for row in results["rows"] if (row["arm"], row["dataset"]) == ("grpo", "league")):
        rates: dict[tuple[int, str], list[float]] = {}
        problems = sql_task.make_problems("held_out", 200, row["seed"])
        for problem, fitting, correct in zip(problems, base[row["seed"]]["fitting"], row["num_correct"], strict=True):
            num_years = problem.gold_sql.count("year = ")
            rates.setdefault((num_years, fitting), []).append(correct / 32)
        for (num_years, fitting), found in rates.items():
            if " " not in fitting:
                rate = round(sum(found) / len(found), 2)
                assert rate >= 0.85 if fitting == kept[row["seed"], num_years] else rate <= 0.05
