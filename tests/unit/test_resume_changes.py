"""What may change when a run goes on from its checkpoint: settings, and the content of what they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dphrl.config.changes import EARLIER_DEFAULTS, FREE, MAY_GROW, SettingChanges, compare_settings
from dphrl.config.errors import ConfigSchema
from dphrl.config.loading import InputError
from dphrl.durable import seal
from dphrl.learner.checkpoint import MANIFEST, CheckpointManifest, begin_checkpoint, complete_checkpoint
from dphrl.resume import ResumeCheck, training_inputs
from dphrl.types import Prompt

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def as_json(config: Any) -> dict[str, Any]:
    return dict(config.model_dump(mode="json"))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[dict[str, Any], str, str]]:
    """(section, key, dotted path) of every setting; a method is one setting."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and value.keys() != {"name", "params"}:
            yield from leaves(value, f"{path}.")
        else:
            yield tree, key, path


# ------------------------------------------------------------ settings


def test_the_trust_region_of_a_run_from_before_it_could_be_chosen(make_config: Any) -> None:
    for max_staleness, proximal, named in (
        (0, "auto", ()),
        (1, "auto", ('algorithm.proximal_policy: "learner" -> "behavior"',)),
        (1, "learner", ()),
    ):
        config = make_config(rollout={"max_staleness": max_staleness}, algorithm={"proximal_policy": proximal})
        stored = as_json(config)
        del stored["algorithm"]["proximal_policy"]
        assert compare_settings(stored, config).changed == named


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"learner": {"lr": 0.5}}, ["learner.lr: 0.001 -> 0.5"]),
        (
            {"algorithm": {"divergence": "js", "eta": 0.25, "clip_low": 0.1}},
            [
                'algorithm.divergence: "forward_kl" -> "js"',
                "algorithm.eta: 0.5 -> 0.25",
                "algorithm.clip_low: 0.2 -> 0.1",
            ],
        ),
        ({"data": {"train": {"limit": 23}}}, ["data.train.limit: 24 -> 23"]),
        ({"data": {"chat_template_kwargs": {"level": 5}}}, ["data.chat_template_kwargs.level: not set -> 5"]),
        ({"seed": 7, "reference": {"threshold": 2}}, ["seed: 0 -> 7", "reference.threshold: 1 -> 2"]),
        ({"learner": {"num_steps": 3}}, []),
        ({"learner": {"num_steps": 1}}, ["learner.num_steps: 2 -> 1"]),
        (
            {
                "run_dir": "elsewhere",
                "run_name": "other",
                "data": {"evaluation": []},
                "evaluation": {"num_samples": 2, "k": [1, 2], "every_steps": 5},
                "checkpoint": {"every_steps": 1, "keep": 9},
                "tracking": {"project": "p", "samples_per_step": 1},
                "rollout": {"num_engines": 2, "timeout_s": 5.0, "kv_cache_gib": 3},
                "reward": {"num_workers": 4},
                "cluster": {"num_cpus": 3, "autoscaling": "gpu"},
            },
            [],
        ),
        ({"learner": {"num_ranks": 2, "zero_stage": 1}}, []),
    ],
)
def test_what_changed_is_named_and_what_is_free_is_not(
    make_config: Any, changes: dict[str, Any], named: list[str]
) -> None:
    assert list(compare_settings(as_json(make_config()), make_config(**changes)).changed) == named


def test_a_method_is_one_setting_with_its_parameters(make_config: Any) -> None:
    stored = as_json(make_config())
    stored["algorithm"]["divergence"] = {"name": "alpha", "params": {"alpha": 0.3}}
    (line,) = compare_settings(stored, make_config()).changed
    assert line == 'algorithm.divergence: {"name": "alpha", "alpha": 0.3} -> "forward_kl"'


def test_every_setting_that_is_not_on_the_list_is_named(make_config: Any) -> None:
    config = make_config()
    stored, seen = as_json(config), set()
    for section, key, path in leaves(stored):
        section[key], value = "another value", section[key]
        named = [line.partition(":")[0] for line in compare_settings(stored, config).changed]
        section[key] = value
        is_free = any(f"{path}.".startswith(f"{place}.") for place in FREE)
        assert named == ([] if is_free else [path])
        seen.add(path)
    assert {"learner.lr", "algorithm.divergence", "data.train.path", "reward.timeout_s", "tracking.wandb"} <= seen


def test_the_list_holds_settings_that_exist_and_the_page_shows_it() -> None:
    places = set(ConfigSchema().places())
    assert places >= FREE | MAY_GROW
    page = OPERATIONS.read_text()
    start = page.index("## Checkpoints")
    section = page[start : page.index("\n## ", start + 1)]
    assert [place for place in sorted(FREE | MAY_GROW) if f"`{place}`" not in section] == []


def test_settings_that_one_version_lacks(make_config: Any) -> None:
    config = make_config()
    older = as_json(config)
    del older["algorithm"]["dual_clip"], older["algorithm"]["advantage"], older["sync"], older["learner"]["lr"]
    older["algorithm"]["momentum"] = 0.9
    older["reward"]["params"] = {"scale": 2}
    changes = compare_settings(older, config)
    # The default of lr is not what this run has; those of the other new settings are.
    assert set(changes.changed) == {"reward.params.scale: 2 -> not set", "learner.lr: 1e-06 -> 0.001"}
    assert changes.unknown == ("algorithm.momentum",)


@pytest.mark.parametrize("bound", [None, 0.5])
def test_a_free_setting_that_is_no_more_is_no_change(make_config: Any, bound: float | None) -> None:
    older = as_json(make_config())
    del older["sync"]["max_mean_logprob_gap"]
    older["sync"]["max_logprob_gap"] = bound
    assert compare_settings(older, make_config()) == SettingChanges((), ())


def test_defaults_of_earlier_versions_are_no_changes(make_config: Any) -> None:
    config = make_config()
    older = as_json(config)
    for place, value in EARLIER_DEFAULTS.items():
        *_, key = place.split(".")
        assert older["data"]["train"][key] is None
        older["data"]["train"][key] = value
    assert compare_settings(older, config).changed == ()
    # Set by the user now, it is the same value still.
    assert compare_settings(older, make_config(data={"train": {"answer_format": "plain"}})).changed == ()
    (line,) = compare_settings(older, make_config(data={"train": {"answer_format": "boxed"}})).changed
    assert line.startswith("data.train.answer_format: ")


# ------------------------------------------------------------ a run and its checkpoint


class Run:
    """A run's folder, with a checkpoint after each of two steps, and what a start of it would prepare."""

    def __init__(self, make_config: Any, folder: Path, model_dir: str) -> None:
        self.folder, self.model_dir = folder, model_dir
        self.make = lambda **changes: make_config(run_dir=str(folder), run_name="run", **changes)
        self.config = self.make()
        self.prompts = [Prompt("p0", "question", (1, 2), "4", "data")]

    def prepared(self, **changes: Any) -> Any:
        return SimpleNamespace(**{"model_dir": self.model_dir, "prompts": self.prompts, **changes})

    def save(self, step: int = 2) -> Path:
        inputs = training_inputs(self.config, self.prepared())
        manifest = CheckpointManifest(step, step, "inline", "float32", as_json(self.config), inputs)
        staging = begin_checkpoint(self.folder / "run" / "checkpoints", step)
        (staging / "state").write_text("weights")
        return complete_checkpoint(staging, manifest, {})


@pytest.fixture
def saved(make_config: Any, tmp_path: Path, tiny_dir: str) -> Run:
    run = Run(make_config, tmp_path, tiny_dir)
    run.save()
    return run


def test_a_run_goes_on_when_nothing_changed(saved: Run) -> None:
    check = ResumeCheck(saved.make(learner={"num_steps": 9}, checkpoint={"keep": 5}))
    check.check_settings()
    check.check_inputs(saved.prepared())
    assert check.notes == []


def test_a_run_without_a_checkpoint_has_nothing_to_compare(make_config: Any, tmp_path: Path, tiny_dir: str) -> None:
    run = Run(make_config, tmp_path, tiny_dir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(as_json(run.config)))
    check = ResumeCheck(run.make(learner={"lr": 0.5, "num_steps": 1}))
    check.check_settings()
    check.check_inputs(run.prepared(prompts=[]))
    assert check.notes == []


def test_changed_settings_are_refused_in_a_line_or_noted(saved: Run) -> None:
    changed = saved.make(learner={"lr": 0.5}, algorithm={"eta": 0.25})
    # The run's own config.yaml may have been edited and given as the configuration: the checkpoint knows better.
    (saved.folder / "run" / "config.yaml").write_text(yaml.safe_dump(as_json(changed)))
    with pytest.raises(InputError) as refused:
        ResumeCheck(changed).check_settings()
    (line,) = refused.value.lines
    checkpoint = saved.folder / "run" / "checkpoints" / "step_2"
    was = f"{checkpoint} was trained with other settings: algorithm.eta: 0.5 -> 0.25, learner.lr: 0.001 -> 0.5"
    assert line == f"{was}; --insist goes on all the same, --overwrite starts anew"
    check = ResumeCheck(changed, insist=True)
    check.check_settings()
    assert check.notes == [f"resume: --insist goes on although {was}"]


def test_changed_inputs_are_refused_in_a_line_or_noted(saved: Run) -> None:
    others = saved.prepared(prompts=[Prompt("p0", "question", (1, 3), "4", "data")])
    with pytest.raises(InputError, match=r"step_2 was trained with another content of prompts \(data\); remove it"):
        ResumeCheck(saved.config, remedy="remove it").check_inputs(others)
    check = ResumeCheck(saved.config, insist=True)
    check.check_inputs(others)
    assert len(check.notes) == 1


def test_another_model_is_named_part_by_part(saved: Run, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(saved.model_dir, model)
    ResumeCheck(saved.config).check_inputs(saved.prepared(model_dir=str(model)))
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    with pytest.raises(InputError, match=r"another content of generation settings \(model\.path\); "):
        ResumeCheck(saved.config).check_inputs(saved.prepared(model_dir=str(model)))


def test_a_plugins_code_is_an_input(
    make_config: Any, tmp_path: Path, tiny_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_a_run.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = Run(make_config, tmp_path, tiny_dir)
    run.config = run.make(algorithm={"plugins": ["plugin_of_a_run"]})
    run.save()
    (tmp_path / "plugin_of_a_run.py").write_text("A = 2\n")
    with pytest.raises(InputError, match=r"another content of plugin code \(algorithm\.plugins\)"):
        ResumeCheck(run.config).check_inputs(run.prepared())


def test_a_run_cannot_become_shorter_than_it_is(saved: Run) -> None:
    saved.save(step=5)
    with pytest.raises(InputError, match=r"learner\.num_steps=4: .*step_5 has 5 steps behind it; set it to 5 or more"):
        ResumeCheck(saved.make(learner={"num_steps": 4}), insist=True).check_settings()


def test_a_longer_run_with_a_falling_rate_is_told_what_becomes_of_it(
    make_config: Any, tmp_path: Path, tiny_dir: str
) -> None:
    run = Run(make_config, tmp_path, tiny_dir)
    run.config = run.make(learner={"lr_schedule": "linear"})
    run.save()
    check = ResumeCheck(run.make(learner={"lr_schedule": "linear", "num_steps": 6}))
    check.check_settings()
    assert check.notes == ["resume: the learning rate of lr_schedule: linear now falls until step 6"]


def test_the_newest_whole_checkpoint_is_what_a_run_goes_on_from(saved: Run) -> None:
    saved.save(step=5)
    (saved.folder / "run" / "checkpoints" / "step_5" / "state").write_text("weight5")
    ResumeCheck(saved.make(learner={"num_steps": 4})).check_settings()
    (saved.folder / "run" / "checkpoints" / "step_2" / "state").unlink()
    with pytest.raises(InputError, match=r"no whole checkpoint is left in .*checkpoints: --overwrite starts anew"):
        ResumeCheck(saved.config)


def test_what_a_newer_version_looks_at_besides_is_taken_on_trust(saved: Run) -> None:
    path = saved.folder / "run" / "checkpoints" / "step_2" / MANIFEST
    told = json.loads(path.read_text())
    del told["inputs"]["tokenizer"]
    path.write_text(json.dumps(told))
    seal(path.parent)
    check = ResumeCheck(saved.config)
    check.check_inputs(saved.prepared())
    (note,) = check.notes
    assert "does not tell of tokenizer; what is given now is taken on trust" in note
    with pytest.raises(InputError, match="another content of prompts"):
        check.check_inputs(saved.prepared(prompts=[]))
