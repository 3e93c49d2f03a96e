"""A rendered file tells what the run needs that no container has: the user's own code, and places of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.render.nodes import RenderOptions, render
from dphrl.config.loading import load_config

SIZES = {"kubernetes": RenderOptions(memory_gib_per_node=64, volume_size="10Gi"), "compose": RenderOptions()}
DATA_DIRS = {"kubernetes": "/shared/data", "compose": "/data"}


def rendered(kind: str, *overrides: str) -> list[str]:
    return render(kind, load_config("demo-math", overrides), SIZES[kind]).splitlines()


def told(lines: list[str], title: str) -> list[str]:
    """The text behind a title of the header, and of the line below it."""
    at = [i for i, line in enumerate(lines) if line.startswith(f"# {title}:")]
    return [line.lstrip("# ").removeprefix(f"{title}:").strip() for i in at for line in lines[i : i + 2]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, data, two modules."""
    (tmp_path / "my-model").mkdir()
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "data").mkdir()
    (tmp_path / "org" / "data" / "train.jsonl").write_text("{}\n")
    (tmp_path / "plugged_in_module.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", SIZES)
def test_own_code_is_told_with_the_image_that_must_have_it(kind: str) -> None:
    lines = rendered(kind, "reward.name=my_rewards.brief:score", "algorithm.plugins=[plugged_in_module]")
    said = "my_rewards.brief, plugged_in_module: your own; dphrl:cpu must have it, its folder in PYTHONPATH"
    assert told(lines, "Code")[:1] == [said]
    assert told(rendered(kind), "Code") == []


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("place", ["my-model", "./my-model", "~/model", "/models/llama"])
def test_a_model_of_this_machine_is_told(kind: str, place: str) -> None:
    lines = rendered(kind, f"model.path={place}")
    assert told(lines, "Paths") == [
        f"model.path={place}: of this machine;",
        f"bring what is there into the folder that DPHRL_DATA names, and write {DATA_DIRS[kind]}/... for it below",
    ]
    assert told(lines, "Data"), "and how that folder comes into the containers"
    if kind == "compose":
        services = yaml.safe_load("\n".join(lines))["services"]
        assert any("/data" in str(volume) for volume in services["worker-1"]["volumes"])


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("place", ["tiny-factor", "org/name", "$MODELS/llama", "{data_dir}/llama"])
def test_a_model_that_the_nodes_find_is_not(kind: str, place: str) -> None:
    place = place.format(data_dir=DATA_DIRS[kind])
    lines = rendered(kind, f"model.path={place}")
    assert told(lines, "Paths") == []
    assert bool(told(lines, "Data")) == place.startswith("/"), "the folder is mounted for what lies in it"


def test_every_file_of_the_data_is_told() -> None:
    files = "{name: a, kind: math, path: org/data}, {name: b, kind: math, path: org/other}"
    tables = "{name: c, kind: text_to_sql, path: $DPHRL_DATA/c.json, databases: /db, convention: bird}"
    lines = rendered("kubernetes", f"data.evaluation=[{files}, {tables}]", "reward.name=a:b")
    assert (
        told(lines, "Paths")[0] == "data.evaluation.0.path=org/data, data.evaluation.2.databases=/db: of this machine;"
    )


@pytest.mark.parametrize("kind", SIZES)
def test_a_line_break_does_not_end_the_comment(kind: str) -> None:
    lines = rendered(kind, "model.path='/models/a\\n\\nb: c'".replace("'", '"'))
    assert told(lines, "Paths")[0] == "model.path=/models/a b: c: of this machine;"
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any(line.startswith("# Clean up:") for line in header)


def test_any_place_on_the_volume_is_there() -> None:
    assert told(rendered("kubernetes", "model.path=/shared/models/llama"), "Paths") == []
