"""Published figures in suites: what is accepted, and how they stand beside results."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.config.loading import InputError
from dphrl.experiments.expected import compare_expected, expected_table
from dphrl.experiments.results import write_results
from dphrl.experiments.suite import about, list_suites, load_suite
from tests.unit.test_suite_results import results_of

SUITE = """
name: mine
about: A test.
base: demo-math
seeds: [0, 1]
settings: {learner.num_steps: 3, evaluation.k: [1, 4], evaluation.num_samples: 4}
arms:
  grpo: {algorithm.divergence: none}
  dph-js: {algorithm.divergence: js}
quick: {seeds: [0], arms: [grpo]}
expected:
  source: A paper, table 1
  figures:
    grpo: {in_domain.pass@1: 0.6, in_domain.greedy: 0.5, out_of_domain.retention: 1}
    dph-js: {in_domain.pass@4: 0.75}
"""


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE)
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("dph-js: {in_domain.pass@4", "ppo: {in_domain.pass@4", "ppo not among arms (base, grpo, dph-js)"),
        ("in_domain.pass@4", "in_domain.pass@8", "the suite measures no pass@8; add 8 to evaluation.k"),
        ("in_domain.pass@4", "in_domain.pass@k", "no such metric; name it DOMAIN.RATE"),
        ("in_domain.pass@4", "in_domain.pass@0", "no such metric"),
        ("in_domain.pass@4", "in_domain.passes@4", "no such metric"),
        ("in_domain.pass@4", "pass@4", "no such metric"),
        ("in_domain.pass@4", "elsewhere.pass@4", "no such metric"),
        ("pass@4: 0.75", "pass@4: 75", "75 is no share; give a number from 0 to 1"),
        ("pass@4: 0.75", "pass@4: often", "expected.figures.dph-js.in_domain.pass@4"),
        ("source: A paper, table 1", "about: x", "expected.source"),
    ],
)
def test_what_is_no_figure_is_refused_in_a_line(suite_file: Path, old: str, new: str, words: str) -> None:
    text = SUITE.replace(old, new)
    assert text != SUITE
    suite_file.write_text(text)
    with pytest.raises(InputError) as error:
        load_suite(str(suite_file))
    assert words in error.value.lines[0]
    done = CliRunner().invoke(app, ["experiment", str(suite_file)])
    assert (done.exit_code, words in done.stderr) == (2, True)
    assert all(line.startswith("dphrl: error: ") for line in done.stderr.splitlines())


def test_figures_stand_beside_results_with_their_difference(suite_file: Path, tmp_path: Path) -> None:
    suite = load_suite(str(suite_file))
    results = results_of({("grpo", 0): [4, 0], ("grpo", 1): [4, 2]}, base=[2, 2]) | about(suite)
    found = {(entry["arm"], entry["domain"], entry["rate"]): entry for entry in compare_expected(results)}
    # GRPO has .5 and .75 where .6 was published: .625 and .025 more.
    assert found["grpo", "in_domain", "pass@1"]["difference"] == pytest.approx(0.025)
    assert found["grpo", "in_domain", "greedy"]["difference"] == 0.0
    assert found["grpo", "out_of_domain", "retention"]["difference"] == pytest.approx(-0.25)
    missing = found["dph-js", "in_domain", "pass@4"]
    assert (missing["published"], missing["here"], missing["difference"]) == (0.75, None, None)
    rows = expected_table(results)[1]
    assert rows[0][:4] == ["grpo", "in", "pass@1", "0.600"]
    assert str(rows[0][4]).startswith("0.625 ±")
    assert rows[0][5] == "+0.025"
    assert rows[-1][4:] == ["-", "-"]
    write_results(tmp_path / "results.json", results)
    shown = CliRunner().invoke(app, ["experiment", "--show", str(tmp_path / "results.json")])
    assert "Published figures beside these: A paper, table 1" in shown.output
    as_json = CliRunner().invoke(app, ["experiment", "--show", str(tmp_path / "results.json"), "--json"])
    assert '"published": [{"arm": "grpo"' in as_json.output


def test_without_published_figures_nothing_is_shown() -> None:
    results = results_of({("grpo", 0): [4, 0]}, base=[2, 2])
    assert compare_expected(results) == []
    assert expected_table(results)[1] == []


def test_the_papers_sql_suite_has_its_table() -> None:
    suite = load_suite("paper-llama8b-sql")
    assert suite.expected is not None
    figures = suite.expected.figures
    # The paper's table has no arm of 8 right answers out of 8.
    assert list(figures) == ["base", *(arm for arm in suite.arms if arm != "dph-f-8of8")]
    # The paper's single answer is greedy, so no figure of it is called Pass@1.
    metrics = [
        f"{domain}.{rate}" for domain in ("in_domain", "out_of_domain") for rate in ("greedy", "pass@8", "pass@16")
    ]
    assert all(list(of_arm) == metrics for of_arm in figures.values())
    assert "greedy" in suite.expected.source
    # What the paper claims of them: plain RL and reverse KL end below the base, and above none of the rehearsing arms.
    top = {arm: of_arm["out_of_domain.pass@16"] for arm, of_arm in figures.items()}
    assert max(top, key=top.__getitem__) == "base"
    assert min(top["dph-f"], top["dph-js"]) > max(top["grpo"], top["dapo"], top["rkl"])
    papers = [name for name in list_suites() if name.startswith("paper-")]
    assert [name for name in papers if load_suite(name).expected] == ["paper-llama8b-sql"]
    assert "published figures" in CliRunner().invoke(app, ["plan", "paper-llama8b-sql"]).output
