"""What the README shows must be what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dphrl.config.loading import list_presets, load_config
from dphrl.experiments.suite import committed_results

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_example_configuration_loads(tmp_path: Path) -> None:
    example, text_to_sql = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    source = tmp_path / "mine.yaml"
    source.write_text(example)
    config = load_config(str(source))
    assert config.algorithm.divergence.name == "js"
    assert config.data.prompt_template.endswith(r"\boxed{}.")
    assert "\n\n" in config.data.prompt_template

    source.write_text(text_to_sql)
    config = load_config(str(source))
    assert config.reward.name == "sql_execution"
    assert [dataset.convention for dataset in (config.data.train, *config.data.evaluation)] == ["bird", "spider"]


def test_the_presets_it_names_exist() -> None:
    named = set(re.findall(r"dphrl (?:train|plan|sample) ([\w./-]+)", README)) - {"CONFIG", "PRESET"}
    named = {name for name in named if not name.endswith(".yaml")}
    assert named
    assert named <= set(list_presets())


@pytest.mark.parametrize("suite", ["passk-math", "passk-sql"])
def test_the_table_of_results_is_the_committed_one(suite: str) -> None:
    results = committed_results(suite)
    after = README[README.index(f"results/{suite}.svg") :]
    table = after[after.index("| | Pass@1 | Pass@8 |") :].partition("\n\n")[0].splitlines()[2:]
    shown = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}
    assert list(shown) == list(results["arms"])
    columns = [("in_domain", key) for key in ("pass@1", "pass@8", "pass@16", "retention")]
    columns += [("out_of_domain", key) for key in ("pass@1", "pass@16")]
    for arm, cells in shown.items():
        found = [results["arms"][arm][domain].get(key) for domain, key in columns]
        wanted = ["-" if c is None else f"{c['mean']:.3f} ±{(c['high'] - c['low']) / 2:.3f}" for c in found]
        assert cells == wanted, arm


def test_the_three_ways_to_run_are_shown_briefly() -> None:
    start = README.index("## From a laptop to a cluster")
    section = README[start : README.index("\n## ", start + 1)]
    assert len(section.splitlines()) < 60
    for words in ("dphrl train", "ray start --head", "dphrl submit", "dphrl render kubernetes"):
        assert words in section
